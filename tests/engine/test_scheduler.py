"""Tests of the scheduler without a model.

They record which text every cache row belongs to, and check every step with this record.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamoe.engine.pages import PagePool
from lamoe.engine.request import Sequence
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.scheduler import Scheduler


class World:
    """A scheduler with a record of the rows that its steps write. It checks every step."""

    def __init__(
        self,
        pages: int,
        size: int = 4,
        max_sequences: int = 4,
        max_tokens: int = 8,
        speculate: int = 0,
    ):
        self.pool = PagePool(pages, size)
        self.scheduler = Scheduler(self.pool, max_sequences, max_tokens, speculate)
        self.rows: dict[int, tuple] = {}  # slot -> all tokens of the text up to this row
        self.arrived: list[Sequence] = []
        self.admitted: list[Sequence] = []  # sequences in the order of their first step
        self.steps = 0

    def add(self, prompt, out: int = 3, n: int = 1) -> list[Sequence]:
        """Queue n samples of a prompt, each with `out` output tokens."""
        first = Sequence(
            len(self.arrived), list(prompt), len(prompt), SamplingParams(), len(prompt) + out
        )
        group = [first] + [
            Sequence(
                first.id + i,
                list(prompt),
                len(prompt),
                SamplingParams(),
                len(prompt) + out,
                leader=first,
            )
            for i in range(1, n)
        ]
        for seq in group:
            self.arrived.append(seq)
            self.scheduler.add(seq)
        return group

    def step(self) -> list[tuple[Sequence, int]]:
        """Run one step: write rows, append `next_token` to computed texts, end full sequences."""
        s, size = self.scheduler, self.pool.page_size
        work = s.schedule()
        self.steps += 1
        self.check(work)
        for seq, n in work:
            text = seq.tokens + seq.draft
            for i in range(seq.computed, seq.computed + n):
                self.rows[seq.pages[i // size] * size + i % size] = tuple(text[: i + 1])
        for seq, n in work:
            draft, seq.draft = seq.draft, []
            s.computed(seq, n - len(draft))
            for guess in [*draft, None]:
                if seq.todo:
                    break
                seq.tokens.append(next_token(seq.tokens))
                if len(seq.tokens) == seq.limit:
                    self.end(seq, "length")
                    break
                if seq.tokens[-1] != guess:
                    break
                s.computed(seq, 1)
        self.check_pages()
        return work

    def end(self, seq: Sequence, reason: str = "abort"):
        seq.finish = reason
        self.scheduler.end(seq)
        assert (
            seq.pages == []
            and seq not in self.scheduler.running
            and seq not in self.scheduler.waiting
        )

    def check(self, work):
        """Check the plan of a step before it runs."""
        s, size = self.scheduler, self.pool.page_size
        assert sum(n for _, n in work) <= s.max_tokens and len(s.running) <= s.max_sequences
        assert len({seq.id for seq, _ in work}) == len(work)
        assert work or not (s.running or s.waiting), "sequences run or wait, but the plan is empty"
        for seq, n in work:
            assert seq in s.running and seq.finish is None and 1 <= n <= seq.todo + len(seq.draft)
            assert len(seq.tokens) + len(seq.draft) <= seq.limit
            assert len(seq.pages) * size >= seq.computed + n
            for i in range(seq.computed):  # a sequence reads only rows of its own text
                assert self.rows[seq.pages[i // size] * size + i % size] == tuple(
                    seq.tokens[: i + 1]
                )
            # A sequence writes only to pages that are neither shared nor published.
            for at in range(seq.computed // size, (seq.computed + n - 1) // size + 1):
                page = seq.pages[at]
                assert self.pool._owners[page] == 1 and page not in self.pool._content_of
            if seq not in self.admitted:
                self.admitted.append(seq)
                overtaken = [
                    e
                    for e in self.arrived
                    if e.id < seq.id and e not in self.admitted and e.finish is None
                ]
                assert all(e.leader is not None for e in overtaken), (
                    "a sequence was overtaken that does not wait for a sibling's prompt"
                )
        self.check_pages()

    def check_pages(self):
        """Check that the pool agrees with the pages that sequences hold."""
        pool, s = self.pool, self.scheduler
        owners: dict[int, int] = {}
        for seq in s.running:
            for page in seq.pages:
                owners[page] = owners.get(page, 0) + 1
            assert len(set(seq.pages)) == len(seq.pages)
        assert all(seq.pages == [] and seq.computed == 0 for seq in s.waiting)
        assert pool._owners == owners
        free, kept = set(pool._free), set(pool._kept)
        assert len(free) + len(kept) + len(owners) == pool.total and free | kept | set(
            owners
        ) == set(range(pool.total))
        assert (
            len(pool._free) == len(free)
            and pool.available == len(free) + len(kept)
            and pool.owned == len(owners)
        )
        assert (
            {pool._page_of[c]: c for c in pool._page_of} == pool._content_of
            and kept <= set(pool._content_of)
            and not free & set(pool._content_of)
        )

    def run(self, limit: int = 1000):
        """Step until no sequence is left, at most `limit` times."""
        begin = self.steps
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            assert self.steps - begin < limit, "the scheduler still has sequences"
        assert self.pool.owned == 0 and self.pool.available == self.pool.total
        assert all(seq.finish for seq in self.arrived)


def next_token(tokens: list[int]) -> int:
    """Return the next token by a rule that often repeats itself, so that some drafts are right."""
    return (tokens[-1] + len(tokens) // 7) % 3


def text(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 50), k=n)


# ---- random streams of requests ----
# A request: (number of its prefix, prompt length, output tokens, samples).
REQUEST = st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 10), st.integers(1, 3))


@settings(deadline=None, max_examples=250)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 12),
    st.integers(0, 6),
    st.integers(0, 3),
    st.lists(st.one_of(REQUEST, st.just("step"), st.just("step"), st.integers(0, 30)), max_size=40),
)
def test_any_stream_of_requests(size, max_sequences, spare_tokens, spare_pages, speculate, events):
    """For any stream of requests, all checks hold and all requests end.

    Requests share prefixes, pages are few, and some requests are cancelled.
    """
    world = World(
        -(-30 // size) + spare_pages, size, max_sequences, max_sequences + spare_tokens, speculate
    )
    for event in events:
        if event == "step":
            world.step()
        elif isinstance(event, int):
            unfinished = [s for s in world.arrived if s.finish is None]
            if unfinished:
                world.end(unfinished[event % len(unfinished)])
                world.check_pages()
        else:
            seed, length, out, n = event
            world.add(text(30, seed)[:length], out, n)
    world.run()
    for seq in world.arrived:
        if seq.finish == "length":  # preemption has lost no token
            expected = seq.tokens[: seq.prompt_len]
            while len(expected) < seq.limit:
                expected.append(next_token(expected))
            assert seq.tokens == expected


# ---- single scheduling rules ----
def test_decoding_comes_first_and_a_long_prompt_comes_in_chunks():
    world = World(40, max_tokens=8)
    (a,) = world.add(text(3), 20)
    world.step()
    (b,) = world.add(text(30, 1), 2)
    plans = [world.step() for _ in range(5)]
    assert plans[:4] == [[(a, 1), (b, 7)]] * 4 and plans[4] == [(a, 1), (b, 2)]
    assert world.step() == [(a, 1), (b, 1)]


def test_waiting_requests_start_in_order_of_arrival():
    world = World(40, max_sequences=2, max_tokens=8)
    a, b, c = (world.add(text(4, i), 3)[0] for i in range(3))
    assert world.step() == [(a, 4), (b, 4)]
    assert world.step() == [(a, 1), (b, 1)] and list(world.scheduler.waiting) == [c]
    world.step()
    assert a.finish and b.finish and world.step() == [(c, 4)]
    assert world.admitted == [a, b, c]


def test_a_large_first_request_is_not_overtaken_by_small_ones():
    world = World(10, max_tokens=40)
    (a,) = world.add(text(24), 8)
    world.step()
    (big,) = world.add(text(20, 1), 2)
    small = [world.add(text(2, 2 + i), 1)[0] for i in range(3)]
    while not a.finish:
        assert [s for s, _ in world.step()] == [a] and list(world.scheduler.waiting) == [
            big,
            *small,
        ]
    world.run()
    assert world.admitted == [a, big, *small]


@pytest.mark.parametrize("length, shared", [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_only_full_pages_are_shared_and_the_last_token_is_computed(length, shared):
    world = World(20)
    for _ in range(2):
        (seq,) = world.add(text(length), 1)
        world.run()
    assert seq.cached == shared


def test_different_prefixes_share_nothing():
    world = World(20, max_tokens=16)
    world.add(text(12), 1)
    world.run()
    changed = text(12)
    changed[0] += 1
    (other,), (same,) = world.add(changed, 1), world.add(text(8) + [99] * 4, 1)
    world.run()
    assert (other.cached, same.cached) == (0, 8)


def test_pages_of_outputs_are_shared_too():
    """Full pages of an output are shared, because the next turn of a chat begins with them."""
    world = World(20)
    (first,) = world.add(text(6), 7)
    world.run()
    (second,) = world.add(first.tokens + text(3, 1), 1)
    world.run()
    # The last of 13 tokens has no row. The other 12 fill three pages.
    assert len(first.tokens) == 13 and second.cached == 12


def test_samples_of_a_prompt_wait_for_its_pages():
    world = World(20, max_tokens=8)
    leader, *others = world.add(text(18), 4, n=3)
    plans = [world.step() for _ in range(3)]
    assert [[(s.id, n) for s, n in p] for p in plans] == [[(0, 8)], [(0, 8)], [(0, 2)]] and not any(
        o.pages for o in others
    )
    world.step()
    assert [o.cached for o in others] == [16, 16]
    assert others[0].pages[:4] == leader.pages[:4] == others[1].pages[:4]
    assert len({leader.pages[4], others[0].pages[4], others[1].pages[4]}) == 3
    world.run()


@pytest.mark.parametrize("when", ["waiting", "prefill", "decoding"])
def test_samples_continue_when_their_first_sample_is_cancelled(when):
    world = World(20, max_tokens=8)
    leader, *others = world.add(text(18), 4, n=3)
    for _ in range({"waiting": 0, "prefill": 1, "decoding": 4}[when]):
        world.step()
    world.end(leader)
    world.run(20)
    assert [o.finish for o in others] == ["length"] * 2


def test_the_youngest_sequence_is_preempted_and_resumes_first():
    world = World(6, max_sequences=2, max_tokens=30)
    a, b, c = world.add(text(8), 12)[0], world.add(text(8, 1), 12)[0], world.add(text(4, 2), 1)[0]
    while not b.preemptions:
        world.step()
    assert list(world.scheduler.waiting) == [b, c] and a.preemptions == 0
    world.run()
    assert a.preemptions == 0 and [len(s.tokens) for s in (a, b, c)] == [20, 20, 5]


def test_a_partly_computed_prompt_is_not_starved_by_small_requests():
    """Small requests do not starve a partly computed prompt.

    The prompt waits for pages of a decoding sequence, while small requests keep arriving.
    """
    world = World(10, max_tokens=12)
    (a,) = world.add(text(16), 16)
    world.step(), world.step()
    (b,) = world.add(text(30, 1), 2)
    world.step(), world.step()
    assert b in world.scheduler.running and b.todo > 1
    for i in range(40):
        world.add(text(3, 2 + i), 9)
        world.step()
        assert b.finish or b.todo == 1 or not [s for s in world.scheduler.running if s.id > b.id], (
            "a later request took the pages b needs"
        )
    assert b.finish
    world.run()


def test_prompts_that_hold_all_pages_do_not_block_each_other():
    """If partly computed prompts fill the cache and none can continue, the oldest gets pages."""
    world = World(8, max_sequences=4, max_tokens=12)
    for i in range(4):
        world.add(text(28, i), 2)
    world.run(200)


def test_one_sequence_may_fill_the_whole_cache():
    world = World(5, max_tokens=6)
    seqs = [world.add(text(14, i), 6)[0] for i in range(3)]
    world.run(200)
    assert [len(s.tokens) for s in seqs] == [20] * 3


@pytest.mark.parametrize("after", range(9))
def test_cancelling_frees_pages_at_once(after):
    """Cancelling a sequence at any stage frees its pages, and other sequences finish normally."""
    world = World(9, max_sequences=3, max_tokens=6)
    seqs = [world.add(text(11, i), 8)[0] for i in range(4)]
    for _ in range(after):
        world.step()
    for seq in seqs[1:3]:
        before, held = world.pool.available, len(seq.pages)
        world.end(seq)
        assert world.pool.available == before + held
        world.check_pages()
    world.run(100)
    assert [s.finish for s in seqs] == ["length", "abort", "abort", "length"]
