"""The tables of client_inputs against one server, and the shapes of streamed replies.

The model is random, so the tests of replies replace the sampler: it returns the tokens of a text.
"""

import json

import pytest

import client_inputs as inputs
from lamoe.text.tokenizer import Tokenizer
from tiny_server import Running, connect, llm, tok

JSON = {"content-type": "application/json"}
TAG = "<｜fim▁hole｜>"  # a special token that ends no reply by itself


@pytest.fixture(scope="module")
def server():
    tokenizer = Tokenizer(tok().inner, eos=tok()._eos, chat_template=inputs.SPEAK)
    with Running(lambda: llm(tok=tokenizer, speculate=0)) as s:
        yield s.wait_ready()


def send(server, path, body, headers=None):
    """Send a body of bytes as it is, and one of fields with what its route needs."""
    if isinstance(body, dict):
        if path.startswith(inputs.COMPLETE):
            body = {"prompt": "the cat", "max_tokens": 1} | body
        elif path.startswith("/v1") and not path.startswith(inputs.EMBED):
            limit = {} if "max_completion_tokens" in body else {"max_tokens": 2}
            body = {"messages": [inputs.USER]} | limit | body
        body = json.dumps(body).encode()
    return server.client.post(path, content=body, headers=JSON | (headers or {}))


# ---- the tables ----------------------------------------------------------------------------------
def test_tables_are_large():
    """The issue asks for 40 inputs of each kind."""
    assert min(map(len, (inputs.RENDERED, inputs.ACCEPTED, inputs.ERRORS))) >= 40


@pytest.mark.parametrize("name", inputs.RENDERED)
def test_conversations_reach_the_model_whole(server, name):
    messages, want = inputs.RENDERED[name]
    for generate, end in ((False, ""), (True, "<assistant>")):
        body = {"messages": messages, "add_generation_prompt": generate}
        r = server.post(inputs.TOKENIZE, **body)
        assert r.status_code == 200, r.text
        assert server.post(inputs.DETOKENIZE, tokens=r.json()["tokens"]).json() == {
            "prompt": want + end
        }


@pytest.mark.parametrize("name", inputs.ACCEPTED)
def test_valid_requests_are_answered(server, name):
    r = send(server, *inputs.ACCEPTED[name])
    assert r.status_code == 200, r.text


@pytest.mark.parametrize("name", inputs.ERRORS)
def test_errors_say_what_is_wrong(server, name):
    path, body, says, *headers = inputs.ERRORS[name]
    r = send(server, path, body, *headers)
    assert 400 <= r.status_code < 500 and set(r.json()) == {"error"}
    assert says in r.json()["error"]["message"]


def test_a_request_line_with_the_whole_url(server):
    body = b'{"prompt": "a", "max_tokens": 1}'
    lines = (
        f"POST {server.url}/v1/completions HTTP/1.1",
        f"host: {server.url.removeprefix('http://')}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    )
    with connect(server.url) as s:
        s.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)
        assert s.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_an_offer_of_http2_is_not_logged(server, caplog):
    """Java's client sends it with every first request."""
    r = send(server, *inputs.ACCEPTED["asks for HTTP/2 (Java)"])
    assert r.status_code == 200 and "upgrade" not in r.headers
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_places_of_the_key():
    with Running(api_key="k1") as s:
        for headers in (
            {"authorization": "Bearer k1"},
            {"authorization": "bearer  k1"},
            {"api-key": "k1"},
            {"x-api-key": "k1"},
            {"authorization": "Basic eDp5", "x-api-key": "k1"},
        ):
            assert s.client.get("/lamoe/stats", headers=headers).status_code != 401, headers
        for headers, says in (
            ({}, "needs an API key"),
            ({"authorization": "k1"}, "needs an API key"),
            ({"authorization": "Basic k1"}, "needs an API key"),
            ({"authorization": "Bearer k2"}, "is not valid"),
            ({"authorization": "Bearer k2", "api-key": "k1"}, "is not valid"),
            ({"api-key": "k2"}, "is not valid"),
        ):
            r = s.client.get("/lamoe/stats", headers=headers)
            assert r.status_code == 401 and says in r.json()["error"]["message"], headers


# ---- replies -------------------------------------------------------------------------------------
@pytest.fixture
def reply(server, monkeypatch):
    """Return a function that gets a reply of a given text, whole and as the objects of a stream."""
    tokenizer, to_sample = server.service.tokenizer, []
    monkeypatch.setattr("lamoe.engine.next_token.sample", lambda *args, **kwargs: to_sample.pop(0))

    def reply(text, path=inputs.CHAT, **body):
        ids = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]
        what = {"messages": [inputs.USER]} if path == inputs.CHAT else {"prompt": "hi"}
        body = what | body
        to_sample[:] = ids
        r = server.post(path, **body)
        assert r.status_code == 200, r.text
        to_sample[:] = ids
        return r.json(), server.events(path, **body)

    return reply


def texts(chunks):
    return [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"]]


# stop strings and the text before the first of them
STOPPED = [
    ("hello world", "b", "hello world"),
    ("hello world", "lo w", "hel"),  # over several tokens
    ("hello world", ["x", "wor", "w"], "hello "),
    ("hello", "hello", ""),
    ("né 👨‍👩‍👧 b", "é", "n"),  # a character of two tokens
    ("né 👨‍👩‍👧 b", "👩", "né 👨‍"),  # in the middle of an emoji of several characters
    ("a\n\nb", "\n\n", "a"),
    (f"hello{TAG}world", TAG, "hello"),  # a special token, which is not in the text
    (f"hello{TAG}world", "x", "helloworld"),
    (f"né{TAG}", ["z", TAG], "né"),
]


@pytest.mark.parametrize("text, stop, want", STOPPED, ids=str)
def test_stop_strings_cut_the_text(reply, text, stop, want):
    whole, chunks = reply(text, stop=stop)
    assert whole["choices"][0]["message"]["content"] == want
    assert "".join(t or "" for t in texts(chunks)) == want
    for last in (whole, chunks[-1]):
        assert last["choices"][0]["finish_reason"] == "stop"


def test_the_shape_of_a_stream(reply):
    """The role comes first, the reason last; no text is sent in halves of a character."""
    text = "né 👨‍👩‍👧 日本 b"
    whole, chunks = reply(text, stream_options=None)
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": text,
        "refusal": None,
    }
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert all(set(d) == {"content"} and d["content"] for d in deltas[1:-1])
    assert "".join(d.get("content", "") for d in deltas) == text and "\ufffd" not in text
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert {c["choices"][0]["index"] for c in chunks} == {0}
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", chunks[0]["created"], "tiny")
    }
    assert all("usage" not in c for c in chunks)


def test_a_reply_that_continues_keeps_its_blanks(server, reply):
    fields = {"messages": [inputs.USER, inputs.assistant("The")], "continue_final_message": True}
    whole, chunks = reply(" cat", **fields)
    assert whole["choices"][0]["message"]["content"] == "".join(texts(chunks)[:-1]) == " cat"
    prompt = server.post(inputs.TOKENIZE, prompt="<user>hi<assistant>The").json()
    assert whole["usage"]["prompt_tokens"] == prompt["count"]


def test_usage_in_a_stream(server):
    options = {"messages": [inputs.USER], "max_tokens": 3, "n": 2, "ignore_eos": True}
    chunks = server.events(inputs.CHAT, **options, stream_options={"include_usage": True})
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    by_index = [
        [c for c in chunks if c["choices"] and c["choices"][0]["index"] == i] for i in (0, 1)
    ]
    for own in by_index:
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        assert own[-1]["choices"][0]["finish_reason"] == "length"
    first = server.events(inputs.COMPLETE, prompt="hi", max_tokens=2, ignore_eos=True)
    assert [c["choices"][0]["finish_reason"] for c in first][-1] == "length"


def test_logprobs_of_a_character_of_several_tokens(reply):
    whole, chunks = reply("né", logprobs=True, top_logprobs=2)
    content = whole["choices"][0]["logprobs"]["content"]
    streamed = [
        t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [t["bytes"] for t in streamed] == [t["bytes"] for t in content]
    assert bytes(b for t in content[:3] for b in t["bytes"]).decode() == "né"
    assert [t["token"] for t in content[:3]] == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 for t in content)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    "text, content, num_calls",
    [
        ("plain", "plain", 0),
        (CALL, None, 1),
        (f"I look. {CALL}\n{CALL}", "I look.", 2),
        ("<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", 0),
        ("a <tool_", "a <tool_", 0),
    ],
)
def test_calls_in_a_reply(reply, text, content, num_calls):
    whole, chunks = reply(text, tools=[inputs.TOOL])
    choice = whole["choices"][0]
    assert choice["message"]["content"] == content
    assert "".join(t or "" for t in texts(chunks)) == (content or "")
    found = choice["message"].get("tool_calls") or []
    streamed = [t for c in chunks for t in c["choices"][0]["delta"].get("tool_calls", ())]
    assert [t["index"] for t in streamed] == list(range(num_calls))
    for c in (*found, *streamed):
        assert c["type"] == "function" and c["id"].startswith("call_")
        assert c["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    reason = "tool_calls" if num_calls else "stop"
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == reason
    assert len(found) == num_calls
