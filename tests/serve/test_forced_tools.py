"""Tests of tool_choice: forced calls have a function of the list and valid arguments.

The model is random, so only the grammar can make its replies valid.
"""

import asyncio
import functools
import json

import jsonschema
import openai
import pydantic
import pytest
import tokenizers
from tokenizers import decoders, normalizers

from lamoe.serve import wire
from lamoe.serve.prompts import chat_prompt
from lamoe.text import tokenizer
from lamoe.text.forced_calls import ForcedCalls, ForcedStream, spelling_of
from tiny_server import NAME, TOOL_TEMPLATE, TOOL_TOKENS, WORDS, Running, llm

MESSAGES = [{"role": "user", "content": "Rome?"}]
CHATML = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# name of the form: chat template, further control tokens
FORMS = {
    "deepseek": (TOOL_TEMPLATE, TOOL_TOKENS),
    "deepseek-v3.1": (TOOL_TEMPLATE.replace("```json", ""), TOOL_TOKENS),
    "tags": (CHATML, ()),
    "tag tokens": (CHATML, ("<tool_call>", "</tool_call>")),
    "unknown": ("{{ tools | tojson }}{{ messages | tojson }}\n", ()),
    "no tools": (None, ()),
    "sentencepiece": (CHATML, ()),
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Bern"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
}
SCHEMAS = {"weather": WEATHER, "time": None, "stop.all": {}}


def function(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [function(*item) for item in SCHEMAS.items()]
NAMED = {"type": "function", "function": {"name": "weather"}}


def sentencepiece(template):
    """Make a vocabulary of bytes, which puts a space before every text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "{", "▁{"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab, [("▁", "{")], byte_fallback=True, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.add_special_tokens(["<s>", "</s>"])
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer.Tokenizer(inner, bos="<s>", eos="</s>", chat_template=template)


@functools.cache
def vocabulary(form):
    template, special = FORMS[form]
    if form == "sentencepiece":
        return sentencepiece(template)
    t = tokenizer.train([WORDS * 3], 300, (*tokenizer.SPECIAL_TOKENS[:2], *special))
    t.chat_template = template
    return t


@pytest.fixture(scope="module", params=FORMS)
def client(request):
    with (
        Running(lambda: llm(tok=vocabulary(request.param))) as s,
        openai.OpenAI(base_url=f"{s.wait_ready().url}/v1", api_key="none", max_retries=0) as c,
    ):
        yield c
        assert s.idle()


def ask(client, **options):
    options = {"tools": TOOLS, "max_tokens": 300, "seed": 3, **options}
    return client.chat.completions.create(model=NAME, messages=MESSAGES, **options)


def calls_of(choice) -> list[tuple[str, str]]:
    assert choice.message.content is None
    return [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]


def joined(chunks) -> dict:
    """Return {choice: [[name, arguments]]} of a stream, and check its order."""
    calls = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        for d in choice.delta.tool_calls or []:
            mine = calls.setdefault(choice.index, [])
            if d.index == len(mine):
                assert d.id and d.type == "function" and d.function.name
                mine.append([d.function.name, ""])
            mine[d.index][1] += d.function.arguments
    return calls


@pytest.mark.parametrize(
    "choice, more, reason, names",
    [
        (NAMED, {}, "stop", {"weather"}),
        ({"type": "function", "name": "time"}, {}, "stop", {"time"}),
        ("required", {}, "tool_calls", set(SCHEMAS)),
        ("required", {"n": 3, "logprobs": True}, "tool_calls", set(SCHEMAS)),
        ("required", {"tools": TOOLS[1:2], "max_tokens": 6}, "tool_calls", {"time"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
            {},
            "tool_calls",
            {"weather"},
        ),
        # These must not cut or prolong a call.
        (NAMED, {"stop": ['"', ":"], "extra_body": {"min_tokens": 200}}, "stop", {"weather"}),
    ],
    ids=["named", "flat", "required", "n", "one tool", "allowed", "stop"],
)
def test_forced_calls_are_valid(client, choice, more, reason, names):
    reply = ask(client, tool_choice=choice, **more)
    found = {}
    for c in reply.choices:
        [(name, arguments)] = calls_of(c)
        assert c.finish_reason == reason and name in names
        value = json.loads(arguments)
        if name == "weather":
            jsonschema.validate(value, WEATHER)
            assert set(value) == {"city", "days"}
        else:
            assert value == {}
        assert len(c.message.tool_calls[0].id) > 9
        found[c.index] = [[name, arguments]]
        if "logprobs" in more:
            assert len(c.logprobs.content) > 2
    assert joined(ask(client, tool_choice=choice, stream=True, **more)) == found


@pytest.mark.parametrize("client", ["tags", "no tools"], indirect=True)
def test_a_cut_call_says_so(client):
    options = dict(tool_choice=NAMED, max_tokens=4)
    [choice] = ask(client, **options).choices
    [(name, arguments)] = calls_of(choice)
    assert choice.finish_reason == "length" and name == "weather"
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    chunks = list(ask(client, stream=True, **options))
    assert joined(chunks) == {0: [[name, arguments]]}
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("client", ["deepseek", "tag tokens", "unknown"], indirect=True)
def test_several_calls(client):
    options = dict(tool_choice="required", parallel_tool_calls=True, max_tokens=200)
    for seed in range(20):  # the number of calls is random
        [choice] = ask(client, seed=seed, **options).choices
        calls = calls_of(choice)
        whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
        for name, arguments in whole:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name] or {"maxProperties": 0})
        if len(calls) > 1:
            break
    assert len(calls) > 1
    chunks = ask(client, seed=seed, stream=True, **options)
    assert joined(chunks)[0] == [list(call) for call in calls]
    [choice] = ask(client, **{**options, "parallel_tool_calls": False}).choices
    assert len(calls_of(choice)) == 1


@pytest.mark.parametrize("client", ["deepseek", "tags", "unknown"], indirect=True)
def test_a_call_or_an_answer_in_the_response_format(client):
    """A response_format does not forbid the calls of tool_choice auto."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    kinds = set()
    for seed in range(40):
        options = dict(response_format=form, seed=seed, temperature=1.5, max_tokens=200)
        try:
            [choice] = ask(client, **options).choices
        except openai.BadRequestError as e:
            assert e.code == "unsupported"  # without a known form of calls
            return
        kinds.add(choice.finish_reason)
        for call in choice.message.tool_calls or []:
            schema = SCHEMAS[call.function.name] or {"maxProperties": 0}
            jsonschema.validate(json.loads(call.function.arguments), schema)
        if choice.finish_reason == "stop":
            assert choice.message.content in ('"yes"', '"no"')
        if kinds >= {"stop", "tool_calls"}:
            return
    raise AssertionError(kinds)


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    hot: bool
    days: list[pydantic.conint(ge=0, le=9)] = pydantic.Field(max_length=2)


@pytest.mark.parametrize("client", ["tags"], indirect=True)
def test_parsed_by_the_client(client):
    tool = openai.pydantic_function_tool(Weather)
    named = {"type": "function", "function": {"name": "Weather"}}
    reply = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, tools=[tool], tool_choice=named, max_tokens=300, seed=1
    )
    message = reply.choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
    with client.chat.completions.stream(
        model=NAME, messages=MESSAGES, tools=[tool], tool_choice=named, max_tokens=300, seed=1
    ) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.parsed_arguments == (
        message.tool_calls[0].function.parsed_arguments
    )


@pytest.mark.parametrize("client", ["tags"], indirect=True)
@pytest.mark.parametrize(
    "options, param, says",
    [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'time'"),
        ({"response_format": {"type": "json_object"}}, "tool_choice", "response_format"),
        ({"extra_body": {"regex": "a"}}, "tool_choice", "regex"),
        ({"tools": openai.NOT_GIVEN}, "tools", "no tools"),
        ({"tools": [function("f", {"not": {}})]}, "tools[0].function.parameters", "not"),
        (
            {"tools": [function("f", {"type": "array"})]},
            "tools[0].function.parameters",
            "an object",
        ),
    ],
)
def test_contradictions_are_refused(client, options, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as e:
        ask(client, **{"tool_choice": "required", **options})
    assert e.value.param == param


def test_the_model_sees_the_tools():
    """A template that does not read tools gets them in the first message."""
    with Running() as s:
        s.wait_ready()
        options = dict(messages=MESSAGES, tools=TOOLS, tool_choice=NAMED)
        got = s.post("/v1/chat/completions", **options, max_tokens=300).json()["usage"]
        plain = s.chat("Rome?", max_tokens=1)["usage"]
        described = sum(len(json.dumps(tool)) for tool in TOOLS)
        assert got["prompt_tokens"] > plain["prompt_tokens"] + described / 4
        # not forced: refused, because free text has no known form of calls
        error = s.error(400, "/v1/chat/completions", messages=MESSAGES, tools=TOOLS)
        assert error["code"] == "unsupported" and "required" in error["message"]
        neutral = dict(tools=TOOLS, tool_choice="none", temperature=0, max_tokens=5)
        assert (
            s.chat("a", **neutral)["choices"] == s.chat("a", temperature=0, max_tokens=5)["choices"]
        )


def test_the_call_begins_after_the_prompt():
    """A call is no part of the reasoning, and does not stick to the word before it."""
    t = tokenizer.train([WORDS], 280, (*tokenizer.SPECIAL_TOKENS[:2], "<|end|>"))
    body = wire.ChatRequest.model_validate({"messages": MESSAGES, "tools": TOOLS})
    with Running(lambda: llm(tok=t)) as s:
        s.wait_ready()
        for ending, lead in (
            ("assistant\n", ""),
            ("Assistant:", " "),
            ("assistant\n<think>\n", "\n</think>\n\n"),
            ("<|end|>", ""),
        ):
            t.chat_template = "{{ tools }}{{ messages[0].content }}{{ '" + ending + "' }}"
            forced = ForcedCalls(spelling_of(t.chat_template), ("weather",))
            work = chat_prompt(s.service, body.messages, body.tools, forced=forced)
            ids = asyncio.run_coroutine_threadsafe(work, s.serving.loop).result()
            text = t.decode(ids, skip_special=False)
            assert text.endswith(f"Rome?{ending}{lead}{forced.head}")


@pytest.mark.parametrize("template", [t for t, _ in FORMS.values()], ids=FORMS)
def test_every_prefix_of_a_reply_is_read_alike_in_pieces(template):
    spelling = spelling_of(template)
    arguments = ['{"a": "}\\n</tool_call> <｜tool▁call▁end｜>"}', "{}"]
    reply = (
        "weather"
        + spelling.middle
        + arguments[0]
        + (spelling.end + spelling.between + "time" + spelling.middle + arguments[1])
        + (spelling.end + spelling.close)
    )
    for names, several, begun, text in (
        (("weather", "time"), True, "", reply),
        (("weather", "time"), False, "", "weather" + spelling.middle + arguments[0]),
        (("weather",), False, "", " " + arguments[0]),
        (("weather",), False, ' {"a":', arguments[0].removeprefix('{"a":')),
    ):
        forced = ForcedCalls(spelling, names, several, begun)
        whole = forced.parse(text)
        assert whole[0] == ("weather", arguments[0]) and len(whole) == 1 + several
        for stop in range(1, len(text) + 1):
            stream, got = ForcedStream(forced), []
            for char in text[:stop]:
                got += stream.add(char)
            got += stream.end()
            calls = {}
            for d in got:
                name, found = calls.get(d["index"], (d["function"].get("name"), ""))
                calls[d["index"]] = (name, found + d["function"]["arguments"])
            assert list(calls.values()) == forced.parse(text[:stop])
