"""The engine, which runs many requests at once over one paged cache.

Programs call `LLM(...).generate(prompts, params)`. Servers call `add`, `step` and `cancel`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from lamoe import backends
from lamoe.backends import cache_codec
from lamoe.backends.base import Backend, Formats
from lamoe.engine import prefix_file, runner
from lamoe.engine.grammar import Matcher
from lamoe.engine.lookup import Pace
from lamoe.engine.next_token import TextStream, next_token
from lamoe.engine.pages import PagePool
from lamoe.engine.plan import Plan, fit
from lamoe.engine.request import Output, Sequence, check_prompt
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.scheduler import Scheduler
from lamoe.model.config import did_you_mean
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer

log = logging.getLogger("lamoe.engine")
_INTERNAL_ERROR = "an internal error ended it ({}); the log has the traceback"


@dataclass(frozen=True)
class Delta:
    """The token and text that one step added to one sequence.

    output: the finished sequence on its last delta, else None.
    logprobs: log-probabilities of this token, in the form of Output.logprobs.
    """

    id: int
    token_id: int | None
    text: str
    output: Output | None = None
    logprobs: dict[int, float] | None = None


class LLM:
    """A model with a paged cache and continuous batching.

    Args:
        model: a Transformer, a Backend, or the folder (packed or not) or hub id of a model.
        tokenizer: the tokenizer. By default, the one in the model's folder.
        cache: storage format of the cache: fp32 | bf16 | int8 | 6bit | 4bit.
        cache_memory: size of the cache in bytes. The default is enough for four full contexts, but
            at most 1 GiB unless one full context needs more.
        max_model_len: longest sequence in tokens, prompt and output together. The default is the
            model's limit.
        max_num_seqs: largest number of sequences that run at once.
        max_num_batched_tokens: largest number of tokens per step. It bounds how long a long prompt
            delays sequences that are decoding.
        page_size: number of tokens per cache page.
        speculate: while at most this many sequences run, n-gram drafts are checked several tokens
            at a time (lookup.py). Outputs do not change. 0 disables drafts.
        dtype: dtype of the computation, "float32" or "bfloat16". The default is the checkpoint's.
        device: "auto" | "cpu" | "cuda" | "mps". The default is the device of `model` if it is in
            memory, else the CPU.
        threads: number of CPU threads. 0 leaves torch's setting.
        count_experts: whether to count, for every sequence, which routed experts computed its
            tokens (Output.experts, `experts`).
        weights: format to which the weights are converted while loading, int8 | int4 (quantised) or
            fp32 | bf16. `lamoe quantize` does this once and writes a folder.
        head: the same for the output head alone.
        backend: "cpu" (the compiled kernels) or "torch". By default the compiled kernels run every
            model that they support.

    Attributes:
        model: the `model` argument.
        backend: the Backend that runs the model.
        config: the architecture of the model.

    Raises:
        ValueError: if memory does not suffice (plan.py). This is checked before weights are read.
    """

    def __init__(
        self,
        model: Transformer | Backend | str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        cache: str = "bf16",
        cache_memory: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        page_size: int = 16,
        speculate: int = 2,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        threads: int = 0,
        count_experts: bool = False,
        weights: str | None = None,
        head: str | None = None,
        backend: str | None = None,
    ):
        if cache not in cache_codec.FORMATS:
            raise ValueError(
                f"unknown cache format {cache!r}{did_you_mean(cache, cache_codec.FORMATS)}; "
                f"known: {', '.join(cache_codec.FORMATS)}"
            )
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs or page_size < 1:
            raise ValueError(
                f"max_num_seqs {max_num_seqs} and page_size {page_size} must be at least 1, "
                f"max_num_batched_tokens {max_num_batched_tokens} at least max_num_seqs"
            )
        if threads:
            torch.set_num_threads(threads)
        formats = Formats(weights, head, cache)
        prepared = backends.prepare(
            model,
            formats,
            dtype=dtype,
            device=device,
            backend=backend,
            threads=threads,
        )
        self._plan = fit(
            prepared.config,
            prepared.weight_bytes,
            formats.cache,
            cache_memory,
            max_model_len,
            max_num_seqs,
            page_size,
            prepared.available,
            lambda length: prepared.state_bytes(
                prepared.config, length, max_num_seqs, max_num_batched_tokens
            ),
        )
        folder = prepared.folder
        if tokenizer is None and folder and (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(folder)
        self.model, self.tokenizer = model, tokenizer
        self.backend, self.config = prepared.load(), prepared.config
        self._plan = replace(self._plan, weights=self.backend.weight_bytes())
        self.max_model_len = self._plan.max_model_len
        self.cache = self.backend.new_cache(self._plan.pages, page_size, formats.cache)
        self.pool = PagePool(self.cache.pages, page_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens, speculate)
        self.eos_ids = tokenizer.stop_ids if tokenizer else self.config.eos_token_ids
        self.count_experts = count_experts and self.config.is_moe
        self._ids = count()
        self._texts: dict[int, TextStream] = {}
        # Deltas that `generate` and `stream` have not consumed yet, by sequence id.
        self._inboxes: dict[int, deque[Delta]] = {}
        # Totals since construction. cached_tokens / prompt_tokens is the prefix hit rate.
        self.prompt_tokens = self.cached_tokens = 0
        self.drafted = self.accepted = 0
        self._pace = Pace()

    # ---- whole requests --------------------------------------------------------------------------
    def generate(
        self,
        prompts: list[str | list[int]],
        params: SamplingParams | list[SamplingParams] = SamplingParams(),
    ) -> list[Output]:
        """Generate the outputs of all prompts.

        Args:
            prompts: texts or lists of token ids.
            params: sampling parameters for all prompts, or a list with one entry per prompt.

        Returns:
            The outputs in the order of the prompts. The n samples of a prompt are neighbours.

        Raises:
            ValueError: if one of the requests is invalid. Then nothing runs.
        """
        each = params if isinstance(params, list) else [params] * len(prompts)
        if isinstance(prompts, str) or len(each) != len(prompts):
            raise ValueError(
                "generate takes a list of prompts and one SamplingParams for all or for each; "
                f"found {type(prompts).__name__} and {len(each)}"
            )
        sequences = [seq for prompt, p in zip(prompts, each) for seq in self._sequences(prompt, p)]
        done = {d.id: d.output for d in self._deltas(sequences) if d.output is not None}
        return [done[seq.id] for seq in sequences]

    def stream(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> Iterator[Delta]:
        """Yield the deltas of one prompt as soon as they are generated.

        `Delta.id` distinguishes the n samples. Leaving the loop early frees their cache pages.
        """
        return self._deltas(self._sequences(prompt, params))

    def _deltas(self, sequences: list[Sequence]) -> Iterator[Delta]:
        """Run sequences to their end.

        Several of these iterators may be consumed alternately, because each step puts every delta
        into the inbox of the iterator that it belongs to.
        """
        inbox: deque[Delta] = deque()
        left = len(sequences)
        self._inboxes.update({seq.id: inbox for seq in sequences})
        try:
            for seq in sequences:
                self._start(seq)
            while left:
                while not inbox:
                    self.step()
                left -= inbox[0].output is not None
                yield inbox.popleft()
        finally:
            for seq in sequences:
                del self._inboxes[seq.id]
                self.cancel(seq.id)

    # ---- single steps ----------------------------------------------------------------------------
    def add(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """Queue a request and return the ids of its n sequences.

        Raises:
            ValueError: if the request can never run.
        """
        return self.add_all([(prompt, params)])

    def add_all(self, requests: list[tuple[str | list[int], SamplingParams]]) -> list[int]:
        """Queue several requests and return the ids of all sequences, which are consecutive.

        Raises:
            ValueError: if one of them can never run. Then none is queued.
        """
        sequences = [seq for prompt, params in requests for seq in self._sequences(prompt, params)]
        for seq in sequences:
            self._start(seq)
        return [seq.id for seq in sequences]

    def experts(self, id: int) -> torch.Tensor | None:
        """Return how often each routed expert computed a token of an unfinished sequence.

        Tokens of a prefix hit do not count, because they were not computed. Tokens of a preempted
        sequence count twice, because they were computed twice.

        Returns:
            int64 [MoE layers, E]. None if the id is unknown or count_experts is off.
        """
        seq = self._find(id)
        return seq.experts if seq else None

    def cancel(self, id: int) -> Output | None:
        """End a sequence at any point, free its pages, and return its output so far.

        Returns None for a sequence that is unknown or finished.
        """
        seq = self._find(id)
        if seq is None:
            return None
        output = self._finish(seq, "abort", self._texts[id].shown)
        self._deliver([Delta(id, None, "", output)])
        return output

    def _find(self, id: int) -> Sequence | None:
        unfinished = (*self.scheduler.running, *self.scheduler.waiting)
        return next((seq for seq in unfinished if seq.id == id), None)

    def plan(self) -> Plan:
        """Return the memory plan of this engine. Its `describe()` formats the plan as text."""
        return self._plan

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which attention computes."""
        return self.backend.dtype

    @property
    def busy(self) -> bool:
        """Whether at least one sequence is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Run one forward pass over the tokens that the scheduler chose, and return the deltas.

        If the pass fails, the affected sequences finish with an error and the others continue. If
        `step` itself raises, the engine state is undefined: discard the engine.
        """
        work = self.scheduler.schedule()
        if not work:
            return []
        alone = work[0] if len(work) == 1 and work[0][0].todo == 1 else None
        begin = time.perf_counter()
        results, failed = self._run(work)
        self.backend.check()  # before a token is chosen from results that may be garbage
        if alone and not failed:
            self._pace.saw(alone[1], time.perf_counter() - begin)
        for seq, n in work:
            if not seq.finish:
                self.scheduler.computed(seq, n - len(seq.draft))
        deltas = [delta for result in results for delta in self._accept(result)]
        return self._deliver(failed + deltas)

    def _run(self, work: runner.Work) -> tuple[list[runner.Ready], list[Delta]]:
        """Run the scheduled work; return its results and the deltas of sequences that failed.

        A failed pass counts as not run. Its rows are treated as unwritten, and no other sequence
        shares their pages. Then each sequence of the pass is retried alone, which finds the faulty
        sequence and needs less memory.
        """
        try:
            return runner.run(self.backend, self.cache, work, self.count_experts), []
        except Exception as e:
            fields = {"sequences": len(work), "tokens": sum(n for _, n in work)}
            log.error("a pass failed", exc_info=e, extra={"fields": fields})
            if len(work) == 1:
                error = _INTERNAL_ERROR.format(type(e).__name__)
                return [], [self._fail(work[0][0], error, internal=True)]
        retried = [self._run([one]) for one in work]
        results = [result for found, _ in retried for result in found]
        return results, [delta for _, failed in retried for delta in failed]

    def _deliver(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            if delta.id in self._inboxes:
                self._inboxes[delta.id].append(delta)
        return deltas

    def _accept(self, ready: runner.Ready) -> list[Delta]:
        """Choose the next token, and further tokens while each chosen token equals the draft."""
        seq, logits, checks = ready
        draft, seq.draft = seq.draft, []
        deltas = [self._advance(seq, logits[0], *checks[0])]
        for guess, row, check in zip(draft, logits[1:], checks[1:]):
            if seq.finish or seq.tokens[-1] != guess:
                break
            self.scheduler.computed(seq, 1)
            deltas.append(self._advance(seq, row, *check))
        if draft:
            accepted = len(deltas) - 1
            cost = self._pace.cost(1 + len(draft))
            seq.lookup.learn(len(draft), accepted, len(seq.tokens), cost)
            self.drafted, self.accepted = self.drafted + len(draft), self.accepted + accepted
        return deltas

    def _advance(self, seq: Sequence, logits: torch.Tensor, total: float, argmax: int) -> Delta:
        """Choose the next token of a sequence.

        An error in its logits, sampling, grammar or text ends this sequence alone.

        Args:
            logits: [vocabulary].
            total: the sum of the logits. It is not finite if any logit is not finite.
            argmax: index of the largest logit.
        """
        if not math.isfinite(total):
            # Rows before this one may contain NaN too. Even a masked NaN spreads, since its
            # attention weight is 0 and 0 x NaN is NaN.
            self.pool.forget(seq.pages)
            return self._fail(seq, "the model's logits are not finite", internal=True)
        try:
            return self._choose(seq, logits, argmax)
        except (ValueError, RuntimeError) as e:  # options or grammar exclude every token
            return self._fail(seq, str(e), internal=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic in a Rust library is not an Exception
            log.error("a sequence failed", exc_info=e)
            return self._fail(seq, _INTERNAL_ERROR.format(type(e).__name__), internal=True)

    def _fail(self, seq: Sequence, error: str, internal: bool) -> Delta:
        """End a sequence with an error. `internal` is stored as Output.internal."""
        seq.error, seq.internal = error, internal
        return Delta(seq.id, None, "", self._finish(seq, "error", self._texts[seq.id].shown))

    def _choose(self, seq: Sequence, logits: torch.Tensor, argmax: int) -> Delta:
        text = self._texts[seq.id]
        if logits.device.type != "cpu" and not seq.params.is_plain_greedy:
            logits = logits.cpu()  # sampling, penalties and grammars work on the host
        token, piece, reason = next_token(seq, text, logits, self.eos_ids, argmax)
        logprobs = None if seq.params.logprobs is None else seq.logprobs[-1]
        output = self._finish(seq, reason, text.shown) if reason else None
        return Delta(seq.id, token, piece, output, logprobs)

    def _sequences(self, prompt: str | list[int], params: SamplingParams) -> list[Sequence]:
        """Make the n sequences of a request.

        Raises:
            ValueError: if the request can never run.
        """
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    "a text prompt needs a tokenizer; give token ids, or a model folder with "
                    "tokenizer.json"
                )
            prompt = tokenizer.encode(prompt, bos=tokenizer.add_bos)
        check_prompt(prompt, params, tokenizer, self.config, self.max_model_len)
        limit = min(len(prompt) + params.max_tokens, self.max_model_len)
        sequences: list[Sequence] = []
        for i in range(params.n):
            seq = Sequence(
                next(self._ids),
                list(prompt),
                len(prompt),
                params,
                limit,
                params.generator(i),
                self._matcher(params),
                leader=sequences[0] if sequences else None,
            )
            sequences.append(seq)
        return sequences

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        return None if params.grammar is None else params.grammar.start(self.tokenizer)

    def _start(self, seq: Sequence) -> None:
        self._texts[seq.id] = TextStream(self.tokenizer, seq.params.stop, seq.params.skip_special)
        self.scheduler.add(seq)

    def _finish(self, seq: Sequence, reason: str, text: str) -> Output:
        seq.finish = reason
        self.scheduler.end(seq)
        del self._texts[seq.id]
        self.prompt_tokens += seq.prompt_len
        self.cached_tokens += seq.cached
        return Output(
            token_ids=seq.output,
            text=text,
            finish_reason=reason,
            prompt_tokens=seq.prompt_len,
            cached_tokens=seq.cached,
            logprobs=seq.logprobs if seq.params.logprobs is not None else None,
            error=seq.error,
            experts=seq.experts,
            internal=seq.internal,
        )

    # ---- prefixes on disk ------------------------------------------------------------------------
    def save_cache(self, file: str | Path, tokens: list[int]) -> int:
        """Save the cached rows of the beginning of `tokens` to a safetensors file.

        Call this method between two steps, not from another thread. prefix_file.py documents the
        file.

        Returns:
            The number of tokens whose rows were saved.
        """
        return prefix_file.save(file, tokens, self.backend, self.cache, self.pool)

    def load_cache(self, file: str | Path) -> int:
        """Load a file of `save_cache`, so that prompts which begin with its tokens reuse its rows.

        Call this method between two steps, not from another thread.

        Returns:
            The number of tokens of the file that are in the cache now.

        Raises:
            ValueError: if the file is damaged, does not fit in the cache, or belongs to another
                model or cache format.
        """
        return prefix_file.load(file, self.backend, self.cache, self.pool, self.max_model_len)
