"""Tests of /v1/completions and /v1/chat/completions against direct calls of the engine.

They cover every sampling field, streams, refusals, and structured output.
"""

import itertools
import json
import re

import pytest
import torch

from lamoe.engine.sampler import SamplingParams
from tiny_server import CONTEXT, NAME, Running, direct, llm, model, tok

LONG = "def read(self): return None\n" * 3


@pytest.fixture(scope="module")
def server():
    with Running() as s:
        yield s.wait_ready()


@pytest.fixture(autouse=True)
def idle_afterwards(server):
    yield
    assert server.idle()


def rounded(value):
    """Make all floats in a JSON value comparable up to 1e-3.

    The last bits of a log-probability may depend on the other sequences of a batch.
    """
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def joined(parts: list[dict]) -> dict:
    """Concatenate the lists of several dicts with the same keys."""
    return {k: sum((p[k] for p in parts), []) for k in parts[0]}


# ---- completions ---------------------------------------------------------------------------------
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
def test_sampling_fields_reach_the_engine(server, body):
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


def test_defaults_are_those_of_openai(server):
    assert server.complete(seed=3, ignore_eos=True)["usage"]["completion_tokens"] == 16
    defaults = dict(temperature=1, top_p=1, n=1, max_tokens=16, top_k=-1, min_p=0)
    explicit = server.complete(seed=3, stream=False, echo=False, **defaults)
    assert server.complete(seed=3)["choices"] == explicit["choices"]


def test_seed_gives_the_same_tokens_alone_and_in_a_batch(server):
    alone = server.complete(seed=11, max_tokens=12)["choices"][0]["text"]
    together = server.complete(["a dog", "the cat", "rain"], seed=11, max_tokens=12)["choices"]
    assert together[1]["text"] == alone and [c["index"] for c in together] == [0, 1, 2]
    assert server.complete(seed=12, max_tokens=12)["choices"][0]["text"] != alone
    negative = server.complete(seed=11 - 2**63, max_tokens=3)  # this seed equals 11 modulo 2**63
    assert negative["choices"] == server.complete(seed=11, max_tokens=3)["choices"]


def test_samples_are_ordered_by_prompt(server):
    answer = server.complete(["the cat", "a dog"], n=3, seed=4, max_tokens=5)
    params = SamplingParams(n=3, seed=4, max_tokens=5)
    want = [output.text for output in llm().generate(["the cat", "a dog"], params)]
    assert [c["text"] for c in answer["choices"]] == want and len(set(want)) > 3
    num_tokens = sum(len(tok().encode(p, bos=True)) for p in ("the cat", "a dog"))
    assert answer["usage"]["prompt_tokens"] == num_tokens


def test_prompts_of_token_ids(server):
    ids = tok().encode("the cat", bos=True)
    want = server.complete(temperature=0)["choices"][0]["text"]
    assert server.complete(ids, temperature=0)["choices"][0]["text"] == want
    both = server.complete([ids, ids], temperature=0)["choices"]
    assert [choice["text"] for choice in both] == [want, want]


def test_stop_strings_end_the_text(server):
    body = dict(prompt="the cat", temperature=0, max_tokens=20, ignore_eos=True)
    whole = server.complete(**body)["choices"][0]["text"]
    cut = whole[4:7]
    for stop in (cut, [cut, "never there"]):
        [choice] = server.complete(**body, stop=stop)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(cut)], "stop")
        events = server.events("/v1/completions", **body, stop=stop)
        assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]


def test_logit_bias(server):
    answer = server.complete(temperature=0, max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == [tok().decode([70])] * 3
    assert server.error(400, prompt="a", logit_bias={"300": 1})["code"] == "invalid_value"
    assert server.error(400, prompt="a", logit_bias={"x": 1})["param"].startswith("logit_bias")


def test_logprobs_equal_those_of_the_engine(server):
    out = direct(temperature=0.0, max_tokens=6, logprobs=3)
    got = server.complete(temperature=0, max_tokens=6, logprobs=3)["choices"][0]["logprobs"]
    want = [logprobs[token] for token, logprobs in zip(out.token_ids, out.logprobs)]
    assert got["token_logprobs"] == pytest.approx(want, abs=1e-4)
    assert [max(t.values()) for t in got["top_logprobs"]] == pytest.approx(got["token_logprobs"])
    assert all(len(t) == 3 for t in got["top_logprobs"])
    assert "".join(t for t in got["tokens"] if not t.startswith("bytes:"))
    assert got["text_offset"][0] == 0 and len(got["text_offset"]) == 6


def test_echo_with_logprobs_scores_the_prompt(server):
    """`echo` with `logprobs` returns prompt log-probabilities, which evaluation harnesses need.

    They equal those of one forward pass of the model.
    """
    ids = tok().encode(LONG, bos=True)
    with torch.no_grad():
        logp = model()(torch.tensor([ids]))[0].log_softmax(-1)
    want = [float(logp[i, t]) for i, t in enumerate(ids[1:])]
    for max_tokens in (0, 1):
        body = dict(prompt=LONG, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0)
        [choice] = server.complete(**body)["choices"]
        got = choice["logprobs"]
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        assert got["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
        assert choice["text"].startswith(LONG)
        offsets = got["text_offset"]
        assert len(got["tokens"]) == len(ids) + max_tokens
        assert len(offsets) == len(got["top_logprobs"]) == len(got["tokens"])
        texts = [LONG[begin:end] for begin, end in itertools.pairwise(offsets[1:6])]
        assert texts == got["tokens"][1:5]
    streamed = server.events("/v1/completions", **body)
    parts = [e["choices"][0]["logprobs"] for e in streamed]
    assert joined(parts) == rounded(got)
    assert server.complete("a", echo=True, max_tokens=0)["choices"] == [
        {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
    ]


def test_stream_equals_whole_response(server):
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
    by_suffix = server.complete("the cat", suffix=" hill", temperature=0)
    assert by_suffix["choices"] == server.complete(ids, temperature=0)["choices"]


def test_full_context_ends_with_length(server):
    answer = server.complete([5] * (CONTEXT - 3), temperature=0, max_tokens=100, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    error = server.error(400, prompt=[5] * CONTEXT)
    assert str(CONTEXT) in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"


def test_usage_counts_cached_prompt_tokens(server):
    body = dict(prompt=LONG + "x", temperature=0, max_tokens=2)
    first, second = (server.complete(**body)["usage"] for _ in range(2))
    cached = second["prompt_tokens_details"]["cached_tokens"]
    before = first["prompt_tokens_details"]["cached_tokens"]
    assert cached > before or cached >= second["prompt_tokens"] - 4
    assert 0 < cached < second["prompt_tokens"]


# ---- chat ----------------------------------------------------------------------------------------
def test_chat_equals_the_engine(server):
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
    same = server.chat(messages, temperature=0, max_completion_tokens=12)
    assert same["choices"] == answer["choices"]
    messages[0]["role"] = "developer"
    same = server.chat(messages, temperature=0, max_tokens=12)
    assert same["choices"] == answer["choices"]


def test_chat_stream_equals_whole_response(server):
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
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for i in range(2):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["finish_reason"] == whole["choices"][i]["finish_reason"]
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == whole["choices"][i]["message"]["content"]
        got = [t for c in mine if c["logprobs"] for t in c["logprobs"]["content"]]
        assert len(got) > 5
        assert rounded(got) == rounded(whole["choices"][i]["logprobs"]["content"])
    first = whole["choices"][0]["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) == 2
    assert first["top_logprobs"][0]["logprob"] >= first["top_logprobs"][1]["logprob"]
    assert all(
        bytes(t["bytes"]).decode("utf-8", "replace") == t["token"]
        or t["token"].startswith("bytes:")
        for t in got
    )


def test_tools_are_refused_without_a_tool_template(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    message = [{"role": "user", "content": "hi"}]
    orphan = [{"role": "tool", "content": "x", "tool_call_id": "1"}]
    for body, param in (
        ({"messages": message, "tools": tools}, "tools"),
        ({"messages": message, "tool_choice": "required"}, "tools"),
        ({"messages": orphan}, "messages"),
    ):
        assert server.error(400, "/v1/chat/completions", **body)["param"] == param


def test_model_without_some_features():
    """Models without some features refuse the requests that need them.

    The first model has no fill-in-the-middle tokens, the second no tokenizer and no experts.
    """
    with Running(lambda: llm(tok=tok(fim=False))) as s:
        s.wait_ready()
        error = s.error(400, prompt="a", suffix="b")
        assert error["param"] == "suffix" and "fill-in-the-middle" in error["message"]
    with Running(lambda: llm("llama", tok=None)) as s:
        s.wait_ready()
        r = s.post("/v1/completions", prompt=[5, 6, 7], max_tokens=3, temperature=0, logprobs=1)
        [choice] = r.json()["choices"]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"][0].startswith("token_id:")
        assert r.json()["usage"]["completion_tokens"] == 3
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
        assert s.client.get("/tokenizer_info").status_code == 400
        assert len(s.post("/v1/embeddings", input=[5, 6]).json()["data"][0]["embedding"]) == 32


# ---- refusals ------------------------------------------------------------------------------------
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
        ({"prompt": "a", "max_tokens": -2}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "top_p": -0.1}, "top_p"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": [5], "suffix": "b", "echo": True}, "echo"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": "a", "min_tokens": 50, "max_tokens": 5}, "min_tokens"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "a", "regex": "a", "grammar": "b"}, "grammar"),
        ({}, "prompt"),
    ],
)
def test_refusal_names_the_field(server, body, param):
    error = server.error(400, **body)
    assert error["type"] == "invalid_request_error" and error["message"]
    if param:
        assert error["param"] == param


# ---- structured output ---------------------------------------------------------------------------
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


def test_structured_output_refusals(server):
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
