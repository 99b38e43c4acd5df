"""Tests of named chat templates: where they are read, which one renders, how they are kept."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from lamoe.text.tokenizer import Tokenizer, train


@pytest.fixture(scope="module")
def tok():
    return train(["def add(x, y):\n    return x + y  # the sum of 12 and 345\n"] * 4, 300)


HELLO = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRITES = (
    "{% for m in messages %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
TALK, USE = "talk {{ messages[0].content }}", "use {{ tools | tojson }} " + WRITES


def named_in_config(folder):
    return {"chat_template": [{"name": "default", "template": TALK}, USE_ENTRY]}


USE_ENTRY = {"name": "tool_use", "template": USE}


def as_object(folder):
    return {"chat_template": {"default": TALK, "tool_use": USE}}


def files_beside(folder):
    (folder / "chat_template.jinja").write_text(TALK)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(USE)
    return {"chat_template": "older"}


def file_beside_config(folder):
    files_beside(folder)
    (folder / "chat_template.jinja").unlink()
    return {"chat_template": TALK}


def processor_file(folder):
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": TALK}, USE_ENTRY]})
    )
    return {}


@pytest.mark.parametrize(
    "write", [named_in_config, as_object, files_beside, file_beside_config, processor_file]
)
def test_the_template_called_tool_use_renders_tools(tok, tmp_path, write):
    tok.save(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config | write(tmp_path / "a")))
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for t in (loaded, Tokenizer.load(tmp_path / "b")):
        assert t.templates == {"default": TALK, "tool_use": USE} and t.chat_template == TALK
        assert t.render_chat(HELLO) == "talk hi"
        assert t.render_chat(HELLO, tools=TOOLS) == f"use {json.dumps(TOOLS)} hi"
        # The usual template could not write this conversation.
        history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        assert t.render_chat(history) == "use null hi{}"
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    for tools in (None, TOOLS):
        text = theirs.apply_chat_template(HELLO, tools=tools, tokenize=False)
        assert text == loaded.render_chat(HELLO, tools=tools)


def test_without_a_default_template(tok):
    def named(**templates):
        return Tokenizer(tok.inner, bos=tok._bos, eos=tok._eos, chat_template=templates)

    assert named(rag=TALK).render_chat(HELLO) == "talk hi"  # the only one
    assert named(tool_use=USE).render_chat(HELLO) == "use null hi"
    two = named(rag=TALK, tool_use=USE)
    assert two.render_chat(HELLO, tools=TOOLS).startswith("use")
    with pytest.raises(ValueError, match="rag, tool_use, and none is called default"):
        two.render_chat(HELLO)
    assert named().render_chat(HELLO).endswith("User: hi\n\nAssistant:")  # DeepSeek-V2's


def test_a_history_of_tool_calls_stays_with_a_usual_template_that_knows_them(tok):
    t = Tokenizer(tok.inner, chat_template={"default": "{#tools#}usual " + WRITES, "tool_use": USE})
    history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert t.render_chat(history) == "usual hi{}"


def test_too_many_templates_are_refused(tok, tmp_path):
    tok.save(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    for i in range(65):
        (tmp_path / "additional_chat_templates" / f"{i}.jinja").write_text("x")
    with pytest.raises(ValueError, match="65 files; more than 64"):
        Tokenizer.load(tmp_path)
