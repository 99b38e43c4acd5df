"""Tests with the unchanged `openai` client, sync and async: requests, streams and errors."""

import asyncio
import json

import openai
import pytest

from lamoe.text.tokenizer import Tokenizer
from tiny_server import NAME, TOOL_TEMPLATE, Running, llm, tok

KEY = "sk-test-0123456789"


@pytest.fixture(scope="module")
def server():
    with Running(api_key=KEY) as s:
        s.wait_ready()
        yield s


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as c:
        yield c


def test_completions_whole_and_streamed(client):
    got = client.completions.create(
        model=NAME, prompt="the cat", max_tokens=8, temperature=0, logprobs=2, stop=["never there"]
    )
    assert got.choices[0].finish_reason == "length"
    assert len(got.choices[0].logprobs.token_logprobs) == 8
    assert got.usage.completion_tokens == 8
    chunks = list(
        client.completions.create(
            model=NAME,
            prompt="the cat",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == got.choices[0].text
    assert chunks[-1].usage.total_tokens == got.usage.total_tokens


def test_chat_whole_and_streamed(client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    got = client.chat.completions.create(
        model=NAME,
        messages=messages,
        max_completion_tokens=8,
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    assert len(got.choices) == 2
    assert got.choices[0].message.content == got.choices[1].message.content
    assert got.usage.prompt_tokens_details.cached_tokens is not None
    assert len(got.choices[0].logprobs.content[0].top_logprobs) == 2
    text = "".join(
        c.choices[0].delta.content or ""
        for c in client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=8, temperature=0, stream=True
        )
    )
    assert text == got.choices[0].message.content
    stop = text[3:5]
    with client.chat.completions.stream(  # the client's helper that joins deltas
        model=NAME, messages=messages, max_tokens=8, temperature=0, stop=stop
    ) as stream:
        joined = stream.get_final_completion().choices[0].message.content
        assert joined == text[: text.index(stop)]
    reply = got.choices[
        0
    ].message.model_dump()  # the reply is sent back to the server with all its fields
    longer = [*messages, reply, {"role": "user", "content": "go on"}]
    again = client.chat.completions.create(model=NAME, messages=longer, max_tokens=2)
    assert again.choices[0].finish_reason
    extra = {"top_k": 1, "min_p": 0.1}
    extended = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=3, extra_body=extra
    )
    assert extended.choices[0].message.content is not None


def test_raw_headers_carry_the_request_id(client):
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=2
    )
    assert raw.headers["x-request-id"] == raw.parse().id == raw.parse()._request_id


def test_models_and_embeddings(client):
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    got = client.embeddings.create(model=NAME, input=["a", "the cat"])  # the client requests base64
    plain = client.embeddings.create(model=NAME, input="the cat", encoding_format="float")
    assert got.data[1].embedding == pytest.approx(plain.data[0].embedding, rel=1e-5)
    assert len(plain.data[0].embedding) == 32


def test_errors_become_exceptions_of_the_client(client, server):
    with pytest.raises(openai.NotFoundError) as e:
        client.completions.create(model="gpt-9", prompt="a")
    assert e.value.code == "model_not_found" and e.value.request_id.startswith("cmpl-")
    with pytest.raises(openai.BadRequestError, match="unknown field 'prefill'"):
        client.completions.create(model=NAME, prompt="a", extra_body={"prefill": "b"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0).models.list()


def test_concurrent_async_requests_equal_sync_requests(client, server):
    prompts = ["the cat", "a dog", "rain", "one bird sang"]
    want = [
        client.completions.create(model=NAME, prompt=p, max_tokens=10, seed=7).choices[0].text
        for p in prompts
    ]

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as c:
            whole = asyncio.gather(
                *(
                    c.completions.create(model=NAME, prompt=p, max_tokens=10, seed=7)
                    for p in prompts
                )
            )

            async def streamed(p):
                return "".join(
                    [
                        e.choices[0].text
                        async for e in await c.completions.create(
                            model=NAME, prompt=p, max_tokens=10, seed=7, stream=True
                        )
                    ]
                )

            streams = asyncio.gather(*map(streamed, prompts))
            return [r.choices[0].text for r in await whole], await streams

    assert asyncio.run(main()) == (want, want)


# ---- tool calls ----------------------------------------------------------------------------------
MESSAGES = [{"role": "user", "content": "Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": n, "description": "d", "parameters": PARAMETERS}}
    for n in ("weather", "time")
]
CALL_REPLY = (
    "I look.\n<｜tool▁calls▁begin｜>"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n"
    "```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)


@pytest.fixture
def ask(monkeypatch):
    """Return a function that sends a chat with tools.

    The model is random, so the test replaces the sampler. It returns the tokens of `reply` one by
    one.
    """
    tokenizer, to_sample = tok(tools=True), []
    assert tokenizer.chat_template == TOOL_TEMPLATE
    monkeypatch.setattr("lamoe.engine.next_token.sample", lambda *args, **kwargs: to_sample.pop(0))
    with (
        Running(lambda: llm(tok=tokenizer, speculate=0)) as s,
        openai.OpenAI(base_url=f"{s.wait_ready().url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(reply=CALL_REPLY, messages=MESSAGES, **options):
            to_sample[:] = tokenizer.encode(reply, allow_special=True) + [tokenizer.eos_id]
            return client.chat.completions.create(
                model=NAME, messages=messages, tools=TOOLS, **options
            )

        yield ask


def test_tool_calls(ask):
    choice = ask().choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
    assert calls == [("weather", '{"city": "Rome"}'), ("time", "{}")]
    assert len(ask(parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert ask(tool_choice="none").choices[0].message.tool_calls is None


def test_streamed_tool_calls(ask):
    chunks = list(ask(stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I look."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "weather", '{"city": "Rome"}'),
        (1, "time", "{}"),
    ]


def test_tool_result(ask):
    reply = ask().choices[0].message
    call_id = reply.tool_calls[0].id
    result = {"role": "tool", "tool_call_id": call_id, "content": "20 degrees"}
    final = ask("Mild.", [*MESSAGES, reply.model_dump(exclude_none=True), result]).choices[0]
    assert (final.message.content, final.finish_reason) == ("Mild.", "stop")


def test_named_templates_and_tool_history():
    """A request with tools uses the template "tool_use", and earlier calls are written once."""
    writes = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    named = Tokenizer(
        tok().inner,
        chat_template={
            "default": "{% for m in messages %}{{ m.content }}{% endfor %}",
            "tool_use": "<tool_call>{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
            + writes
            + "{% endfor %}",
        },
    )
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "Hi"}]
    history = [
        *messages,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    with Running(lambda: llm(tok=named)) as s:
        post, tools = s.wait_ready().client.post, [{"type": "function", "function": {"name": "f"}}]
        body = {"messages": messages, "tools": tools, "max_tokens": 2}
        assert post("/v1/chat/completions", json=body).status_code == 200

        def rendered(**body):
            tokens = post("/tokenize", json=body).json()["tokens"]
            return post("/detokenize", json={"tokens": tokens}).json()["prompt"]

        assert rendered(messages=messages) == "Hi"
        assert rendered(messages=messages, tools=tools) == f"<tool_call>{json.dumps(tools)}Hi"
        assert rendered(messages=history) == '<tool_call>nullHi{"a": 1}42'
