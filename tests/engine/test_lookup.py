"""Tests of prompt lookup: proposed tokens, draft lengths, and that drafts never change outputs."""

import pytest

from lamoe.engine import llm as llm_module
from lamoe.engine.lookup import LONGEST, LONGEST_REST, REST, Lookup, Pace
from tiny_engine import greedy, llm, prompts, tokens, watch


def test_propose_returns_what_followed_the_latest_three_tokens_before():
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 0, 1, 2, 3]
    assert Lookup().propose(text, 10) == [
        6,
        7,
        8,
        0,
    ]  # the tokens after the latest occurrence; the first draft has four tokens
    assert Lookup().propose(text, 2) == [6, 7]
    assert Lookup().propose(text[:9], 10) == [4, 5, 9, 1]
    for no_match in (text[:8], [1, 2], [1, 2, 3]):
        assert Lookup().propose(no_match, 10) == []
    # A proposal that reaches the end of the text continues with its repetition.
    assert Lookup().propose([7] * 4, 10) == [7] * 4
    assert Lookup().propose([5, 6] * 3, 10) == [5, 6, 5, 6]


def test_the_index_grows_with_the_text():
    whole, text = [(i * i) % 11 for i in range(200)], Lookup()
    for end in range(3, 200):
        latest = [at for at in range(3, end) if whole[at - 3 : at] == whole[end - 3 : end]]
        want = (whole[latest[-1] : end] * 4)[:4] if latest else []
        assert text.propose(whole[:end], 10) == want
    assert text.indexed == 199


def test_accepted_drafts_grow_and_rejected_drafts_pause_longer_each_time():
    s, at = Lookup(), 100
    for want in (8, LONGEST, LONGEST):
        s.learn(s.length, s.length, at)
        assert s.length == want
    s.learn(12, 6, at)
    assert s.length == 12  # the draft grows if at least half of its tokens are accepted
    for want in (6, 3, 1, 0):
        s.learn(s.length, 0, at)
        assert s.length == want
    rests = []
    for _ in range(6):
        # One token before the end of the pause.
        assert s.propose([1, 2, 3, 1, 2, 3] + [0] * (s.resume - 8) + [1], 9) == []
        rests.append(s.resume - at)
        at = s.resume
        s.propose([1, 2, 3] * (at // 3 + 1), 9)
        assert s.length == 2
        s.learn(2, 0, at), s.learn(1, 0, at)
        assert s.length == 0
    assert (
        rests == [REST, 2 * REST, 4 * REST, LONGEST_REST, LONGEST_REST, LONGEST_REST]
        and LONGEST_REST == 8 * REST
    )
    s.length = 2
    s.learn(2, 2, at)
    assert s.rest == REST and s.length == 4


@pytest.mark.parametrize(
    "drafted, accepted, cost, length",
    [
        (4, 4, 1.0, 8),
        (4, 4, 4.9, 8),
        (4, 4, 5.1, 2),  # five tokens at the cost of 4.9 or 5.1 steps
        (4, 3, 3.9, 4),
        (4, 3, 4.1, 2),
        (4, 1, 1.0, 2),
        (1, 0, 0.5, 2),
    ],
)
def test_a_draft_that_costs_more_than_it_gives_gets_shorter(drafted, accepted, cost, length):
    s = Lookup()
    s.learn(drafted, accepted, 50, cost)
    assert s.length == length


def test_pace():
    p = Pace()
    assert p.cost(5) == 1.0
    p.saw(5, 3.0)
    assert p.cost(5) == 1.0  # without a recorded plain step, the cost is 1
    p.saw(1, 1.0)
    assert p.cost(5) == 3.0 and p.cost(4) == 1.0
    p.saw(5, 7.0)
    assert p.cost(5) == 4.0


def repeating(n: int) -> list[int]:
    return (prompts(12)[0] * 20)[:n]


@pytest.mark.parametrize("expensive", [False, True])
def test_the_engine_stops_drafting_when_it_does_not_pay(expensive, monkeypatch):
    """Drafts pause if passes over several tokens take 100 times as long as plain passes.

    All draft tokens are right here. The output equals that of plain decoding, with slow passes and
    without.
    """
    engine = llm(
        max_model_len=256, cache_memory=1 << 22, speculate=1, changes=dict(initializer_range=0.02)
    )
    plans, _ = watch(engine)
    run, now = llm_module.runner.run, [0.0]

    def timed(model, cache, work, *options):
        now[0] += 100.0 if expensive and max(n for _, n in work) > 1 else 1.0
        return run(model, cache, work, *options)

    monkeypatch.setattr(llm_module.runner, "run", timed)
    monkeypatch.setattr(llm_module.time, "perf_counter", lambda: now[0])
    # The bias makes every token 7, so that all drafts are right.
    [o] = engine.generate([repeating(30)], greedy(150, logit_bias={7: 100.0}))
    assert o.token_ids == [7] * 150
    steps = len(plans)
    if expensive:
        assert 4 <= engine.drafted < 20 and steps > 135
    else:
        assert engine.accepted > 120 and steps < 30


@pytest.mark.parametrize("family", ["mla", "gqa"])
def test_outputs_are_those_of_plain_decoding(family):
    a, b = llm(family, speculate=0), llm(family, speculate=2)
    for prompt in (repeating(40), prompts(30)[0], repeating(13)):
        assert tokens(a.generate([prompt], greedy(40))) == tokens(b.generate([prompt], greedy(40)))
    assert a.drafted == 0 < b.drafted
