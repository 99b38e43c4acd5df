"""Between HTTP and the engine: its state (loading, ready, draining), admission to a bounded queue, requests in flight, and the numbers about them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lamoe.engine.async_llm import AsyncLLM, EngineDead, Run
from lamoe.engine.llm import LLM, Delta
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.model import accounting
from lamoe.serve.errors import ApiError
from lamoe.serve.metrics import Metrics
from lamoe.serve.settings import Settings

REMEMBERED = 256  # finished requests whose expert counts can still be asked for
WINDOW = 5.0  # seconds that tokens_per_s looks back


class Service:
    """One model being served. `state`: loading, ok, draining, failed. Everything but the engine's own thread runs in one event loop."""

    def __init__(self, settings: Settings, name: str):
        self.settings, self.name, self.created, self.metrics = (
            settings,
            settings.served_model_name or name,
            int(time.time()),
            Metrics(),
        )
        self.state, self.engine, self.tokenizer = "loading", None, None
        self.jobs: dict[str, Job] = {}
        self.admitted, self.requests = 0, 0  # sequences and requests, from admission to the end
        self.generated_tokens, self.mean_seconds = 0, 1.0
        self.scoring = (
            asyncio.Lock()
        )  # one text at a time is scored beside the paged cache: it has a cache of its own
        self._compilers, self._compiling = (
            ThreadPoolExecutor(2, "lamoe-compile"),
            0,
        )  # apart: a grammar may take seconds, texts must not wait for it
        self._recent: deque[list[float]] = deque()  # [time, tokens]
        self._experts: OrderedDict[str, torch.Tensor | None] = OrderedDict()

    def begin(self, llm: LLM) -> None:
        """The model is there: answer requests."""
        self.engine, self.tokenizer, self.config, self.max_model_len = (
            AsyncLLM(llm),
            llm.tokenizer,
            llm.model.config,
            llm.max_model_len,
        )
        tok = llm.tokenizer
        if (
            tok is not None
        ):  # a text of more bytes is longer than the context however it is cut; a normalizer could shorten it, hence the factor
            longest = max(len(tok.token_bytes(i)) for i in range(tok.vocab_size))
            self.max_text_bytes = (
                self.max_model_len * longest * (1 if tok.inner.normalizer is None else 4)
            )
        if self.state == "loading":
            self.state = "ok"

    def ready(self) -> AsyncLLM:
        """The engine, or a 503."""
        if self.state != "ok" or self.engine is None:
            says = {
                "loading": "the model is still loading",
                "draining": "the server is shutting down",
            }.get(self.state, "the engine has ended")
            raise ApiError(
                503, f"{says}; try again later", self.state, headers={"Retry-After": "5"}
            )
        if not self.engine.alive:
            raise ended()
        return self.engine

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; this server has {self.name!r}",
                "model_not_found",
                "model",
            )

    # ---- admission -----------------------------------------------------------------------------------------------
    def admit(self, sequences: int) -> None:
        """Count sequences in; `release` counts them out. 400 when they can never fit, 429 with Retry-After when there is no room now."""
        s = self.settings
        if sequences > min(s.max_choices, s.max_num_seqs + s.max_queued_requests):
            raise ApiError(
                400,
                f"the request asks for {sequences} sequences (prompts x n); the limit is {min(s.max_choices, s.max_num_seqs + s.max_queued_requests)} "
                "(--max-choices, --max-num-seqs + --max-queued-requests); send fewer at a time",
                "too_many_sequences",
                "n",
            )
        if self.admitted + sequences > s.max_num_seqs + s.max_queued_requests:
            self.metrics.rejected.inc()
            wait = self.mean_seconds * max(self.admitted - s.max_num_seqs, 1) / s.max_num_seqs
            raise ApiError(
                429,
                f"the queue is full: {self.admitted} sequences run or wait, the limit is {s.max_num_seqs + s.max_queued_requests} "
                "(--max-num-seqs + --max-queued-requests)",
                "queue_full",
                headers={"Retry-After": str(min(max(math.ceil(wait), 1), 60))},
            )
        self.admitted += sequences
        self.requests += 1

    def release(self, sequences: int) -> None:
        self.admitted -= sequences
        self.requests -= 1

    async def compile(self, work: Callable[[], Any]) -> Any:
        """The result of `work` (making a grammar ready), of which two run at a time. 429 when too many wait."""
        if self._compiling > self.settings.max_queued_requests:
            self.metrics.rejected.inc()
            raise ApiError(
                429,
                f"{self._compiling} grammars are waiting to be compiled; try again later",
                "queue_full",
                headers={"Retry-After": "5"},
            )
        self._compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compilers, work)
        finally:
            self._compiling -= 1

    async def start(self, id: str, requests: list[tuple[list[int], SamplingParams]]) -> Job:
        """Queue prompts (token ids) with their parameters. ApiError: 400 for what can never run, 429, 503."""
        engine, sequences = self.ready(), sum(p.n for _, p in requests)
        self.admit(sequences)
        try:
            job = Job(self, id, await engine.open(requests), requests, sequences)
        except BaseException as e:
            self.release(sequences)
            if isinstance(e, ValueError):
                raise ApiError(400, str(e), "invalid_value") from None
            if isinstance(e, EngineDead):
                raise ended() from None
            raise
        self.jobs[id] = job
        return job

    # ---- numbers -------------------------------------------------------------------------------------------------
    def count_token(self) -> None:
        self.generated_tokens += 1
        self.metrics.tokens.inc()
        now = time.monotonic()
        if self._recent and now - self._recent[-1][0] < 0.1:
            self._recent[-1][1] += 1
        else:
            self._recent.append([now, 1])

    def tokens_per_s(self) -> float:
        """Over the last few seconds."""
        now = time.monotonic()
        while self._recent and now - self._recent[0][0] > WINDOW:
            self._recent.popleft()
        return (
            sum(n for _, n in self._recent) / max(now - self._recent[0][0], 0.5)
            if self._recent
            else 0.0
        )

    async def stats(self) -> dict[str, Any]:
        """What /lamoe/stats answers."""
        engine = self.engine
        if engine is None or not engine.alive:
            self.ready()
            raise ended()
        try:
            return {
                **await engine.call(_engine_stats),
                "model": self.name,
                "tokens_per_s": round(self.tokens_per_s(), 2),
                "generated_tokens": self.generated_tokens,
            }
        except EngineDead:
            raise ended() from None

    async def experts(self, id: str) -> dict[str, Any]:
        """How often each expert of each MoE layer computed a token of a request, running or recently finished. 404 for others."""
        job, c = self.jobs.get(id), getattr(self, "config", None)
        if job is None and id not in self._experts:
            raise ApiError(
                404,
                f"no request {id[:100]!r} is running or among the last {REMEMBERED}",
                "request_not_found",
            )
        load = self._experts.get(id)
        if job is not None:
            try:
                load = await self.engine.call(
                    lambda llm: _sum(
                        [*job.experts.values(), *(llm.experts(i) for i in job.run.ids)]
                    )
                )
            except EngineDead:
                raise ended() from None
        if not c.is_moe:
            return {"layers": []}
        layers = list(c.moe_layers)
        return {
            "layers": layers,
            "experts": c.n_routed_experts,
            "load": [[0] * c.n_routed_experts for _ in layers] if load is None else load.tolist(),
        }

    def remember(self, id: str, load: torch.Tensor | None) -> None:
        self._experts[id] = load
        while len(self._experts) > REMEMBERED:
            self._experts.popitem(last=False)

    def finished(self, job: Job) -> None:
        self.release(job.sequences)
        del self.jobs[job.id]
        self.remember(job.id, _sum(list(job.experts.values())))
        self.mean_seconds += 0.2 * (time.monotonic() - job.started - self.mean_seconds)


class Job:
    """One request in the engine, from admission to its last byte. Whoever gets it closes it; that frees its pages wherever it stands."""

    def __init__(
        self,
        service: Service,
        id: str,
        run: Run,
        requests: list[tuple[list[int], SamplingParams]],
        sequences: int,
    ):
        self.service, self.id, self.run, self.sequences = service, id, run, sequences
        self.prompts = [len(ids) for ids, p in requests]
        self._first_of = [0]
        for _, p in requests:
            self._first_of.append(self._first_of[-1] + p.n)
        self.outputs: dict[int, Output] = {}
        self.experts: dict[int, torch.Tensor] = {}
        self.started, self._first, self._counts, self._closed = (
            time.monotonic(),
            {},
            [0] * sequences,
            False,
        )
        limit = service.settings.request_timeout
        self._timer = asyncio.get_running_loop().call_later(
            limit,
            run.fail,
            ApiError(
                408,
                f"the answer was not complete within {limit:g} seconds (--request-timeout)",
                "timeout",
                headers={"X-Should-Retry": "false"},
            ),
        )

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the sequence, what a step added to it). ApiError when one failed, at the time-out, and when the engine ended."""
        try:
            async for index, delta in self.run:
                self._note(index, delta)
                yield index, delta
        except EngineDead:
            raise ended() from None

    def _note(self, index: int, delta: Delta) -> None:
        now = time.monotonic()
        if delta.token_id is not None:
            self.service.count_token()
            self._counts[index] += 1
            if index not in self._first:
                self._first[index] = now
                self.service.metrics.first_token.observe(now - self.started)
        if delta.output is None:
            return
        self.outputs[index] = delta.output
        if delta.output.experts is not None:
            self.experts[index] = delta.output.experts
        if delta.output.finish_reason == "error":
            raise ApiError(
                500 if delta.output.internal else 400,
                f"generation failed: {delta.output.error}",
                "generation_failed",
            )
        if self._counts[index] > 1:
            self.service.metrics.between.observe(
                (now - self._first[index]) / (self._counts[index] - 1)
            )

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage of what has come so far; a prompt counts once, however many samples it has."""
        prompt, completion = sum(self.prompts), sum(self._counts)
        cached = sum(
            self.outputs[i].cached_tokens for i in self._first_of[:-1] if i in self.outputs
        )
        return usage(prompt, completion, cached)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self.service.finished(self)
        loop = asyncio.get_running_loop()

        def count(llm: LLM) -> None:  # also of what is cut short, which has no output
            load = _sum([*self.experts.values(), *map(llm.experts, self.run.ids)])
            try:
                loop.call_soon_threadsafe(self.service.remember, self.id, load)
            except RuntimeError:
                pass  # the loop has ended

        self.run.close(count)


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def ended() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down, or its engine has ended; try again later",
        "engine_ended",
        headers={"Retry-After": "5"},
    )


def _sum(loads: list[torch.Tensor | None]) -> torch.Tensor | None:
    loads = [load for load in loads if load is not None]
    return torch.stack(loads).sum(0) if loads else None


def _engine_stats(llm: LLM) -> dict[str, Any]:
    c, cache, pool = llm.model.config, llm.cache, llm.pool
    page = cache.nbytes // cache.pages
    twins = {
        name[:3].lower(): 2 * n
        for name, n in accounting.cache_twins(c).items()
        if name[:3] in ("MHA", "GQA", "MQA")
    }
    return {
        "dtype": str(llm.dtype).removeprefix("torch."),
        "max_model_len": llm.max_model_len,
        "cache": {
            "format": cache.format,
            "used_bytes": pool.owned * page,
            "total_bytes": cache.nbytes,
            "used_tokens": pool.owned * cache.page_size,
            "total_tokens": cache.pages * cache.page_size,
            "bytes_per_token": page / cache.page_size,
            "compare": twins,
        },
        "running": len(llm.scheduler.running),
        "waiting": len(llm.scheduler.waiting),
        "prompt_tokens": llm.prompt_tokens,
        "cached_tokens": llm.cached_tokens,
        "drafted": llm.drafted,
        "accepted": llm.accepted,
    }
