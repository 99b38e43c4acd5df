"""Find tool calls in the replies of a model.

Chat templates use two forms of calls: DeepSeek's with its control tokens, and JSON between
<tool_call> tags. Replies are untrusted text. A call is valid if its name is plain and its arguments
are a JSON object. Everything else stays text, so nothing is lost. Parsing takes time linear in the
length of the reply. Nothing here runs or looks up a tool.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lamoe.text.text_finder import TextFinder

# Largest number of places in a reply that are parsed as calls. Everything after them stays text.
MAX_CALLS = 128
# Arguments of a call without any. More text must follow: a reply that is cut here is no call.
_NOTHING = re.compile(r'(?:null|"")?(?=\s*+[`<])')
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True)
class Form:
    """How a chat template writes tool calls.

    Attributes:
        marks: texts that may begin a call.
        head: matches a call up to its JSON. Its group, if any, is the name of the tool. For
            DeepSeek it includes the token that begins the list of calls.
        foot: matches the text that must follow the JSON, which is the end of the call or of the
            reply.
    """

    marks: tuple[str, ...]
    head: re.Pattern
    foot: re.Pattern


# V3 and R1 write "function", the name and a block of JSON; V3.1 writes the name, then JSON.
DEEPSEEK = Form(
    ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    re.compile(
        r"(?:<｜tool▁calls▁begin｜>\s*+)?<｜tool▁call▁begin｜>"
        r"(?:function<｜tool▁sep｜>([^\n<]{1,128})\n```json\s*+"
        r"|([^\n<]{1,128})<｜tool▁sep｜>\s*+)"
    ),
    re.compile(r"\s*+(?:```\s*+)?(?:<｜tool▁call▁end｜>(?:\s*+<｜tool▁calls▁end｜>)?|\Z)"),
)
TAGS = Form(
    ("<tool_call>",), re.compile(r"<tool_call>\s*+"), re.compile(r"\s*+(?:</tool_call>|\Z)")
)


@functools.lru_cache(maxsize=64)
def knows_tools(template: str) -> bool:
    """Return whether a chat template mentions tools at all."""
    return re.search(r"\btools?\b", template) is not None


def form_of(template: str | None) -> Form | None:
    """Return the form of tool calls in a chat template, or None if it has no known form."""
    if template is None or not knows_tools(template):
        return None
    return (
        DEEPSEEK if DEEPSEEK.marks[1] in template else TAGS if TAGS.marks[0] in template else None
    )


def new_call(name: str, arguments: str) -> dict[str, Any]:
    """Make a call as in OpenAI's API, with a new id."""
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def parse(form: Form, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split a reply into text and tool calls.

    Returns:
        text: the reply without its calls; the unchanged reply if it holds no valid call.
        calls: as in OpenAI's API: id, type, and function with name and arguments (JSON text).
    """
    calls: list[dict[str, Any]] = []
    plain, end = [], 0
    for head in islice(form.head.finditer(text), MAX_CALLS):
        # A head inside the JSON of the previous call belongs to that call.
        found = _parse_call(form, text, head) if head.start() >= end else None
        if found is not None:
            plain.append(text[end : head.start()])
            name, arguments, end = found
            calls.append(new_call(name, arguments))
    if not calls:
        return text, []
    later = [s.strip() for s in (*plain[1:], text[end:])]
    return plain[0].rstrip() + "".join("\n" + s for s in later if s), calls


class Splitter:
    """Splits a streamed reply into text and tool calls.

    `add` returns the text that can be shown, and `end` returns the remaining text and the calls.
    For any division into chunks, the joined result equals that of `parse` for the whole reply.
    """

    def __init__(self, form: Form):
        self._form, self._finder = form, TextFinder(form.marks)
        # What is held back: blanks, which `parse` removes before a call, and after them what may be
        # the beginning of a mark.
        self._blanks: list[str] = []
        self._partial = ""
        self._from_mark: list[str] = []  # everything from the first mark on

    def add(self, text: str) -> str:
        """Add a chunk and return the new text that is certainly not part of a call."""
        if self._from_mark:
            self._from_mark.append(text)
            return ""
        begin, held = self._finder.add(text)
        stop = len(self._partial) + (len(text) - held if begin is None else begin)
        text = self._partial + text
        plain, after = text[:stop], text[stop:]
        words = plain.rstrip()
        shown = "".join([*self._blanks, words]) if words else ""
        if words:
            self._blanks = []
        self._blanks.append(plain[len(words) :])
        self._partial = after if begin is None else ""
        self._from_mark = [] if begin is None else [after]
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text and the calls, after the last chunk."""
        return parse(self._form, "".join([*self._blanks, self._partial, *self._from_mark]))


def _parse_call(form: Form, text: str, head: re.Match[str]) -> tuple[str, str, int] | None:
    """Return (name, arguments, end) of the call that begins with `head`, or None if invalid."""
    if text.startswith("{", head.end()):
        try:
            value, end = _JSON.raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return None
    elif head.lastindex and (nothing := _NOTHING.match(text, head.end())):
        value, end = {}, nothing.end()
    else:
        return None
    foot = form.foot.match(text, end)
    if foot is None:
        return None
    if head.lastindex:
        name, arguments = head[head.lastindex].strip(), value
    else:
        name, arguments = value.get("name"), value.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        if isinstance(arguments, str):  # some models encode the arguments twice
            try:
                arguments = parse_json(arguments)
            except (ValueError, RecursionError):
                return None
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    return name, _to_json(arguments), foot.end()


def _refuse(constant: str) -> None:
    """Refuse NaN and Infinity, which Python's decoder accepts."""
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text: str) -> Any:
    """Parse JSON as it is defined: without NaN and Infinity. Raises ValueError."""
    return _JSON.decode(text)


def _to_json(arguments: dict) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    has_surrogate = any("\ud800" <= c <= "\udfff" for c in text)  # cannot be encoded as UTF-8
    return json.dumps(arguments) if has_surrogate else text
