"""Tests of the engine: equal outputs under any schedule, page accounting, refusals, cancelling."""

import math

import pytest
import torch

from lamoe.backends import cache_codec
from lamoe.backends.torch_backend import sequence_slots
from lamoe.engine.generate import generate
from lamoe.engine.sampler import SamplingParams
from tiny_engine import (
    CONTEXT,
    EVERY,
    FAMILIES,
    drain,
    greedy,
    idle,
    llm,
    prompts,
    reforward,
    tokens,
    watch,
)

# ---- equal tokens under any schedule ----
LENGTHS = (1, 3, 4, 5, 17, 40, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def expected(request) -> tuple[str, list[list[int]]]:
    """Return (family, greedy tokens of every prompt), from generate.py and full forward passes."""
    m = llm(request.param).model
    out = [[p.token_id for p in generate(m, prompt, greedy())] for prompt in prompts(*LENGTHS)]
    assert [reforward(m, prompt, 16)[0] for prompt in prompts(*LENGTHS)] == out
    assert len(set(sum(out, []))) > 10 and all(len(set(o)) > 2 for o in out)
    return request.param, out


@pytest.mark.parametrize("speculate", [0, 8])
def test_tokens_of_a_single_request(expected, speculate):
    family, out = expected
    engine = llm(family, speculate=speculate)
    for prompt, o in zip(prompts(*LENGTHS), out):
        assert tokens(engine.generate([prompt], greedy())) == [o]
    assert idle(engine)


@pytest.mark.parametrize("speculate", [0, 8])
def test_tokens_of_a_batch(expected, speculate):
    family, out = expected
    engine = llm(family, speculate=speculate)
    plans, _ = watch(engine)
    assert tokens(engine.generate(prompts(*LENGTHS), greedy())) == out
    assert max(len(p) for p in plans) == len(LENGTHS) and idle(engine)


def test_tokens_with_prompt_chunks_mixed_with_decoding(expected):
    family, out = expected
    engine = llm(family, max_num_batched_tokens=16, speculate=0)
    plans, _ = watch(engine)
    assert tokens(engine.generate(prompts(*LENGTHS), greedy())) == out
    assert any(
        len(p) > 1 and any(1 < n < seq.prompt_len for seq, n in p) and any(n == 1 for _, n in p)
        for p in plans
    ), "no step mixed a prompt chunk with decoding"


def test_tokens_of_requests_that_join_a_running_batch(expected):
    family, out = expected
    engine, done, ids = llm(family), {}, []
    for prompt in prompts(*LENGTHS):
        ids += engine.add(prompt, greedy())
        done.update({d.id: d.output for d in engine.step() if d.output})
    done.update(drain(engine))
    assert [done[i].token_ids for i in ids] == out


@pytest.mark.parametrize("budget", [16, 512])
def test_tokens_on_a_prefix_hit(expected, budget):
    family, out = expected
    engine = llm(family, max_num_batched_tokens=budget, cache_memory=1 << 22)
    first = engine.generate(prompts(*LENGTHS), greedy())
    second = engine.generate(prompts(*LENGTHS), greedy())
    assert tokens(first) == tokens(second) == out
    assert [o.cached_tokens for o in first] == [0] * 7
    assert [o.cached_tokens for o in second] == [(n - 1) // 4 * 4 for n in LENGTHS]


@pytest.mark.parametrize("budget", [16, 512])
@pytest.mark.parametrize("speculate", [0, 8])
def test_tokens_after_preemption(expected, budget, speculate):
    """Preempted sequences give the same tokens. The cache holds only one full context."""
    family, out = expected
    one = llm(family)
    engine = llm(
        family,
        cache_memory=one.cache.nbytes // one.pool.total * 24,
        max_num_batched_tokens=budget,
        speculate=speculate,
    )
    _, sequences = watch(engine)
    assert engine.pool.total * 4 == CONTEXT < sum(LENGTHS) + 16
    assert tokens(engine.generate(prompts(*LENGTHS), greedy())) == out
    assert sum(s.preemptions for s in sequences) > 0 and idle(engine)


@EVERY
@pytest.mark.parametrize("format", cache_codec.FORMATS)
def test_unused_rows_are_never_read(family, format):
    """Unused cache rows do not change outputs. Here all their bits are set, which is NaN."""
    out = []
    for fill in (0, 0xFF):
        engine = llm(family, cache=format, max_num_batched_tokens=16)
        engine.cache.rows.fill_(fill)
        out.append(tokens(engine.generate(prompts(*LENGTHS), greedy())))
    assert out[0] == out[1] and len(set(sum(out[0], []))) > 10


def test_page_numbers_beyond_the_text_are_never_used():
    pages = torch.tensor([3, 0, 7, 10**15, -5])
    assert sequence_slots(pages, 9, 4).tolist() == [12, 13, 14, 15, 0, 1, 2, 3, 28]
    assert sequence_slots(pages, 8, 4).tolist() == [12, 13, 14, 15, 0, 1, 2, 3]


@EVERY
def test_logprobs_do_not_depend_on_chunks_or_prefix_hits(family):
    """Log-probabilities are equal for whole, chunked and cached prompts."""
    found = []
    for budget, times in ((512, 1), (16, 1), (16, 2)):
        engine = llm(family, max_num_batched_tokens=budget)
        for _ in range(times):
            (o,) = engine.generate(prompts(70), greedy(4, logprobs=20))
        found.append(o)
    assert found[2].cached_tokens == 68
    for o in found[1:]:
        assert o.token_ids == found[0].token_ids
        for a, b in zip(o.logprobs, found[0].logprobs):
            assert list(a) == list(b) and all(abs(a[i] - b[i]) < 1e-3 for i in a)


# ---- shared pages ----
def test_shared_pages_are_never_written():
    """The bytes of a page do not change while the page is published under a content hash."""
    engine = llm(cache_memory=llm().cache.nbytes // 3, max_num_batched_tokens=24)
    seen, checked = {}, 0
    base = prompts(30)[0]
    for i in range(12):
        engine.add(
            base[: 10 + 2 * (i % 8)] + prompts(1 + i, seed=i)[0],
            SamplingParams(seed=i, max_tokens=8, n=1 + i % 3),
        )
    while engine.busy:
        engine.step()
        now = {}
        for page, content in engine.pool._content_of.items():
            now[page, content] = engine.cache.rows[:, page * 4 : page * 4 + 4].clone()
            if (page, content) in seen:
                assert torch.equal(now[page, content], seen[page, content])
                checked += engine.pool._owners.get(page, 0) > 1
        seen = now
    assert checked > 50


@pytest.mark.parametrize(
    "length, shared", [(15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32)]
)
def test_partial_pages_are_never_shared(length, shared):
    engine, prompt = llm(page_size=16), prompts(33)[0]
    engine.generate([prompt[:length]], greedy(1))
    assert engine.generate([prompt[:length]], greedy(1))[0].cached_tokens == shared
    assert (engine.prompt_tokens, engine.cached_tokens) == (2 * length, shared)


def test_pages_are_not_shared_after_a_different_beginning():
    """Pages with equal tokens are not shared if the tokens before them differ.

    Cache rows depend on all earlier tokens, not only on those of their own page.
    """
    engine, prompt = llm(), prompts(21)[0]
    other = [(prompt[0] + 1) % 64, *prompt[1:]]
    a, b = (engine.generate([p], greedy())[0] for p in (prompt, other))
    assert (
        b.cached_tokens == 0 and b.token_ids == reforward(engine.model, other, 16)[0] != a.token_ids
    )


def test_the_next_turn_of_a_conversation_reuses_prompt_and_output():
    engine, prompt = llm(), prompts(10)[0]
    (first,) = engine.generate([prompt], greedy(15))
    turn = prompt + first.token_ids + [5, 6, 7]
    (second,) = engine.generate([turn], greedy())
    assert second.cached_tokens == 24 and second.token_ids == reforward(engine.model, turn, 16)[0]


def test_samples_share_their_prompt():
    engine = llm()
    plans, sequences = watch(engine)
    outputs = engine.generate(prompts(41), SamplingParams(n=4, seed=5, max_tokens=8))
    assert [o.cached_tokens for o in outputs] == [0, 40, 40, 40] and len(
        {tuple(o.token_ids) for o in outputs}
    ) == 4
    # The prompt was computed once.
    assert sum(n for p in plans for _, n in p) < 41 + 3 + 4 * 20


# ---- memory ----
@EVERY
def test_cache_memory_is_a_bound_and_is_used(family):
    c = FAMILIES[family]
    token = sum(c.cache_row) * c.num_hidden_layers * 4
    engine = llm(family, cache_memory=30 * 4 * token + 4 * token - 1)
    assert (
        engine.pool.total == 30 and engine.cache.rows.untyped_storage().nbytes() == 30 * 4 * token
    )
    # By default the cache holds four full contexts.
    assert llm(family).cache.nbytes == 4 * CONTEXT * token


def test_every_request_finishes_when_pages_run_out():
    one = llm()
    engine = llm(
        cache_memory=one.cache.nbytes // one.pool.total * 24,
        max_num_seqs=4,
        max_num_batched_tokens=32,
    )
    _, sequences = watch(engine)
    outputs = engine.generate(
        prompts(*[5 + 7 * i % 60 for i in range(12)]),
        SamplingParams(seed=1, max_tokens=25, ignore_eos=True),
    )
    assert len(outputs) == 12 and all(
        o.finish_reason == "length" and len(o.token_ids) == 25 for o in outputs
    )
    assert sum(s.preemptions for s in sequences) > 0 and idle(engine)


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("prompt", [[7] * 250, list(range(60)), [1]])
def test_a_full_context_ends_with_length(prompt, speculate):
    """A sequence that fills its context ends with "length", also where a draft would exceed it."""
    engine = llm(max_model_len=256, speculate=speculate, changes=dict(initializer_range=0.02))
    (o,) = engine.generate([prompt], greedy(10_000, logit_bias={7: 100}))
    assert o.finish_reason == "length" and len(prompt) + len(o.token_ids) == 256 and idle(engine)


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers():
    engine = llm()
    for n in (CONTEXT, CONTEXT + 1, 500):
        with pytest.raises(
            ValueError,
            match=f"the prompt has {n} tokens, .* max_model_len {CONTEXT}; shorten it, or raise "
            "max_model_len .* 256",
        ):
            engine.add([1] * n, greedy())
    with pytest.raises(ValueError, match="max_model_len 256; shorten it$"):
        llm(max_model_len=256).add([1] * 256, greedy())
    assert engine.generate([[1] * (CONTEXT - 1)], greedy())[0].finish_reason == "length"
    assert idle(engine)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(cache="6bits"),
            r"unknown cache format '6bits', did you mean '6bit'\?; known: fp32, bf16, int8, "
            r"6bit, 4bit",
        ),
        (dict(cache="fp8"), "unknown cache format 'fp8'.*known: fp32"),
        (
            dict(cache_memory=30 * 288),
            r"a cache of 8.640 kB in fp32 holds 28 tokens, less than max_model_len 96, which "
            r"needs 27.65 kB; give more cache_memory, a smaller cache format, or max_model_len 28",
        ),
        (dict(cache_memory=0), "holds 0 tokens"),
        (
            dict(max_model_len=257),
            "max_model_len is 257; it must be from 2 to the model's max_position_embeddings 256",
        ),
        (dict(max_model_len=1), "max_model_len is 1"),
        (dict(max_model_len=0), "max_model_len is 0"),
        (dict(max_model_len=-5), "max_model_len is -5"),
        (dict(max_num_seqs=0), "max_num_seqs 0 and page_size 4 must be at least 1"),
        (dict(page_size=0), "page_size 0"),
        (
            dict(max_num_seqs=9, max_num_batched_tokens=8),
            "max_num_batched_tokens 8 at least max_num_seqs",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        llm(**options)


# ---- invalid and cancelled requests ----
@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "the prompt has no tokens"),
        ([1, 64], {}, "token ids from 0 to 63; found 64"),
        ([-1], {}, "found -1"),
        ([1, 2.0], {}, "found 2.0"),
        ([True], {}, "found True"),
        ([10**30], {}, "found 1000"),
        ("text", {}, "a text prompt needs a tokenizer"),
        ([1], dict(stop=("x",)), "stop strings need a tokenizer"),
        ([1], dict(logit_bias={64: 1.0}), "logit_bias names token 64; the vocabulary has 64"),
    ],
)
def test_an_invalid_request_is_refused_and_nothing_runs(prompt, params, message):
    engine = llm()
    for call in (
        lambda: engine.add(prompt, greedy(**params)),
        lambda: engine.generate([[1, 2], prompt], [greedy(), greedy(**params)]),
        lambda: engine.stream(prompt, greedy(**params)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert idle(engine)


def test_generate_takes_a_list_of_prompts():
    for arguments in (("text", greedy()), ([[1], [2]], [greedy()])):
        with pytest.raises(ValueError, match="generate takes a list of prompts"):
            llm().generate(*arguments)
    assert llm().generate([]) == []


@EVERY
def test_a_request_with_nan_logits_fails_alone(family):
    """A request whose logits become NaN ends with an error, and the others continue.

    The embedding of one token is NaN. This token occurs once in a prompt and once as a sampled
    token.
    """
    engine, texts = llm(family, max_num_batched_tokens=16), prompts(5, 20, 9, 33)
    clean = [[t if t != 63 else 1 for t in p] for p in texts]
    expected_ = tokens(llm(family).generate(clean, greedy(12, logit_bias={63: -100})))
    with torch.no_grad():
        engine.model.embed.weight[63] = math.nan
    poisoned = [*clean[:2], [1, 2, 63, 4, 5, 6, 7, 8, 9], *clean[2:]]
    for _ in range(2):  # the second round reuses the pages of the first
        outputs = engine.generate(poisoned, greedy(12, logit_bias={63: -100}))
        bad = outputs.pop(2)
        assert (bad.finish_reason, bad.error, bad.token_ids) == (
            "error",
            "the model's logits are not finite",
            [],
        )
        assert tokens(outputs) == expected_ and all(
            o.finish_reason == "length" and o.error is None for o in outputs
        )
        assert idle(engine)
    # The bias makes the last request sample the token with the NaN embedding.
    params = [greedy(12, logit_bias={63: -100})] * 4 + [greedy(12, logit_bias={63: 100})]
    *good, bad = engine.generate([*clean, [3, 4]], params)
    assert (
        tokens(good) == expected_
        and (bad.finish_reason, bad.token_ids) == ("error", [63])
        and idle(engine)
    )


def test_a_request_whose_options_leave_no_token_does_not_affect_others():
    """A request that leaves no token to sample does not affect others.

    Its bias allows only EOS, which min_tokens forbids.
    """
    engine = llm(changes=dict(eos_token_id=5))
    odd = SamplingParams(
        max_tokens=4, min_tokens=4, seed=0, logit_bias=dict.fromkeys(range(64), -100.0) | {5: 100.0}
    )
    a, b, c = engine.generate(
        prompts(5, 6, 7), [greedy(8, ignore_eos=True), odd, greedy(8, ignore_eos=True)]
    )
    assert 5 not in b.token_ids
    assert [a.token_ids, c.token_ids] == [
        reforward(engine.model, p, 8)[0] for p in (prompts(5, 6, 7)[0], prompts(5, 6, 7)[2])
    ]


@pytest.mark.parametrize("stage, steps", [("waiting", 0), ("prefill", 1), ("decoding", 6)])
def test_cancelling(stage, steps):
    engine, texts = llm(max_num_batched_tokens=8, max_num_seqs=2), prompts(20, 6, 5)
    (victim,) = engine.add(texts[0], greedy())
    _, sequences = watch(engine)
    others = [engine.add(p, greedy())[0] for p in texts[1:]]
    for _ in range(steps):
        engine.step()
    seq = next(s for s in (*engine.scheduler.running, *engine.scheduler.waiting) if s.id == victim)
    assert stage == (
        "waiting"
        if seq not in engine.scheduler.running
        else "prefill"
        if seq.todo > 1
        else "decoding"
    )
    free, held = engine.pool.available, len(seq.pages)
    out = engine.cancel(victim)
    assert out.finish_reason == "abort" and (stage == "decoding") == bool(out.token_ids)
    assert out.token_ids == reforward(engine.model, texts[0], 16)[0][: len(out.token_ids)]
    assert engine.pool.available == free + held and seq.pages == []
    assert engine.cancel(victim) is None and engine.cancel(12345) is None
    done = drain(engine)
    assert [done[i].token_ids for i in others] == [
        reforward(engine.model, p, 16)[0] for p in texts[1:]
    ] and victim not in done
    assert idle(engine)


def test_leaving_a_stream_early():
    engine = llm()
    for n in (1, 3):
        deltas = engine.stream(prompts(30)[0], SamplingParams(n=n, max_tokens=50, seed=1))
        for _ in range(4):
            next(deltas)
        assert engine.pool.owned > 0
        deltas.close()
        assert idle(engine)
    deltas = engine.stream(prompts(30)[0], greedy())
    deltas.close()  # the stream is closed before the first step
    assert idle(engine)


def test_cancelling_a_stream_ends_it():
    engine = llm(speculate=0)
    deltas = engine.stream(prompts(9)[0], greedy())
    first = next(deltas)
    engine.cancel(first.id)
    (last,) = deltas
    assert (last.output.finish_reason, last.output.token_ids) == (
        "abort",
        [first.token_id],
    ) and idle(engine)


def test_stream_yields_the_tokens_of_generate():
    engine, prompt = llm(), prompts(9)[0]
    deltas = list(engine.stream(prompt, SamplingParams(n=2, seed=3, max_tokens=7)))
    outputs = llm().generate([prompt], SamplingParams(n=2, seed=3, max_tokens=7))
    by_id: dict = {}
    for d in deltas:
        by_id.setdefault(d.id, []).append(d)
    assert [[d.token_id for d in ds] for ds in by_id.values()] == tokens(outputs)
    assert [[d.output is not None for d in ds] for ds in by_id.values()] == [
        [False] * 6 + [True]
    ] * 2


def test_two_streams_and_a_generate_at_once():
    """Two streams and a `generate` call at once each get their own output.

    Any of the three may run a step that produces tokens for the others.
    """
    engine, (a, b, c) = llm(speculate=0), prompts(9, 14, 5)
    one, two = engine.stream(a, greedy()), engine.stream(b, greedy())
    got = [[next(one).token_id], [next(two).token_id]]
    (third,) = engine.generate([c], greedy(20))
    got[0] += [d.token_id for d in one]
    got[1] += [d.token_id for d in two]
    assert [*got, third.token_ids] == [
        reforward(engine.model, p, n)[0] for p, n in ((a, 16), (b, 16), (c, 20))
    ] and idle(engine)


# ---- budgets ----
@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("seqs, budget", [(1, 1), (3, 3), (3, 7), (8, 64)])
def test_budgets_are_kept(seqs, budget, speculate):
    """No step exceeds its budget of tokens or sequences. `watch` checks both after every plan."""
    engine = llm(max_num_seqs=seqs, max_num_batched_tokens=budget, speculate=speculate)
    plans, _ = watch(engine)
    lengths = (30, 4, 11, 2, 25)
    out = engine.generate(prompts(*lengths), greedy(6))
    assert tokens(out) == [reforward(engine.model, p, 6)[0] for p in prompts(*lengths)]
    assert (
        max(len(p) for p in plans) == min(seqs, 5)
        and max(sum(n for _, n in p) for p in plans) <= budget
    )
