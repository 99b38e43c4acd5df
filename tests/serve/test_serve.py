"""The HTTP API against the engine called directly: every field that generates, streams that say what whole answers say, and what is refused."""

import base64
import json
import logging
import math
import re
import struct

import pytest
import torch

from lamoe.engine.sampler import SamplingParams
from lamoe.serve.app import PAGE
from tiny_server import CONTEXT, NAME, Running, llm, model, tok, until

LONG = "def read(self): return None\n" * 3


@pytest.fixture(scope="module")
def server():
    with Running() as s:
        yield s.wait_ready()


@pytest.fixture(autouse=True)
def nothing_left(server):
    yield
    assert server.idle()


def direct(prompt="the cat", **params):
    [out] = llm().generate([prompt], SamplingParams(**params))
    return out


def rounded(value):
    """Floats with three digits: in other company the last bits of a sum differ."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return (
        [rounded(v) for v in value]
        if isinstance(value, list)
        else pytest.approx(value, abs=1e-3)
        if isinstance(value, float)
        else value
    )


def joined(parts: list[dict]) -> dict:
    return {k: sum((p[k] for p in parts), []) for k in parts[0]}


# ---- completions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 5, "temperature": 2.5, "top_p": 0.7},
        {"seed": 6, "top_k": 3},
        {"seed": 6, "min_p": 0.2},
        {"temperature": 0, "presence_penalty": 2.0},
        {"temperature": 0, "frequency_penalty": 1.5},
        {"temperature": 0, "repetition_penalty": 3.0},
        {"temperature": 0, "ignore_eos": True, "min_tokens": 5},
    ],
    ids=lambda b: ",".join(b),
)
def test_every_parameter_reaches_the_engine(server, body):
    out = direct(max_tokens=20, **body)
    answer = server.complete(max_tokens=20, **body)
    assert answer["choices"] == [
        {"index": 0, "text": out.text, "finish_reason": out.finish_reason, "logprobs": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": out.prompt_tokens,
        "completion_tokens": len(out.token_ids),
        "total_tokens": out.prompt_tokens + len(out.token_ids),
        "prompt_tokens_details": {
            "cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        },
    }
    assert answer["object"] == "text_completion" and answer["model"] == NAME


def test_the_defaults_are_those_of_openai(server):
    assert server.complete(seed=3, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert (
        server.complete(seed=3)["choices"]
        == server.complete(
            seed=3,
            temperature=1,
            top_p=1,
            n=1,
            max_tokens=16,
            stream=False,
            top_k=-1,
            min_p=0,
            echo=False,
        )["choices"]
    )


def test_same_seed_same_tokens_alone_and_beside_others(server):
    alone = server.complete(seed=11, max_tokens=12)["choices"][0]["text"]
    together = server.complete(["a dog", "the cat", "rain"], seed=11, max_tokens=12)["choices"]
    assert together[1]["text"] == alone and [c["index"] for c in together] == [0, 1, 2]
    assert server.complete(seed=12, max_tokens=12)["choices"][0]["text"] != alone
    assert (
        server.complete(seed=11 - 2**63, max_tokens=3)["choices"]
        == server.complete(seed=11, max_tokens=3)["choices"]
    )  # negative ones are allowed


def test_n_samples_lie_beside_their_prompt(server):
    answer = server.complete(["the cat", "a dog"], n=3, seed=4, max_tokens=5)
    want = [
        o.text
        for o in llm().generate(["the cat", "a dog"], SamplingParams(n=3, seed=4, max_tokens=5))
    ]
    assert [c["text"] for c in answer["choices"]] == want and len(set(want)) > 3
    assert answer["usage"]["prompt_tokens"] == sum(
        len(tok().encode(p, bos=True)) for p in ("the cat", "a dog")
    )


def test_prompts_of_token_ids(server):
    ids = tok().encode("the cat", bos=True)
    want = server.complete(temperature=0)["choices"][0]["text"]
    assert server.complete(ids, temperature=0)["choices"][0]["text"] == want
    assert [c["text"] for c in server.complete([ids, ids], temperature=0)["choices"]] == [
        want,
        want,
    ]


def test_stop(server):
    whole = server.complete(temperature=0, max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    cut = whole[4:7]
    for stop in (cut, [cut, "never there"]):
        answer = server.complete(temperature=0, max_tokens=20, ignore_eos=True, stop=stop)[
            "choices"
        ][0]
        assert (answer["text"], answer["finish_reason"]) == (whole[: whole.index(cut)], "stop")
        events = server.events(
            "/v1/completions",
            prompt="the cat",
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            stop=stop,
        )
        assert "".join(e["choices"][0]["text"] for e in events) == answer["text"]


def test_logit_bias_decides(server):
    answer = server.complete(temperature=0, max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == [tok().decode([70])] * 3
    assert server.error(400, prompt="a", logit_bias={"300": 1})["code"] == "invalid_value"
    assert server.error(400, prompt="a", logit_bias={"x": 1})["param"].startswith("logit_bias")


def test_logprobs_are_the_models(server):
    answer = server.complete(temperature=0, max_tokens=6, logprobs=3)["choices"][0]
    out, found = direct(temperature=0.0, max_tokens=6, logprobs=3), answer["logprobs"]
    assert found["token_logprobs"] == [
        pytest.approx(lp[t], abs=1e-4) for t, lp in zip(out.token_ids, out.logprobs)
    ]
    assert [max(t.values()) for t in found["top_logprobs"]] == pytest.approx(
        found["token_logprobs"]
    )
    assert all(len(t) == 3 for t in found["top_logprobs"]) and found["text_offset"][0] == 0
    assert (
        "".join(t for t in found["tokens"] if not t.startswith("bytes:"))
        and len(found["text_offset"]) == 6
    )


def test_echo_scores_the_prompt(server):
    """The harness for evaluations lives on this: every token of the prompt after the first, as one plain pass of the model has them."""
    ids = tok().encode(LONG, bos=True)
    with torch.no_grad():
        logp = model()(torch.tensor([ids]))[0].log_softmax(-1)
    want = [float(logp[i, t]) for i, t in enumerate(ids[1:])]
    for max_tokens in (0, 1):
        choice = server.complete(LONG, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0)[
            "choices"
        ][0]
        got = choice["logprobs"]
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        assert got["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
        assert choice["text"].startswith(LONG) and len(got["tokens"]) == len(
            ids
        ) + max_tokens == len(got["text_offset"]) == len(got["top_logprobs"])
        assert [LONG[a:b] for a, b in zip(got["text_offset"][1:5], got["text_offset"][2:6])] == got[
            "tokens"
        ][1:5]
    streamed = server.events(
        "/v1/completions", prompt=LONG, echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    parts = [e["choices"][0]["logprobs"] for e in streamed]
    assert joined(parts) == rounded(got)
    assert server.complete("a", echo=True, max_tokens=0)["choices"] == [
        {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
    ]


def test_a_stream_says_what_the_whole_answer_says(server):
    body = dict(prompt=["the cat", "a dog"], n=2, seed=3, max_tokens=9, logprobs=1)
    whole = server.complete(**body)
    events = server.events("/v1/completions", **body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and all(e["usage"] is None for e in events[:-1])
    tokens = {k: v for k, v in events[-1]["usage"].items() if k != "prompt_tokens_details"}
    assert tokens == {k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"}
    for i in range(4):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in mine) == whole["choices"][i]["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [
            whole["choices"][i]["finish_reason"]
        ]
        assert joined([c["logprobs"] for c in mine]) == rounded(whole["choices"][i]["logprobs"])
    assert len({e["id"] for e in events}) == 1 and events[0]["id"].startswith("cmpl-")


def test_fill_in_the_middle(server):
    t = tok()
    begin, hole, end = (
        t.inner.token_to_id(x) for x in ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    )
    ids = [t.bos_id, begin, *t.encode("the cat"), hole, *t.encode(" hill"), end]
    assert (
        server.complete("the cat", suffix=" hill", temperature=0)["choices"]
        == server.complete(ids, temperature=0)["choices"]
    )


def test_a_full_context_ends_with_length(server):
    answer = server.complete([5] * (CONTEXT - 3), temperature=0, max_tokens=100, ignore_eos=True)
    assert (
        answer["choices"][0]["finish_reason"] == "length"
        and answer["usage"]["completion_tokens"] == 3
    )
    error = server.error(400, prompt=[5] * CONTEXT)
    assert (
        str(CONTEXT) in error["message"]
        and error["code"] == "context_length_exceeded"
        and error["param"] == "prompt"
    )


def test_a_prefix_hit_is_in_the_usage(server):
    first, second = (
        server.complete(LONG + "x", temperature=0, max_tokens=2)["usage"] for _ in range(2)
    )
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert (
        cached > first["prompt_tokens_details"]["cached_tokens"]
        or cached >= second["prompt_tokens"] - 4
    )
    assert 0 < cached < second["prompt_tokens"]


# ---- chat ------------------------------------------------------------------------------------------------------------
def test_chat(server):
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and?", "name": "Ann"},
    ]
    plain = [
        {**m, "content": "hello" if isinstance(m["content"], list) else m["content"]}
        for m in messages
    ]
    [out] = llm().generate(
        [tok().apply_chat(plain)], SamplingParams(temperature=0.0, max_tokens=12)
    )
    answer = server.chat(messages, temperature=0, max_tokens=12)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": out.text.lstrip(), "refusal": None},
            "finish_reason": out.finish_reason,
            "logprobs": None,
        }
    ]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert (
        server.chat(messages, temperature=0, max_completion_tokens=12)["choices"]
        == answer["choices"]
    )
    assert (
        server.chat(
            [{"role": "developer", "content": "be brief"}, *messages[1:]],
            temperature=0,
            max_tokens=12,
        )["choices"]
        == answer["choices"]
    )


def test_a_chat_stream_says_what_the_whole_answer_says(server):
    body = dict(
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        seed=3,
        max_tokens=9,
        logprobs=True,
        top_logprobs=2,
    )
    whole = server.post("/v1/chat/completions", **body).json()
    events = server.events("/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and events[-1]["usage"][
        "completion_tokens"
    ] == whole["usage"]["completion_tokens"]
    for i in range(2):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i]
        assert (
            mine[0]["delta"] == {"role": "assistant", "content": ""}
            and mine[-1]["finish_reason"] == whole["choices"][i]["finish_reason"]
        )
        assert (
            "".join(c["delta"].get("content", "") for c in mine)
            == whole["choices"][i]["message"]["content"]
        )
        got = [t for c in mine if c["logprobs"] for t in c["logprobs"]["content"]]
        assert rounded(got) == rounded(whole["choices"][i]["logprobs"]["content"]) and len(got) > 5
    first = whole["choices"][0]["logprobs"]["content"][0]
    assert (
        len(first["top_logprobs"]) == 2
        and first["top_logprobs"][0]["logprob"] >= first["top_logprobs"][1]["logprob"]
    )
    assert all(
        bytes(t["bytes"]).decode("utf-8", "replace") == t["token"]
        or t["token"].startswith("bytes:")
        for t in got
    )


def test_what_the_model_is_not_trained_for_is_said(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    message = [{"role": "user", "content": "hi"}]
    assert (
        server.error(400, "/v1/chat/completions", messages=message, tools=tools)["param"] == "tools"
    )
    assert (
        server.error(400, "/v1/chat/completions", messages=message, tool_choice="auto")["param"]
        == "tools"
    )
    assert (
        server.error(
            400,
            "/v1/chat/completions",
            messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}],
        )["param"]
        == "messages"
    )


def test_other_models():
    """Without fill-in-the-middle tokens, without a tokenizer, without experts."""
    with Running(lambda: llm(tok=tok(fim=False))) as s:
        s.wait_ready()
        error = s.error(400, prompt="a", suffix="b")
        assert error["param"] == "suffix" and "fill-in-the-middle" in error["message"]
    with Running(lambda: llm("llama", tok=None)) as s:
        s.wait_ready()
        r = s.post("/v1/completions", prompt=[5, 6, 7], max_tokens=3, temperature=0, logprobs=1)
        [choice] = r.json()["choices"]
        assert (
            choice["text"] == ""
            and choice["logprobs"]["tokens"][0].startswith("token_id:")
            and r.json()["usage"]["completion_tokens"] == 3
        )
        assert s.client.get(f"/lamoe/requests/{r.headers['x-request-id']}/experts").json() == {
            "layers": []
        }
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/tokenize", {"prompt": "a"}),
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/completions", {"prompt": [5], "regex": "a"}),
            ("/v1/completions", {"prompt": [5], "stop": "a"}),
        ):
            assert "tokenizer" in s.error(400, path, **body)["message"]
        assert (
            s.client.get("/tokenizer_info").status_code == 400
            and len(s.post("/v1/embeddings", input=[5, 6]).json()["data"][0]["embedding"]) == 32
        )


# ---- the rest --------------------------------------------------------------------------------------------------------
def test_embeddings_are_mean_final_states(server):
    texts = ["the cat sat", LONG * 4]
    r = server.post("/v1/embeddings", input=texts, model=NAME).json()
    for text, got in zip(texts, r["data"]):
        ids = tok().encode(text, bos=True)
        with torch.no_grad():
            want = model().hidden(torch.tensor([ids]))[0].mean(0)
        assert torch.allclose(torch.tensor(got["embedding"]), want, atol=1e-5)
    coded = server.post("/v1/embeddings", input=texts[0], encoding_format="base64").json()["data"][
        0
    ]["embedding"]
    data = base64.b64decode(coded)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(
        r["data"][0]["embedding"]
    )
    assert (
        r["usage"]["prompt_tokens"]
        == r["usage"]["total_tokens"]
        == sum(len(tok().encode(t, bos=True)) for t in texts)
    )
    assert server.error(400, "/v1/embeddings", input="a", dimensions=8)["code"] == "unknown_field"


def test_tokenize_and_back(server):
    r = server.post("/tokenize", prompt="the cat", return_token_strs=True).json()
    assert (
        r["tokens"] == tok().encode("the cat", bos=True)
        and r["count"] == len(r["tokens"])
        and r["max_model_len"] == CONTEXT
    )
    assert "".join(r["token_strs"][1:]) == "the cat"
    assert (
        server.post("/tokenize", prompt="the cat", add_special_tokens=False).json()["tokens"]
        == r["tokens"][1:]
    )
    assert server.post("/detokenize", tokens=r["tokens"][1:]).json() == {"prompt": "the cat"}
    chat = [{"role": "user", "content": "hi"}]
    assert server.post("/tokenize", messages=chat).json()["tokens"] == tok().apply_chat(chat)
    assert server.error(400, "/tokenize")["param"] == "prompt"
    assert server.client.get("/tokenizer_info").json()["eos_token"] == "<｜end▁of▁sentence｜>"


def test_models(server):
    [card] = server.client.get("/v1/models").json()["data"]
    assert card["id"] == NAME and card["max_model_len"] == CONTEXT
    assert server.client.get(f"/v1/models/{NAME}").json() == card
    assert server.client.get("/v1/models/another/one").status_code == 404
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        error = server.error(404, path, model="gpt", **body)
        assert error["code"] == "model_not_found" and repr(NAME) in error["message"]


def test_stats_while_it_runs_and_after(server):
    assert server.idle()
    before = server.client.get("/lamoe/stats").json()
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": LONG, "max_tokens": 3000, "ignore_eos": True, "stream": True},
    ) as r:
        lines = r.iter_lines()
        next(lines)
        now = server.client.get("/lamoe/stats").json()
        assert (
            now["running"] == 1
            and now["cache"]["used_bytes"] > 0
            and now["cache"]["used_tokens"] > len(tok().encode(LONG))
        )
        assert (
            now["cache"]["used_bytes"]
            == now["cache"]["used_tokens"] * now["cache"]["bytes_per_token"]
        )
    c = model().config
    assert now["cache"]["bytes_per_token"] == c.num_hidden_layers * 4 * sum(
        c.cache_row
    )  # fp32 rows
    heads = c.num_attention_heads
    assert now["cache"]["compare"] == {
        "mha": 2 * 2 * heads * c.v_head_dim * c.num_hidden_layers,
        "gqa": 2 * 2 * (heads // 2) * c.v_head_dim * c.num_hidden_layers,
        "mqa": 2 * 2 * c.v_head_dim * c.num_hidden_layers,
    }
    after = server.client.get("/lamoe/stats").json()
    assert after["generated_tokens"] > before["generated_tokens"] and after["tokens_per_s"] > 0
    assert set(after) == {
        "model",
        "dtype",
        "max_model_len",
        "cache",
        "running",
        "waiting",
        "tokens_per_s",
        "prompt_tokens",
        "cached_tokens",
        "generated_tokens",
        "drafted",
        "accepted",
    }


def test_expert_counts_of_a_request(server):
    r = server.post(
        "/v1/completions", prompt=[9, 8, 7, 6, 5], max_tokens=4, ignore_eos=True, temperature=0
    )
    id, c = r.json()["id"], model().config
    assert id == r.headers["x-request-id"]
    got = server.client.get(f"/lamoe/requests/{id}/experts").json()
    assert got["layers"] == list(c.moe_layers) and got["experts"] == c.n_routed_experts
    assert (
        got["load"]
        == direct([9, 8, 7, 6, 5], max_tokens=4, ignore_eos=True, temperature=0.0).experts.tolist()
    )
    assert server.client.get("/lamoe/requests/cmpl-none/experts").status_code == 404


def test_metrics(server):
    server.complete(max_tokens=2)
    text = server.client.get("/metrics").text
    assert 'lamoe_requests_total{route="/v1/completions",status="200"}' in text
    for name in (
        "lamoe_running 0.0",
        "lamoe_cache_used_bytes 0.0",
        "lamoe_time_to_first_token_seconds_bucket",
        "lamoe_generated_tokens_total",
    ):
        assert name in text
    generated = next(
        float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("lamoe_generated_tokens_total ")
    )
    assert generated == server.client.get("/lamoe/stats").json()[
        "generated_tokens"
    ] and math.isfinite(generated)


def test_what_is_polled_is_no_news_for_the_log(server, caplog):
    with caplog.at_level(logging.DEBUG, "lamoe.serve"):
        id = server.complete(max_tokens=1)["id"]
        polled = ["/health", "/metrics", "/lamoe/stats", f"/lamoe/requests/{id}/experts"]
        for path in [*polled, "/v1/models", "/lamoe/requests/cmpl-none/experts"]:
            server.client.get(path)
        until(
            lambda: (
                sum(
                    getattr(r, "fields", {}).get("path", "").endswith("none/experts")
                    for r in caplog.records
                )
                == 1
            )
        )
    level = {r.fields["path"]: r.levelname for r in caplog.records if r.getMessage() == "request"}
    assert [level[p] for p in polled] == ["DEBUG"] * 4
    assert (
        level["/v1/models"]
        == level["/v1/completions"]
        == level["/lamoe/requests/cmpl-none/experts"]
        == "INFO"
    )  # what failed is news


def test_page_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr("lamoe.serve.app.PAGE", tmp_path)
    (tmp_path / "index.html").write_text("<!doctype html>hello")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "secret.pem").write_text("x")
    r = server.client.get("/")
    assert (
        r.text == "<!doctype html>hello" and r.headers["content-type"] == "text/html; charset=utf-8"
    )
    policy = r.headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'none';")
        and "unsafe" not in policy
        and "http" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert (
        server.client.get("/page/app.js").headers["content-type"]
        == "text/javascript; charset=utf-8"
    )
    for path in (
        "/page/secret.pem",
        "/page/nothing.js",
        "/page/..%2f..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page/",
        "/page/.hidden.js",
        "/page/app.js%00.html",
    ):
        assert server.client.get(path).status_code == 404, path
    assert PAGE.name == "page"


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "body, param",
    [
        ({"promt": "a"}, None),
        ({"prompt": "a", "best_off": 1}, "best_off"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "1"}, "temperature"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**9}, "n"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": ""}, None),
        ({"prompt": [5], "suffix": "b", "echo": True}, "echo"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": "a", "min_tokens": 50, "max_tokens": 5}, "min_tokens"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "a", "regex": "a", "grammar": "b"}, "grammar"),
        ({}, "prompt"),
    ],
)
def test_refusals_name_the_field(server, body, param):
    error = server.error(400, **body)
    assert error["type"] == "invalid_request_error" and error["message"]
    if param:
        assert error["param"] == param


# ---- structured output -----------------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["cat", "dog"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(server, stream):
    def text(**body) -> str:
        body = dict(
            messages=[{"role": "user", "content": "a pet"}],
            seed=1,
            temperature=1.5,
            max_tokens=400,
            **body,
        )
        if stream:
            return "".join(
                e["choices"][0]["delta"].get("content", "")
                for e in server.events("/v1/chat/completions", **body)
            )
        choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        return choice["message"]["content"]

    pet = json.loads(
        text(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True},
            }
        )
    )
    assert pet["name"] in ("cat", "dog") and 0 <= pet["n"] <= 99
    assert re.fullmatch(r"[ab]{3}-\d", text(regex=r"[ab]{3}-\d"))
    assert text(grammar='start: "yes" | "no"') in ("yes", "no")
    assert text(response_format={"type": "text"}, min_tokens=1, stop=["e"]) is not None


def test_structured_output_by_other_names(server):
    answer = server.complete(response_format={"type": "json_object"}, temperature=0, max_tokens=60)[
        "choices"
    ][0]
    assert answer["text"].lstrip().startswith("{")
    for body, says in (
        ({"regex": "a{99999}"}, "at most 10000"),
        ({"regex": "(a"}, "regular expression"),
        ({"grammar": "start: nothing"}, "grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "schema",
        ),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "belongs"),
    ):
        error = server.error(400, prompt="a", **body)
        assert says in error["message"] and error["param"] == next(iter(body))
