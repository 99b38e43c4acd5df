"""Replies that must be tool calls: how the model spells them, and how they are read back.

The text before the first thing to choose ends the prompt, so the model does not generate it. For
one function that is everything up to its arguments. The rest of the reply follows a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lamoe.text.tool_calls import DEEPSEEK, TAGS, form_of, new_call

_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Spelling:
    """The texts around the names and arguments of calls.

    Attributes:
        begin: text before the name of the first call.
        middle: text between a name and its arguments.
        end: text after the arguments.
        between: text between the end of a call and the name of the next.
        close: text after the last call.
    """

    begin: str
    middle: str
    end: str
    between: str
    close: str = ""

    @property
    def space(self) -> str:
        """The space before arguments, which models write in one token with what follows."""
        return " " if self.middle.endswith(":") else ""


_TAGS = Spelling(
    '<tool_call>\n{"name": "',
    '", "arguments":',
    "}\n</tool_call>",
    '\n<tool_call>\n{"name": "',
)
# V3 and R1, then V3.1.
_DEEPSEEK_BLOCK = Spelling(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "<｜tool▁calls▁end｜>",
)
_DEEPSEEK_PLAIN = Spelling(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁calls▁end｜>",
)
# For chat templates without a known form of calls.
_OBJECTS = Spelling('{"name": "', '", "arguments":', "}", '\n{"name": "')
_TOKENS = re.compile(r"(<｜[^｜]{1,32}｜>|</?tool_call>)")


def spelling_of(template: str | None) -> Spelling:
    """Return how a model with this chat template spells tool calls."""
    form = form_of(template)
    if form is DEEPSEEK:
        return _DEEPSEEK_BLOCK if "```json" in (template or "") else _DEEPSEEK_PLAIN
    return _TAGS if form is TAGS else _OBJECTS


@dataclass(frozen=True)
class ForcedCalls:
    """What a reply must be: one call, or several calls, of the named functions.

    Attributes:
        spelling: how the model spells calls.
        names: the functions that may be called.
        several: whether there may be more than one call.
        begun: if there is one function and one call, the beginning of its arguments.
    """

    spelling: Spelling
    names: tuple[str, ...]
    several: bool = False
    begun: str = ""

    @property
    def name(self) -> str | None:
        """The function that is called, or None if the model chooses it."""
        return self.names[0] if len(self.names) == 1 and not self.several else None

    @property
    def head(self) -> str:
        """The beginning of the reply, which belongs to the prompt."""
        s = self.spelling
        return s.begin if self.name is None else s.begin + self.name + s.middle + self.begun

    def rules(self, special: Collection[str], answer: bool = False) -> str:
        """Write the rest of the reply as Lark rules. Rule arguments0 is for the first name, etc.

        Args:
            special: tokens that the grammar matches as `<name>` only.
            answer: allow another reply, which is the rule `answer`. The head is not in the prompt.
        """
        s = self.spelling
        space = '" " ' if s.space else ""
        if self.name is not None and not answer:
            return f"start: {space}arguments0"
        calls = (
            f"{_lark(name + s.middle, special)} {space}arguments{i}"
            for i, name in enumerate(self.names)
        )
        reply = "call"
        if self.several:
            reply += f" ({_lark(s.end + s.between, special)} call)*"
        if self.several or answer:
            reply += f" {_lark(s.end + s.close, special)}"
        if answer:
            reply = f"answer | {_lark(s.begin, special)} {reply}"
        return f"start: {reply}\ncall: {' | '.join(calls)}"

    def parse(self, text: str) -> list[tuple[str, str]]:
        """Return (name, arguments) of the calls in a reply without its head.

        The reply may be cut, so the arguments of the last call may be incomplete JSON.
        """
        s, at, text = self.spelling, 0, self.begun + text
        calls: list[tuple[str, str]] = []
        while True:
            name = self.name
            if name is None:
                middle = text.find(s.middle, at)
                if middle < 0:
                    return calls
                name, at = text[at:middle], middle + len(s.middle)
            at += text.startswith(" ", at)
            try:
                _, end = _JSON.raw_decode(text, at)
            except (ValueError, RecursionError):
                return [*calls, (name, text[at:])]
            calls.append((name, text[at:end]))
            if not self.several or not text.startswith(s.end + s.between, end):
                return calls
            at = end + len(s.end + s.between)


@dataclass
class ForcedStream:
    """Reads a streamed reply. `add` and `end` return the changes of OpenAI's tool_calls.

    The arguments of a single call are sent as they arrive, several calls at the end.
    """

    forced: ForcedCalls
    _parts: list[str] = field(default_factory=list)
    _sent: int = field(default=-1)  # characters of the arguments; -1: not even the name

    def add(self, text: str) -> list[dict[str, Any]]:
        """Add a chunk of the reply."""
        if self._sent >= 0:
            return self._more(text)
        self._parts.append(text)
        if self.forced.several:
            return []
        # The grammar bounds the text up to the name.
        name, arguments = self.forced.name, self.forced.begun + "".join(self._parts)
        if name is None:
            name, middle, arguments = arguments.partition(self.forced.spelling.middle)
            if not middle:
                return []
        self._sent = 0
        return [{"index": 0, **new_call(name, "")}, *self._more(arguments)]

    def _more(self, text: str) -> list[dict[str, Any]]:
        text = text if self._sent else text.lstrip(" ")
        self._sent += len(text)
        return [{"index": 0, "function": {"arguments": text}}] if text else []

    def end(self) -> list[dict[str, Any]]:
        """Return what remains after the last chunk."""
        if not self.forced.several:
            return []
        calls = self.forced.parse("".join(self._parts))
        return [{"index": i, **new_call(*call)} for i, call in enumerate(calls)]


def _lark(text: str, special: Collection[str]) -> str:
    parts = (part for part in _TOKENS.split(text) if part)
    return " ".join(p if p in special else json.dumps(p, ensure_ascii=False) for p in parts)
