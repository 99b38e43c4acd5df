"""Tests of templates with the features of public ones, on conversations as API clients send them.

The files in data/chat_templates are written in the manner of the public templates; each keeps what
is special about its model. The right text is that of transformers, which wants another form of
tool calls: arguments as objects (DeepSeek's template: as text), and results with the name of their
function. `RIGHT` lists where templates want more than that.
"""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lamoe.text import chat_template

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
VARIABLES = dict(bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a"],
}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Été", "parameters": PARAMETERS},
}


def call(id: str, arguments: dict) -> dict:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def result(id: str, content: str) -> dict:
    return {"role": "tool", "tool_call_id": id, "name": "f", "content": content}


QUESTION, LONG_ID = {"role": "user", "content": "q"}, "call_0123456789abcdef"
TALKS = {
    "text": [
        {"role": "system", "content": " S "},
        {"role": "user", "content": "<b> é\n"},
        {"role": "assistant", "content": "<think>t</think>\nA"},
        {"role": "user", "content": "x"},
    ],
    "call": [
        QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call(LONG_ID, {"a": 1, "b": 'é"<'})],
        },
        result(LONG_ID, "42"),
    ],
    "calls": [
        QUESTION,
        {
            "role": "assistant",
            "content": "I look",
            "tool_calls": [call("c1", {"a": 1}), call("c2", {})],
        },
        result("c1", "42"),
        result("c2", "43"),
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "thanks"},
    ],
}
# The templates that read no tools: conversations about calls are refused, not cut.
PLAIN = {"gemma", "parts_only", "phi"}
REFUSED = {("llama", "calls"): "one call at a time"} | {
    (name, talk): "chat template (does not know|leaves them out)"
    for name in PLAIN
    for talk in ("call", "calls")
}
SHORT_IDS = {LONG_ID: "aff2e571f", "c1": "d0f631ca1", "c2": "9c0abe51c"}


def copy(messages: list[dict]) -> list[dict]:
    return json.loads(json.dumps(messages))


def as_sent(messages: list[dict]) -> list[dict]:
    """Return messages in the form of OpenAI's API."""
    messages = copy(messages)
    for message in messages:
        if message["role"] == "tool":
            del message["name"]
        for c in message.get("tool_calls", ()):
            c["function"]["arguments"] = json.dumps(c["function"]["arguments"], ensure_ascii=False)
    return messages


def short_ids(messages: list[dict]) -> list[dict]:
    text = json.dumps(messages)
    for long, short in SHORT_IDS.items():
        text = text.replace(f'"{long}"', f'"{short}"')
    return json.loads(text)


def contents_as_parts(messages: list[dict]) -> list[dict]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


RIGHT = {"deepseek": as_sent, "mistral": short_ids, "parts_only": contents_as_parts}


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", SOURCES)
def test_conversations_of_clients_render_as_in_transformers(name, talk, tools):
    if tools and name in PLAIN:
        with pytest.raises(ValueError, match="does not know tools"):
            chat_template.render(SOURCES[name], as_sent(TALKS[talk]), tools=tools, **VARIABLES)
        return
    if (name, talk) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, talk]):
            chat_template.render(SOURCES[name], as_sent(TALKS[talk]), tools=tools, **VARIABLES)
        return
    text, mark = chat_template.render(SOURCES[name], as_sent(TALKS[talk]), tools=tools, **VARIABLES)
    messages = RIGHT.get(name, copy)(TALKS[talk])
    [right], _ = render_jinja_template(
        [messages], chat_template=SOURCES[name], tools=tools, **VARIABLES
    )
    assert text == right and mark not in text


def test_every_template_writes_every_message():
    """No content is silently left out, by the templates that accept the conversation."""
    for name, source in SOURCES.items():
        text, _ = chat_template.render(source, TALKS["text"], **VARIABLES)
        assert all(part in text for part in ("S", "<b> é", "A", "x")), name


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_options_of_the_client(options):
    text, _ = chat_template.render(SOURCES["qwen"], [QUESTION], options=options, **VARIABLES)
    [right], _ = render_jinja_template(
        [[QUESTION]], chat_template=SOURCES["qwen"], tools=None, **options, **VARIABLES
    )
    assert text == right and ("<think>" in text) is (options == {"enable_thinking": False})


def continued(name, content):
    """Return our text and that of transformers for a reply to continue."""
    messages = [QUESTION, {"role": "assistant", "content": content}]
    variables = VARIABLES | {"add_generation_prompt": False}
    text, _ = chat_template.render(SOURCES[name], messages, continued=True, **variables)
    [right], _ = render_jinja_template(
        [messages],
        chat_template=SOURCES[name],
        tools=None,
        continue_final_message=True,
        **variables,
    )
    return text, right


@pytest.mark.parametrize("content", ["The", " The ", "q", "a\n\n", "x</think>y"])
@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"parts_only"}))
def test_a_reply_to_continue(name, content):
    if "</think>" in content and name in ("deepseek", "qwen"):
        with pytest.raises(ValueError, match="leaves out a part"):
            continued(name, content)
        return
    text, right = continued(name, content)
    assert text == right and text.rstrip().endswith(content.strip()[-1])


@pytest.mark.parametrize("last", [QUESTION, TALKS["call"][1]], ids=["user", "call"])
def test_only_a_text_of_the_assistant_is_continued(last):
    with pytest.raises(ValueError, match="only an assistant's text"):
        chat_template.render(SOURCES["qwen"], [QUESTION, last], continued=True, **VARIABLES)


def test_an_option_cannot_write_control_tokens():
    source, token = "{{ mood }}{{ eos_token }}{{ messages[0].content }}", "</s>"
    text, mark = chat_template.render(
        source, [QUESTION], options={"mood": token}, control_tokens=[token], **VARIABLES
    )
    assert text.count(token) == 1 and text.replace(mark, "") == "</s></s>q"


def test_tools_without_description_and_parameters():
    """A template that writes them as they are gets nothing else; others get empty ones."""
    bare = {"type": "function", "function": {"name": "f"}}
    for source, want in (
        ("{{ tools | tojson }}", json.dumps([bare])),
        ("{% for t in tools %}{{ 'f: ' + t.function.description }}{% endfor %}", "f: "),
        (
            "{% for t in tools %}{{ t.function.parameters | tojson }}{% endfor %}",
            '{"type": "object", "properties": {}}',
        ),
        ("{{ tools[0].function.parameters.properties.keys() | list }}", "[]"),
    ):
        assert chat_template.render(source, [QUESTION], tools=[bare], **VARIABLES)[0] == want
    with pytest.raises(ValueError, match="no such thing"):
        source = "{{ tools }}{{ raise_exception('no such thing') }}"
        chat_template.render(source, [QUESTION], tools=[bare], **VARIABLES)


BROKEN = '{"a": 1'  # a call that max_tokens cut


def test_arguments_that_are_not_json_or_are_encoded_twice():
    def rendered(name, arguments):
        messages = as_sent(TALKS["call"])
        messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
        return chat_template.render(SOURCES[name], messages, **VARIABLES)[0]

    assert f"```json\n{BROKEN}\n```" in rendered("deepseek", BROKEN)
    with pytest.raises(ValueError, match="not JSON"):
        rendered("llama", BROKEN)
    twice = json.dumps('{"a": 1}')
    for name in ("llama", "qwen", "granite"):
        assert rendered(name, twice) == rendered(name, '{"a": 1}')
