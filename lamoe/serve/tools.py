"""Tool calls in what a model wrote, in the forms that the known chat templates teach: DeepSeek's and the one with <tool_call> tags."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """`begin` opens the part of a reply that is calls; `call` matches one of them, with groups name and arguments, or json."""

    begin: str
    call: re.Pattern


DEEPSEEK = Form("<｜tool▁calls▁begin｜>", re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n(?P<arguments>.*?)\n```|(?P<name2>[^<]+?)<｜tool▁sep｜>(?P<arguments2>.*?))"
    r"<｜tool▁call▁end｜>", re.DOTALL))
TAGS = Form("<tool_call>", re.compile(r"<tool_call>\s*(?P<json>\{.*?\})\s*</tool_call>", re.DOTALL))


def form_of(template: str | None) -> Form | None:
    """How a chat template has tool calls written; None when it has not, or in a way not known here."""
    if template is None or not re.search(r"\btools?\b", template):
        return None
    return DEEPSEEK if "<｜tool▁call▁begin｜>" in template else TAGS if "<tool_call>" in template else None


def parse(form: Form, text: str) -> tuple[str, list[dict[str, Any]]]:
    """(what was said before the calls, the calls as OpenAI has them). Text that is no sound call stays text."""
    at = text.find(form.begin)
    if at < 0:
        return text, []
    calls = []
    for m in form.call.finditer(text, at):
        groups = m.groupdict()
        name, arguments = groups.get("name") or groups.get("name2"), groups.get("arguments") or groups.get("arguments2") or ""
        if groups.get("json") is not None:
            try:
                said = json.loads(groups["json"])
                name, arguments = said["name"], said.get("arguments", {})
            except (ValueError, KeyError, RecursionError):
                continue
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if not isinstance(name, str):
            continue
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name.strip(), "arguments": arguments}})
    return (text[:at].rstrip(), calls) if calls else (text, [])


class Splitter:
    """A stream of text that may turn into calls: `add` gives what can be shown, `end` the rest of the text and the calls."""

    def __init__(self, form: Form):
        self.form, self.held = form, ""

    def add(self, text: str) -> str:
        self.held += text
        at = self.held.find(self.form.begin)
        if at < 0:
            at = len(self.held) - max((n for n in range(1, len(self.form.begin)) if self.held.endswith(self.form.begin[:n])), default=0)
        at = len(self.held[:at].rstrip())  # blanks before the calls are not part of the text
        shown, self.held = self.held[:at], self.held[at:]
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        return parse(self.form, self.held)
