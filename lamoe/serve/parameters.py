"""Converts the sampling fields of a request to `SamplingParams`, and compiles its grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from lamoe.engine.grammar import Grammar
from lamoe.engine.sampler import SamplingParams
from lamoe.serve.errors import ApiError, invalid_value
from lamoe.serve.prompts import need_tokenizer
from lamoe.serve.service import Service
from lamoe.serve.wire import Sampling

MAX_LOGPROBS = 1 << 22  # limit per request, because they stay in memory until its end


async def sampling_params(
    service: Service,
    body: Sampling,
    max_tokens: int,
    logprobs: int | None,
    skip_special: bool = True,
    cache_salt: str = "",
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Convert the sampling fields of a request.

    Args:
        service: the server's state.
        body: the request.
        max_tokens: the limit on generated tokens.
        logprobs: number of top log-probabilities per token, or None for none.
        skip_special: leave special tokens out of the text.
        cache_salt: the salt of the client's key. The request's own salt is added to it.
        grammar: a grammar that is ready; None compiles the grammar of the request.

    Raises:
        ApiError: 400 if a value or the grammar is invalid.
    """
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise invalid_value(
            "stream_options is for stream: true only; leave it out, or set stream", "stream_options"
        )
    if grammar is None:
        grammar = await compile_grammar(service, body)
    # Fields that are absent here get the defaults of SamplingParams.
    optional: dict[str, Any] = {
        # top_p 0 leaves only the most likely token
        "temperature": 0.0 if body.top_p == 0 else body.temperature,
        "top_p": body.top_p or None,
        "min_p": body.min_p,
        "seed": service.settings.seed if body.seed in (None, -1) else body.seed % 2**63,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "n": body.n,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "grammar": grammar,
    }
    if body.top_k is not None:
        optional["top_k"] = max(body.top_k, 0)
    if body.logit_bias is not None:
        optional["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(body.stop or ()),
            skip_special=skip_special,
            cache_salt=f"{cache_salt}/{body.cache_salt}" if body.cache_salt else cache_salt,
            **{name: value for name, value in optional.items() if value is not None},
        )
    except ValueError as e:
        # the messages of SamplingParams begin with the name of the field
        field = str(e).split()[0]
        raise invalid_value(str(e), field if field in type(body).model_fields else None) from None


async def compile_grammar(service: Service, body: Sampling) -> Grammar | None:
    """Compile the grammar that a field of the request asks for, see `grammar_makers`.

    Returns None if the request restricts nothing.

    Raises:
        ApiError: 400 if the grammar is invalid or exceeds a limit.
    """
    makers = grammar_makers(body)
    if not makers:
        return None
    fields = list(makers)
    if len(fields) > 1:
        message = f"{' and '.join(fields)} are given; an output can follow only one of them"
        raise invalid_value(message, fields[1])
    [(field, make)] = makers.items()
    return await prepare_grammar(service, make, field)


async def prepare_grammar(service: Service, make: Callable[[], Grammar], field: str) -> Grammar:
    """Make a grammar and compile it, in a thread. `field` names it in errors.

    Raises:
        ApiError: 400 if the grammar is invalid or exceeds a limit.
    """
    tokenizer = need_tokenizer(service, field)

    def make_and_compile() -> Grammar:
        grammar = make()
        grammar.prepare(tokenizer)
        return grammar

    try:
        return await service.compile(make_and_compile)
    except ValueError as e:
        raise ApiError(400, f"{field}: {e}", "invalid_grammar", field) from None


def grammar_makers(body: Sampling) -> dict[str, Callable[[], Grammar]]:
    """Map each field that asks for a grammar to a function that makes the grammar."""
    makers: dict[str, Callable[[], Grammar]] = {}

    def add(field: str, make: Callable[[Any], Grammar], value: Any) -> None:
        if value is not None:
            makers[field] = partial(make, value)

    form = body.response_format
    if form is not None:
        add("response_format", Grammar.json_schema, form.schema_object)
        if form.type == "json_object" and form.schema_object is None:
            makers["response_format"] = Grammar.json_object
    add("regex", Grammar.regex, body.regex)
    add("grammar", _lark, body.grammar)
    add("json_schema", Grammar.json_schema, body.json_schema)
    add("guided_json", Grammar.json_schema, body.guided_json)
    add("guided_regex", Grammar.regex, body.guided_regex)
    add("guided_choice", _one_of, body.guided_choice)
    add("guided_grammar", _lark, body.guided_grammar)
    if body.format == "json":
        makers["format"] = Grammar.json_object
    else:
        add("format", Grammar.json_schema, body.format)
    if (several := body.structured_outputs) is not None:
        add("structured_outputs.json", Grammar.json_schema, several.json_)
        add("structured_outputs.regex", Grammar.regex, several.regex)
        add("structured_outputs.choice", _one_of, several.choice)
        add("structured_outputs.grammar", _lark, several.grammar)
        if several.json_object:
            makers["structured_outputs.json_object"] = Grammar.json_object
    return makers


def _one_of(texts: list[str]) -> Grammar:
    """Make the grammar of a choice between texts."""
    return Grammar.lark("start: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in texts))


def _lark(text: str) -> Grammar:
    try:
        return Grammar.lark(text)
    except ValueError as e:
        if "::=" not in text:
            raise
        raise ValueError(
            f"{e}; this looks like GBNF or EBNF, and grammars are written in Lark here: "
            'start: "yes" | "no"'
        ) from None


def check_logprobs(
    service: Service, prompts: list[list[int]], params: SamplingParams, echo: bool
) -> int:
    """Return how many log-probabilities a request may keep in memory.

    Raises:
        ApiError: 400 if they are too many.
    """
    if params.logprobs is None:
        return 0
    tokens = 0
    for ids in prompts:
        generated = min(params.max_tokens, service.max_model_len - len(ids))
        tokens += params.n * (generated + (len(ids) if echo else 0))
    per_token = params.logprobs + 1
    if tokens * per_token > MAX_LOGPROBS:
        raise ApiError(
            400,
            f"up to {tokens} tokens with {per_token} log-probabilities each are more than "
            f"{MAX_LOGPROBS}; ask for a smaller max_tokens, n or logprobs",
            "too_many_logprobs",
            "logprobs",
        )
    return tokens * per_token
