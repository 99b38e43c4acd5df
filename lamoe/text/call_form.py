"""Find out in which form a chat template wants the tool calls of earlier replies.

OpenAI's API carries the arguments of a call as JSON text. Most templates were written for
transformers, where they are an object: given text, such a template would write JSON inside a JSON
text, and the model would imitate that. Other templates (DeepSeek's) want text. Some expect
a call without its `function` wrapper, or a text where the content is null.

The template itself decides: it renders a small conversation in each form, and the first form that
is written correctly wins. Templates for other contents than text are found in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamoe.text.child_process import ChildLimit
from lamoe.text.tool_calls import parse_json

# Names that no template contains.
_NAME, _KEY, _VALUE = "probed_tool_name", "probed_argument", "probed_value"
_ID, _NUMBER = "call_probed0123456789", "5821073964"
_OUTSIDE = ("id", "type")  # what a call has beside its function
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "other_tool",
            "description": "a tool",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]


@dataclass(frozen=True)
class CallForm:
    """A form of tool calls in messages.

    wrapped: a call has its name and arguments in an object `function`.
    as_text: arguments are JSON text, not an object.
    empty_content: a message that has only calls has the content "", not null.
    short_ids: an id has nine letters and digits (Mistral's templates refuse others).
    """

    wrapped: bool = True
    as_text: bool = False
    empty_content: bool = False
    short_ids: bool = False

    def convert(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with their tool calls in this form.

        A result names its function: OpenAI's API has only the id of the call there.

        Raises:
            ValueError: if a call has no name, or arguments that are not JSON.
        """
        converted: list[dict[str, Any]] = []
        names: dict[Any, str] = {}
        for n, message in enumerate(messages):
            message = dict(message)
            if message.get("tool_calls"):
                message["tool_calls"] = calls = self._calls(message["tool_calls"], n)
                names |= {c.get("id"): (c.get("function") or c)["name"] for c in calls}
                if self.empty_content and message.get("content") is None:
                    message["content"] = ""
            elif message.get("role") == "tool" and isinstance(message.get("tool_call_id"), str):
                message["tool_call_id"] = id = self._id(message["tool_call_id"])
                if id in names:
                    message.setdefault("name", names[id])
            converted.append(message)
        return converted

    def _id(self, id: str) -> str:
        if not self.short_ids or re.fullmatch("[a-zA-Z0-9]{9}", id):
            return id
        return hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]

    def _calls(self, calls: Any, n: int) -> list[dict[str, Any]]:
        if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
            raise ValueError(f"message {n}: tool_calls must be a list of objects")
        return [self._call(call, n) for call in calls]

    def _call(self, call: Any, n: int) -> dict[str, Any]:
        if not isinstance(call, Mapping):
            raise ValueError(f"message {n}: a tool call must be an object")
        function = call.get("function", {k: v for k, v in call.items() if k not in _OUTSIDE})
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"message {n}: a tool call must be "
                "{'type': 'function', 'function': {'name': ..., 'arguments': ...}}"
            )
        function = {**function, "arguments": self._arguments(function.get("arguments"), n)}
        around = call if "function" in call else {k: call[k] for k in _OUTSIDE if k in call}
        if isinstance(call.get("id"), str):
            around = {**around, "id": self._id(call["id"])}
        if self.wrapped:
            return {**around, "function": function}
        return {**{k: v for k, v in around.items() if k != "function"}, **function}

    def _arguments(self, arguments: Any, n: int) -> Any:
        """Convert arguments. None and an empty text mean no arguments, as in OpenAI's API."""
        if isinstance(arguments, str) and arguments.strip():
            try:
                value = _decode(arguments)
            except ValueError as e:
                if self.as_text:  # the template copies the text, so it shows what the model wrote
                    return arguments
                raise ValueError(
                    f"message {n}: the arguments of a tool call are not JSON: {e}"
                ) from None
        else:
            value = {} if arguments is None or isinstance(arguments, str) else arguments
            arguments = None
        if not self.as_text:
            return {} if value is None else value
        return json.dumps(value, ensure_ascii=False) if arguments is None else arguments


def _decode(arguments: str) -> Any:
    value = parse_json(arguments)
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def wants_parts(render: Callable[..., str]) -> bool:
    """Return whether a template reads contents as lists of parts only, and leaves texts out.

    Args:
        render: renders the template with the variables `messages` and `tools`.

    Raises:
        ChildLimit: if the template takes too long or ends its process.
    """
    for content in (_NUMBER, [{"type": "text", "text": _NUMBER}]):
        try:
            text = render(messages=[{"role": "user", "content": content}], tools=None)
        except ChildLimit:
            raise
        except ValueError:
            continue
        if _NUMBER in text:
            # "'text'" is Python's notation of a part.
            return not isinstance(content, str) and "'text'" not in text.lower()
    return False


def find(render: Callable[..., str], has_tools: bool) -> CallForm | None:
    """Return the form of tool calls that a template wants, or None if it leaves them out.

    Args:
        render: renders the template with the variables `messages` and `tools`.
        has_tools: whether conversations have tools. Some templates write no calls without.

    Raises:
        ChildLimit: if the template takes too long or ends its process.
    """
    for short_ids in (False, True):
        choices = itertools.product((True, False), (False, True), (False, True))
        scores = {
            form: _score(form, render, has_tools)
            for form in (CallForm(*choice, short_ids) for choice in choices)
        }
        form = max(scores, key=lambda form: scores[form])
        if scores[form] > FAILED:
            return form if scores[form] > LEFT_OUT else None
    return CallForm()


FAILED, LEFT_OUT = (0, False), (1, True)


def _score(form: CallForm, render: Callable[..., str], has_tools: bool) -> tuple[int, bool]:
    """Return how well a template writes tool calls of this form. Larger is better."""
    function = {"name": _NAME, "arguments": json.dumps({_KEY: _VALUE})}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": _ID, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": _ID, "name": "other_tool", "content": "b"},
    ]
    try:
        text = render(messages=form.convert(messages), tools=_TOOLS if has_tools else None)
    except ChildLimit:
        raise
    except ValueError:
        return FAILED
    if _KEY not in text or _VALUE not in text:
        return 1, "None" not in text
    # '\"' is JSON inside a JSON text, and "'" is Python's notation of a dict.
    is_clean = f'\\"{_KEY}' not in text and f"'{_KEY}'" not in text
    return 2 + (_NAME in text) + 2 * is_clean, "None" not in text
