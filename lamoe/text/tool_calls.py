"""Tool calls in what a model wrote, in the two forms that chat templates teach: DeepSeek's with its control tokens, and JSON between <tool_call> tags.

A reply is a stranger's text like any other. Only a sound call counts, that is one with a plain name and arguments that are a JSON object; everything
else stays text, so nothing a model says is lost. One pass, linear in the length; nothing here runs or looks up a tool.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from itertools import islice
from typing import Any

MAX_CALLS = (
    128  # beginnings of calls that are looked at in a reply; what comes after them stays text
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True)
class Form:
    """`marks`: where text may turn into calls. `head`: the beginning of a call up to its JSON, with the name where it stands outside; `foot`: what must
    follow the JSON (a call that the end of the text cut off behind its JSON is whole). DeepSeek's marks around all calls go with the first and last one."""

    marks: tuple[str, ...]
    head: re.Pattern
    foot: re.Pattern


DEEPSEEK = Form(  # V3 and R1: a kind, then the name and a block of JSON; V3.1: the name, then JSON
    ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    re.compile(
        r"(?:<｜tool▁calls▁begin｜>\s*+)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^\n<]{1,128})\n```json\s*+|([^\n<]{1,128})<｜tool▁sep｜>\s*+)"
    ),
    re.compile(r"\s*+(?:```\s*+)?(?:<｜tool▁call▁end｜>(?:\s*+<｜tool▁calls▁end｜>)?|\Z)"),
)
TAGS = Form(
    ("<tool_call>",), re.compile(r"<tool_call>\s*+"), re.compile(r"\s*+(?:</tool_call>|\Z)")
)


def form_of(template: str | None) -> Form | None:
    """How a chat template has tool calls written; None when it has none, or in a way not known here."""
    if template is None or not re.search(r"\btools?\b", template):
        return None
    return (
        DEEPSEEK if DEEPSEEK.marks[1] in template else TAGS if TAGS.marks[0] in template else None
    )


def parse(form: Form, text: str) -> tuple[str, list[dict[str, Any]]]:
    """(the text without its calls, the calls as OpenAI's API has them: id, type, function with name and arguments, a JSON text). Without a sound call
    the text comes back as it was."""
    calls, said, at = [], [], 0
    for m in islice(form.head.finditer(text), MAX_CALLS):
        found = (
            _call(form, text, m) if m.start() >= at else None
        )  # a head inside another call's JSON is part of that
        if found is not None:
            said.append(text[at : m.start()])
            name, arguments, at = found
            calls.append(
                {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
    if not calls:
        return text, []
    later = [s.strip() for s in (*said[1:], text[at:])]
    return said[0].rstrip() + "".join("\n" + s for s in later if s), calls


class Splitter:
    """A stream of text that may turn into calls: `add` gives what can be shown, `end` the rest of the text and the calls. Together they are what `parse`
    says of the whole text, however it was cut."""

    def __init__(self, form: Form):
        self._form, self._held, self._inside = form, "", []

    def add(self, text: str) -> str:
        """The part of the text so far that is certainly no call and was not shown yet. From the first mark on everything waits for `end`."""
        if self._inside:
            self._inside.append(text)
            return ""
        text = self._held + text
        found = [at for mark in self._form.marks if (at := text.find(mark)) >= 0]
        keep = max(
            (
                n
                for mark in self._form.marks
                for n in range(1, len(mark))
                if text.endswith(mark[:n])
            ),
            default=0,
        )
        end = len(
            text[: min(found) if found else len(text) - keep].rstrip()
        )  # blanks before calls are not part of the text
        if found:
            self._inside.append(text[end:])
        self._held = "" if found else text[end:]
        return text[:end]

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        return parse(self._form, self._held + "".join(self._inside))


def _call(form: Form, text: str, head: re.Match) -> tuple[str, str, int] | None:
    """(name, arguments, where it ends) of the call that begins with `head`, None when it is not sound."""
    if not text.startswith("{", head.end()):
        return None
    try:
        value, end = _JSON.raw_decode(text, head.end())
    except (ValueError, RecursionError):
        return None
    foot = form.foot.match(text, end)
    if foot is None:
        return None
    if head.lastindex:
        name, arguments = head[head.lastindex].strip(), value
    else:
        name, arguments = value.get("name"), value.get("arguments", {})
        if isinstance(arguments, str):  # some models write the JSON of the JSON
            try:
                arguments = json.loads(arguments, parse_constant=_refuse)
            except (ValueError, RecursionError):
                return None
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return name, _written(arguments), foot.end()


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def _written(arguments: dict) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    return (
        json.dumps(arguments) if any("\ud800" <= c <= "\udfff" for c in text) else text
    )  # half a surrogate pair has no UTF-8
