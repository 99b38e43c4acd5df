"""Tests of sampling options in the engine, compared with loops over full forward passes.

The options are seeds, penalties, bias, log-probabilities, EOS and stop strings.
"""

import math

import pytest
import torch

from lamoe.engine.generate import generate
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.text import tokenizer
from tiny_engine import CONTEXT, greedy, idle, llm, prompts, reforward, tokens


@pytest.mark.parametrize("speculate", [0, 8])
def test_equal_seeds_give_equal_tokens_alone_and_in_any_batch(speculate):
    texts = prompts(5, 5, 18, 40)
    params = [
        SamplingParams(seed=10 + i, max_tokens=14, temperature=0.8, top_p=0.95, top_k=30)
        for i in range(4)
    ]
    alone = [llm(speculate=0).generate([t], p)[0].token_ids for t, p in zip(texts, params)]
    engine = llm(max_num_batched_tokens=16, speculate=speculate)
    assert tokens(engine.generate(texts, params)) == alone == tokens(engine.generate(texts, params))
    assert (
        tokens(
            engine.generate(
                texts[::-1] + prompts(30, 2, seed=9),
                params[::-1] + [SamplingParams(max_tokens=3)] * 2,
            )
        )[:4]
        == alone[::-1]
    )
    # This cache is so small that sequences are preempted.
    small = llm(cache_memory=llm().cache.nbytes // 4, speculate=speculate)
    assert tokens(small.generate(texts * 2, params * 2)) == alone * 2
    assert (
        engine.generate(
            texts[:1], SamplingParams(seed=11, max_tokens=14, temperature=0.8, top_p=0.95, top_k=30)
        )[0].token_ids
        != alone[0]
    )


def test_sample_i_draws_from_seed_plus_i():
    (prompt,) = prompts(11)
    together = llm().generate([prompt], SamplingParams(n=3, seed=20, max_tokens=9))
    alone = [
        llm().generate([prompt], SamplingParams(seed=20 + i, max_tokens=9))[0] for i in range(3)
    ]
    assert tokens(together) == tokens(alone) and len({tuple(t) for t in tokens(together)}) == 3


def repetition(logits, ids, prompt_len):
    for t in set(ids):
        logits[t] = logits[t] / 1.7 if logits[t] > 0 else logits[t] * 1.7
    return logits


def presence(logits, ids, prompt_len):
    for t in set(ids[prompt_len:]):
        logits[t] -= 1.5
    return logits


def frequency(logits, ids, prompt_len):
    for t in ids[prompt_len:]:
        logits[t] -= 0.9
    return logits


def bias(logits, ids, prompt_len):
    logits[3] += 6.5
    logits[50] -= 100
    return logits


def everything(logits, ids, prompt_len):
    return bias(
        frequency(presence(repetition(logits, ids, prompt_len), ids, prompt_len), ids, prompt_len),
        ids,
        prompt_len,
    )


OPTIONS = {
    repetition: dict(repetition_penalty=1.7),
    presence: dict(presence_penalty=1.5),
    frequency: dict(frequency_penalty=0.9),
    bias: dict(logit_bias={3: 6.5, 50: -100}),
    everything: dict(
        repetition_penalty=1.7,
        presence_penalty=1.5,
        frequency_penalty=0.9,
        logit_bias={3: 6.5, 50: -100},
    ),
}


@pytest.mark.parametrize("rule", OPTIONS, ids=lambda f: f.__name__)
def test_penalties_and_bias(rule):
    """Penalties and bias give equal tokens in the engine and in generate.py.

    The batch of the engine also has a request without these options.
    """
    engine, texts = llm(), prompts(5, 13)
    for prompt in texts:
        expected_, _ = reforward(
            engine.model, prompt, 30, lambda logits, ids: rule(logits, ids, len(prompt))
        )
        assert expected_ != reforward(engine.model, prompt, 30)[0]
        got, other = engine.generate([prompt, texts[0]], [greedy(30, **OPTIONS[rule]), greedy(30)])
        assert (
            got.token_ids == expected_
            and other.token_ids == reforward(engine.model, texts[0], 30)[0]
        )
        assert [
            p.token_id for p in generate(engine.model, prompt, greedy(30, **OPTIONS[rule]))
        ] == expected_


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.7, logit_bias={3: 6.5})])
def test_logprobs(options):
    """Log-probabilities are those of the model, before penalties and bias.

    The most likely tokens come first, in order. The chosen one is included whatever its rank.
    """
    engine, (prompt,) = llm(), prompts(9)
    (o,) = engine.generate([prompt], SamplingParams(seed=1, max_tokens=12, logprobs=3, **options))
    ids, outside = list(prompt), 0
    for token, found in zip(o.token_ids, o.logprobs, strict=True):
        with torch.no_grad():
            logp = engine.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        top = logp.topk(3).indices.tolist()
        assert list(found) == list(dict.fromkeys([*top, token]))
        assert all(abs(value - float(logp[i])) < 1e-4 for i, value in found.items())
        outside += token not in top
        ids.append(token)
    assert outside > 0
    zero, none = engine.generate([prompt] * 2, [greedy(5, logprobs=0), greedy(5)])
    assert [list(d) for d in zero.logprobs] == [
        [t] for t in zero.token_ids
    ] and none.logprobs is None


def test_more_logprobs_than_tokens():
    engine = llm(vocabulary=10)
    (o,) = engine.generate([[1, 2]], greedy(3, logprobs=20))
    assert [len(d) for d in o.logprobs] == [10] * 3 and all(
        abs(sum(map(math.exp, d.values())) - 1) < 1e-4 for d in o.logprobs
    )


@pytest.mark.parametrize("min_tokens", [0, 1, 7])
def test_eos_and_min_tokens(min_tokens):
    """EOS ends the output as soon as min_tokens allows. A bias makes EOS the most likely token."""
    engine = llm(changes=dict(eos_token_id=9))
    for prompt in prompts(6, 19):
        free, _ = reforward(
            engine.model,
            prompt,
            min_tokens,
            lambda logits, ids: logits.index_fill(0, torch.tensor([9]), -math.inf),
        )
        for run in (
            lambda p: engine.generate([prompt], p)[0].token_ids,
            lambda p: [
                x.token_id for x in generate(engine.model, prompt, p, eos_ids=frozenset({9}))
            ],
        ):
            assert run(greedy(12, min_tokens=min_tokens, logit_bias={9: 100})) == [*free, 9]
        o = engine.generate(
            [prompt], greedy(12, min_tokens=min_tokens, logit_bias={9: 100}, ignore_eos=True)
        )[0]
        assert o.token_ids == [9] * 12 and o.finish_reason == "length"
    assert engine.generate(prompts(6), greedy(12, logit_bias={9: 100}))[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def letters() -> tuple[LLM, SamplingParams, str]:
    """Return (engine with a byte tokenizer, parameters that allow letters only, generated text)."""
    tok = tokenizer.train(["a"], 256 + len(tokenizer.SPECIAL_TOKENS))
    engine = llm(vocabulary=tok.vocab_size, changes=dict(first_k_dense_replace=1))
    engine = LLM(engine.model, tok, cache="fp32", max_model_len=CONTEXT, page_size=4)
    params = SamplingParams(
        seed=4, max_tokens=40, logit_bias={tok.encode(c)[0]: 60 for c in "abcdefgh"}
    )
    (o,) = engine.generate(["gad"], params)
    assert (
        o.finish_reason == "length"
        and len(o.text) == 40 == len(o.token_ids)
        and set(o.text) <= set("abcdefgh")
    )
    return engine, params, o.text


@pytest.mark.parametrize(
    "stops",
    [
        lambda t: (t[20:24],),
        lambda t: (t[20:21],),
        lambda t: (t[25:30], t[20:26], t[21:23]),
        lambda t: ("zz", t[39]),
        lambda t: (t[:2],),
    ],
)
@pytest.mark.parametrize("speculate", [0, 2])
def test_stop_strings(letters, stops, speculate):
    """The output ends before the first complete stop string, and no piece shows part of it."""
    engine, params, whole = letters
    engine.scheduler.speculate = speculate
    stop = stops(whole)
    # Position after the stop string that is complete first.
    end = min(i + len(s) for s in stop if (i := whole.find(s)) >= 0)
    at = min(i for s in stop if (i := whole[:end].find(s)) >= 0)
    deltas = list(engine.stream("gad", SamplingParams(**{**vars(params), "stop": stop})))
    o = deltas[-1].output
    assert o.text == whole[:at] == "".join(d.text for d in deltas) and o.finish_reason == "stop"
    assert len(o.token_ids) == end and idle(engine)


def test_a_stop_string_that_does_not_occur(letters):
    engine, params, whole = letters
    (o,) = engine.generate(
        ["gad"], SamplingParams(**{**vars(params), "stop": (whole[-3:] + "!", "xyz")})
    )
    assert o.text == whole and o.finish_reason == "length"
