"""The state of the server between HTTP and the engine.

It admits requests to a bounded queue, keeps track of the running ones, and counts tokens, times
and expert loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from lamoe.engine.async_llm import AsyncLLM, EngineDead, Run
from lamoe.engine.llm import LLM, Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.serve.errors import ApiError, invalid_value, queue_full, timed_out
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings
from lamoe.text.tokenizer import Tokenizer

MAX_KEPT_LOADS = 256  # number of finished requests whose expert loads are kept
MAX_UNREAD = 1 << 16  # deltas of all requests that wait for their clients to read
# Log-probabilities of all running requests. Each takes about 100 bytes until the request ends.
MAX_HELD_LOGPROBS = 1 << 23
SPEED_WINDOW_S = 5.0  # period over which tokens_per_s is measured

Result = TypeVar("Result")


class Service:
    """One model being served.

    All methods run in one event loop; only the engine's steps and grammar compilation run in
    other threads.

    Attributes:
        state: "loading", "ok", "draining" or "failed".
        admitted: sequences that were admitted and whose generation has not ended.
        requests: requests that were admitted and whose response has not ended.
        scoring: lock that is held while a text is scored outside the paged cache. Each such text
            has a cache of its own, so memory is limited by scoring one text at a time.
    """

    config: ModelConfig
    max_model_len: int
    max_text_bytes: int

    def __init__(self, settings: Settings, name: str):
        self.settings = settings
        self.name = settings.served_model_name or name
        self.created = int(time.time())
        self.metrics = Metrics()
        self.state = "loading"
        self.engine: AsyncLLM | None = None
        self.tokenizer: Tokenizer | None = None
        self.jobs: dict[str, Job] = {}
        self.admitted, self.requests = 0, 0
        self.held_logprobs = 0  # an upper bound on the log-probabilities in memory
        self.unread = 0  # deltas that wait for their clients to read
        self.generated_tokens = 0
        self.mean_seconds = 1.0  # moving average of the duration of a request
        self.scoring = asyncio.Lock()
        waiting = settings.max_queued_requests
        self.text_work = WorkQueue("texts", 2, waiting, self.metrics)
        # Parsing holds Python's lock, so a second thread would only delay the event loop.
        self.body_work = WorkQueue("bodies", 1, waiting, self.metrics)
        # Compiling a grammar may take seconds, so it must not use the threads for text work.
        self._grammar_work = WorkQueue("grammars", 2, waiting, self.metrics)
        self._recent_tokens: deque[list[float]] = deque()  # [time, number of tokens]
        self._expert_loads: OrderedDict[str, torch.Tensor | None] = OrderedDict()

    def begin(self, llm: LLM) -> None:
        """Start to answer requests with a loaded model."""
        self.engine, self.tokenizer = AsyncLLM(llm), llm.tokenizer
        self.config, self.max_model_len = llm.config, llm.max_model_len
        if self.tokenizer is not None:
            # Longer texts cannot fit in the context, so they are refused without tokenizing.
            self.max_text_bytes = self.max_model_len * _max_bytes_per_token(self.tokenizer)
        if self.state == "loading":
            self.state = "ok"

    def ready(self) -> AsyncLLM:
        """Return the engine.

        Raises:
            ApiError: 503 while the model loads, during shutdown, and after the engine ended.
        """
        if self.state != "ok" or self.engine is None:
            reason = {
                "loading": "the model is still loading",
                "draining": "the server is shutting down",
            }.get(self.state, "the engine has ended")
            message = f"{reason}; try again later"
            raise ApiError(503, message, self.state, headers={"Retry-After": "5"})
        if not self.engine.alive:
            raise engine_ended()
        return self.engine

    def check_model(self, name: str | None) -> None:
        """Raise a 404 error if a request names another model."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; this server has {self.name!r}",
                "model_not_found",
                "model",
            )

    # ---- admission -----------------------------------------------------------------------------
    def admit(self, sequences: int, logprobs: int = 0) -> None:
        """Admit sequences to the queue. Every admission needs a call of `release` later.

        Args:
            sequences: number of sequences.
            logprobs: the largest number of log-probabilities that they may keep in memory.

        Raises:
            ApiError: 400 if the sequences can never fit, 429 if the queue is full now, or other
                requests keep too many log-probabilities.
        """
        s = self.settings
        capacity = s.max_num_seqs + s.max_queued_requests
        limit = min(s.max_choices, capacity)
        if sequences > limit:
            raise ApiError(
                400,
                f"the request asks for {sequences} sequences (prompts x n); the limit is {limit} "
                "(--max-choices, --max-num-seqs + --max-queued-requests); send fewer at a time",
                "too_many_sequences",
                "n",
            )
        if self.admitted + sequences > capacity:
            self.metrics.rejected.inc()
            raise queue_full(
                f"the queue is full: {self.admitted} sequences run or wait, the limit is "
                f"{capacity} (--max-num-seqs + --max-queued-requests)",
                self.mean_seconds * max(self.admitted - s.max_num_seqs, 1) / s.max_num_seqs,
            )
        if self.held_logprobs and self.held_logprobs + logprobs > MAX_HELD_LOGPROBS:
            self.metrics.rejected.inc()
            raise queue_full(
                f"running requests may keep {self.held_logprobs} log-probabilities, and this one "
                f"{logprobs}; the limit is {MAX_HELD_LOGPROBS}; try again later, or ask for a "
                "smaller max_tokens, n or logprobs",
                self.mean_seconds,
            )
        self.admitted += sequences
        self.requests += 1
        self.held_logprobs += logprobs

    def release(self, sequences: int, logprobs: int = 0) -> None:
        """Release what one call of `admit` has admitted."""
        self.admitted -= sequences
        self.requests -= 1
        self.held_logprobs -= logprobs

    async def compile(self, work: Callable[[], Any]) -> Any:
        """Run `work`, the compilation of a grammar, in one of two threads.

        Raises:
            ApiError: 429 if too many compilations are waiting.
        """
        return await self._grammar_work.run(work)

    async def start(
        self, id: str, prompts: list[tuple[list[int], SamplingParams]], logprobs: int = 0
    ) -> Job:
        """Queue prompts (token ids) of one request with their sampling parameters.

        Args:
            logprobs: the largest number of log-probabilities that the request may keep.

        Raises:
            ApiError: 400 if a prompt can never run, 429 or 503 if the request cannot run now.
        """
        engine, sequences = self.ready(), sum(params.n for _, params in prompts)
        self.admit(sequences, logprobs)
        try:
            job = Job(self, id, await engine.open([*prompts]), prompts, sequences, logprobs)
        except BaseException as e:
            self.release(sequences, logprobs)
            if isinstance(e, ValueError):
                field = "logit_bias" if str(e).startswith("logit_bias") else None
                raise invalid_value(str(e), field) from None
            if isinstance(e, EngineDead):
                raise engine_ended() from None
            raise
        self.jobs[id] = job
        return job

    def generated(self, job: Job) -> None:
        """Release the sequences of a job whose generation has ended, and keep its expert load."""
        self.admitted -= job.sequences
        self.keep_load(job.id, _sum(list(job.expert_loads.values())))
        self.mean_seconds += 0.2 * (time.monotonic() - job.started - self.mean_seconds)

    # ---- numbers -------------------------------------------------------------------------------
    def count_token(self) -> None:
        """Count one generated token."""
        self.generated_tokens += 1
        self.metrics.tokens.inc()
        now = time.monotonic()
        if self._recent_tokens and now - self._recent_tokens[-1][0] < 0.1:
            self._recent_tokens[-1][1] += 1
        else:
            self._recent_tokens.append([now, 1])
            self._forget_tokens(now)

    def _forget_tokens(self, now: float) -> None:
        while self._recent_tokens and now - self._recent_tokens[0][0] > SPEED_WINDOW_S:
            self._recent_tokens.popleft()

    def tokens_per_s(self) -> float:
        """Measure the rate of generated tokens over the last few seconds."""
        now, recent = time.monotonic(), self._recent_tokens
        self._forget_tokens(now)
        if not recent:
            return 0.0
        return sum(num_tokens for _, num_tokens in recent) / max(now - recent[0][0], 0.5)

    async def stats(self) -> dict[str, Any]:
        """Build the response of /lamoe/stats."""
        engine = self.engine
        if engine is None or not engine.alive:
            self.ready()
            raise engine_ended()
        try:
            engine_stats = await engine.call(_engine_stats)
        except EngineDead:
            raise engine_ended() from None
        return {
            **engine_stats,
            "model": self.name,
            "tokens_per_s": round(self.tokens_per_s(), 2),
            "generated_tokens": self.generated_tokens,
        }

    async def experts(self, id: str) -> dict[str, Any]:
        """Build the response of /lamoe/requests/{id}/experts.

        Raises:
            ApiError: 404 if the request is neither running nor among the recent ones.
        """
        job = self.jobs.get(id)
        if job is None and id not in self._expert_loads:
            raise ApiError(
                404,
                f"no request {id[:100]!r} is running or among the last {MAX_KEPT_LOADS}",
                "request_not_found",
            )
        load = self._expert_loads.get(id) if job is None else await job.expert_load()
        layers, num_experts = list(self.config.moe_layers), self.config.n_routed_experts
        if num_experts is None:
            return {"layers": []}
        if load is None:
            load = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        return {"layers": layers, "experts": num_experts, "load": load.tolist()}

    def keep_load(self, id: str, load: torch.Tensor | None) -> None:
        """Keep the expert load of a finished request, and drop those of the oldest requests."""
        self._expert_loads[id] = load
        while len(self._expert_loads) > MAX_KEPT_LOADS:
            self._expert_loads.popitem(last=False)


class WorkQueue:
    """Threads for one kind of work outside the event loop, with a bounded queue.

    Args:
        what: what the work is done on, for names and messages.
        num_threads: number of threads.
        max_waiting: maximum number of calls that wait for a thread.
        metrics: counts refused calls.
    """

    def __init__(self, what: str, num_threads: int, max_waiting: int, metrics: Metrics):
        self.what, self.metrics = what, metrics
        self.num_threads, self.limit = num_threads, num_threads + max_waiting
        self.pending = 0  # calls that wait or run, also if their client has left
        self._threads = ThreadPoolExecutor(num_threads, f"lamoe-{what}")

    async def run(self, work: Callable[..., Result], *args, **options) -> Result:
        """Call `work` in a thread.

        Raises:
            ApiError: 429 if too many calls are waiting.
        """
        if self.pending >= self.limit:
            self.metrics.rejected.inc()
            raise queue_full(
                f"{self.pending} {self.what} are being worked on or wait, the limit is "
                f"{self.limit} (--max-queued-requests + {self.num_threads}); try again later"
            )
        self.pending += 1
        loop = asyncio.get_running_loop()

        def ended(_) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(self._ended)

        future = self._threads.submit(work, *args, **options)
        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def _ended(self) -> None:
        self.pending -= 1


class Job:
    """One request in the engine, from admission to its last byte.

    The owner must call `close`, which frees the pages of sequences that have not finished.

    Attributes:
        outputs: the finished sequences, by index. The n samples of a prompt are neighbours.
        expert_loads: the expert load of each finished sequence, by index.
    """

    def __init__(
        self,
        service: Service,
        id: str,
        run: Run,
        prompts: list[tuple[list[int], SamplingParams]],
        sequences: int,
        logprobs: int,
    ):
        self.service, self.id, self.run, self.sequences = service, id, run, sequences
        self._logprobs = logprobs
        self.prompt_lengths = [len(ids) for ids, _ in prompts]
        self._first_samples = [0]  # index of each prompt's first sample, then the total
        for _, params in prompts:
            self._first_samples.append(self._first_samples[-1] + params.n)
        self.outputs: dict[int, Output] = {}
        self.expert_loads: dict[int, torch.Tensor] = {}
        self.started = time.monotonic()
        self._first_token_times: dict[int, float] = {}
        self._num_tokens = [0] * sequences
        self._num_unread = 0
        self._ended = self._closed = False
        timeout = service.settings.request_timeout
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout, run.fail, timed_out(timeout))
        run.watch(self._arrived)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index of the sequence, its next delta) for all sequences of the request.

        Raises:
            ApiError: if a sequence fails, the request times out, or the engine ends.
        """
        try:
            async for index, delta in self.run:
                self._count_unread(-1)
                output = delta.output
                if output is not None and output.finish_reason == "error":
                    status = 500 if output.internal else 400
                    message = f"generation failed: {output.error}"
                    raise ApiError(status, message, "generation_failed")
                yield index, delta
        except EngineDead:
            raise engine_ended() from None

    def _arrived(self, item: Delta | Exception) -> None:
        """Record a delta or error that the engine has sent; the client may read it much later."""
        if self._closed:
            return
        if isinstance(item, Exception):
            self._end_generation()
            return
        self._record(item.id - self.run.ids[0], item)
        self._count_unread(1)
        if len(self.outputs) == self.sequences:
            self._end_generation()
        elif self.service.unread > MAX_UNREAD and self._num_unread > MAX_UNREAD // 16:
            self.run.discard()
            self._count_unread(-self._num_unread)
            error = ApiError(408, "the client reads too slowly; its answer is cut off", "timeout")
            self.run.fail(error)

    def _count_unread(self, change: int) -> None:
        self._num_unread += change
        self.service.unread += change

    def _record(self, index: int, delta: Delta) -> None:
        metrics, now = self.service.metrics, time.monotonic()
        if delta.token_id is not None:
            self.service.count_token()
            self._num_tokens[index] += 1
            if index not in self._first_token_times:
                self._first_token_times[index] = now
                metrics.first_token.observe(now - self.started)
        output = delta.output
        if output is None:
            return
        self.outputs[index] = output
        if output.experts is not None:
            self.expert_loads[index] = output.experts
        intervals = self._num_tokens[index] - 1
        if intervals > 0:
            metrics.token_interval.observe((now - self._first_token_times[index]) / intervals)

    def usage(self) -> dict[str, Any]:
        """Build OpenAI's usage object for the tokens so far.

        A prompt counts once, however many samples it has.
        """
        cached = sum(
            self.outputs[i].cached_tokens for i in self._first_samples[:-1] if i in self.outputs
        )
        return usage(sum(self.prompt_lengths), sum(self._num_tokens), cached)

    async def expert_load(self) -> torch.Tensor | None:
        """Sum the expert loads of all sequences so far, [MoE layers, experts]."""
        assert self.service.engine is not None
        try:
            return await self.service.engine.call(self._current_load)
        except EngineDead:
            raise engine_ended() from None

    def _current_load(self, llm: LLM) -> torch.Tensor | None:
        return _sum([*self.expert_loads.values(), *map(llm.experts, self.run.ids)])

    def close(self) -> None:
        """End the request: free its pages and forget what is not read."""
        if self._closed:
            return
        self._end_generation()
        self._closed = True
        self.run.close()
        self._count_unread(-self._num_unread)
        self.service.release(0, self._logprobs)  # the sequences went with the generation
        del self.service.jobs[self.id]

    def _end_generation(self) -> None:
        """Free the pages, keep the expert load, and let the next request run."""
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        self.service.generated(self)
        loop = asyncio.get_running_loop()

        def keep_load(llm: LLM) -> None:
            # Sequences that are cut short have no output; the engine still knows their load.
            load = self._current_load(llm)
            with contextlib.suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(self.service.keep_load, self.id, load)

        self.run.cancel(keep_load)


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Build OpenAI's usage object from numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def engine_ended() -> ApiError:
    """Make the 503 error for requests to an engine that has stopped."""
    return ApiError(
        503,
        "the server is shutting down, or its engine has ended; try again later",
        "engine_ended",
        headers={"Retry-After": "5"},
    )


def _max_bytes_per_token(tokenizer: Tokenizer) -> int:
    """Return an upper bound on the bytes of text that one token can stand for."""
    longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    # A normalizer may shorten the text before it is split into tokens.
    return longest if tokenizer.inner.normalizer is None else 4 * longest


def _sum(loads: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [load for load in loads if load is not None]
    return torch.stack(present).sum(0) if present else None


def _engine_stats(llm: LLM) -> dict[str, Any]:
    cache, pool = llm.cache, llm.pool
    page_bytes = cache.nbytes // cache.pages
    # bytes per token of the same model with other kinds of attention, cached in bf16
    other_attention = {
        name[:3].lower(): 2 * values
        for name, values in accounting.cache_twins(llm.config).items()
        if name[:3] in ("MHA", "GQA", "MQA")
    }
    return {
        "dtype": str(llm.dtype).removeprefix("torch."),
        "max_model_len": llm.max_model_len,
        "cache": {
            "format": cache.format,
            "used_bytes": pool.owned * page_bytes,
            "total_bytes": cache.nbytes,
            "used_tokens": pool.owned * cache.page_size,
            "total_tokens": cache.pages * cache.page_size,
            "bytes_per_token": page_bytes / cache.page_size,
            "compare": other_attention,
        },
        "running": len(llm.scheduler.running),
        "waiting": len(llm.scheduler.waiting),
        "prompt_tokens": llm.prompt_tokens,
        "cached_tokens": llm.cached_tokens,
        "drafted": llm.drafted,
        "accepted": llm.accepted,
    }
