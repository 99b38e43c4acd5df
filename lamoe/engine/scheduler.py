"""Choose the tokens that the next step computes.

Decoding sequences come first, then chunks of prompts, within a budget of tokens and pages. If pages
run out, the youngest running sequence is preempted. It returns its pages and waits, and its tokens
are computed again later unless their pages are still kept. The engine refuses sequences that need
more pages than exist, so they never reach the scheduler.
"""

from __future__ import annotations

from collections import deque

from lamoe.engine.pages import PagePool, content_hash, first_hash
from lamoe.engine.request import Sequence


class Scheduler:
    """Decides which sequences run, and owns their pages.

    A step calls `schedule`, runs the forward pass, and records its result with `computed`. `end`
    removes a sequence.
    """

    def __init__(self, pool: PagePool, max_sequences: int, max_tokens: int, speculate: int = 0):
        """Create a scheduler.

        Args:
            pool: the pages of the cache.
            max_sequences: largest number of sequences that run at once.
            max_tokens: largest number of tokens per step.
            speculate: drafts are made while at most this many sequences run. With more sequences,
                batching alone uses the hardware well.
        """
        self.pool, self.max_sequences = pool, max_sequences
        self.max_tokens, self.speculate = max_tokens, speculate
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Choose the work of one step and take the pages that it needs.

        Returns:
            (sequence, its number of tokens including the draft) for each chosen sequence, decoding
            sequences first.
        """
        budget, decode, prefill = self.max_tokens, [], []
        for seq in [s for s in self.running if s.todo == 1]:
            if seq not in self.running:
                continue  # in this loop, an older sequence has preempted `seq`
            seq.draft = self._draft(seq)
            if seq.draft and self._take_pages(seq, 1 + len(seq.draft)):
                decode.append((seq, 1 + len(seq.draft)))
                continue
            seq.draft = []
            if self._take_pages_or_preempt(seq, 1):
                decode.append((seq, 1))
        budget -= sum(n for _, n in decode)
        for seq in [s for s in self.running if s.todo > 1]:
            n = min(seq.todo, budget)
            if n > 0 and self._take_pages(seq, n):
                prefill.append((seq, n))
                budget -= n
            elif n > 0:
                budget = 0  # later sequences must not take the pages that `seq` waits for
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            next_seq = self._next_waiting()
            if next_seq is None:
                break
            self._share_prefix(next_seq)
            n = min(next_seq.todo, budget)
            if not self._take_pages(next_seq, n):
                self._release(next_seq)
                break
            self.waiting.remove(next_seq)
            self.running.append(next_seq)
            prefill.append((next_seq, n))
            budget -= n
        if not decode and not prefill and self.running:
            # Unfinished prompts hold all pages and block each other. The oldest one continues.
            seq = self.running[0]
            n = min(seq.todo, self.max_tokens)
            if self._take_pages_or_preempt(seq, n):
                prefill.append((seq, n))
        return decode + prefill

    def computed(self, seq: Sequence, n: int) -> None:
        """Record that the cache has the rows of the next n tokens of a sequence.

        Pages that are full now are published for sharing.
        """
        seq.computed += n
        size = self.pool.page_size
        while (len(seq.contents) + 1) * size <= seq.computed:
            at = len(seq.contents)
            before = seq.contents[-1] if seq.contents else first_hash(seq.params.cache_salt)
            seq.contents.append(content_hash(before, seq.tokens[at * size : (at + 1) * size]))
            self.pool.publish(seq.pages[at], seq.contents[-1])

    def end(self, seq: Sequence) -> None:
        """Remove a running or waiting sequence and return its pages."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._release(seq)

    def _draft(self, seq: Sequence) -> list[int]:
        if len(self.running) > self.speculate or self.waiting:
            return []
        limit = min(seq.limit - len(seq.tokens) - 1, self.max_tokens // len(self.running) - 1)
        return seq.lookup.propose(seq.tokens, limit) if limit > 0 else []

    # ---- pages -----------------------------------------------------------------------------------
    def _next_waiting(self) -> Sequence | None:
        """Return the first waiting sequence whose leader, if any, has computed its prompt."""
        for seq in self.waiting:
            leader = seq.leader
            if leader is None or leader.finish or leader.computed >= seq.prompt_len:
                return seq
        return None

    def _share_prefix(self, seq: Sequence) -> None:
        """Let `seq` share cached pages of its prefix.

        The last token is never taken from the cache, because its logits must be computed.
        """
        size, salt = self.pool.page_size, seq.params.cache_salt
        own, public = first_hash(salt), first_hash("")
        while (len(seq.pages) + 1) * size < len(seq.tokens):
            at = len(seq.pages) * size
            tokens = seq.tokens[at : at + size]
            own = content_hash(own, tokens)
            page = self.pool.share(own)
            if salt and self.pool.public:
                public = content_hash(public, tokens)
                if page is None and public in self.pool.public:
                    page = self.pool.share(public)
            if page is None:
                break
            seq.pages.append(page)
            seq.contents.append(own)
        seq.computed = len(seq.pages) * size
        if not seq.preemptions:
            seq.cached = seq.computed

    def _take_pages(self, seq: Sequence, n: int) -> bool:
        """Take pages for n more tokens of `seq`, without preemption.

        Returns False if too few pages are available.
        """
        missing = -(-(seq.computed + n) // self.pool.page_size) - len(seq.pages)
        if missing > self.pool.available:
            return False
        seq.pages += [self.pool.take() for _ in range(missing)]
        return True

    def _take_pages_or_preempt(self, seq: Sequence, n: int) -> bool:
        """Take pages for n more tokens of `seq`, preempting the youngest sequences if needed.

        Returns False if `seq` itself was preempted.
        """
        while not self._take_pages(seq, n):
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
