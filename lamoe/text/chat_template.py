"""Render chat templates, with protection against forged control tokens.

Templates come with model folders and messages come from users. Neither is trusted.

Templates run in jinja2's sandbox in a process of their own (see child_process), which bounds
their time and memory. The result is that of transformers.

Messages may hold the text of a control token, such as an end-of-turn token. `render` inserts a mark
into each such text, which is a noncharacter that occurs nowhere else. Every control token without a
mark in the result therefore comes from the template. The caller removes the marks after it has
converted the control tokens to ids. Messages without such text reach the template unchanged.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lamoe.text import call_form, template_worker
from lamoe.text.child_process import Child, ChildLimit
from lamoe.text.tool_calls import knows_tools

# DeepSeek-V2's format. There is no blank after the last "Assistant:": with one, replies get worse.
V2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

MAX_TEMPLATE_CHARS = 256 << 10
MAX_CONTROL_CHARS = 256
MAX_SECONDS = 5.0
PROCESS = Child(template_worker.__file__, ("jinja2", "markupsafe"), "the chat template")
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


class Templates(dict[str, str]):
    """The chat templates of a model by name. The usual one is called "default"."""

    @property
    def usual(self) -> str | None:
        """The template called "default", or the only one."""
        return self.get("default", next(iter(self.values())) if len(self) == 1 else None)

    def choose(self, *, tools: bool) -> str:
        """Return the template for conversations with or without tools.

        With tools it is the one called "tool_use", if there is one. Without any template it is
        DeepSeek-V2's.

        Raises:
            ValueError: if there are several templates and none of them is called default.
        """
        if tools and "tool_use" in self:
            return self["tool_use"]
        if self and self.usual is None:
            raise ValueError(
                f"this model has the chat templates {', '.join(sorted(self))}, and none is called "
                "default; name one of them so in tokenizer_config.json"
            )
        return self.usual or V2_TEMPLATE

    def choose_for(self, messages: Any, tools: Any) -> str:
        """Return the template for a conversation, which may be about tools without giving any."""
        usual = self.choose(tools=tools is not None)
        about_tools = isinstance(messages, Sequence) and any(
            isinstance(m, Mapping) and (m.get("role") == "tool" or m.get("tool_calls"))
            for m in messages
        )
        return self.choose(tools=True) if about_tools and not knows_tools(usual) else usual

    def to_config(self) -> str | list[dict[str, str]]:
        """Return the value of chat_template in tokenizer_config.json."""
        if self.keys() <= {"default"}:
            return self.get("default", V2_TEMPLATE)
        return [{"name": name, "template": source} for name, source in self.items()]


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    continued: bool = False,
    **variables: Any,
) -> tuple[str, str]:
    """Render a conversation.

    Args:
        source: the template.
        messages: objects with role and content, as in OpenAI's API.
        tools: descriptions of functions, for templates that use them.
        control_tokens: texts that only the template may write.
        options: JSON values for the template from the same source as the messages, for example
            enable_thinking. One that the template does not read must be false or None.
        continued: end the text where the last message ends, which must be the assistant's.
        variables: passed to the template, e.g. bos_token.

    Returns:
        text: the conversation, with marks inside control tokens that came from the messages.
        mark: the character that was used.

    Raises:
        ValueError: if the template does not support these messages, does not parse, raises an
            error, does something that the sandbox forbids, or exceeds a limit.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"the chat template has {len(source)} characters; "
            f"more than {MAX_TEMPLATE_CHARS} is refused"
        )
    try:
        _check_messages(messages, tools, source)
        constants = json.dumps(variables, sort_keys=True)
        if any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            form = _call_form(source, tools is not None, constants)
            if form is None:
                advice = "" if tools is not None else "send tools too, or "
                raise ValueError(
                    "the messages hold tool calls or results, and this model's chat template "
                    f"leaves them out; {advice}write them as text"
                )
            messages = form.convert(messages)
        if _wants_parts(source, constants):
            messages = [{**m, "content": _parts(m.get("content"))} for m in messages]
        options = _options(options or {}, source, variables)
        mark = free_mark([source, *control_tokens, *variables.values(), messages, tools, options])
        end = free_mark([mark, source, messages, tools, options]) if continued else ""
        shield = _Shield(tuple(control_tokens), mark)
        shielded = [{k: v if k == "role" else shield(v) for k, v in m.items()} for m in messages]
        if continued:
            shielded[-1]["content"] = _with_end(shielded[-1], end)
        shielded_tools, shielded_options = shield(tools), shield(options)
    except RecursionError:
        raise ValueError("the messages or tools are nested too deeply; make them flatter") from None
    variables = {**shielded_options, **variables}
    try:
        text = _run(source, messages=shielded, tools=shielded_tools, **variables)
    except ChildLimit:
        raise
    except ValueError:
        # Templates read a description and parameters, which the API lets clients leave out.
        if shielded_tools is None or (whole := _completed(shielded_tools)) == shielded_tools:
            raise
        text = _run(source, messages=shielded, tools=whole, **variables)
    return _until(text, end, shielded[-1]["content"]) if continued else text, mark


def _completed(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools with an empty description and no parameters where they have none."""
    absent = {"description": "", "parameters": {"type": "object", "properties": {}}}
    completed = []
    for tool in map(dict, tools):
        if isinstance(tool.get("function"), Mapping):
            tool["function"] = {**tool["function"]}
            for name, value in absent.items():
                tool["function"].setdefault(name, value)
        completed.append(tool)
    return completed


def _with_end(message: Mapping[str, Any], end: str) -> str:
    """Return the content of the last message with a mark at its end, which is `end` and a space."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or message.get("tool_calls"):
        raise ValueError("only an assistant's text can be continued; make it the last message")
    return f"{content}{end} "


def _until(text: str, end: str, content: str) -> str:
    """Return the text before the mark `end`, stripped if the template strips the content."""
    before, _, after = text.rpartition(end)
    if content.strip() not in f"{before}{end}":
        raise ValueError("this model's chat template leaves out a part of the message to continue")
    return before if after.startswith(" ") else before.rstrip()


def _options(
    options: Mapping[str, Any], source: str, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options that a template reads.

    Raises:
        ValueError: if another option asks for something, or has the name of a variable.
    """
    reads = _names(source) if options else None
    for name, value in options.items():
        if name in variables or name in ("messages", "tools", "documents"):
            raise ValueError(f"the template option {name!r} is set by the server; leave it out")
        if reads is not None and name not in reads and value not in (None, False):
            raise ValueError(
                f"this model's chat template does not read the option {name!r}; leave it out"
            )
    return {name: value for name, value in options.items() if reads is None or name in reads}


def _run(source: str, **variables: Any) -> str:
    # transformers defines `documents` too
    request = {"source": source, "variables": {"documents": None, **variables}}
    reply = PROCESS.ask(request, MAX_SECONDS)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


@functools.lru_cache(maxsize=64)
def _wants_parts(source: str, variables: str) -> bool:
    """Return whether a template reads contents as parts only. `variables` is JSON text."""
    return call_form.wants_parts(functools.partial(_run, source, **json.loads(variables)))


def _parts(content: str | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if content else []


@functools.lru_cache(maxsize=64)
def _call_form(source: str, has_tools: bool, variables: str) -> call_form.CallForm | None:
    """Return the form in which a template wants the tool calls of earlier replies.

    Args:
        variables: JSON text of an object.
    """
    return call_form.find(functools.partial(_run, source, **json.loads(variables)), has_tools)


@functools.lru_cache(maxsize=64)
def _names(source: str) -> list[str] | None:
    """Return the names that a template reads, or None if it does not parse."""
    return PROCESS.ask({"source": source}, MAX_SECONDS).get("names")


# ---- messages ------------------------------------------------------------------------------------
def _check_messages(messages: Any, tools: Any, source: str) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "messages must be a list with at least one {'role': ..., 'content': ...}, "
            f"found {_short(messages)}"
        )
    if tools is not None:
        _check_tools(tools, source)
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(k, str) for k in message):
            raise ValueError(
                f"message {n} must be an object with role and content, found {_short(message)}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {n} has role {role!r}; known: system, user, assistant, tool")
        calls = message.get("tool_calls")
        if (role == "tool" or calls) and not knows_tools(source):
            raise ValueError(
                f"message {n} is about a tool call, but this model's chat template does not know "
                "tools"
            )
        if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
            raise ValueError(
                f"message {n} (role {role}): content must be a str, found {_short(content)}"
            )


def reads_tools(source: str) -> bool:
    """Return whether a template reads `tools`, or does not parse.

    A template may write earlier tool calls without reading `tools` (DeepSeek-V3's does). The model
    would then never see the tools.
    """
    names = _names(source)
    return names is None or "tools" in names  # `render` reports a template that does not parse


def _check_tools(tools: Any, source: str) -> None:
    if not reads_tools(source):
        raise ValueError(
            "tools were given, but this model's chat template does not know tools; leave them out"
        )
    if (
        isinstance(tools, (str, Mapping))
        or not isinstance(tools, Sequence)
        or not all(isinstance(t, Mapping) for t in tools)
    ):
        raise ValueError(
            "tools must be a list of objects {'type': 'function', 'function': {'name': ...}}, "
            f"found {_short(tools)}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _strings(k)
            yield from _strings(v)
    elif isinstance(value, Sequence):
        for v in value:
            yield from _strings(v)


def free_mark(values: Sequence[Any]) -> str:
    """Return the first noncharacter that occurs in none of the strings in nested values."""
    free = dict.fromkeys(_NONCHARACTERS)
    for text in _strings(values):
        for char in [c for c in free if c in text]:
            del free[char]
    if not free:
        raise ValueError(
            "the conversation uses all 32 noncharacters U+FDD0 to U+FDEF; remove at least one, "
            "they carry no text"
        )
    return next(iter(free))


@functools.lru_cache(maxsize=16)
def _beginnings_of(tokens: frozenset[str]) -> re.Pattern[str]:
    def after(rests: list[str]) -> str:
        """Return a pattern with the shape of a trie, so that many tokens match as fast as one."""
        by_first: dict[str, list[str]] = {}
        for rest in rests:
            by_first.setdefault(rest[:1], []).append(rest[1:])
        ends = by_first.pop("", None) is not None
        branches = "|".join(re.escape(c) + after(more) for c, more in sorted(by_first.items()))
        return (
            f"(?:{branches}){'?' if ends else ''}"
            if len(by_first) > 1 or (ends and branches)
            else branches
        )

    return re.compile(f"(?=({after(sorted(tokens))}))")


def beginnings_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that matches wherever one of the tokens begins.

    Matches have no width, so overlapping tokens are all found. Group 1 is the longest token there.

    Returns:
        None if there are no tokens.

    Raises:
        ValueError: if a token is longer than MAX_CONTROL_CHARS.
    """
    tokens = frozenset(tokens)
    if (longest := max(map(len, tokens), default=0)) > MAX_CONTROL_CHARS:
        raise ValueError(
            f"a control token has {longest} characters; more than {MAX_CONTROL_CHARS} is refused"
        )
    return _beginnings_of(tokens) if tokens else None


@functools.lru_cache(maxsize=16)
def _sorted_both_ways(tokens: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the tokens in order, and the reversed tokens in order."""
    return sorted(tokens), sorted(t[::-1] for t in tokens)


class _Shield:
    """Inserts the mark into every control token in the strings of a nested value.

    A string that begins or ends with part of a control token gets a mark there too, because the
    template may write the rest of the token next to it.
    """

    def __init__(self, control_tokens: tuple[str, ...], mark: str):
        self._mark, self._whole = mark, beginnings_of(control_tokens)
        self._tokens, self._reversed = _sorted_both_ways(control_tokens)
        self._longest = max(map(len, control_tokens), default=0)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._insert_marks(value)
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return {self(k): self(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(v) for v in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise ValueError(f"messages and tools hold JSON values, found {_short(value)}")

    def _insert_marks(self, text: str) -> str:
        if self._whole is None:
            return text
        cuts = [0, *(m.start() + 1 for m in self._whole.finditer(text)), len(text)]
        text = self._mark.join(text[a:b] for a, b in itertools.pairwise(cuts))
        core = text.strip()  # the template may strip the string
        start = text.find(core)
        end, sizes = start + len(core), range(1, min(self._longest, len(core) + 1))
        if any(_begins_longer(self._tokens, core[-k:]) for k in sizes):
            text = text[:end] + self._mark + text[end:]
        if any(_begins_longer(self._reversed, core[k - 1 :: -1]) for k in sizes):
            text = text[:start] + self._mark + text[start:]
        return text


def _begins_longer(ordered: list[str], text: str) -> bool:
    """Return whether one of the ordered texts begins with `text` and is longer."""
    at = bisect.bisect_right(ordered, text)
    return at < len(ordered) and ordered[at].startswith(text)
