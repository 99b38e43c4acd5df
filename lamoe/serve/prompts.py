"""Converts the prompts and messages of requests to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from lamoe.serve.errors import ApiError, invalid_value
from lamoe.serve.service import Service
from lamoe.serve.wire import Message, Tool
from lamoe.text.tokenizer import Tokenizer

FILL_IN_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
Result = TypeVar("Result")


async def in_thread(param: str | None, work: Callable[..., Result], *args, **options) -> Result:
    """Run text work outside the event loop. A ValueError becomes a 400 error about `param`."""
    try:
        return await asyncio.to_thread(work, *args, **options)
    except ValueError as e:
        raise invalid_value(str(e), param) from None


def need_tokenizer(service: Service, feature: str) -> Tokenizer:
    """Return the tokenizer, or raise a 400 error that names the feature that needs it."""
    if service.tokenizer is None:
        raise ApiError(
            400,
            f"{feature} needs a tokenizer, and this model folder has none; send token ids",
            "no_tokenizer",
        )
    return service.tokenizer


def check_length(service: Service, ids: list[int], param: str) -> None:
    """Raise a 400 error for a prompt that is empty, too long, or has ids outside the vocabulary."""
    if not ids:
        raise invalid_value("the prompt has no tokens; give at least one", param)
    if len(ids) >= service.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, and the context of this server is "
            f"{service.max_model_len}, output included; shorten it",
            "context_length_exceeded",
            param,
        )
    vocab_size = service.config.vocab_size
    if max(ids) >= vocab_size:
        message = f"token id {max(ids)} is outside the vocabulary of {vocab_size}"
        raise invalid_value(message, param)


def check_text(service: Service, texts: list[str], param: str) -> None:
    """Raise a 400 error for a text that cannot fit in the context, without tokenizing it."""
    size = max(len(text.encode("utf-8", "replace")) for text in texts)
    if size > service.max_text_bytes:
        raise ApiError(
            400,
            f"the prompt has {size} bytes; the context of this server is "
            f"{service.max_model_len} tokens, output included, which cannot hold more than "
            f"{service.max_text_bytes} bytes; shorten it",
            "context_length_exceeded",
            param,
        )


async def tokenize_prompts(
    service: Service,
    value: str | list[str] | list[int] | list[list[int]],
    param: str = "prompt",
) -> list[list[int]]:
    """Convert a prompt field, in any of OpenAI's four forms, to lists of token ids."""
    items: list[Any] = [value] if isinstance(value, str) or isinstance(value[0], int) else value
    limit = service.settings.max_choices
    if len(items) > limit:
        raise ApiError(
            400,
            f"{len(items)} prompts are more than {limit} (--max-choices); send fewer at a time",
            "too_many_sequences",
            param,
        )
    if isinstance(items[0], str):
        tokenizer = need_tokenizer(service, f"a text as {param}")
        check_text(service, items, param)
        items = await in_thread(param, tokenizer.encode_batch, items, bos=tokenizer.add_bos)
    for ids in items:
        check_length(service, ids, param)
    return items


async def fill_in_prompt(
    service: Service, prefix: list[int], suffix: str, echo: bool | None, text: str | None = None
) -> list[int]:
    """Build the prompt that asks the model for the text between a prefix and a suffix.

    Args:
        service: the server's state.
        prefix: the prompt before the gap.
        suffix: the text after the gap.
        echo: the request's `echo`.
        text: the text that `prefix` was made of, if it came as text.
    """
    tokenizer = need_tokenizer(service, "suffix")
    if not tokenizer.control_tokens.issuperset(FILL_IN_TOKENS):
        raise ApiError(
            400,
            "suffix needs a tokenizer with fill-in-the-middle tokens, and this model's has none",
            "unsupported",
            "suffix",
        )
    if echo:
        raise invalid_value("echo and suffix cannot be used together", "echo")
    check_text(service, [suffix], "suffix")
    num_bos = 1 if prefix[0] == tokenizer.bos_id else 0  # BOS stays in front
    before = prefix[num_bos:] if text is None else text
    ids = await in_thread("suffix", tokenizer.encode_fill_in, before, suffix, FILL_IN_TOKENS)
    ids = [*prefix[:num_bos], *ids]
    check_length(service, ids, "suffix")
    return ids


async def chat_prompt(
    service: Service, messages: list[Message], tools: list[Tool] | None, generate: bool = True
) -> list[int]:
    """Convert a conversation to token ids with the model's chat template.

    Args:
        service: the server's state.
        messages: the conversation.
        tools: the tools that the template describes to the model.
        generate: end the prompt where the assistant's reply begins.
    """
    tokenizer = need_tokenizer(service, "chat")
    check_text(service, [_text_of(message) or "" for message in messages], "messages")
    return await in_thread(
        "messages",
        tokenizer.apply_chat,
        [_template_message(message) for message in messages],
        add_generation_prompt=generate,
        tools=None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools],
    )


def _text_of(message: Message) -> str | None:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content


def _template_message(message: Message) -> dict[str, Any]:
    """Convert a message to the dict that chat templates expect."""
    if message.content is None and not message.tool_calls:
        raise invalid_value(f"a message of the {message.role} has no content", "messages")
    if message.tool_calls and message.role != "assistant":
        raise invalid_value(
            f"only an assistant's message has tool_calls, found one of the {message.role}",
            "messages",
        )
    # Chat templates know OpenAI's "developer" role as "system".
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": _text_of(message)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return result
