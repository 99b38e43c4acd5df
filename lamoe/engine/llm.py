"""The engine: many requests at once over one paged cache. `LLM(...).generate(prompts, params)`; `add`, `step` and `cancel` for servers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from lamoe import accounting, codec
from lamoe.cache import PagedCache
from lamoe.config import did_you_mean
from lamoe.engine import prefix_file, runner
from lamoe.engine.generate import TextStream
from lamoe.engine.lookup import Pace
from lamoe.engine.pages import PagePool
from lamoe.engine.plan import Plan, available_memory, fit
from lamoe.engine.request import Output, Sequence
from lamoe.engine.sampler import SamplingParams, sample
from lamoe.engine.scheduler import Scheduler
from lamoe.model import Transformer
from lamoe.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence. output: set on the last one."""

    id: int
    token_id: int | None
    text: str
    output: Output | None = None


class LLM:
    """A model with a paged cache and continuous batching. ValueError, before any weight is read, when the memory does not suffice (engine/plan.py).

    model: a Transformer, or the folder or hub id of one. cache: fp32 | bf16 | int8 | 6bit | 4bit. cache_memory: bytes of cache (default: enough for
    four full contexts, at most 1 GiB). max_model_len: the longest prompt + output; max_num_seqs: sequences running at once; max_num_batched_tokens:
    tokens of a step, which bounds how long a long prompt can hold up those who are decoding. speculate: while at most this many sequences run,
    drafts from the text so far are checked several tokens at a time (engine/lookup.py); outputs do not change. 0 switches it off.
    """

    def __init__(self, model: Transformer | str | Path, tokenizer: Tokenizer | None = None, *, cache: str = "bf16", cache_memory: int | None = None,
                 max_model_len: int | None = None, max_num_seqs: int = 64, max_num_batched_tokens: int = 512, page_size: int = 16,
                 speculate: int = 2, dtype: str | None = None, threads: int = 0):
        if cache not in codec.FORMATS:
            raise ValueError(f"unknown cache format {cache!r}{did_you_mean(cache, codec.FORMATS)}; known: {', '.join(codec.FORMATS)}")
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs or page_size < 1:
            raise ValueError(f"max_num_seqs {max_num_seqs} and page_size {page_size} must be at least 1, max_num_batched_tokens {max_num_batched_tokens} at least max_num_seqs")
        if threads:
            torch.set_num_threads(threads)
        options = (cache, cache_memory, max_model_len, max_num_seqs, page_size)
        if isinstance(model, Transformer):
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            free = available_memory()
            self._plan = fit(model.config, size, *options, None if free is None else free + size)  # the weights are there already
        else:
            from lamoe.convert import load, read_config, resolve

            folder = resolve(model)
            c = read_config(folder)
            size = accounting.parameters(c).total * accounting.DTYPE_BITS.get(dtype or c.torch_dtype, 32) // 8
            self._plan = fit(c, size, *options, available_memory())  # before the weights are read
            model = load(folder, dtype)
            tokenizer = tokenizer or (Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None)
        self.model, self.tokenizer, c = model.eval(), tokenizer, model.config
        self.max_model_len = self._plan.max_model_len
        self.cache = PagedCache(c, self._plan.pages, page_size, cache, model.embed.weight.dtype)
        self.pool = PagePool(self.cache.pages, page_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens, speculate)
        self.eos_ids = tokenizer.stop_ids if tokenizer else frozenset({c.eos_token_id} - {None})
        self._ids, self._texts = count(), {}
        self._inboxes: dict[int, deque[Delta]] = {}  # of those who wait in generate or stream
        self.prompt_tokens = self.cached_tokens = 0  # since the start; their ratio is the prefix hit rate
        self.drafted = self.accepted = 0  # tokens of drafts, since the start
        self._pace = Pace()

    # ---- the simple way ------------------------------------------------------------------------------------------
    def generate(self, prompts: list[str | list[int]], params: SamplingParams | list[SamplingParams] = SamplingParams()) -> list[Output]:
        """All outputs, in the order of the prompts (n samples of a prompt lie side by side). A prompt is a text or a list of token ids. Nothing
        runs when one of them is not valid (ValueError)."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        if isinstance(prompts, str) or len(each) != len(prompts):
            raise ValueError(f"generate takes a list of prompts and one SamplingParams for all or for each; found {type(prompts).__name__} and {len(each)}")
        sequences = [seq for prompt, p in zip(prompts, each) for seq in self._sequences(prompt, p)]
        done = {d.id: d.output for d in self._deltas(sequences) if d.output is not None}
        return [done[seq.id] for seq in sequences]

    def stream(self, prompt: str | list[int], params: SamplingParams = SamplingParams()) -> Iterator[Delta]:
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
        sequences = self._sequences(prompt, params)
        for seq in sequences:
            self._start(seq)
        return [seq.id for seq in sequences]

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
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One pass of the model over what the scheduler chose; what it added."""
        work = self.scheduler.schedule()
        if not work:
            return []
        alone = work[0] if len(work) == 1 and work[0][0].todo == 1 else None
        begin = time.perf_counter()
        results = runner.run(self.model, self.cache, work)
        if alone:
            self._pace.saw(alone[1], time.perf_counter() - begin)
        for seq, n in work:
            self.scheduler.computed(seq, n - len(seq.draft))
        return self._deliver([delta for seq, logits in results for delta in self._follow(seq, logits)])

    def _deliver(self, deltas: list[Delta]) -> list[Delta]:
        for d in deltas:
            if d.id in self._inboxes:
                self._inboxes[d.id].append(d)
        return deltas

    def _follow(self, seq: Sequence, logits: torch.Tensor) -> list[Delta]:
        """Sample behind the last token and, as long as the sample is what the draft says, behind each token of the draft."""
        draft, seq.draft = seq.draft, []
        deltas = [self._advance(seq, logits[0])]
        for guess, row in zip(draft, logits[1:]):
            if seq.finish or seq.tokens[-1] != guess:
                break
            self.scheduler.computed(seq, 1)
            deltas.append(self._advance(seq, row))
        if draft:
            accepted = len(deltas) - 1
            seq.lookup.learn(len(draft), accepted, len(seq.tokens), self._pace.cost(1 + len(draft)))
            self.drafted, self.accepted = self.drafted + len(draft), self.accepted + accepted
        return deltas

    def _advance(self, seq: Sequence, logits: torch.Tensor) -> Delta:
        p, text = seq.params, self._texts[seq.id]
        try:
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite")
            token = sample(p.adjust(logits, seq.tokens, seq.prompt_len, self.eos_ids), p, seq.generator)
        except (ValueError, RuntimeError) as e:  # one poisoned request fails alone
            seq.error = str(e)
            return Delta(seq.id, None, "", self._finish(seq, "error", text.all))
        if p.logprobs is not None:
            seq.logprobs.append(_logprobs(logits, token, p.logprobs))
        seq.tokens.append(token)
        if token in self.eos_ids and not p.ignore_eos:
            piece = text.rest()
            return Delta(seq.id, token, piece, self._finish(seq, "stop", text.all))
        piece, stopped = text.add(token)
        if stopped:
            return Delta(seq.id, token, piece, self._finish(seq, "stop", text.all))
        if len(seq.tokens) >= seq.limit:
            piece += text.rest()
            return Delta(seq.id, token, piece, self._finish(seq, "length", text.all))
        return Delta(seq.id, token, piece)

    def _sequences(self, prompt: str | list[int], p: SamplingParams) -> list[Sequence]:
        c, tok = self.model.config, self.tokenizer
        if isinstance(prompt, str):
            if tok is None:
                raise ValueError("a text prompt needs a tokenizer; give token ids, or a model folder with tokenizer.json")
            prompt = tok.encode(prompt, bos=tok.add_bos)
        if not prompt:
            raise ValueError("the prompt has no tokens; give at least one, for example BOS")
        if not all(type(t) is int and 0 <= t < c.vocab_size for t in prompt):
            raise ValueError(f"a prompt is a list of token ids from 0 to {c.vocab_size - 1}; found {next(t for t in prompt if type(t) is not int or not 0 <= t < c.vocab_size)!r}")
        if len(prompt) >= self.max_model_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens and leaves no room in max_model_len {self.max_model_len}; shorten it"
                             + (f", or raise max_model_len (the model takes {c.max_position_embeddings})" if self.max_model_len < c.max_position_embeddings else ""))
        if p.stop and tok is None:
            raise ValueError("stop strings need a tokenizer")
        if p.logit_bias and max(p.logit_bias) >= c.vocab_size:
            raise ValueError(f"logit_bias names token {max(p.logit_bias)}; the vocabulary has {c.vocab_size}")
        limit = min(len(prompt) + p.max_tokens, self.max_model_len)
        first = Sequence(next(self._ids), list(prompt), len(prompt), p, limit, p.generator(0))
        return [first] + [Sequence(next(self._ids), list(prompt), len(prompt), p, limit, p.generator(i), leader=first) for i in range(1, p.n)]

    def _start(self, seq: Sequence) -> None:
        self._texts[seq.id] = TextStream(self.tokenizer, seq.params.stop)
        self.scheduler.add(seq)

    def _finish(self, seq: Sequence, reason: str, text: str) -> Output:
        seq.finish = reason
        self.scheduler.end(seq)
        del self._texts[seq.id]
        self.prompt_tokens += seq.prompt_len
        self.cached_tokens += seq.cached
        return Output(seq.output, text, reason, seq.prompt_len, seq.cached, seq.logprobs if seq.params.logprobs is not None else None, seq.error)

    # ---- prefixes on disk ----------------------------------------------------------------------------------------
    def save_cache(self, file: str | Path, tokens: list[int]) -> int:
        """Write what the cache holds of the beginning of `tokens` (ids) to a safetensors file; how many tokens that is. See prefix_file.py. Like
        `load_cache` it goes between two steps, not beside one in another thread."""
        return prefix_file.save(file, tokens, self.model, self.cache, self.pool)

    def load_cache(self, file: str | Path) -> int:
        """Read a file of `save_cache`: prompts that begin with its tokens need not compute them again. How many tokens of it are in the cache now.
        ValueError for another model or cache format, a damaged file, or one that does not fit."""
        return prefix_file.load(file, self.model, self.cache, self.pool, self.max_model_len)


def _logprobs(logits: torch.Tensor, token: int, top: int) -> dict[int, float]:
    """The chosen token and the `top` most likely ones with the natural logs of their probabilities, most likely first."""
    logp = logits.float().log_softmax(-1)
    ids = logp.topk(min(top, len(logp))).indices.tolist() if top else []
    return {i: float(logp[i]) for i in dict.fromkeys([*ids, token])}
