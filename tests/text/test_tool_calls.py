"""Tests of tool calls: rendering them with chat templates, and parsing them from replies.

Replies have arbitrary content and are streamed in arbitrary chunks.
"""

import itertools
import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lamoe.text import chat_template
from lamoe.text.tool_calls import DEEPSEEK, MAX_CALLS, TAGS, Splitter, form_of, parse

# One template per form of tool calls. The first does not read `tools`, like that of DeepSeek-V3.
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ m.content }}"
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content or '' }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    "{% for c in m.tool_calls %}{{ '' if loop.first else '\n' }}<｜tool▁call▁begin｜>"
    "{{ c.type }}<｜tool▁sep｜>{{ c.function.name }}\n"
    "```json\n{{ c.function.arguments }}\n```<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
TAGS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson "
    '}}{% endfor %}\n</tools>\nAnswer with <tool_call>\n{"name": ..., "arguments": ...}\n'
    "</tool_call>.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role "
    "== 'tool' else m.role }}\n{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% else %}{{ m.content or '' }}{% endif %}{% for c in m.tool_calls or [] "
    '%}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | "
    "tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather <now> & "soon" in a city: 中',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALLS = [
    {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'},
    },
    {
        "id": "call_2",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Zürich </tool_call>"}'},
    },
]
CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "12 C", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "It is 12 C."},
    {"role": "user", "content": "Thanks"},
]
FORMS = pytest.mark.parametrize("form", [DEEPSEEK, TAGS], ids=["deepseek", "tags"])


def said(calls: list[dict]) -> list[tuple[str, dict]]:
    """Return (name, arguments) of calls, and check their structure."""
    for c in calls:
        assert (
            set(c) == {"id", "type", "function"}
            and re.fullmatch("call_[0-9a-f]{24}", c["id"])
            and c["type"] == "function"
            and set(c["function"]) == {"name", "arguments"}
        )
        c["function"]["arguments"].encode()
    assert len({c["id"] for c in calls}) == len(calls)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def written(form, name: str, arguments: str) -> str:
    if form is TAGS:
        return (
            f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        )
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n"
        f"```json\n{arguments}\n```<｜tool▁call▁end｜>"
    )


# ---- templates ----
@pytest.mark.parametrize(
    "template, tools", [(DEEPSEEK_TEMPLATE, None), (TAGS_TEMPLATE, TOOLS), (TAGS_TEMPLATE, None)]
)
def test_rendering_is_that_of_transformers(template, tools):
    variables = dict(bos_token="<B>", eos_token="<E>", add_generation_prompt=True)
    text, mark = chat_template.render(template, CHAT, tools=tools, **variables)
    (expected,), _ = render_jinja_template([CHAT], tools=tools, chat_template=template, **variables)
    assert text.replace(mark, "") == expected and (tools is None or "Weather <now> & " in text)


@pytest.mark.parametrize("template, form", [(DEEPSEEK_TEMPLATE, DEEPSEEK), (TAGS_TEMPLATE, TAGS)])
def test_rendered_calls_are_parsed_back(template, form):
    text, mark = chat_template.render(template, CHAT[:2], bos_token="", eos_token="")
    assert form_of(template) is form
    content, calls = parse(form, text.replace(mark, ""))
    assert (
        said(calls)
        == [("get_weather", {"city": "Bern"}), ("get_weather", {"city": "Zürich </tool_call>"})]
        and "tool▁call" not in content
        and "tool_call" not in content
    )


def test_tools_are_refused_if_the_template_ignores_them():
    with pytest.raises(ValueError, match="does not know tools"):
        chat_template.render(DEEPSEEK_TEMPLATE, CHAT, tools=TOOLS, bos_token="", eos_token="")
    with pytest.raises(ValueError, match="does not know tools"):
        chat_template.render(
            "{# tools #}some tools{% for m in messages %}{{ m.content }}{% set tools = 1 %}{% "
            "endfor %}",
            CHAT[:1],
            tools=TOOLS,
        )
    for tools in ("get_weather", TOOLS[0], [1], [TOOLS]):
        with pytest.raises(ValueError, match="tools must be a list of objects"):
            chat_template.render(TAGS_TEMPLATE, CHAT, tools=tools)
    with pytest.raises(ValueError, match="does not parse"):
        chat_template.render("{% tools", CHAT[:1], tools=TOOLS)


def test_each_form_of_tool_calls_is_parsed():
    assert (
        form_of(None) is None is form_of("{{ messages }}")
        and form_of("{{ tools }}[TOOL_CALLS]") is None
    )
    assert form_of(chat_template.V2_TEMPLATE) is None


# ---- replies ----
ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.text(max_size=8),
            st.sampled_from(
                [
                    "</tool_call>",
                    "<tool_call>",
                    "<｜tool▁call▁end｜>",
                    "```",
                    '{"name": "x", "arguments": {}}',
                    "\\",
                    '"',
                ]
            ),
        ),
        lambda v: st.lists(v, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)
CALL = st.tuples(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,20}", fullmatch=True), ARGUMENTS)
PIECES = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            *DEEPSEEK.marks,
            *TAGS.marks,
            "</tool_call>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁end｜>",
            "function<｜tool▁sep｜>",
            "<｜tool▁sep｜>",
            "f\n```json\n",
            "{",
            '{"name": "f"}',
            "{}",
            "```",
            "\n",
            " ",
            '{"name": "f", "arguments": {"a": NaN}}',
            '{"name": 1, "arguments": {}}',
            '{"name": "f", "arguments": []}',
            "[" * 50,
        ]
    ),
    CALL.map(lambda c: written(TAGS, c[0], json.dumps(c[1]))),
    CALL.map(lambda c: written(DEEPSEEK, c[0], json.dumps(c[1]))),
)


@FORMS
@given(calls=st.lists(CALL, min_size=1, max_size=4), ascii=st.booleans())
def test_valid_calls_are_parsed(form, calls, ascii):
    text = "\n".join(
        written(form, name, json.dumps(arguments, ensure_ascii=ascii)) for name, arguments in calls
    )
    if form is DEEPSEEK:
        text = f"<｜tool▁calls▁begin｜>{text}<｜tool▁calls▁end｜>"
    content, found = parse(form, "Let me see.\n\n" + text)
    assert content == "Let me see." and said(found) == calls


@FORMS
@given(pieces=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_streamed_parts_equal_the_whole_reply(form, pieces, cuts):
    """For any division into chunks, Splitter gives the same text and calls as `parse`.

    Text that was shown is never taken back. A reply without a valid call is unchanged.
    """
    text, splitter, shown = "".join(pieces), Splitter(form), ""
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for a, b in itertools.pairwise(edges):
        shown += splitter.add(text[a:b])
        assert text.startswith(shown)
    rest, streamed = splitter.end()
    content, calls = parse(form, text)
    assert shown + rest == content and said(streamed) == said(calls)
    assert calls or content == text


@FORMS
def test_text_is_shown_as_soon_as_it_cannot_be_a_call(form):
    splitter = Splitter(form)
    assert (
        splitter.add("Hello <") == "Hello"
        and splitter.add("b> and ") == " <b> and"
        and splitter.add("more") == " more"
    )
    assert (
        splitter.add("\n" + form.marks[-1][:5])
        == ""
        == splitter.add(form.marks[-1][5:] + "junk")
        == splitter.add("later")
    )
    assert splitter.end() == ("\n" + form.marks[-1] + "junklater", [])


def test_the_forms_of_several_models():
    newer = (
        "<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"zone": "UTC"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    )
    assert said(parse(DEEPSEEK, "So: " + newer)[1]) == [("get_time", {"zone": "UTC"}), ("now", {})]
    assert said(
        parse(TAGS, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>')[1]
    ) == [("f", {"a": 1})]
    assert said(parse(TAGS, '<tool_call>{"name": "f"}</tool_call>')[1]) == [("f", {})]
    # EOS came before the closing tag.
    assert said(parse(TAGS, 'ok <tool_call>\n{"name": "f", "arguments": {}}')[1]) == [("f", {})]
    content, calls = parse(
        TAGS,
        'one <tool_call>{"name": "f"}</tool_call> two <tool_call>{"name": "g"}</tool_call> three',
    )
    assert content == "one\ntwo\nthree" and [name for name, _ in said(calls)] == ["f", "g"]


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no"}',
        '{"name": 5, "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "a b", "arguments": {}}',
        '{"name": "../x", "arguments": {}}',
        '{"name": "f\\ud800", "arguments": {}}',
        "[]",
        "",
        "f()",
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": ' + '{"a":' * 50_000,
        '{"name": "f", "arguments": {}} extra',
        '{"name": "' + "f" * 200 + '", "arguments": {}}',
        '{"name": "f", "arguments": "' + "[" * 50_000 + '"}',
    ],
    ids=lambda t: t[:40],
)
def test_invalid_calls_stay_text(inner):
    text = f"Look: <tool_call>{inner}</tool_call>"
    assert parse(TAGS, text) == (text, [])
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    content, calls = parse(TAGS, text + good)
    assert said(calls) == [("g", {})] and content == text


def test_a_call_inside_an_argument_is_an_argument():
    value = "<｜tool▁call▁begin｜>rm<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    assert said(
        parse(DEEPSEEK, written(DEEPSEEK, "echo", json.dumps({"text": value}, ensure_ascii=False)))[
            1
        ]
    ) == [("echo", {"text": value})]


def test_an_unpaired_surrogate_is_serialised():
    ((_, arguments),) = said(
        parse(TAGS, '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>')[1]
    )
    assert arguments == {"a": "\ud83d"}


@FORMS
def test_parsing_time_is_linear_in_the_length(form):
    """Parsing time is linear in the length of a reply.

    The replies have a megabyte. A careless regular expression would backtrack at every mark in
    them.
    """
    heads = {
        DEEPSEEK: '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": ',
        TAGS: '<tool_call>{"a": ',
    }[form]
    start = time.process_time()
    for text in (
        heads * 30_000,
        (form.marks[0] + " ") * 60_000,
        form.marks[-1] + " " * 1_000_000,
        heads + "1}" + " " * 1_000_000 + "x",
        heads + "[" * 1_000_000,
        "<" * 1_000_000,
        (heads + "1}" + "\n" * 50) * 10_000 + ".",
    ):
        assert parse(form, text) == (text, []) and len(text) > 500_000
    assert time.process_time() - start < 20
    content, calls = parse(form, "\n".join([written(form, "f", "{}")] * 200))
    assert len(said(calls)) == MAX_CALLS and content.count(form.marks[-1]) == 200 - MAX_CALLS
