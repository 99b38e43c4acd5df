"""/v1/completions and /v1/chat/completions: a request's fields into prompts and sampling parameters, and the engine's deltas into OpenAI's objects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import from_json

from lamoe.engine.async_llm import EngineDead
from lamoe.engine.grammar import Grammar
from lamoe.engine.llm import Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.score import prompt_logprobs
from lamoe.serve.errors import ApiError
from lamoe.serve.reply import Reply
from lamoe.serve.service import Job, Service, ended, usage
from lamoe.serve.wire import ChatRequest, CompletionRequest, Message, Sampling, Tool
from lamoe.text import tool_calls
from lamoe.text.tokenizer import Tokenizer

FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
MAX_LOGPROBS = 1 << 22  # entries that one request may ask for: they are all in memory until its end
NEVER = -9999.0  # what OpenAI writes for the log of zero


# ---- requests --------------------------------------------------------------------------------------------------------
async def sampling(
    service: Service,
    body: Sampling,
    max_tokens: int,
    logprobs: int | None,
    skip_special: bool = True,
) -> SamplingParams:
    """SamplingParams of a request; 400 for what they refuse."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400,
            "stream_options is for stream: true only; leave it out, or set stream",
            "invalid_value",
            "stream_options",
        )
    constraint = await grammar(service, body)
    seed = body.seed % 2**63 if body.seed is not None else service.settings.seed
    chosen = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "seed": seed,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "n": body.n,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "grammar": constraint,
        "logit_bias": None
        if body.logit_bias is None
        else {int(k): v for k, v in body.logit_bias.items()},
    }
    stop = body.stop if isinstance(body.stop, list) else [] if body.stop is None else [body.stop]
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(stop),
            skip_special=skip_special,
            **{k: v for k, v in chosen.items() if v is not None},
        )
    except ValueError as e:
        raise ApiError(
            400,
            str(e),
            "invalid_value",
            str(e).split()[0] if str(e).split()[0] in type(body).model_fields else None,
        ) from None


async def grammar(service: Service, body: Sampling) -> Grammar | None:
    """What response_format, regex or grammar ask for, compiled; None when they ask for nothing. 400 for what its limits refuse."""
    form = body.response_format
    asked = [
        name
        for name, given in (
            ("response_format", form is not None and form.type != "text"),
            ("regex", body.regex is not None),
            ("grammar", body.grammar is not None),
        )
        if given
    ]
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise ApiError(
            400,
            "response_format: json_schema belongs to type json_schema, and to no other",
            "invalid_value",
            "response_format",
        )
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(
            400,
            f"{' and '.join(asked)} are given; an output follows one of them",
            "invalid_value",
            asked[1],
        )
    tok = need_tokenizer(service, asked[0])

    def make() -> Grammar:
        if body.regex is not None:
            made = Grammar.regex(body.regex)
        elif body.grammar is not None:
            made = Grammar.lark(body.grammar)
        else:
            made = (
                Grammar.json_object()
                if form.type == "json_object"
                else Grammar.json_schema(form.json_schema.json_schema)
            )
        made.prepare(tok)
        return made

    try:
        return await service.compile(make)
    except ValueError as e:
        raise ApiError(400, f"{asked[0]}: {e}", "invalid_grammar", asked[0]) from None


async def in_thread(param: str | None, function, *args, **options):
    """Text work beside the event loop; ValueError is a 400 about `param`."""
    try:
        return await asyncio.to_thread(function, *args, **options)
    except ValueError as e:
        raise ApiError(400, str(e), "invalid_value", param) from None


def need_tokenizer(service: Service, what: str) -> Tokenizer:
    if service.tokenizer is None:
        raise ApiError(
            400,
            f"{what} needs a tokenizer, and this model folder has none; send token ids",
            "no_tokenizer",
        )
    return service.tokenizer


def check_length(service: Service, ids: list[int], param: str) -> None:
    """400, with both numbers, for a prompt that leaves no room; also for none and for ids that the model has not."""
    if not ids:
        raise ApiError(400, "the prompt has no tokens; give at least one", "invalid_value", param)
    if len(ids) >= service.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, and the context of this server is {service.max_model_len}, output included; shorten it",
            "context_length_exceeded",
            param,
        )
    if max(ids) >= service.config.vocab_size:
        raise ApiError(
            400,
            f"token id {max(ids)} is outside the vocabulary of {service.config.vocab_size}",
            "invalid_value",
            param,
        )


def check_text(service: Service, texts: list[str], param: str) -> None:
    """400 for a text that is too long however it is cut into tokens, before it costs the time of cutting it."""
    size = max(len(t.encode("utf-8", "replace")) for t in texts)
    if size > service.max_text_bytes:
        raise ApiError(
            400,
            f"the prompt has {size} bytes; the context of this server is {service.max_model_len} tokens, output included, which cannot hold more than "
            f"{service.max_text_bytes} bytes; shorten it",
            "context_length_exceeded",
            param,
        )


async def prompts_of(service: Service, value: str | list, param: str = "prompt") -> list[list[int]]:
    """Token ids of the prompts in any of OpenAI's four forms."""
    items = [value] if isinstance(value, str) or isinstance(value[0], int) else value
    if len(items) > service.settings.max_choices:
        raise ApiError(
            400,
            f"{len(items)} prompts are more than {service.settings.max_choices} (--max-choices); send fewer at a time",
            "too_many_sequences",
            param,
        )
    if isinstance(items[0], str):
        tok = need_tokenizer(service, f"a text as {param}")
        check_text(service, items, param)
        items = await in_thread(param, tok.encode_batch, items, bos=tok.add_bos)
    for ids in items:
        check_length(service, ids, param)
    return items


async def complete(service: Service, body: CompletionRequest, id: str, log: dict) -> Reply:
    """Answer /v1/completions."""
    service.ready()
    service.check_model(body.model)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(
            400,
            "max_tokens is 0; it must be at least 1, or echo true",
            "invalid_value",
            "max_tokens",
        )
    if body.best_of not in (None, body.n or 1):
        raise ApiError(
            400,
            f"best_of is {body.best_of}; only the value of n ({body.n or 1}) is supported",
            "unsupported",
            "best_of",
        )
    params = await sampling(service, body, max(max_tokens, 1), body.logprobs)
    prompts = await prompts_of(service, body.prompt)
    if body.suffix is not None:
        prompts = [await _fill_in(service, body, p) for p in prompts]
    check_logprobs(service, prompts, params, bool(body.echo))
    say = Completions(service, id, body, prompts, params)
    if max_tokens == 0:
        service.admit(len(prompts))
        return Reply(
            whole=say.only_prompts,
            heavy=body.logprobs is not None,
            close=lambda: service.release(len(prompts)),
            seconds=service.settings.request_timeout,
        )
    return _reply(service, say, await service.start(id, [(p, params) for p in prompts]), body, log)


def check_logprobs(
    service: Service, prompts: list[list[int]], params: SamplingParams, echo: bool
) -> None:
    """400 for more log-probabilities than memory should be spent on."""
    if params.logprobs is None:
        return
    tokens = sum(
        params.n
        * (min(params.max_tokens, service.max_model_len - len(p)) + (len(p) if echo else 0))
        for p in prompts
    )
    if tokens * (params.logprobs + 1) > MAX_LOGPROBS:
        raise ApiError(
            400,
            f"up to {tokens} tokens with {params.logprobs + 1} log-probabilities each are more than {MAX_LOGPROBS}; ask for a smaller max_tokens, n or logprobs",
            "too_many_logprobs",
            "logprobs",
        )


async def _fill_in(service: Service, body: CompletionRequest, prefix: list[int]) -> list[int]:
    tok = need_tokenizer(service, "suffix")
    begin, hole, end = (tok.inner.token_to_id(t) for t in FIM)
    if None in (begin, hole, end):
        raise ApiError(
            400,
            "suffix needs a tokenizer with fill-in-the-middle tokens, and this model's has none",
            "unsupported",
            "suffix",
        )
    if body.echo:
        raise ApiError(400, "echo and suffix do not go together", "invalid_value", "echo")
    check_text(service, [body.suffix], "suffix")
    head = 1 if prefix[0] == tok.bos_id else 0
    ids = [
        *prefix[:head],
        begin,
        *prefix[head:],
        hole,
        *await in_thread("suffix", tok.encode, body.suffix),
        end,
    ]
    check_length(service, ids, "suffix")
    return ids


async def chat(service: Service, body: ChatRequest, id: str, log: dict) -> Reply:
    """Answer /v1/chat/completions."""
    service.ready()
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ; give one of them",
            "invalid_value",
            "max_tokens",
        )
    form = None
    if body.tools is None and (
        body.tool_choice is not None or body.parallel_tool_calls is not None
    ):
        raise ApiError(
            400, "tool_choice and parallel_tool_calls need tools", "invalid_value", "tools"
        )
    use_tools = body.tools is not None and body.tool_choice != "none"
    if use_tools:
        form = tool_calls.form_of(need_tokenizer(service, "chat").chat_template)
        if form is None:
            raise ApiError(
                400,
                "tools are given, but this model's chat template does not define tool calls, or not in a form known here; leave them out",
                "unsupported",
                "tools",
            )
    ids = await chat_ids(service, body.messages, body.tools if use_tools else None)
    check_length(service, ids, "messages")
    max_tokens = body.max_completion_tokens or body.max_tokens or service.max_model_len
    params = await sampling(
        service,
        body,
        max_tokens,
        (body.top_logprobs or 0) if body.logprobs else None,
        skip_special=not use_tools,
    )
    check_logprobs(service, [ids], params, False)
    return _reply(
        service, Chats(service, id, body, form), await service.start(id, [(ids, params)]), body, log
    )


async def chat_ids(
    service: Service, messages: list[Message], tools: list[Tool] | None, generate: bool = True
) -> list[int]:
    """The token ids of a conversation, through the model's chat template."""
    tok = need_tokenizer(service, "chat")
    check_text(
        service,
        [
            "".join(p.text for p in m.content) if isinstance(m.content, list) else m.content or ""
            for m in messages
        ],
        "messages",
    )
    plain = [_plain(m, tool_calls.form_of(tok.chat_template) is tool_calls.TAGS) for m in messages]
    given = None if tools is None else [t.model_dump(exclude_none=True) for t in tools]
    return await in_thread(
        "messages", tok.apply_chat, plain, add_generation_prompt=generate, tools=given
    )


def _plain(m: Message, parsed_arguments: bool) -> dict[str, Any]:
    """A message as templates take it: content is a text, and so are arguments, except where the template writes JSON itself."""
    out: dict[str, Any] = {"role": "system" if m.role == "developer" else m.role}
    out["content"] = (
        "".join(p.text for p in m.content) if isinstance(m.content, list) else m.content
    )
    if m.content is None and not m.tool_calls:
        raise ApiError(
            400, f"a message of the {m.role} has no content", "invalid_value", "messages"
        )
    for name in ("name", "tool_call_id"):
        if getattr(m, name) is not None:
            out[name] = getattr(m, name)
    if m.tool_calls:
        if m.role != "assistant":
            raise ApiError(
                400,
                f"only an assistant's message has tool_calls, found one of the {m.role}",
                "invalid_value",
                "messages",
            )
        out["tool_calls"] = [c.model_dump() for c in m.tool_calls]
        for call in out["tool_calls"] if parsed_arguments else ():
            try:
                call["function"]["arguments"] = from_json(
                    call["function"]["arguments"], allow_inf_nan=False
                )
            except ValueError:
                raise ApiError(
                    400, "the arguments of a tool call are not JSON", "invalid_value", "messages"
                ) from None
    return out


def _reply(
    service: Service, say: Completions | Chats, job: Job, body: Sampling, log: dict
) -> Reply:
    say.job = job
    if body.user is not None:
        log["user"] = body.user

    def close() -> None:
        log.update(
            prompt_tokens=sum(job.prompts),
            generated_tokens=job.usage()["completion_tokens"],
            finish=[o.finish_reason for _, o in sorted(job.outputs.items())][:8],
        )
        job.close()

    how = (
        {"events": lambda: _events(say, body)}
        if body.stream
        else {"whole": lambda: _whole(say, job)}
    )
    return Reply(
        **how,
        close=close,
        left=service.metrics.left.inc,
        seconds=service.settings.request_timeout,
        heavy=bool(body.logprobs),
    )


async def _whole(say: Completions | Chats, job: Job) -> dict[str, Any]:
    await say.prepare()
    async for _ in job.deltas():
        pass

    def choices() -> list[dict[str, Any]]:
        return [say.choice(i, job.outputs[i]) for i in range(job.sequences)]

    return say.head() | {
        "choices": await asyncio.to_thread(choices) if say.body.logprobs else choices(),
        "usage": job.usage(),
    }


async def _events(say: Completions | Chats, body: Sampling) -> AsyncIterator[dict[str, Any]]:
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head = say.head(".chunk") | ({"usage": None} if wants_usage else {})
    await say.prepare()
    for index in range(say.job.sequences):
        for choice in say.opening(index):
            yield head | {"choices": [choice]}
    async for index, delta in say.job.deltas():
        for choice in say.pieces(index, delta):
            yield head | {"choices": [choice]}
    if wants_usage:
        yield head | {"choices": [], "usage": say.job.usage()}


# ---- answers ---------------------------------------------------------------------------------------------------------
def token_text(tok: Tokenizer | None, id: int) -> str:
    """A token by itself as OpenAI writes it: its text, or "bytes:\\xe2\\x82" when it is only a part of a character."""
    if tok is None:
        return f"token_id:{id}"
    data = tok.token_bytes(id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


class Completions:
    """Objects of /v1/completions for one request."""

    kind = "text_completion"

    def __init__(
        self,
        service: Service,
        id: str,
        body: CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
    ):
        self.service, self.id, self.body, self.prompts, self.params, self.tok = (
            service,
            id,
            body,
            prompts,
            params,
            service.tokenizer,
        )
        self.created, self.job = int(time.time()), None
        self.scores: list[list[dict[int, float] | None]] | None = None
        self._offsets: dict[int, Any] = {}

    def head(self, chunk: str = "") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.service.name,
        }

    async def prepare(self) -> None:
        """What echo with logprobs needs: the log-probabilities of the prompts' own tokens."""
        if not (self.body.echo and self.body.logprobs is not None):
            return
        try:
            scores = []
            for p in self.prompts:
                async with self.service.scoring:
                    scores.append(await prompt_logprobs(self.service.engine, p, self.body.logprobs))
            self.scores = scores
        except EngineDead:
            raise ended() from None

    async def only_prompts(self) -> dict[str, Any]:
        """max_tokens 0: the prompts, echoed and scored."""
        await self.prepare()
        choices = [
            {
                "index": i,
                "text": self._prompt_text(i),
                "finish_reason": "length",
                "logprobs": self._logprobs(p, self.scores and self.scores[i], 0),
            }
            for i, p in enumerate(self.prompts)
        ]
        return self.head() | {"choices": choices, "usage": usage(sum(map(len, self.prompts)), 0, 0)}

    def _prompt_text(self, i: int) -> str:
        return need_tokenizer(self.service, "echo").decode(self.prompts[i])

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        tokens, logprobs, text = output.token_ids, output.logprobs, output.text
        if self.body.echo:
            prompt = index // self.params.n
            text = self._prompt_text(prompt) + text
            tokens = self.prompts[prompt] + tokens
            logprobs = self.scores and self.scores[prompt] + logprobs
        return {
            "index": index,
            "text": text,
            "finish_reason": output.finish_reason,
            "logprobs": self._logprobs(tokens, logprobs, index),
        }

    def _logprobs(
        self, tokens: list[int], logprobs: list[dict[int, float] | None] | None, index: int
    ) -> dict[str, Any] | None:
        """Of `tokens`, which follow what this was called with before for the same index."""
        if logprobs is None:
            return None
        if index not in self._offsets:
            self._offsets[index] = [0, self.tok.stream() if self.tok else None]
        state, offsets = self._offsets[index], []
        for t in tokens:
            offsets.append(state[0])
            state[0] += len(state[1].step(t)) if state[1] else 0
        top = None
        if self.body.logprobs:
            top = [
                None
                if found is None
                else {
                    token_text(self.tok, t): max(v, NEVER) for t, v in reversed(list(found.items()))
                }
                for found in logprobs
            ]
        return {
            "tokens": [token_text(self.tok, t) for t in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
            "token_logprobs": [
                None if found is None else max(found[t], NEVER)
                for t, found in zip(tokens, logprobs)
            ],
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        if not self.body.echo:
            return []
        i = index // self.params.n
        return [
            {
                "index": index,
                "text": self._prompt_text(i),
                "finish_reason": None,
                "logprobs": self._logprobs(self.prompts[i], self.scores and self.scores[i], index),
            }
        ]

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        reason = delta.output.finish_reason if delta.output else None
        if not delta.text and delta.logprobs is None and reason is None:
            return []
        logprobs = (
            None
            if delta.logprobs is None
            else self._logprobs([delta.token_id], [delta.logprobs], index)
        )
        return [{"index": index, "text": delta.text, "finish_reason": reason, "logprobs": logprobs}]


class Chats:
    """Objects of /v1/chat/completions for one request. A template sets its own blank before a reply, so blanks at its beginning are left out."""

    def __init__(self, service: Service, id: str, body: ChatRequest, form: tool_calls.Form | None):
        self.service, self.id, self.body, self.form, self.tok = (
            service,
            id,
            body,
            form,
            service.tokenizer,
        )
        self.created, self.job = int(time.time()), None
        self._began: set[int] = set()
        self._split: dict[int, tool_calls.Splitter] = {}

    def head(self, chunk: str = "") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": f"chat.completion{chunk}",
            "created": self.created,
            "model": self.service.name,
        }

    async def prepare(self) -> None:
        """Nothing to do first."""

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        text, calls = tool_calls.parse(self.form, output.text) if self.form else (output.text, [])
        text, calls = text.lstrip(), self._allowed(calls)
        message = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if output.logprobs is not None:
            logprobs = {
                "content": [
                    self._logprob(t, found) for t, found in zip(output.token_ids, output.logprobs)
                ],
                "refusal": None,
            }
        return {
            "index": index,
            "message": message,
            "finish_reason": "tool_calls" if calls else output.finish_reason,
            "logprobs": logprobs,
        }

    def _allowed(self, calls: list[dict]) -> list[dict]:
        return calls[:1] if self.body.parallel_tool_calls is False else calls

    def _logprob(self, token: int, found: dict[int, float]) -> dict[str, Any]:
        def one(t: int) -> dict[str, Any]:
            return {
                "token": token_text(self.tok, t),
                "logprob": max(found[t], NEVER),
                "bytes": list(self.tok.token_bytes(t)),
            }

        top = sorted(found, key=found.get, reverse=True)[: self.body.top_logprobs or 0]
        return one(token) | {"top_logprobs": [one(t) for t in top]}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        text, out = delta.text, []
        if self.form:
            text = self._split.setdefault(index, tool_calls.Splitter(self.form)).add(text)
        calls: list[dict] = []
        if self.form and delta.output:
            rest, calls = self._split[index].end()
            text, calls = text + rest, self._allowed(calls)
        if index not in self._began:
            text = text.lstrip()
            if text:
                self._began.add(index)
        logprobs = (
            None
            if delta.logprobs is None
            else {"content": [self._logprob(delta.token_id, delta.logprobs)], "refusal": None}
        )
        if text or logprobs:
            out.append(self._chunk(index, {"content": text}, logprobs=logprobs))
        if calls:
            out.append(
                self._chunk(index, {"tool_calls": [{"index": i, **c} for i, c in enumerate(calls)]})
            )
        if delta.output:
            out.append(
                self._chunk(index, {}, "tool_calls" if calls else delta.output.finish_reason)
            )
        return out

    def _chunk(
        self, index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
