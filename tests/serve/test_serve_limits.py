"""Safe by default: the queue, clients that leave, time-outs, keys, names, loading, draining, poison, and a log that tells no secret."""

import asyncio
import hmac
import json
import logging
import socket
import threading
import time

import pytest
import torch

from lamoe.engine import runner
from lamoe.serve import guard
from lamoe.serve.logs import JsonLines
from tiny_server import CONTEXT, Running, paced, until

LONG = {"prompt": "the cat", "max_tokens": CONTEXT, "ignore_eos": True, "temperature": 0}
KEY, OTHER = "sk-0123456789abcdef", "sk-second"


class Client(threading.Thread):
    """Sends one request over a socket of its own; `leave` closes it at whatever point it is."""

    def __init__(self, server, path="/v1/completions", **body):
        super().__init__(daemon=True)
        host, port = server.url.removeprefix("http://").split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=30)
        data = json.dumps(body).encode()
        self.sock.sendall(
            b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % (path.encode(), len(data))
            + data
        )
        self.received = b""
        self.start()

    def run(self):
        try:
            while data := self.sock.recv(65536):
                self.received += data
        except OSError:
            pass

    def leave(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.join(5)

    @property
    def status(self) -> int:
        return int(self.received.split()[1]) if self.received else 0


# ---- the queue -------------------------------------------------------------------------------------------------------
def test_a_full_queue_answers_429_and_health_stays_good():
    with Running(lambda: paced(max_num_seqs=2), max_num_seqs=2, max_queued_requests=3) as s:
        s.wait_ready()
        busy = [Client(s, stream=True, **LONG) for _ in range(5)]
        until(
            lambda: (
                [s.client.get("/lamoe/stats").json()[k] for k in ("running", "waiting")] == [2, 3]
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
            r = s.post(path, **body)
            assert (
                r.status_code == 429
                and r.json()["error"]["type"] == "rate_limit_error"
                and 1 <= int(r.headers["retry-after"]) <= 60
            )
        assert (
            s.client.get("/health").status_code == 200
            and s.post("/tokenize", prompt="a").status_code == 200
        )
        assert "lamoe_rejected_total 4.0" in s.client.get("/metrics").text
        busy.pop().leave()
        until(lambda: s.service.admitted == 4)
        extra = Client(s, prompt="a", max_tokens=1)
        assert (
            s.error(400, prompt=["a"] * 3, n=2)["code"] == "too_many_sequences"
        )  # more than there will ever be room for
        for c in busy:
            c.leave()
        until(lambda: extra.status == 200)
        until(s.idle, 1.0)


def test_limits_on_what_one_request_asks_for():
    with Running(paced, max_choices=6, max_body_bytes=2000) as s:
        s.wait_ready()
        assert len(s.complete(["a", "b"], n=3, max_tokens=1)["choices"]) == 6
        for body in (
            dict(prompt=["a", "b"], n=4),
            dict(prompt=["a"] * 7),
            dict(prompt=["a"] * 7, echo=True, max_tokens=0),
        ):
            assert s.error(400, **body)["code"] == "too_many_sequences"
        assert s.error(400, "/v1/embeddings", input=["a"] * 7)["code"] == "too_many_sequences"
        assert s.error(413, prompt="a" * 2000)["code"] == "body_too_large"
        sent = s.client.post(
            "/v1/completions",
            content=iter([b'{"prompt": "', b"a" * 3000, b'"}']),
            headers={"content-type": "application/json"},
        )  # of unknown length
        assert sent.status_code == 413
        assert s.idle()


def test_bodies_in_memory_and_log_probabilities_are_bounded(monkeypatch):
    with Running(paced, max_body_bytes=60_000, body_timeout=3) as s:
        s.wait_ready()
        host, port = s.url.removeprefix("http://").split(":")
        half = (
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 60000\r\n\r\n"
            + b" " * 50_000
        )
        slow = [
            socket.create_connection((host, int(port)), timeout=5) for _ in range(guard.MAX_HELD_BODIES + 3)
        ]
        for sock in slow:
            sock.sendall(half)
        until(lambda: s.serving._app.held_bytes == len(slow) * 50_000)
        assert s.error(429, prompt="a" * 55_000)["code"] == "queue_full"
        assert (
            s.client.get("/health").status_code == 200
            and s.serving._app.held_bytes < (guard.MAX_HELD_BODIES + 1) * 60_000
        )
        for sock in slow:
            sock.close()
        until(lambda: s.serving._app.held_bytes == 0)
        assert (
            s.error(400, prompt="a", n=128, max_tokens=4000, logprobs=20)["code"]
            == "too_many_logprobs"
        )
        assert (
            s.error(
                400,
                "/v1/chat/completions",
                messages=[{"role": "user", "content": "a"}],
                n=100,
                logprobs=True,
                top_logprobs=20,
            )["param"]
            == "logprobs"
        )


# ---- clients that leave ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_generates(stream):
    with Running(paced) as s:
        s.wait_ready()
        c = Client(s, stream=stream, n=3, **LONG)
        until(lambda: s.service.generated_tokens > 6)
        c.leave()
        until(s.idle, 1.0)
        [id] = s.service._expert_loads  # what was cut short counts too
        load = s.client.get(f"/lamoe/requests/{id}/experts").json()["load"]
        assert (
            sum(load[0])
            >= s.service.generated_tokens * paced().model.config.num_experts_per_tok / 2
        )
        assert (
            s.service.generated_tokens < 3 * CONTEXT / 2
            and "lamoe_disconnected_total 1.0" in s.client.get("/metrics").text
        )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_or_in_its_prompt(stream):
    with Running(
        lambda: paced(max_num_seqs=1, max_num_batched_tokens=1),
        max_num_seqs=1,
        max_num_batched_tokens=1,
    ) as s:
        s.wait_ready()
        first = Client(
            s, stream=stream, **(LONG | {"prompt": [5] * 4000})
        )  # 4,000 steps until its first token
        until(lambda: s.client.get("/lamoe/stats").json()["running"] == 1)
        second = Client(s, stream=stream, **LONG)
        until(lambda: s.client.get("/lamoe/stats").json()["waiting"] == 1)
        second.leave()
        until(lambda: s.service.admitted == 1, 1.0)
        assert s.service.generated_tokens == 0
        first.leave()
        until(s.idle, 1.0)
        assert s.service.generated_tokens == 0


def test_a_client_that_leaves_while_its_prompt_is_scored():
    with Running(
        lambda: paced(max_num_seqs=1, max_num_batched_tokens=1),
        max_num_seqs=1,
        max_num_batched_tokens=1,
    ) as s:
        s.wait_ready()
        for path, body in (
            ("/v1/embeddings", {"input": [[5] * 4000]}),
            (
                "/v1/completions",
                {"prompt": [5] * 4000, "echo": True, "logprobs": 1, "max_tokens": 0},
            ),
        ):
            c = Client(s, path, **body)
            until(lambda: s.service.scoring.locked())
            c.leave()
            until(lambda: s.idle() and not s.service.scoring.locked(), 1.0)


# ---- time-outs -------------------------------------------------------------------------------------------------------
def test_a_request_that_takes_too_long():
    with Running(paced, request_timeout=0.3) as s:
        s.wait_ready()
        assert s.error(408, **LONG)["code"] == "timeout"
        last = s.events("/v1/completions", **LONG)[-1]
        assert last["error"]["code"] == "timeout" and last["error"]["type"] == "timeout_error"
        until(s.idle, 1.0)


def test_a_body_that_never_ends():
    with Running(paced, body_timeout=0.3) as s:
        s.wait_ready()
        host, port = s.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            )
            assert b" 408 " in sock.recv(4096)
        assert s.idle()


def test_headers_that_never_end():
    """On a new connection, and on one that has asked something before."""
    with Running(paced, body_timeout=0.3) as s:
        s.wait_ready()
        host, port = s.url.removeprefix("http://").split(":")
        for before in (b"", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"):
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.sendall(before)
                got = b""
                while before and not got.endswith(b"}"):
                    got += sock.recv(4096)
                sock.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
                assert sock.recv(4096) == b""  # closed
        with s.client.stream(
            "POST", "/v1/completions", json=LONG | {"max_tokens": 800, "stream": True}
        ) as r:  # a long answer is not silence
            assert [line for line in r.iter_lines() if line][-1] == "data: [DONE]"


# ---- loading, draining, ending ---------------------------------------------------------------------------------------
def test_loading():
    go = threading.Event()
    with Running(lambda: go.wait(20) and paced()) as s:
        until(lambda: s.client.get("/health").status_code == 503)
        assert s.client.get("/health").json() == {"status": "loading"}
        r = s.post("/v1/completions", prompt="a")
        assert (
            r.status_code == 503
            and r.json()["error"]["code"] == "loading"
            and r.headers["retry-after"]
        )
        assert (
            s.client.get("/v1/models").status_code == 503
            and s.client.get("/lamoe/stats").status_code == 503
            and s.client.get("/metrics").status_code == 503
        )
        go.set()
        s.wait_ready()
        assert s.complete(max_tokens=1)


def test_a_model_that_does_not_load():
    def load():
        raise ValueError("the folder is not a model")

    with Running(load) as s:
        s._thread.join(10)
        assert s.code == 1


def test_the_first_signal_drains():
    with Running(paced) as s:
        s.wait_ready()
        with s.client.stream(
            "POST", "/v1/completions", json=LONG | {"max_tokens": 300, "stream": True}
        ) as r:
            lines = r.iter_lines()
            next(lines)
            s.signal()
            until(lambda: s.service.state == "draining")
            with s.talk() as other:
                health = other.get("/health")
                assert health.status_code == 503 and health.json() == {"status": "draining"}
                refused = other.post("/v1/completions", json={"prompt": "a"})
                assert (
                    refused.status_code == 503
                    and refused.json()["error"]["code"] == "draining"
                    and refused.headers["retry-after"]
                )
            rest = [line for line in lines if line]
        assert (
            rest[-1] == "data: [DONE]"
            and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        )
        s._thread.join(10)
        assert s.code == 0 and not s.service.engine._thread.is_alive()


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_requests_are_cut_off_at_the_end(how):
    with Running(paced, shutdown_timeout=0.2 if how == "timeout" else 30.0) as s:
        s.wait_ready()
        stream, whole = Client(s, stream=True, **LONG), Client(s, **LONG)
        until(lambda: s.service.generated_tokens > 3)
        s.signal()
        if how == "second signal":
            s.signal()
        s._thread.join(5)
        stream.join(5), whole.join(5)
        assert s.code == 1 and not s.service.engine._thread.is_alive()
        assert (
            b"engine_ended" in stream.received
            and stream.received.rstrip(b"0\r\n").endswith(b"data: [DONE]")
            and whole.status == 503
        )


def test_an_engine_that_dies_ends_the_server(monkeypatch):
    with Running(paced) as s:
        s.wait_ready()
        monkeypatch.setattr(s.service.engine._llm, "step", lambda: 1 / 0)
        assert s.error(503, prompt="a")["code"] == "engine_ended"
        s._thread.join(10)
        assert s.code == 1


# ---- poison ----------------------------------------------------------------------------------------------------------
def test_one_poisoned_request_fails_alone(monkeypatch):
    """One sequence's logits become nan in the middle of a batch: the others say what they say alone."""
    with Running(lambda: paced(speculate=0)) as s:
        s.wait_ready()
        good = dict(prompt=["the cat", "a dog"], seed=2, max_tokens=40, ignore_eos=True)
        want = [c["text"] for c in s.complete(**good)["choices"]]
        run = runner.run

        def poisoned(*args):
            nan = float("nan")
            return [
                (seq, logits * nan, [(nan, 0)] * len(looks))
                if seq.tokens[1] == 66 and len(seq.tokens) > 8
                else (seq, logits, looks)
                for seq, logits, looks in run(*args)
            ]

        monkeypatch.setattr(runner, "run", poisoned)
        bad = [
            Client(s, prompt=[65, 66, 67], max_tokens=40, ignore_eos=True, stream=stream, **more)
            for stream, more in ((False, {}), (True, {}), (False, {"n": 2}))
        ]
        assert [c["text"] for c in s.complete(**good)["choices"]] == want
        until(lambda: all(c.received.endswith((b"}", b"\r\n\r\n")) for c in bad))
        assert [c.status for c in bad] == [500, 200, 500] and all(
            b"not finite" in c.received for c in bad
        )
        monkeypatch.setattr(runner, "run", run)
        assert [c["text"] for c in s.complete(**good)["choices"]] == want
        until(s.idle, 1.0)


def test_a_pass_that_fails_ends_its_requests_and_not_the_server(monkeypatch, caplog):
    with Running(paced) as s:
        s.wait_ready()
        body = dict(prompt="the cat", seed=2, max_tokens=20)
        want = s.complete(**body)["choices"]
        stream, whole = Client(s, stream=True, **LONG), Client(s, **LONG)
        until(lambda: s.service.generated_tokens > 30)
        with monkeypatch.context() as m:
            m.setattr(runner, "run", lambda *args: {}["kernel"])
            until(lambda: whole.received.endswith(b"}") and b"[DONE]" in stream.received)
            assert s.error(500, prompt="a")["code"] == "generation_failed"
        assert whole.status == 500 and all(
            b"an internal error ended it (KeyError)" in c.received and b"'kernel'" not in c.received
            for c in (stream, whole)
        )
        assert s.client.get("/health").status_code == 200 and s.complete(**body)["choices"] == want
        assert any(
            r.exc_info and r.getMessage() == "a pass failed"
            for r in caplog.records
            if r.name == "lamoe.engine"
        )
        until(s.idle, 1.0)


def test_a_request_that_leaves_no_token_is_the_callers_fault(monkeypatch):
    with Running(paced) as s:
        s.wait_ready()
        monkeypatch.setattr(
            "lamoe.engine.llm.sample",
            lambda logits, p, g=None: torch.multinomial(torch.zeros(3), 1),
        )
        assert s.error(400, prompt="a")["code"] == "generation_failed"
        until(s.idle, 1.0)


def test_an_unexpected_error_is_a_plain_500(monkeypatch, caplog):
    with Running(paced) as s:
        s.wait_ready()
        monkeypatch.setattr(s.service, "check_model", lambda name: 1 / 0)
        r = s.post("/tokenize", prompt="a")
        assert (
            r.status_code == 500
            and r.json()["error"]["code"] == "internal_error"
            and "zero" not in r.text
        )
        until(
            lambda: any(
                rec.exc_info and rec.fields["id"] == r.headers["x-request-id"]
                for rec in caplog.records
                if rec.name == "lamoe.serve"
            )
        )


# ---- keys ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n\n{OTHER}\n")
    with Running(paced, api_key_file=str(file)) as s:
        yield s


def every_route(server) -> list[tuple[str, str]]:
    from lamoe.serve.app import router

    found = [(m, r.path) for r in router.routes for m in r.methods]
    return [
        (m, p.replace("{model:path}", "x").replace("{id}", "x").replace("{name}", "app.js"))
        for m, p in found
    ] + [("GET", "/openapi.json")]


def test_every_route_needs_the_key_but_health_and_the_page(locked):
    routes = every_route(locked)
    assert len(routes) >= 15
    for method, path in [
        *routes,
        ("GET", "/nothing"),
        ("OPTIONS", "/v1/models"),
        ("POST", "/health"),
        ("POST", "/page/app.js"),
        ("GET", "/pages"),
        ("GET", "/v1/models/%2e%2e/%2e%2e/health"),
        ("GET", "/page"),
        ("GET", "/HEALTH"),
    ]:
        is_open = method == "GET" and (path in ("/health", "/") or path.startswith("/page/"))
        for headers in (
            {},
            {"authorization": "Bearer sk-wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Bearer"},
            {"authorization": f"Bearer {KEY[:-2]}"},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": "Bearer é".encode("latin-1")},
        ):
            r = locked.client.request(method, path, headers=headers)
            assert (r.status_code == 401) == (not is_open), (method, path, headers)
            if not is_open:
                assert (
                    r.headers["www-authenticate"] == "Bearer"
                    and r.json()["error"]["type"] == "authentication_error"
                )
    for key in (KEY, OTHER):
        until(
            lambda: (
                locked.client.get(
                    "/v1/models", headers={"authorization": f"bearer {key}"}
                ).status_code
                == 200
            )
        )
    assert locked.client.get(f"/v1/models?api_key={KEY}").status_code == 401


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    seen = []
    monkeypatch.setattr(
        guard.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or hmac_compare(a, b)
    )
    for key in ("x", "s", KEY, KEY[:-1], OTHER):
        seen.clear()
        locked.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert len(seen) == 2 and all(
            len(a) == len(b) == 32 for a, b in seen
        )  # both keys, digests of one length, whichever fits


hmac_compare = hmac.compare_digest


def test_no_log_line_holds_a_key_or_what_was_said(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, OTHER, "sk-wrong-but-secret"):
            locked.client.post(
                f"/v1/completions?api_key={key}",
                json={"prompt": "a secret", "max_tokens": 1, "user": "ann"},
                headers={"authorization": f"Bearer {key}"},
            )
            locked.client.get(
                "/v1/models", headers={"authorization": f"Bearer {key}", "cookie": key}
            )
        until(
            lambda: (
                sum(getattr(r, "fields", {}).get("path") == "/v1/models" for r in caplog.records)
                >= 3
            )
        )
    lines = [
        JsonLines().format(r)
        for r in caplog.records
        if not r.name.startswith(("httpx2", "httpcore2"))
    ]  # those are the client's
    assert len([line for line in lines if '"user": "ann"' in line]) == 2 and any(
        '"status": 401' in line for line in lines
    )
    for line in lines:
        assert "\n" not in line and "sk-" not in line and "secret" not in line
        json.loads(line)


# ---- names, types ----------------------------------------------------------------------------------------------------
def test_a_foreign_page_cannot_use_a_server_on_loopback():
    """Under a name of its own that points here (DNS rebinding), or by a form's content types, which browsers send without asking first."""
    with Running(paced) as s:
        s.wait_ready()
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "",
        ):
            r = s.client.get("/lamoe/stats", headers={"host": host})
            assert r.status_code in (400, 403), host
        for host in ("localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:8000"):
            assert s.client.get("/health", headers={"host": host}).status_code == 200
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "",
        ):
            assert (
                s.client.post(
                    "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
                ).status_code
                == 415
            )
        assert (
            "access-control-allow-origin"
            not in s.client.get("/v1/models", headers={"origin": "http://evil.example"}).headers
        )
    with Running(paced, allowed_hosts="box.lan, other.lan") as s:
        assert [
            s.client.get("/page/x.js", headers={"host": h}).status_code
            for h in ("box.lan:80", "other.lan", "localhost")
        ] == [404, 404, 403]


def test_more_connections_than_allowed():
    with Running(paced, max_connections=3) as s:
        s.wait_ready()
        host, port = s.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(3)]
        until(lambda: s.client.get("/health").status_code == 503)
        for sock in idle:
            sock.close()
        until(lambda: s.client.get("/health").status_code == 200)


def test_many_clients_at_once_leave_nothing_behind():
    async def main(url):
        import httpx2

        async with httpx2.AsyncClient(base_url=url, timeout=60) as c:

            async def one(i):
                body = {
                    "prompt": "the cat",
                    "max_tokens": 30,
                    "ignore_eos": True,
                    "seed": i,
                    "stream": i % 3 == 0,
                }
                if i % 5 == 4:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(
                            c.post("/v1/completions", json=body | {"max_tokens": CONTEXT}), 0.2
                        )
                    return 0
                return (
                    await c.post("/v1/completions", json=body if i % 7 else {"prompt": None})
                ).status_code

            return await asyncio.gather(*map(one, range(40)))

    with Running(paced) as s:
        s.wait_ready()
        codes = asyncio.run(main(s.url))
        assert set(codes) == {0, 200, 400} and codes.count(200) > 20
        until(s.idle, 1.0)
        started = time.perf_counter()
        assert s.complete(max_tokens=1) and time.perf_counter() - started < 5
