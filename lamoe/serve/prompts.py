"""Converts the prompts and messages of requests to token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lamoe.serve.errors import ApiError, invalid_value
from lamoe.serve.service import Service
from lamoe.serve.wire import Message, Tool
from lamoe.text.chat_template import reads_tools
from lamoe.text.forced_calls import ForcedCalls
from lamoe.text.tokenizer import FILL_IN_TOKENS, Tokenizer

PIECE_CHARS = 1 << 14  # longer texts are counted in pieces first, see `check_num_tokens`
# Texts with more tokens than this many contexts are refused while they are counted.
MAX_CONTEXTS = 2
MAX_PROMPT_TOKENS = 1 << 20  # of all prompts of one request together
Result = TypeVar("Result")


async def in_thread(
    service: Service, param: str | None, work: Callable[..., Result], *args, **options
) -> Result:
    """Run text work in a thread of the server. A ValueError becomes a 400 error about `param`.

    Raises:
        ApiError: 400, or 429 if too much text work is waiting.
    """
    try:
        return await service.text_work.run(work, *args, **options)
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
        raise invalid_value(f"{param} has no tokens; give at least one", param)
    if len(ids) >= service.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, and the context of this server is "
            f"{service.max_model_len}, output included; shorten it",
            "context_length_exceeded",
            param,
        )
    check_ids(service, ids, param)


def check_ids(service: Service, ids: list[int], param: str) -> None:
    """Raise a 400 error for ids outside the vocabulary."""
    vocab_size = service.config.vocab_size
    if max(ids, default=0) >= vocab_size:
        message = f"token id {max(ids)} is outside the vocabulary of {vocab_size}"
        raise invalid_value(message, param)


def check_text(service: Service, texts: list[str], param: str) -> None:
    """Raise a 400 error for a prompt that cannot fit in the context, without tokenizing it.

    Args:
        service: the server's state.
        texts: the parts of one prompt.
        param: the field that holds them.
    """
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if size > service.max_text_bytes:
        raise ApiError(
            400,
            f"the prompt has {size} bytes; the context of this server is "
            f"{service.max_model_len} tokens, output included, which cannot hold more than "
            f"{service.max_text_bytes} bytes; shorten it",
            "context_length_exceeded",
            param,
        )


def check_num_tokens(service: Service, text: str, param: str) -> None:
    """Raise a 400 error for a text that has far more tokens than the context.

    The tokenizer needs hundreds of bytes for each token that it finds. So a long text is first
    tokenized in pieces, which only counts: the tokens at the cuts may differ.
    """
    assert service.tokenizer is not None
    limit, found = MAX_CONTEXTS * service.max_model_len, 0
    starts = range(0, len(text), PIECE_CHARS)
    for start in starts if len(starts) > 1 else ():
        found += len(service.tokenizer.encode(text[start : start + PIECE_CHARS]))
        if found > limit:
            raise ApiError(
                400,
                f"the prompt has more than {limit} tokens, and the context of this server is "
                f"{service.max_model_len}, output included; shorten it",
                "context_length_exceeded",
                param,
            )


def encode_texts(service: Service, texts: list[str], param: str, bos: bool) -> list[list[int]]:
    """Tokenize texts. Call this in a thread, see `in_thread`.

    Raises:
        ApiError: 400 if a text, or all of them together, have too many tokens.
    """
    tokenizer = need_tokenizer(service, f"a text as {param}")
    ids: list[list[int]] = []
    found = 0
    for text in texts:
        check_num_tokens(service, text, param)
        ids.append(tokenizer.encode(text, bos=bos))
        found += len(ids[-1])
        if found > max(MAX_PROMPT_TOKENS, service.max_model_len * MAX_CONTEXTS):
            raise ApiError(
                400,
                f"the prompts have more than {MAX_PROMPT_TOKENS} tokens together; "
                "send fewer at a time",
                "too_many_tokens",
                param,
            )
    return ids


async def tokenize_prompts(
    service: Service,
    value: str | list[str] | list[int] | list[list[int]],
    param: str = "prompt",
    limit: int | None = None,
) -> list[list[int]]:
    """Convert a prompt field, in any of OpenAI's four forms, to lists of token ids.

    Args:
        service: the server's state.
        value: the field.
        param: its name.
        limit: largest number of prompts; default: --max-choices.
    """
    items: list[Any] = [value] if isinstance(value, str) or isinstance(value[0], int) else value
    if len(items) > (limit or service.settings.max_choices):
        found = f"{service.settings.max_choices} (--max-choices)" if limit is None else limit
        raise ApiError(
            400,
            f"{len(items)} prompts are more than {found}; send fewer at a time",
            "too_many_sequences",
            param,
        )
    if isinstance(items[0], str):
        tokenizer = need_tokenizer(service, f"a text as {param}")
        for text in items:
            check_text(service, [text], param)
        items = await in_thread(
            service, param, encode_texts, service, items, param, tokenizer.add_bos
        )
    for i, ids in enumerate(items):
        check_length(service, ids, param if len(items) == 1 else f"{param}[{i}]")
    return items


async def fill_in_prompts(
    service: Service,
    prefixes: list[list[int]],
    texts: Sequence[Any],
    suffix: str,
    echo: bool | None,
) -> list[list[int]]:
    """Build the prompts that ask the model for the text between each prefix and a suffix.

    Args:
        service: the server's state.
        prefixes: the prompts before the gap.
        texts: for each prefix the text that it was made of, or anything else if it came as ids.
        suffix: the text after the gap.
        echo: the request's `echo`.
    """
    tokenizer = need_tokenizer(service, "suffix")
    if tokenizer.fill_in_ids is None:
        raise ApiError(
            400,
            "suffix needs a tokenizer with fill-in-the-middle tokens, and this model's has none",
            "unsupported",
            "suffix",
        )
    if echo:
        raise invalid_value("echo and suffix cannot be used together", "echo")
    check_text(service, [suffix], "suffix")

    def fill_in() -> list[list[int]]:
        check_num_tokens(service, suffix, "suffix")
        prompts = []
        for prefix, text in zip(prefixes, texts):
            num_bos = 1 if prefix[0] == tokenizer.bos_id else 0  # BOS stays in front
            before = text if isinstance(text, str) else prefix[num_bos:]
            ids = tokenizer.encode_fill_in(before, suffix, FILL_IN_TOKENS)
            prompts.append([*prefix[:num_bos], *ids])
            check_length(service, prompts[-1], "suffix")
        return prompts

    return await in_thread(service, "suffix", fill_in)


async def chat_prompt(
    service: Service,
    messages: list[Message],
    tools: list[Tool] | None,
    generate: bool = True,
    forced: ForcedCalls | None = None,
    options: dict[str, Any] | None = None,
    continued: bool = False,
) -> list[int]:
    """Convert a conversation to token ids with the model's chat template.

    Args:
        service: the server's state.
        messages: the conversation.
        tools: the tools that the template describes to the model.
        generate: end the prompt where the assistant's reply begins.
        forced: calls that the reply must consist of. Their beginning ends the prompt, and if the
            template does not read tools, the first message describes them.
        options: the client's variables for the template.
        continued: the reply continues the last message.
    """
    tokenizer = need_tokenizer(service, "chat")

    def render() -> list[int]:
        texts = [*_texts(messages, tools), json.dumps(options or "")]
        check_text(service, texts, "messages")
        shown = [_template_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
        functions = None if tools is None else [t.model_dump(exclude_none=True) for t in tools]
        if functions and forced and not reads_tools(tokenizer.templates.choose(tools=True)):
            parts = [_description(functions), shown[0]["content"]]
            shown[0]["content"] = "\n\n".join(part for part in parts if part)
            functions = None
        ids = tokenizer.apply_chat(
            shown,
            add_generation_prompt=generate and not continued,
            tools=functions,
            options=options,
            continued=continued,
            check=lambda text: check_num_tokens(service, text, "messages"),
        )
        if forced is None:
            return ids
        return ids + tokenizer.encode(_lead(tokenizer, ids) + forced.head, allow_special=True)

    return await in_thread(service, "messages", render)


def _lead(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return what goes between a prompt and a forced call."""
    text = tokenizer.decode(ids[-16:], skip_special=False)
    if text.rstrip().endswith("<think>"):  # the template has begun the reasoning
        return "\n</think>\n\n"
    # A text that ends in the middle of a line goes on with a space.
    return " " if tokenizer.decode(ids[-1:])[-1:].strip() else ""


def _description(functions: list[dict[str, Any]]) -> str:
    """Describe functions to a model whose template does not read tools."""
    lines = [json.dumps(function["function"], ensure_ascii=False) for function in functions]
    return "\n".join(
        [
            "These functions exist:",
            *lines,
            'A call of a function is written as {"name": its name, "arguments": an object}.',
        ]
    )


def _texts(messages: list[Message], tools: list[Tool] | None) -> list[str]:
    """Return all parts of a conversation whose length the client chooses freely."""
    calls = [call for message in messages for call in message.tool_calls or ()]
    return [
        *(_text_of(message) or "" for message in messages),
        *(message.name or "" for message in messages),
        *(call.model_dump_json() for call in calls),
        *(tool.model_dump_json() for tool in tools or ()),
    ]


def _text_of(message: Message) -> str | None:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.refusal if message.content is None else message.content


def _template_message(message: Message, field: str) -> dict[str, Any]:
    """Convert a message to the dict that chat templates expect.

    Raises:
        ApiError: 400 that names `field`, the place of the message.
    """
    if _text_of(message) is None and not message.tool_calls:
        wrong = f"{field}.content is missing or null; a message of the {message.role} needs it"
        raise invalid_value(wrong, f"{field}.content")
    if message.tool_calls and message.role != "assistant":
        raise invalid_value(
            f"{field}.tool_calls: only an assistant's message has tool_calls, found one of the "
            f"{message.role}",
            f"{field}.tool_calls",
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
