"""Tests of the server under load and failure.

They cover full queues, disconnecting clients, time limits, loading, shutdown and failing passes.
"""

import asyncio
import json
import threading
import time

import httpx2
import pytest
import torch

from lamoe.engine import runner
from lamoe.serve import guard, service
from tiny_server import CONTEXT, Client, Running, connect, paced, post_head, until

LONG = {"prompt": "the cat", "max_tokens": CONTEXT, "ignore_eos": True, "temperature": 0}


# ---- the queue -----------------------------------------------------------------------------------
def test_full_queue_answers_429_and_health_answers_200():
    with Running(lambda: paced(max_num_seqs=2), max_num_seqs=2, max_queued_requests=3) as server:
        server.wait_ready()
        busy = [Client(server, stream=True, **LONG) for _ in range(5)]
        until(
            lambda: (
                [server.client.get("/lamoe/stats").json()[k] for k in ("running", "waiting")]
                == [2, 3]
            )
        )
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/completions", {"prompt": "a", "echo": True, "max_tokens": 0}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "a"}], "stream": True},
            ),
        ):
            r = server.post(path, **body)
            assert r.status_code == 429
            assert r.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(r.headers["retry-after"]) <= 60
        assert server.client.get("/health").status_code == 200
        assert server.post("/tokenize", prompt="a").status_code == 200
        assert "lamoe_rejected_total 4.0" in server.client.get("/metrics").text
        busy.pop().leave()
        until(lambda: server.service.admitted == 4)
        extra = Client(server, prompt="a", max_tokens=1)
        # more than max_num_seqs + max_queued_requests can never fit
        assert server.error(400, prompt=["a"] * 3, n=2)["code"] == "too_many_sequences"
        for c in busy:
            c.leave()
        until(lambda: extra.status == 200)
        until(server.idle, 1.0)


def test_limits_of_one_request():
    with Running(paced, max_choices=6, max_body_bytes=2000) as server:
        server.wait_ready()
        assert len(server.complete(["a", "b"], n=3, max_tokens=1)["choices"]) == 6
        for body in (
            dict(prompt=["a", "b"], n=4),
            dict(prompt=["a"] * 7),
            dict(prompt=["a"] * 7, echo=True, max_tokens=0),
        ):
            assert server.error(400, **body)["code"] == "too_many_sequences"
        assert server.post("/v1/embeddings", input=["a"] * 7).status_code == 200  # no sequences
        assert server.error(413, prompt="a" * 2000)["code"] == "body_too_large"
        # chunked, so without a Content-Length
        chunks = iter([b'{"prompt": "', b"a" * 3000, b'"}'])
        json_type = {"content-type": "application/json"}
        r = server.client.post("/v1/completions", content=chunks, headers=json_type)
        assert r.status_code == 413
        assert server.idle()


def test_bodies_and_logprobs_in_memory_are_bounded(monkeypatch):
    with Running(paced, max_body_bytes=200_000, body_timeout=3) as server:
        server.wait_ready()
        slow = [connect(server.url, timeout=5) for _ in range(guard.MAX_HELD_BODIES + 1)]
        for sock in slow:  # every one of these clients has sent an incomplete body
            sock.sendall(post_head(160_000) + b" " * 150_000)
        until(lambda: server.serving._app.held_bytes == len(slow) * 150_000)
        assert server.error(429, prompt="a" * 150_000)["code"] == "queue_full"
        assert server.complete(max_tokens=1)  # small bodies are not affected
        assert server.client.get("/health").status_code == 200
        assert server.serving._app.held_bytes <= guard.MAX_HELD_BODIES * 200_000
        for sock in slow:
            sock.close()
        until(lambda: server.serving._app.held_bytes == 0)
        many = dict(prompt="a", n=128, max_tokens=4000, logprobs=20)
        assert server.error(400, **many)["code"] == "too_many_logprobs"
        messages = [{"role": "user", "content": "a"}]
        many = dict(messages=messages, n=100, logprobs=True, top_logprobs=20)
        assert server.error(400, "/v1/chat/completions", **many)["param"] == "logprobs"
        monkeypatch.setattr(service, "MAX_HELD_LOGPROBS", 3 * CONTEXT)  # of all requests
        busy = Client(server, stream=True, logprobs=1, **LONG)
        until(lambda: server.service.held_logprobs > CONTEXT)
        few = dict(prompt="a", max_tokens=CONTEXT, logprobs=1)
        assert server.error(429, **few)["code"] == "queue_full"
        assert server.error(429, **few, echo=True)["code"] == "queue_full"
        assert server.complete(max_tokens=2, logprobs=1)  # small requests are not affected
        busy.leave()
        until(server.idle)
        assert server.service.held_logprobs == 0
        assert server.complete("a", max_tokens=0, echo=True, logprobs=1)
        assert server.service.held_logprobs == 0


# ---- disconnecting clients -----------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
def test_client_disconnects_during_generation(stream):
    with Running(paced) as server:
        server.wait_ready()
        c = Client(server, stream=stream, n=3, **LONG)
        until(lambda: server.service.generated_tokens > 6)
        c.leave()
        until(server.idle, 1.0)
        # The server keeps expert loads also for requests that were cut short.
        [id] = server.service._expert_loads
        load = server.client.get(f"/lamoe/requests/{id}/experts").json()["load"]
        per_token = server.service.config.num_experts_per_tok
        assert sum(load[0]) >= server.service.generated_tokens * per_token / 2
        assert server.service.generated_tokens < 3 * CONTEXT / 2
        assert "lamoe_disconnected_total 1.0" in server.client.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_client_disconnects_in_the_queue_or_during_prefill(stream):
    with Running(
        lambda: paced(max_num_seqs=1, max_num_batched_tokens=1),
        max_num_seqs=1,
        max_num_batched_tokens=1,
    ) as server:
        server.wait_ready()
        # one token per step, so 4,000 steps until the first generated token
        first = Client(server, stream=stream, **(LONG | {"prompt": [5] * 4000}))
        until(lambda: server.client.get("/lamoe/stats").json()["running"] == 1)
        second = Client(server, stream=stream, **LONG)
        until(lambda: server.client.get("/lamoe/stats").json()["waiting"] == 1)
        second.leave()
        until(lambda: server.service.admitted == 1, 1.0)
        assert server.service.generated_tokens == 0
        first.leave()
        until(server.idle, 1.0)
        assert server.service.generated_tokens == 0


def test_client_disconnects_while_its_prompt_is_scored():
    with Running(
        lambda: paced(max_num_seqs=1, max_num_batched_tokens=1),
        max_num_seqs=1,
        max_num_batched_tokens=1,
    ) as server:
        server.wait_ready()
        for path, body in (
            ("/v1/embeddings", {"input": [[5] * 4000]}),
            (
                "/v1/completions",
                {"prompt": [5] * 4000, "echo": True, "logprobs": 1, "max_tokens": 0},
            ),
        ):
            c = Client(server, path, **body)
            until(lambda: server.service.scoring.locked())
            c.leave()
            until(lambda: server.idle() and not server.service.scoring.locked(), 1.0)


# ---- time limits ---------------------------------------------------------------------------------
def test_request_timeout():
    with Running(paced, request_timeout=0.3) as server:
        server.wait_ready()
        assert server.error(408, **LONG)["code"] == "timeout"
        last = server.events("/v1/completions", **LONG)[-1]
        assert last["error"]["code"] == "timeout" and last["error"]["type"] == "timeout_error"
        until(server.idle, 1.0)


def test_incomplete_body_times_out():
    with Running(paced, body_timeout=0.3) as server:
        server.wait_ready()
        with connect(server.url, timeout=10) as sock:
            sock.sendall(post_head(100) + b"{")
            assert b" 408 " in sock.recv(4096)
        assert server.idle()


def test_incomplete_headers_close_the_connection():
    """A connection with incomplete headers is closed, also if it has served a request before."""
    with Running(paced, body_timeout=0.3) as server:
        server.wait_ready()
        for before in (b"", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"):
            with connect(server.url, timeout=10) as sock:
                sock.sendall(before)
                got = b""
                while before and not got.endswith(b"}"):
                    got += sock.recv(4096)
                sock.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
                assert sock.recv(4096) == b""  # the server closed the connection
        # a connection with a long response is not idle
        with server.client.stream(
            "POST", "/v1/completions", json=LONG | {"max_tokens": 800, "stream": True}
        ) as r:
            assert [line for line in r.iter_lines() if line][-1] == "data: [DONE]"


# ---- loading and shutdown ------------------------------------------------------------------------
def test_requests_during_loading_get_503():
    go = threading.Event()
    with Running(lambda: go.wait(20) and paced()) as server:
        until(lambda: server.client.get("/health").status_code == 503)
        assert server.client.get("/health").json() == {"status": "loading"}
        r = server.post("/v1/completions", prompt="a")
        assert r.status_code == 503
        assert r.json()["error"]["code"] == "loading"
        assert r.headers["retry-after"]
        assert server.client.get("/v1/models").status_code == 503
        assert server.client.get("/lamoe/stats").status_code == 503
        assert server.client.get("/metrics").status_code == 503
        go.set()
        server.wait_ready()
        assert server.complete(max_tokens=1)


def test_failed_load_ends_the_server():
    def load():
        raise ValueError("the folder is not a model")

    with Running(load) as server:
        server._thread.join(10)
        assert server.code == 1


def test_first_signal_lets_requests_finish():
    with Running(paced) as server:
        server.wait_ready()
        with server.client.stream(
            "POST", "/v1/completions", json=LONG | {"max_tokens": 300, "stream": True}
        ) as r:
            lines = r.iter_lines()
            next(lines)
            server.signal()
            until(lambda: server.service.state == "draining")
            with server.new_client() as other:
                health = other.get("/health")
                assert health.status_code == 503 and health.json() == {"status": "draining"}
                refused = other.post("/v1/completions", json={"prompt": "a"})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "draining"
                assert refused.headers["retry-after"]
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        server._thread.join(10)
        assert server.code == 0 and not server.service.engine._thread.is_alive()


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_second_signal_or_timeout_cuts_requests_off(how):
    with Running(paced, shutdown_timeout=0.2 if how == "timeout" else 30.0) as server:
        server.wait_ready()
        stream, whole = Client(server, stream=True, **LONG), Client(server, **LONG)
        until(lambda: server.service.generated_tokens > 3)
        server.signal()
        if how == "second signal":
            server.signal()
        server._thread.join(5)
        stream.join(5), whole.join(5)
        assert server.code == 1 and not server.service.engine._thread.is_alive()
        assert b"engine_ended" in stream.received
        assert stream.received.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        assert whole.status == 503


def test_failed_engine_ends_the_server(monkeypatch):
    with Running(paced) as server:
        server.wait_ready()
        monkeypatch.setattr(server.service.engine._llm, "step", lambda: 1 / 0)
        assert server.error(503, prompt="a")["code"] == "engine_ended"
        server._thread.join(10)
        assert server.code == 1


# ---- failures ------------------------------------------------------------------------------------
def test_non_finite_logits_fail_only_their_own_request(monkeypatch):
    """If the logits of one sequence become NaN, the other sequences of the batch do not change."""
    with Running(lambda: paced(speculate=0)) as server:
        server.wait_ready()
        good = dict(prompt=["the cat", "a dog"], seed=2, max_tokens=40, ignore_eos=True)
        want = [c["text"] for c in server.complete(**good)["choices"]]
        run = runner.run

        def poisoned(*args):
            nan = float("nan")
            return [
                (seq, logits * nan, [(nan, 0)] * len(summaries))
                if seq.tokens[1] == 66 and len(seq.tokens) > 8
                else (seq, logits, summaries)
                for seq, logits, summaries in run(*args)
            ]

        monkeypatch.setattr(runner, "run", poisoned)
        poison = dict(prompt=[65, 66, 67], max_tokens=40, ignore_eos=True)
        bad = [
            Client(server, **poison, **more)
            for more in ({"stream": False}, {"stream": True}, {"stream": False, "n": 2})
        ]
        assert [c["text"] for c in server.complete(**good)["choices"]] == want
        until(lambda: all(c.received.endswith((b"}", b"\r\n\r\n")) for c in bad))
        assert [c.status for c in bad] == [500, 200, 500]
        assert all(b"not finite" in c.received for c in bad)
        monkeypatch.setattr(runner, "run", run)
        assert [c["text"] for c in server.complete(**good)["choices"]] == want
        until(server.idle, 1.0)


def test_failed_forward_pass_ends_its_requests_but_not_the_server(monkeypatch, caplog):
    with Running(paced) as server:
        server.wait_ready()
        body = dict(prompt="the cat", seed=2, max_tokens=20)
        want = server.complete(**body)["choices"]
        stream, whole = Client(server, stream=True, **LONG), Client(server, **LONG)
        until(lambda: server.service.generated_tokens > 30)
        with monkeypatch.context() as m:
            m.setattr(runner, "run", lambda *args: {}["kernel"])
            until(lambda: whole.received.endswith(b"}") and b"[DONE]" in stream.received)
            assert server.error(500, prompt="a")["code"] == "generation_failed"
        assert whole.status == 500
        assert all(
            b"an internal error ended it (KeyError)" in c.received and b"'kernel'" not in c.received
            for c in (stream, whole)
        )
        assert server.client.get("/health").status_code == 200
        assert server.complete(**body)["choices"] == want
        assert any(
            r.exc_info and r.getMessage() == "a pass failed"
            for r in caplog.records
            if r.name == "lamoe.engine"
        )
        until(server.idle, 1.0)


def test_request_that_excludes_every_token_gets_400(monkeypatch):
    with Running(paced) as server:
        server.wait_ready()
        monkeypatch.setattr(
            "lamoe.engine.next_token.sample",
            lambda logits, p, g=None: torch.multinomial(torch.zeros(3), 1),
        )
        assert server.error(400, prompt="a")["code"] == "generation_failed"
        until(server.idle, 1.0)


def test_unexpected_error_gets_a_500_without_details(monkeypatch, caplog):
    with Running(paced) as server:
        server.wait_ready()
        monkeypatch.setattr(server.service, "check_model", lambda name: 1 / 0)
        r = server.post("/tokenize", prompt="a")
        assert r.status_code == 500
        assert r.json()["error"]["code"] == "internal_error"
        assert "zero" not in r.text
        until(
            lambda: any(
                rec.exc_info and rec.fields["id"] == r.headers["x-request-id"]
                for rec in caplog.records
                if rec.name == "lamoe.serve"
            )
        )


def test_many_clients_at_once_free_all_pages():
    async def send(client, i: int) -> int:
        """Send one request and return its status.

        Every fifth request is cancelled, and some are invalid.
        """
        body = {"prompt": "the cat", "max_tokens": 30, "ignore_eos": True, "seed": i}
        body["stream"] = i % 3 == 0
        if i % 5 == 4:
            endless = body | {"max_tokens": CONTEXT}
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json=endless), 0.2)
            return 0
        body = body if i % 7 else {"prompt": None}
        return (await client.post("/v1/completions", json=body)).status_code

    async def main(url: str) -> list[int]:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(send(client, i) for i in range(40)))

    with Running(paced) as server:
        server.wait_ready()
        codes = asyncio.run(main(server.url))
        assert set(codes) == {0, 200, 400} and codes.count(200) > 20
        until(server.idle, 1.0)
        started = time.perf_counter()
        assert server.complete(max_tokens=1) and time.perf_counter() - started < 5
