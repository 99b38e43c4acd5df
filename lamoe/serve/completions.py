"""The handlers of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from lamoe.serve.builders import ChatBuilder, CompletionBuilder
from lamoe.serve.errors import ApiError, invalid_value
from lamoe.serve.fields import MAX_TOKENS
from lamoe.serve.parameters import check_logprobs, sampling_params
from lamoe.serve.prompts import (
    chat_prompt,
    check_length,
    fill_in_prompts,
    tokenize_prompts,
)
from lamoe.serve.reply import Reply
from lamoe.serve.service import Job, Service
from lamoe.serve.tools import tool_grammar, tool_use
from lamoe.serve.wire import ChatRequest, CompletionRequest, Sampling

Builder = CompletionBuilder | ChatBuilder


async def complete(
    service: Service, body: CompletionRequest, id: str, log_fields: dict[str, Any], cache_salt: str
) -> Reply:
    """Answer a /v1/completions request.

    Args:
        service: the server's state.
        body: the request.
        id: the request id.
        log_fields: fields of the request's log line; this function adds to them.
        cache_salt: salt of the client's cached prefixes, see Guard.cache_salt.
    """
    service.ready()
    service.check_model(body.model)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise invalid_value("max_tokens is 0; it must be at least 1, or echo true", "max_tokens")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(
            400,
            f"best_of is {body.best_of}; only the value of n ({body.n or 1}) is supported",
            "unsupported",
            "best_of",
        )
    params = await sampling_params(
        service, body, max(max_tokens, 1), body.logprobs, cache_salt=cache_salt
    )
    prompts = await tokenize_prompts(service, body.prompt)
    if body.suffix is not None:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        prompts = await fill_in_prompts(service, prompts, texts, body.suffix, body.echo)
    logprobs = check_logprobs(service, prompts, params, bool(body.echo))
    body = body.model_copy(update={"prompt": "", "suffix": None})  # frees their memory
    builder = CompletionBuilder(service, id, body, prompts, params)
    if max_tokens == 0:
        service.admit(len(prompts), logprobs)
        return Reply(
            whole=builder.prompts_only,
            heavy=body.logprobs is not None,
            close=lambda: service.release(len(prompts), logprobs),
            seconds=service.settings.request_timeout,
        )
    job = await service.start(id, [(ids, params) for ids in prompts], logprobs)
    return _reply(service, builder, job, body, log_fields)


async def chat(
    service: Service, body: ChatRequest, id: str, log_fields: dict[str, Any], cache_salt: str
) -> Reply:
    """Answer a /v1/chat/completions request. The arguments are those of `complete`."""
    service.ready()
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise invalid_value("top_logprobs needs logprobs: true", "top_logprobs")
    limits = {body.max_tokens, body.max_completion_tokens} - {None, MAX_TOKENS}
    if len(limits) > 1:
        raise invalid_value(
            "max_tokens and max_completion_tokens differ; give one of them", "max_tokens"
        )
    use = tool_use(service, body)
    continued = bool(body.continue_final_message)
    if continued and (body.add_generation_prompt or use.forced):
        other = "add_generation_prompt" if body.add_generation_prompt else "a forced call"
        raise invalid_value(
            f"continue_final_message and {other} cannot be used together", "continue_final_message"
        )
    ids = await chat_prompt(
        service,
        body.messages,
        use.tools,
        generate=body.add_generation_prompt is not False,
        forced=use.forced,
        options=body.template_options,
        continued=continued,
    )
    check_length(service, ids, "messages")
    params = await sampling_params(
        service,
        body if use.forced is None else body.model_copy(update={"stop": None}),
        max_tokens=min(limits | {service.max_model_len}),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        skip_special=use.form is None and use.forced is None,  # special tokens mark the tool calls
        cache_salt=cache_salt,
        grammar=await tool_grammar(service, body, use),
    )
    logprobs = check_logprobs(service, [ids], params, echo=False)
    job = await service.start(id, [(ids, params)], logprobs)
    return _reply(service, ChatBuilder(service, id, body, use), job, body, log_fields)


def _reply(
    service: Service, builder: Builder, job: Job, body: CompletionRequest | ChatRequest, log_fields
) -> Reply:
    if body.user is not None:
        log_fields["user"] = body.user

    def close() -> None:
        log_fields.update(
            prompt_tokens=sum(job.prompt_lengths),
            generated_tokens=job.usage()["completion_tokens"],
            finish=[output.finish_reason for _, output in sorted(job.outputs.items())][:8],
        )
        job.close()

    return Reply(
        events=(lambda: _events(builder, job, body)) if body.stream else None,
        whole=None if body.stream else lambda: _whole(builder, job),
        close=close,
        disconnected=service.metrics.disconnected.inc,
        seconds=service.settings.request_timeout,
        heavy=bool(body.logprobs),
    )


async def _whole(builder: Builder, job: Job) -> dict[str, Any]:
    await builder.prepare()
    async for _ in job.deltas():
        pass

    def choices() -> list[dict[str, Any]]:
        return [builder.choice(i, job.outputs[i]) for i in range(job.sequences)]

    return builder.envelope() | {
        # many log-probabilities take long to write: keep the event loop free
        "choices": await asyncio.to_thread(choices) if builder.body.logprobs else choices(),
        "usage": job.usage(),
    }


async def _events(builder: Builder, job: Job, body: Sampling) -> AsyncIterator[dict[str, Any]]:
    wants_usage = (body.stream_options is not None and body.stream_options.include_usage) or (
        body.usage is not None and body.usage.include
    )
    envelope = builder.envelope(streaming=True) | ({"usage": None} if wants_usage else {})
    await builder.prepare()
    for index in range(job.sequences):
        first = partial(builder.first_choices, index)
        for choice in await asyncio.to_thread(first) if builder.body.logprobs else first():
            yield envelope | {"choices": [choice]}
    async for index, delta in job.deltas():
        for choice in builder.delta_choices(index, delta):
            yield envelope | {"choices": [choice]}
    if wants_usage:
        yield envelope | {"choices": [], "usage": job.usage()}
