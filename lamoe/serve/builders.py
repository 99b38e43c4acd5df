"""Builds OpenAI's response objects from the outputs and deltas of the engine.

`CompletionBuilder` and `ChatBuilder` have the same methods:

- `prepare`: computes what the responses need besides the generated tokens.
- `envelope`: returns the fields of a response object besides its choices.
- `choice`: builds one finished choice of a whole response.
- `first_choices`: builds the choices to stream before the first token of a sequence.
- `delta_choices`: builds the choices to stream for one step of a sequence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from lamoe.engine.async_llm import EngineDead
from lamoe.engine.llm import Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.score import prompt_logprobs
from lamoe.serve.prompts import need_tokenizer
from lamoe.serve.service import Service, engine_ended, usage
from lamoe.serve.tools import ToolUse
from lamoe.serve.wire import ChatRequest, CompletionRequest
from lamoe.text import tool_calls
from lamoe.text.forced_calls import ForcedStream
from lamoe.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's value for the logarithm of zero
TokenLogprobs = dict[int, float]  # log-probabilities of a token and its top alternatives


def token_text(tokenizer: Tokenizer | None, id: int) -> str:
    """Return the text of a single token in OpenAI's notation.

    Returns:
        The text of the token, or "bytes:\\xe2\\x82" if it is only a part of a character.
    """
    if tokenizer is None:
        return f"token_id:{id}"
    data = tokenizer.token_bytes(id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionBuilder:
    """Builds the response objects of one /v1/completions request."""

    def __init__(
        self,
        service: Service,
        id: str,
        body: CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
    ):
        self.service, self.id, self.body = service, id, body
        self.prompts, self.params = prompts, params
        self.tokenizer = service.tokenizer
        self.created = int(time.time())
        # log-probabilities of the tokens of each prompt, if they are echoed
        self.prompt_logprobs: list[Sequence[TokenLogprobs | None]] | None = None
        self._texts: list[str] = []  # the text of each prompt, if they are echoed
        self._text_positions: dict[int, _TextPosition] = {}  # by choice index

    def envelope(self, streaming: bool = False) -> dict[str, Any]:
        """Return the fields of a response object besides its choices, also of streamed ones."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.name,
        }

    async def prepare(self) -> None:
        """Decode the prompts if they are echoed, and compute their log-probabilities."""
        if not self.body.echo:
            return
        tokenizer = need_tokenizer(self.service, "echo")
        self._texts = await asyncio.to_thread(lambda: list(map(tokenizer.decode, self.prompts)))
        if self.body.logprobs is None:
            return
        engine, top = self.service.engine, self.body.logprobs
        assert engine is not None
        try:
            logprobs = []
            for ids in self.prompts:
                async with self.service.scoring:
                    logprobs.append(await prompt_logprobs(engine, ids, top))
        except EngineDead:
            raise engine_ended() from None
        self.prompt_logprobs = [*logprobs]

    async def prompts_only(self) -> dict[str, Any]:
        """Build the whole response of a request with echo and max_tokens 0."""
        await self.prepare()

        def choice(i: int, ids: list[int]) -> dict[str, Any]:
            return {
                "index": i,
                "text": self._texts[i],
                "finish_reason": "length",
                "logprobs": self._logprobs(ids, self._prompt_logprobs(i), index=i),
            }

        choices = [await asyncio.to_thread(choice, i, ids) for i, ids in enumerate(self.prompts)]
        num_tokens = sum(map(len, self.prompts))
        return self.envelope() | {"choices": choices, "usage": usage(num_tokens, 0, 0)}

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """Build the finished choice of one sequence."""
        text, tokens = output.text, output.token_ids
        logprobs: Sequence[TokenLogprobs | None] | None = output.logprobs
        if self.body.echo:
            prompt = index // self.params.n
            text = self._texts[prompt] + text
            tokens = self.prompts[prompt] + tokens
            of_prompt = self._prompt_logprobs(prompt)
            logprobs = None if of_prompt is None else [*of_prompt, *(logprobs or [])]
        return {
            "index": index,
            "text": text,
            "finish_reason": output.finish_reason,
            "logprobs": self._logprobs(tokens, logprobs, index),
        }

    def first_choices(self, index: int) -> list[dict[str, Any]]:
        """Build the choice that echoes the prompt, if echo is set."""
        if not self.body.echo:
            return []
        prompt = index // self.params.n
        logprobs = self._logprobs(self.prompts[prompt], self._prompt_logprobs(prompt), index)
        text = self._texts[prompt]
        return [{"index": index, "text": text, "finish_reason": None, "logprobs": logprobs}]

    def delta_choices(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Build the choice for one step, or none if the step has nothing to show."""
        reason = delta.output.finish_reason if delta.output else None
        if not delta.text and delta.logprobs is None and reason is None:
            return []
        logprobs = None
        if delta.token_id is not None and delta.logprobs is not None:
            logprobs = self._logprobs([delta.token_id], [delta.logprobs], index)
        return [{"index": index, "text": delta.text, "finish_reason": reason, "logprobs": logprobs}]

    def _prompt_logprobs(self, prompt: int) -> Sequence[TokenLogprobs | None] | None:
        return None if self.prompt_logprobs is None else self.prompt_logprobs[prompt]

    def _logprobs(
        self, tokens: list[int], logprobs: Sequence[TokenLogprobs | None] | None, index: int
    ) -> dict[str, Any] | None:
        """Build the logprobs object of tokens.

        Successive calls with the same index must pass successive tokens, because `text_offset`
        continues where the previous call ended.
        """
        if logprobs is None:
            return None
        if index not in self._text_positions:
            self._text_positions[index] = _TextPosition(self.tokenizer)
        position = self._text_positions[index]
        top = None
        if self.body.logprobs:
            top = [None if p is None else self._top_logprobs(p) for p in logprobs]
        return {
            "tokens": [token_text(self.tokenizer, t) for t in tokens],
            "top_logprobs": top,
            "text_offset": [position.advance(t) for t in tokens],
            "token_logprobs": [
                None if p is None else max(p[t], MIN_LOGPROB) for t, p in zip(tokens, logprobs)
            ],
        }

    def _top_logprobs(self, logprobs: TokenLogprobs) -> dict[str, float]:
        # Different tokens can have the same text. Reversed, so that the likeliest one remains.
        return {
            token_text(self.tokenizer, t): max(logprob, MIN_LOGPROB)
            for t, logprob in reversed(list(logprobs.items()))
        }


class _TextPosition:
    """The position in a text that grows token by token."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._characters = 0
        self._stream = tokenizer.stream() if tokenizer else None

    def advance(self, token: int) -> int:
        """Append a token and return the position where its text begins."""
        begin = self._characters
        if self._stream is not None:
            self._characters += len(self._stream.step(token))
        return begin


class ChatBuilder:
    """Builds the response objects of one /v1/chat/completions request.

    White space at the beginning of a reply is removed, because chat templates write their own. It
    stays if the reply continues a message.

    Args:
        service: the server's state.
        id: the request id.
        body: the request.
        use: how the request uses tools.
    """

    def __init__(self, service: Service, id: str, body: ChatRequest, use: ToolUse):
        self.service, self.id, self.body, self.use = service, id, body, use
        self.tokenizer = need_tokenizer(service, "chat")
        self.created = int(time.time())
        self._begun: set[int] = set()  # indices of choices that have streamed some text
        self._splitters: dict[int, tool_calls.Splitter] = {}  # by choice index
        self._forced: dict[int, ForcedStream] = {}  # by choice index

    def envelope(self, streaming: bool = False) -> dict[str, Any]:
        """Return the fields of a response object besides its choices."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if streaming else "chat.completion",
            "created": self.created,
            "model": self.service.name,
        }

    async def prepare(self) -> None:
        """Do nothing, because a chat response does not echo the prompt."""

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """Build the finished choice of one sequence."""
        text = output.text
        calls: list[dict[str, Any]] = []
        if self.use.forced:
            calls = [tool_calls.new_call(*call) for call in self.use.forced.parse(text)]
            text = ""
        elif self.use.form:
            text, calls = tool_calls.parse(self.use.form, text)
        calls = self._allowed(calls)
        if not self.body.continue_final_message:
            text = text.lstrip()
        content = text or None if calls else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if output.logprobs is not None:
            tokens = zip(output.token_ids, output.logprobs)
            logprobs = {"content": [self._logprob(t, p) for t, p in tokens], "refusal": None}
        return {
            "index": index,
            "message": message,
            "finish_reason": self._reason(output, bool(calls)),
            "logprobs": logprobs,
        }

    def first_choices(self, index: int) -> list[dict[str, Any]]:
        """Build the choice that announces the role, as OpenAI's API does."""
        return [_chat_delta(index, {"role": "assistant", "content": ""})]

    def delta_choices(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Build the choices for one step. Calls beside text are sent complete, at the end."""
        if self.use.forced:
            text, calls = "", self._forced_calls(index, delta)
        else:
            text, calls = self._split_calls(index, delta)
        if index not in self._begun and not self.body.continue_final_message:
            text = text.lstrip()
            if text:
                self._begun.add(index)
        logprobs = None
        if delta.token_id is not None and delta.logprobs is not None:
            content = [self._logprob(delta.token_id, delta.logprobs)]
            logprobs = {"content": content, "refusal": None}
        choices = []
        if text or logprobs:
            choices.append(_chat_delta(index, {"content": text}, logprobs=logprobs))
        if calls:
            choices.append(_chat_delta(index, {"tool_calls": calls}))
        if delta.output:
            choices.append(_chat_delta(index, {}, self._reason(delta.output, bool(calls))))
        return choices

    def _reason(self, output: Output, calls: bool) -> str | None:
        """Return finish_reason. As in OpenAI's API, it is "stop" after a call of a named function.

        "length" says that the arguments of a forced call are incomplete.
        """
        if self.use.forced:
            whole = output.finish_reason == "stop" and not self.use.named
            return "tool_calls" if whole else output.finish_reason
        return "tool_calls" if calls else output.finish_reason

    def _forced_calls(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return the changes of forced calls."""
        stream = self._forced.setdefault(index, ForcedStream(self.use.forced))
        return [*stream.add(delta.text), *(stream.end() if delta.output else [])]

    def _split_calls(self, index: int, delta: Delta) -> tuple[str, list[dict]]:
        """Separate the text of a step from tool calls, which are complete at the last step."""
        if self.use.form is None:
            return delta.text, []
        if index not in self._splitters:
            self._splitters[index] = tool_calls.Splitter(self.use.form)
        splitter = self._splitters[index]
        text = splitter.add(delta.text)
        if delta.output is None:
            return text, []
        rest, calls = splitter.end()
        indexed = [{"index": i, **call} for i, call in enumerate(self._allowed(calls))]
        return text + rest, indexed

    def _allowed(self, calls: list[dict]) -> list[dict]:
        return calls[:1] if self.body.parallel_tool_calls is False else calls

    def _logprob(self, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
        def entry(t: int) -> dict[str, Any]:
            return {
                "token": token_text(self.tokenizer, t),
                "logprob": max(logprobs[t], MIN_LOGPROB),
                "bytes": list(self.tokenizer.token_bytes(t)),
            }

        likeliest = sorted(logprobs, key=lambda t: logprobs[t], reverse=True)
        top = likeliest[: self.body.top_logprobs or 0]
        return entry(token) | {"top_logprobs": [entry(t) for t in top]}


def _chat_delta(
    index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
