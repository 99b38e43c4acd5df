"""Decides from the fields tools and tool_choice what the model is shown and how it must answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lamoe.engine.grammar import Grammar, can_begin, special_tokens
from lamoe.serve.errors import ApiError, invalid_value
from lamoe.serve.parameters import grammar_makers, prepare_grammar
from lamoe.serve.prompts import need_tokenizer
from lamoe.serve.service import Service
from lamoe.serve.wire import ChatRequest, ChosenTool, Function, NamedTool, Tool
from lamoe.text import tool_calls
from lamoe.text.forced_calls import ForcedCalls, spelling_of
from lamoe.text.tokenizer import Tokenizer

NO_PROPERTIES = {"type": "object", "properties": {}, "additionalProperties": False}
# Keys of a schema that do not restrict the properties of an object.
_NOTES = frozenset("type properties required title description $schema $comment $defs".split())


@dataclass(frozen=True)
class ToolUse:
    """How a request uses tools.

    Attributes:
        tools: the tools that the model is shown, or None for none.
        form: how the model writes calls, if it may answer with text or calls.
        forced: what the reply must be, if it must consist of calls.
        calls: the calls that are allowed beside an answer in the response_format, if both follow a
            grammar.
        named: whether tool_choice names the function.
    """

    tools: list[Tool] | None = None
    form: tool_calls.Form | None = None
    forced: ForcedCalls | None = None
    calls: ForcedCalls | None = None
    named: bool = False


def tool_use(service: Service, body: ChatRequest) -> ToolUse:
    """Read the fields about tools.

    Raises:
        ApiError: 400 if they contradict each other, or the model's template cannot do it.
    """
    choice, allowed, named = body.tool_choice or "auto", body.tools, False
    if allowed is None:
        if choice not in ("auto", "none"):
            raise invalid_value("tool_choice asks for a call, but there are no tools", "tools")
        return ToolUse()
    if isinstance(choice, ChosenTool):
        if choice.allowed_tools is not None:
            allowed = _select(allowed, choice.allowed_tools.tools)
            choice = choice.allowed_tools.mode
        else:
            assert choice.function is not None
            allowed = _select(allowed, [NamedTool(type="function", function=choice.function)])
            choice, named = "required", True
    if choice == "none":
        return ToolUse()
    tokenizer = need_tokenizer(service, "chat")
    try:
        template = tokenizer.templates.choose(tools=True)
    except ValueError as e:
        raise invalid_value(str(e), "tools") from None
    if choice in ("required", "any"):  # "any" is Mistral's word
        if fields := list(grammar_makers(body)):
            raise invalid_value(
                f"tool_choice asks for a call, and {fields[0]} for another output; an output can "
                "follow only one of them",
                "tool_choice",
            )
        forced = _forced(tokenizer, template, allowed, not named and body.parallel_tool_calls)
        return ToolUse(body.tools if named else allowed, forced=forced, named=named)
    form = tool_calls.form_of(template)
    if form is None:
        raise ApiError(
            400,
            "tools are given, but this model's chat template defines no tool calls, or writes "
            "them in a form that this server does not know; leave them out, or set tool_choice to "
            "required or to a function",
            "unsupported",
            "tools",
        )
    calls = None
    if [*grammar_makers(body)] == ["response_format"]:
        names = tuple(dict.fromkeys(tool.function.name for tool in allowed))
        calls = ForcedCalls(spelling_of(template), names, body.parallel_tool_calls is not False)
    return ToolUse(allowed, form, calls=calls)


def _forced(
    tokenizer: Tokenizer, template: str, tools: list[Tool], several: bool | None
) -> ForcedCalls:
    functions = {tool.function.name: tool.function for tool in tools}
    forced = ForcedCalls(spelling_of(template), tuple(functions), bool(several))
    if forced.name is not None and (beginning := _beginning(functions[forced.name])):
        begun = forced.spelling.space + beginning
        if can_begin(tokenizer, begun):
            return replace(forced, begun=begun)
    return forced


def _select(tools: list[Tool], named: list[NamedTool]) -> list[Tool]:
    by_name = {tool.function.name: tool for tool in tools}
    names = list(dict.fromkeys(tool.function.name for tool in named))
    for name in names:
        if name not in by_name:
            raise invalid_value(
                f"tool_choice names {name!r}; the functions of tools are "
                f"{', '.join(map(repr, list(by_name)[:20]))}",
                "tool_choice",
            )
    return [by_name[name] for name in names]


async def tool_grammar(service: Service, body: ChatRequest, use: ToolUse) -> Grammar | None:
    """Compile the grammar of a reply with calls, or return None if calls follow no grammar.

    Raises:
        ApiError: 400 if the parameters of a function cannot be enforced.
    """
    calls = use.forced or use.calls
    if calls is None:
        return None
    tokenizer = need_tokenizer(service, "tool_choice")
    functions = {tool.function.name: (i, tool.function) for i, tool in enumerate(body.tools or [])}
    schemas, fields = {}, []
    for rule, name in enumerate(calls.names):
        i, function = functions[name]
        fields.append(f"tools[{i}].function.parameters")
        schemas[f"arguments{rule}"] = _parameters(function, fields[-1])
    if use.calls is not None:
        assert body.response_format is not None
        answer = body.response_format.schema_object
        schemas["answer"] = {"type": "object"} if answer is None else answer
    rules = calls.rules(special_tokens(tokenizer), answer="answer" in schemas)
    make = partial(Grammar.with_schemas, rules, schemas, calls.begun)
    return await prepare_grammar(service, make, fields[0] if len(schemas) == 1 else "tools")


def _beginning(function: Function) -> str:
    """Return the beginning that all arguments share: up to the first value, if it is required."""
    schema = function.parameters or {}
    properties, required = schema.get("properties"), schema.get("required")
    if (
        not set(schema) <= _NOTES | {"additionalProperties"}
        or not isinstance(properties, dict)
        or not isinstance(required, list)
    ):
        return ""
    first = next(iter(properties), None)
    if first is None or first not in required or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", first):
        return ""
    return f'{{"{first}":'


def _parameters(function: Function, field: str) -> dict[str, Any]:
    """Return a schema of the arguments, which are always an object.

    Functions take no arguments that they do not declare, so further properties need an explicit
    additionalProperties.
    """
    schema = function.parameters or NO_PROPERTIES
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise invalid_value(
            f"{field} has type {kind!r}; the arguments of a function are an object", field
        )
    closed = {"additionalProperties": False} if set(schema) <= _NOTES else {}
    return {**schema, "type": "object", **closed}
