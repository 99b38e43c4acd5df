"""The engine: many requests at once over one paged cache. `LLM(...).generate(prompts, params)`; `add`, `step` and `cancel` for servers."""

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

from lamoe.backends import cache_codec
from lamoe.backends.cpu import native, packed, packed_file
from lamoe.backends.cpu.packed import PackedModel
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import load, read_config, resolve
from lamoe.engine import prefix_file, runner
from lamoe.engine.generate import TextStream
from lamoe.engine.grammar import Matcher
from lamoe.engine.lookup import Pace
from lamoe.engine.pages import PagePool
from lamoe.engine.plan import Plan, available_memory, fit
from lamoe.engine.request import Output, Sequence
from lamoe.engine.sampler import SamplingParams, sample
from lamoe.engine.scheduler import Scheduler
from lamoe.model import accounting
from lamoe.model.config import ModelConfig, did_you_mean
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer

log = logging.getLogger("lamoe.engine")
_LOGGED = "an internal error ended it ({}); the log has the traceback"


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence. output: set on the last one. logprobs: of this token, as in Output."""

    id: int
    token_id: int | None
    text: str
    output: Output | None = None
    logprobs: dict[int, float] | None = None


class LLM:
    """A model with a paged cache and continuous batching. ValueError, before any weight is read, when the memory does not suffice (engine/plan.py).

    model: a Transformer, a PackedModel, or the folder (packed or not) or hub id of one. weights: int8 | int4 quantises while loading (`lamoe
    quantize` does it once, for good); head: another format for the output head. impl: "native" runs the compiled kernels, "torch" the torch ops; None takes native where it can. cache:
    fp32 | bf16 | int8 | 6bit | 4bit. cache_memory: bytes of cache (default: enough for four full contexts, at most 1 GiB). max_model_len: the
    longest prompt + output; max_num_seqs: sequences running at once; max_num_batched_tokens: tokens of a step, which bounds how long a long
    prompt can hold up those who are decoding. speculate: while at most this many sequences run, drafts from the text so far are checked several
    tokens at a time (engine/lookup.py); outputs do not change. 0 switches it off. count_experts: every sequence counts which routed experts
    computed its tokens (Output.experts, `experts`).
    """

    def __init__(
        self,
        model: Transformer | PackedModel | str | Path,
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
        threads: int = 0,
        count_experts: bool = False,
        weights: str | None = None,
        head: str | None = None,
        impl: str | None = None,
    ):
        if cache not in cache_codec.FORMATS:
            raise ValueError(
                f"unknown cache format {cache!r}{did_you_mean(cache, cache_codec.FORMATS)}; known: {', '.join(cache_codec.FORMATS)}"
            )
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs or page_size < 1:
            raise ValueError(
                f"max_num_seqs {max_num_seqs} and page_size {page_size} must be at least 1, max_num_batched_tokens {max_num_batched_tokens} at least max_num_seqs"
            )
        if threads:
            torch.set_num_threads(threads)
        step = max_num_batched_tokens if impl != "torch" and native.available() else 0
        options = (cache, cache_memory, max_model_len, max_num_seqs, page_size)
        if isinstance(model, (Transformer, PackedModel)):
            size, free = _weight_bytes(model), available_memory()
            self._plan = fit(
                model.config, size, *options, None if free is None else free + size, step
            )  # the weights are there already
        else:
            folder = resolve(model)
            config, size = _ahead(folder, dtype, weights, head)  # before the weights are read
            free = available_memory()
            if free is not None and packed_file.is_packed(folder):
                free += size  # mapped pages of a file: what does not fit is read again
            self._plan = fit(config, size, *options, free, step)
            tokenizer = tokenizer or (
                Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
            )
            model = load_runnable(folder, weights, dtype, threads, impl, head)
        self.model, self.runs = (
            model,
            _packed(model, weights, impl, threads, head),
        )  # what was given; what steps run on
        self._plan = replace(
            self._plan,
            weights=_weight_bytes(self.runs),
            states=self._plan.states if isinstance(self.runs, PackedModel) else 0,
        )
        self.tokenizer, self.max_model_len, c = tokenizer, self._plan.max_model_len, model.config
        self.cache = PagedCache(c, self._plan.pages, page_size, cache, self.dtype)
        self.pool = PagePool(self.cache.pages, page_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens, speculate)
        self.eos_ids = tokenizer.stop_ids if tokenizer else frozenset({c.eos_token_id} - {None})
        self.count_experts = count_experts and c.is_moe
        self._ids, self._texts = count(), {}
        self._inboxes: dict[int, deque[Delta]] = {}  # of those who wait in generate or stream
        self.prompt_tokens = self.cached_tokens = (
            0  # since the start; their ratio is the prefix hit rate
        )
        self.drafted = self.accepted = 0  # tokens of drafts, since the start
        self._pace = Pace()

    # ---- the simple way ------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: list[str | list[int]],
        params: SamplingParams | list[SamplingParams] = SamplingParams(),
    ) -> list[Output]:
        """All outputs, in the order of the prompts (n samples of a prompt lie side by side). A prompt is a text or a list of token ids. Nothing
        runs when one of them is not valid (ValueError)."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        if isinstance(prompts, str) or len(each) != len(prompts):
            raise ValueError(
                f"generate takes a list of prompts and one SamplingParams for all or for each; found {type(prompts).__name__} and {len(each)}"
            )
        sequences = [seq for prompt, p in zip(prompts, each) for seq in self._sequences(prompt, p)]
        done = {d.id: d.output for d in self._deltas(sequences) if d.output is not None}
        return [done[seq.id] for seq in sequences]

    def stream(
        self, prompt: str | list[int], params: SamplingParams = SamplingParams()
    ) -> Iterator[Delta]:
        """The deltas of one prompt as they come (all n samples, told apart by id). Leaving the loop early frees its pages."""
        return self._deltas(self._sequences(prompt, params))

    def _deltas(self, sequences: list[Sequence]) -> Iterator[Delta]:
        """Run sequences to their end. Several of these may take turns: a step's deltas go to the inbox of whom they belong to."""
        inbox, left = deque(), len(sequences)
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

    # ---- the pieces ----------------------------------------------------------------------------------------------
    def add(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """Queue a request; the ids of its n sequences. ValueError when it can never run."""
        return self.add_all([(prompt, params)])

    def add_all(self, requests: list[tuple[str | list[int], SamplingParams]]) -> list[int]:
        """Queue several requests, or none when one of them can never run (ValueError); the ids of all sequences, which follow each other."""
        sequences = [seq for prompt, params in requests for seq in self._sequences(prompt, params)]
        for seq in sequences:
            self._start(seq)
        return [seq.id for seq in sequences]

    def experts(self, id: int) -> torch.Tensor | None:
        """[MoE layers, experts] int64: how often each routed expert computed a token of a sequence that runs or waits (tokens of a prefix hit were not
        computed, those of a preempted sequence twice). None when it is not there, or without count_experts."""
        return next(
            (
                seq.experts
                for seq in (*self.scheduler.running, *self.scheduler.waiting)
                if seq.id == id
            ),
            None,
        )

    def cancel(self, id: int) -> Output | None:
        """End a sequence at any point and free its pages; what it came to, or None when it is not there (any more)."""
        for seq in (*self.scheduler.running, *self.scheduler.waiting):
            if seq.id == id:
                output = self._finish(seq, "abort", self._texts[id].all)
                self._deliver([Delta(id, None, "", output)])
                return output
        return None

    def plan(self) -> Plan:
        """What weights and cache take, and what fits in; `describe()` says it in words."""
        return self._plan

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in, and cache rows are read in."""
        return (
            self.runs.dtype if isinstance(self.runs, PackedModel) else self.runs.embed.weight.dtype
        )

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One pass of the model over what the scheduler chose; what it added. When a pass fails, whom it fails for ends with an error, the others and
        the engine go on. What is raised nevertheless has left the engine in a state that nothing is known about: use it no more."""
        work = self.scheduler.schedule()
        if not work:
            return []
        alone = work[0] if len(work) == 1 and work[0][0].todo == 1 else None
        begin = time.perf_counter()
        results, failed = self._pass(work)
        if alone and not failed:
            self._pace.saw(alone[1], time.perf_counter() - begin)
        for seq, n in work:
            if not seq.finish:
                self.scheduler.computed(seq, n - len(seq.draft))
        return self._deliver(
            failed + [delta for result in results for delta in self._follow(*result)]
        )

    def _pass(self, work: list[tuple[Sequence, int]]) -> tuple[list, list[Delta]]:
        """(the results of runner.run, ends of sequences it failed for). A pass that fails has computed nothing: its rows count as unwritten, and only their
        own sequences hold these pages. So it is tried again with each sequence alone, which tells whose fault it is, and takes less memory."""
        try:
            return runner.run(self.runs, self.cache, work, self.count_experts), []
        except Exception as e:
            log.error(
                "a pass failed",
                exc_info=e,
                extra={"fields": {"sequences": len(work), "tokens": sum(n for _, n in work)}},
            )
            if len(work) == 1:
                return [], [self._fail(work[0][0], _LOGGED.format(type(e).__name__), internal=True)]
        tried = [self._pass([one]) for one in work]
        return [r for results, _ in tried for r in results], [
            d for _, failed in tried for d in failed
        ]

    def _deliver(self, deltas: list[Delta]) -> list[Delta]:
        for d in deltas:
            if d.id in self._inboxes:
                self._inboxes[d.id].append(d)
        return deltas

    def _follow(
        self, seq: Sequence, logits: torch.Tensor, looks: list[tuple[float, int]]
    ) -> list[Delta]:
        """Sample behind the last token and, as long as the sample is what the draft says, behind each token of the draft."""
        draft, seq.draft = seq.draft, []
        deltas = [self._advance(seq, logits[0], *looks[0])]
        for guess, row, look in zip(draft, logits[1:], looks[1:]):
            if seq.finish or seq.tokens[-1] != guess:
                break
            self.scheduler.computed(seq, 1)
            deltas.append(self._advance(seq, row, *look))
        if draft:
            accepted = len(deltas) - 1
            seq.lookup.learn(len(draft), accepted, len(seq.tokens), self._pace.cost(1 + len(draft)))
            self.drafted, self.accepted = self.drafted + len(draft), self.accepted + accepted
        return deltas

    def _advance(self, seq: Sequence, logits: torch.Tensor, total: float, best: int) -> Delta:
        """The next token of a sequence. Whatever goes wrong with it (numbers, sampling, its grammar, its text) ends this one alone."""
        if not math.isfinite(total):  # NaN and infinities survive a sum
            self.pool.forget(
                seq.pages
            )  # rows before the bad one may be bad too: a masked NaN has weight 0, and 0 x NaN is NaN
            return self._fail(seq, "the model's logits are not finite", internal=True)
        try:
            return self._choose(seq, logits, best)
        except (ValueError, RuntimeError) as e:  # options or a grammar that leave nothing to choose
            return self._fail(seq, str(e), internal=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of a library in Rust is no Exception
            log.error("a sequence failed", exc_info=e)
            return self._fail(seq, _LOGGED.format(type(e).__name__), internal=True)

    def _fail(self, seq: Sequence, error: str, internal: bool) -> Delta:
        """End a sequence with an error; Output says what internal means."""
        seq.error, seq.internal = error, internal
        return Delta(seq.id, None, "", self._finish(seq, "error", self._texts[seq.id].all))

    def _choose(self, seq: Sequence, logits: torch.Tensor, best: int) -> Delta:
        p, text = seq.params, self._texts[seq.id]
        adjusted = p.adjust(logits, seq.tokens, seq.prompt_len, self.eos_ids)
        if seq.matcher:
            adjusted = seq.matcher.mask(adjusted, p.ignore_eos)
        token = (
            best
            if p.temperature == 0 and adjusted is logits
            else sample(adjusted, p, seq.generator)
        )
        if seq.matcher:
            seq.matcher.accept(token)
        logprobs = None if p.logprobs is None else token_logprobs(logits, token, p.logprobs)
        if logprobs is not None:
            seq.logprobs.append(logprobs)
        seq.tokens.append(token)
        if token in self.eos_ids and not p.ignore_eos:
            piece = text.rest()
            return Delta(seq.id, token, piece, self._finish(seq, "stop", text.all), logprobs)
        piece, stopped = text.add(token)
        if stopped:
            return Delta(seq.id, token, piece, self._finish(seq, "stop", text.all), logprobs)
        complete = seq.matcher is not None and seq.matcher.complete
        if complete or len(seq.tokens) >= seq.limit:
            piece += text.rest()
            return Delta(
                seq.id,
                token,
                piece,
                self._finish(seq, "stop" if complete else "length", text.all),
                logprobs,
            )
        return Delta(seq.id, token, piece, None, logprobs)

    def _sequences(self, prompt: str | list[int], p: SamplingParams) -> list[Sequence]:
        c, tok = self.model.config, self.tokenizer
        if isinstance(prompt, str):
            if tok is None:
                raise ValueError(
                    "a text prompt needs a tokenizer; give token ids, or a model folder with tokenizer.json"
                )
            prompt = tok.encode(prompt, bos=tok.add_bos)
        if not prompt:
            raise ValueError("the prompt has no tokens; give at least one, for example BOS")
        if not all(type(t) is int and 0 <= t < c.vocab_size for t in prompt):
            raise ValueError(
                f"a prompt is a list of token ids from 0 to {c.vocab_size - 1}; found {next(t for t in prompt if type(t) is not int or not 0 <= t < c.vocab_size)!r}"
            )
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and leaves no room in max_model_len {self.max_model_len}; shorten it"
                + (
                    f", or raise max_model_len (the model takes {c.max_position_embeddings})"
                    if self.max_model_len < c.max_position_embeddings
                    else ""
                )
            )
        if p.stop and tok is None:
            raise ValueError("stop strings need a tokenizer")
        if p.logit_bias and max(p.logit_bias) >= c.vocab_size:
            raise ValueError(
                f"logit_bias names token {max(p.logit_bias)}; the vocabulary has {c.vocab_size}"
            )
        limit = min(len(prompt) + p.max_tokens, self.max_model_len)
        first = Sequence(
            next(self._ids), list(prompt), len(prompt), p, limit, p.generator(0), self._matcher(p)
        )
        return [first] + [
            Sequence(
                next(self._ids),
                list(prompt),
                len(prompt),
                p,
                limit,
                p.generator(i),
                self._matcher(p),
                first,
            )
            for i in range(1, p.n)
        ]

    def _matcher(self, p: SamplingParams) -> Matcher | None:
        return None if p.grammar is None else p.grammar.start(self.tokenizer)

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
            seq.output,
            text,
            reason,
            seq.prompt_len,
            seq.cached,
            seq.logprobs if seq.params.logprobs is not None else None,
            seq.error,
            seq.experts,
            seq.internal,
        )

    # ---- prefixes on disk ----------------------------------------------------------------------------------------
    def save_cache(self, file: str | Path, tokens: list[int]) -> int:
        """Write what the cache holds of the beginning of `tokens` (ids) to a safetensors file; how many tokens that is. See prefix_file.py. Like
        `load_cache` it goes between two steps, not beside one in another thread."""
        return prefix_file.save(file, tokens, self.runs, self.cache, self.pool)

    def load_cache(self, file: str | Path) -> int:
        """Read a file of `save_cache`: prompts that begin with its tokens need not compute them again. How many tokens of it are in the cache now.
        ValueError for another model or cache format, a damaged file, or one that does not fit."""
        return prefix_file.load(file, self.runs, self.cache, self.pool, self.max_model_len)


def _weight_bytes(model: Transformer | PackedModel) -> int:
    return (
        sum(model.nbytes.values())
        if isinstance(model, PackedModel)
        else sum(p.numel() * p.element_size() for p in model.parameters())
    )


def _ahead(
    folder: Path, dtype: str | None, weights: str | None, head: str | None = None
) -> tuple[ModelConfig, int]:
    """The config of a model that is not loaded yet, and about how many bytes its weights will take."""
    if packed_file.is_packed(folder):
        return packed_file.any_config(folder), packed_file.stored_bytes(folder)
    config = read_config(folder)
    bits = native.BITS.get(weights) or accounting.DTYPE_BITS.get(dtype or config.torch_dtype, 32)
    more = native.BITS.get(head, bits) - bits
    return config, int(
        (accounting.parameters(config).total * bits + config.vocab_size * config.hidden_size * more)
        / 8
    )


def load_runnable(
    folder: Path,
    weights: str | None = None,
    dtype: str | None = None,
    threads: int = 0,
    impl: str | None = None,
    head: str | None = None,
) -> Transformer | PackedModel:
    """The model of a folder, packed or not, in the form that steps run on; LLM says what the options are."""
    if packed_file.is_packed(folder):
        if dtype is not None:
            raise ValueError(
                f"dtype is {dtype}, but {folder} is a packed model, which has its own; leave dtype away"
            )
        if not native.available():
            raise ValueError(
                f"{folder} is packed for the compiled kernels, which are not there (or LAMOE_IMPL switches them off); install lamoe with a "
                "C++ compiler, or use the model it was made from"
            )
        return _packed(
            packed_file.load(folder, threads, available_memory()), weights, impl, threads, head
        )
    if weights is not None and dtype is None and impl != "torch" and native.available():
        config = read_config(
            folder
        )  # a tensor at a time: the checkpoint itself need not fit into memory
        return PackedModel.read(config, weights, packed_file.reader(folder, config), threads, head)
    return _packed(
        load(folder, dtype), weights, impl, threads, head
    )  # and the Transformer it was made from goes


def _packed(
    model: Transformer | PackedModel,
    weights: str | None,
    impl: str | None,
    threads: int,
    head: str | None,
) -> Transformer | PackedModel:
    """The model in the form that `impl` runs."""
    if impl not in (None, "native", "torch"):
        raise ValueError(f"impl is {impl!r}; known: native, torch")
    if isinstance(model, PackedModel):
        if impl == "torch" or weights not in (None, model.weights):
            raise ValueError(
                f"the model is packed as {model.weights}; it runs on the compiled kernels in that format only"
            )
        if head not in (None, model.head):
            raise ValueError(
                f"the model is packed with its output head as {model.head}, asked for is {head}; leave head away, or quantize the model it was made from again"
            )
        return model
    if impl == "torch" or not native.available():
        if impl == "native" or weights is not None or head is not None:
            raise ValueError(
                "the compiled kernels are not there (or LAMOE_IMPL, impl='torch' switch them off), and quantised weights need them; install lamoe with a C++ compiler"
            )
        native.announce()
        return model.eval()
    if (
        impl is None
        and weights is None
        and head is None
        and (
            model.embed.weight.dtype not in (torch.float32, torch.bfloat16)
            or packed.lacks(model.config)
        )
    ):
        return model.eval()
    return PackedModel.of(model, weights, threads, head)


def token_logprobs(logits: torch.Tensor, token: int, top: int) -> dict[int, float]:
    """The chosen token and the `top` most likely ones with the natural logs of their probabilities, most likely first."""
    logp = logits.float().log_softmax(-1)
    ids = logp.topk(min(top, len(logp))).indices.tolist() if top else []
    return {i: float(logp[i]) for i in dict.fromkeys([*ids, token])}
