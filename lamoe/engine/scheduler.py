"""Who computes which tokens in the next step: decoding sequences first, then prompts in chunks, under a budget of tokens and pages.

When pages run out the youngest running sequence gives its pages back and waits; its tokens are computed again later (or found again among
the kept pages). A sequence that alone needs more pages than there are cannot be admitted: the engine refuses it before.
"""

from __future__ import annotations

from collections import deque

from lamoe.engine.pages import PagePool, content_hash
from lamoe.engine.request import Sequence


class Scheduler:
    """`schedule` picks (sequence, number of tokens), decoding ones first; `computed` records what a step did; `end` frees a sequence."""

    def __init__(self, pool: PagePool, max_sequences: int, max_tokens: int, speculate: int = 0):
        """speculate: drafts are made while at most this many sequences run; with more, batching fills the machine by itself."""
        self.pool, self.max_sequences, self.max_tokens, self.speculate = (
            pool,
            max_sequences,
            max_tokens,
            speculate,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        budget, decode, prefill = self.max_tokens, [], []
        for seq in [s for s in self.running if s.todo == 1]:
            if seq not in self.running:
                continue  # an older one has just pushed it out
            seq.draft = self._draft(seq)
            if seq.draft and self._fit(seq, 1 + len(seq.draft)):
                decode.append((seq, 1 + len(seq.draft)))
                continue
            seq.draft = []
            if self._make_room(seq, 1):
                decode.append((seq, 1))
        budget -= sum(n for _, n in decode)
        for seq in [s for s in self.running if s.todo > 1]:
            n = min(seq.todo, budget)
            if n > 0 and self._fit(seq, n):
                prefill.append((seq, n))
                budget -= n
            elif n > 0:
                budget = 0  # those who came later must not take the pages it waits for
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            seq = self._next_waiting()
            if seq is None:
                break
            self._reuse(seq)
            n = min(seq.todo, budget)
            if not self._fit(seq, n):
                self._release(seq)
                break
            self.waiting.remove(seq)
            self.running.append(seq)
            prefill.append((seq, n))
            budget -= n
        if (
            not decode and not prefill and self.running
        ):  # prompts hold all pages and none can go on: the oldest must
            seq = self.running[0]
            n = min(seq.todo, self.max_tokens)
            if self._make_room(seq, n):
                prefill.append((seq, n))
        return decode + prefill

    def computed(self, seq: Sequence, n: int) -> None:
        """The rows of the next n tokens of seq are in the cache now. Full pages are published."""
        seq.computed += n
        size = self.pool.page_size
        while (len(seq.contents) + 1) * size <= seq.computed:
            at = len(seq.contents)
            before = seq.contents[-1] if seq.contents else b""
            seq.contents.append(content_hash(before, seq.tokens[at * size : (at + 1) * size]))
            self.pool.publish(seq.pages[at], seq.contents[-1])

    def end(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and give its pages back."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._release(seq)

    def _draft(self, seq: Sequence) -> list[int]:
        if len(self.running) > self.speculate or self.waiting:
            return []
        room = min(seq.limit - len(seq.tokens) - 1, self.max_tokens // len(self.running) - 1)
        return seq.lookup.propose(seq.tokens, room) if room > 0 else []

    # ---- pages ---------------------------------------------------------------------------------------------------
    def _next_waiting(self) -> Sequence | None:
        """The first that need not wait for a sibling's prompt."""
        return next(
            (
                s
                for s in self.waiting
                if s.leader is None or s.leader.finish or s.leader.computed >= s.prompt_len
            ),
            None,
        )

    def _reuse(self, seq: Sequence) -> None:
        """Take over kept or shared pages that hold the beginning of seq; at least its last token stays to be computed."""
        size, before = self.pool.page_size, b""
        while (len(seq.pages) + 1) * size < len(seq.tokens):
            at = len(seq.pages) * size
            before = content_hash(before, seq.tokens[at : at + size])
            page = self.pool.share(before)
            if page is None:
                break
            seq.pages.append(page)
            seq.contents.append(before)
        seq.computed = len(seq.pages) * size
        if not seq.preemptions:
            seq.cached = seq.computed

    def _fit(self, seq: Sequence, n: int) -> bool:
        """Pages for n more tokens of seq, without taking any from others."""
        missing = -(-(seq.computed + n) // self.pool.page_size) - len(seq.pages)
        if missing > self.pool.available:
            return False
        seq.pages += [self.pool.take() for _ in range(missing)]
        return True

    def _make_room(self, seq: Sequence, n: int) -> bool:
        """Like _fit, but the youngest sequences are pushed out until it fits. False when seq itself was."""
        while not self._fit(seq, n):
            victim = self.running.pop()
            victim.preemptions += 1
            self._release(victim)
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        return True

    def _release(self, seq: Sequence) -> None:
        self.pool.give_back(seq.pages)
        seq.pages, seq.contents, seq.computed = [], [], 0
