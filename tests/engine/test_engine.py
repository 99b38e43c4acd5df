"""Tests of generate.py and sampler.py against simple oracles.

The oracles are full forward passes for generation, a plain Python definition for sampling, and a
search in the whole text for stop strings.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lamoe
from lamoe.engine.generate import Piece, TextStream, generate
from lamoe.engine.sampler import SamplingParams, probabilities, sample
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
CONFIGS = {
    "mla": ModelConfig(**BODY, **MLA, **MOE),
    "mla, q_lora, yarn": ModelConfig(
        **BODY,
        **MLA,
        **MOE,
        q_lora_rank=12,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=16),
    ),
    "gqa": ModelConfig(
        model_type="llama", **{**BODY, "num_attention_heads": 4}, num_key_value_heads=2
    ),
    "mha moe-v1": ModelConfig(model_type="deepseek", **BODY, **{**MOE, "n_shared_experts": 2}),
}


def model(name="mla", dtype=torch.float32) -> Transformer:
    """Make a random model with weights so large that each token depends on all earlier ones."""
    return (
        Transformer(CONFIGS[name].replace(initializer_range=0.2)).init_weights(1).to(dtype).eval()
    )


@pytest.fixture(scope="module")
def trained_model(trained):
    """Return (model, tokenizer) of the finished tiny run."""
    folder = checkpoint.latest(trained) / "model"
    return lamoe.load(folder), Tokenizer.load(folder)


# ---- generation ----
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]])
def test_greedy_equals_full_forward_passes(name, prompt):
    m, ids = model(name), list(prompt)
    pieces = list(generate(m, prompt, GREEDY))
    with torch.no_grad():
        for p in pieces:
            assert p.token_id == int(m(torch.tensor([ids]))[0, -1].argmax())
            ids.append(p.token_id)
    assert len(pieces) == 24 and len({p.token_id for p in pieces}) >= 3
    assert [p.finish_reason for p in pieces] == [None] * 23 + ["length"] and all(
        p.text == "" for p in pieces
    )


def test_greedy_in_bf16():
    """Every greedy token in bfloat16 has the largest logit of a full forward pass, up to rounding.

    Decoding uses the absorbed form, which rounds differently from the full forward pass.
    """
    m, ids, same = model(dtype=torch.bfloat16), [3, 1, 4], 0
    with torch.no_grad():
        for p in generate(m, ids.copy(), GREEDY):
            logits = m(torch.tensor([ids]))[0, -1]
            assert logits.max() - logits[p.token_id] < 0.05 * (logits.max() - logits.min())
            same += p.token_id == int(logits.argmax())
            ids.append(p.token_id)
    assert same >= 20
    assert ids[3:] == [p.token_id for p in generate(m, [3, 1, 4], GREEDY)]


def test_equal_seeds_give_equal_texts():
    m = model()

    def run(**p):
        return [x.token_id for x in generate(m, [5], SamplingParams(max_tokens=20, **p))]

    assert run(seed=3) == run(seed=3) != run(seed=4)
    torch.manual_seed(0)
    first = run(seed=3)
    # A seeded run does not touch torch's global generator.
    assert first == run(seed=3) and torch.initial_seed() == 0
    torch.manual_seed(1)
    a = run()
    torch.manual_seed(1)
    assert a == run() != run()  # without a seed, torch's global generator is used


def test_interleaved_generations_do_not_disturb_each_other():
    m, p = model(), SamplingParams(seed=1, max_tokens=10)
    alone = [x.token_id for x in generate(m, [5], p)]
    pairs = list(
        zip(generate(m, [5], p), generate(m, [9, 9], SamplingParams(seed=2, max_tokens=10)))
    )
    assert [a.token_id for a, _ in pairs] == alone
    steps = generate(m, [5], p)
    next(steps)
    assert not torch.is_inference_mode_enabled()  # the caller's mode is restored between pieces
    steps.close()


def test_finish_reasons():
    m = model()
    greedy = [p.token_id for p in generate(m, [7], GREEDY)]
    at = next(i for i, t in enumerate(greedy) if t not in greedy[:i] and i > 2)
    ended = list(generate(m, [7], GREEDY, eos_ids=frozenset({greedy[at]})))
    assert [p.token_id for p in ended] == greedy[: at + 1] and ended[-1].finish_reason == "stop"
    through = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    assert [
        p.token_id for p in generate(m, [7], through, eos_ids=frozenset({greedy[at]}))
    ] == greedy
    # The model's context has 64 positions, and the last generated token takes the last one.
    full = list(generate(m, [7] * 60, SamplingParams(temperature=0.0, max_tokens=10**12)))
    assert len(full) == 4 and full[-1].finish_reason == "length"
    assert len(list(generate(m, [7] * 63, GREEDY))) == 1
    assert [
        p.finish_reason for p in generate(m, [7], SamplingParams(temperature=0.0, max_tokens=1))
    ] == ["length"]


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "the prompt has no tokens"),
        (
            [1] * 64,
            "the prompt has 64 tokens, but with at least one output token it must "
            "fit in the model's context of 64",
        ),
        ([1] * 1000, "1000 tokens, .* context of 64"),
        ([300], "token ids from 0 to 299; found 300"),
        ([5, -1], "found -1"),
    ],
)
def test_invalid_prompts_are_refused_before_anything_runs(prompt, words):
    with pytest.raises(ValueError, match=words):
        generate(model(), prompt, GREEDY)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate(model(), [1], SamplingParams(stop="x"))


# ---- text ----
def test_pieces_are_the_decoded_text(trained_model):
    m, tok = trained_model
    for params in (
        SamplingParams(temperature=0.0, max_tokens=50),
        SamplingParams(temperature=5.0, seed=1, max_tokens=50, ignore_eos=True),
    ):
        pieces = list(generate(m, tok.encode("the ", bos=True), params, tok))
        assert "".join(p.text for p in pieces) == tok.decode([p.token_id for p in pieces])
    # At temperature 5 the text contains some incomplete characters.
    assert "\ufffd" in "".join(p.text for p in pieces)


def test_the_eos_token_of_the_tokenizer_ends_the_text(trained_model):
    """The EOS token of the tokenizer ends the text. A bias on the logits makes EOS likely."""
    m, tok = trained_model
    biased = Transformer(m.config)
    biased.load_state_dict(m.state_dict())
    original = biased.logits
    bias = torch.zeros(m.config.vocab_size).index_fill(0, torch.tensor([tok.eos_id]), 6.0)
    biased.logits = lambda h: original(h) + bias
    pieces = list(
        generate(biased, tok.encode("the ", bos=True), SamplingParams(seed=0, max_tokens=50), tok)
    )
    assert (
        1 < len(pieces) < 50 and [p.token_id for p in pieces].index(tok.eos_id) == len(pieces) - 1
    )
    assert pieces[-1].finish_reason == "stop" and "".join(p.text for p in pieces) == tok.decode(
        [p.token_id for p in pieces[:-1]]
    )


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_stop_strings_are_never_shown(trained_model, length):
    """The output ends before the first match of a stop string.

    The stop strings are many substrings of a greedy text, so matches may begin or end inside a
    token.
    """
    m, tok = trained_model
    prompt, params = (
        tok.encode("the ", bos=True),
        dict(temperature=0.0, max_tokens=30, ignore_eos=True),
    )
    pieces = list(generate(m, prompt, SamplingParams(**params), tok))
    text = "".join(p.text for p in pieces)
    assert len(text) > 30 and max(len(p.text) for p in pieces) > 1
    for at in range(0, len(text) - length, 3):
        stop = text[at : at + length]
        out = list(generate(m, prompt, SamplingParams(stop=stop, **params), tok))
        assert "".join(p.text for p in out) == text[: text.index(stop)]
        assert out[-1].finish_reason == "stop" and len(out) <= len(pieces)


def test_text_that_was_held_back_is_shown_at_the_length_limit(trained_model):
    m, tok = trained_model
    prompt, params = (
        tok.encode("the ", bos=True),
        dict(temperature=0.0, max_tokens=9, ignore_eos=True),
    )
    text = "".join(p.text for p in generate(m, prompt, SamplingParams(**params), tok))
    out = list(generate(m, prompt, SamplingParams(stop=text[-4:] + "never", **params), tok))
    assert (
        "".join(p.text for p in out) == text and out[-1].finish_reason == "length" and len(out) == 9
    )


class PieceTokenizer:
    """A tokenizer that decodes token i to the i-th piece."""

    control_tokens: frozenset = frozenset()

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self, *, skip_special=True):
        return self

    def step(self, i):
        return self.pieces[i]

    def flush(self):
        return ""


def stopped(pieces, stop) -> tuple[str, bool]:
    """Feed `pieces` to the stop-string filter.

    Return (shown text, whether a stop string ended it).
    """
    text, shown = TextStream(PieceTokenizer(pieces), tuple(stop)), ""
    for i in range(len(pieces)):
        part, hit = text.add(i)
        shown += part
        if hit:
            return shown, True
    return shown + text.rest(), False


@pytest.mark.parametrize(
    "pieces, stop, want",
    [
        (["abc"], ["abc"], ("", True)),
        (["a", "b", "c"], ["abc"], ("", True)),
        (["xa", "b", "cx"], ["abc"], ("x", True)),
        (["a", "a", "a", "b"], ["aab"], ("a", True)),
        (["ab", "ab", "ac"], ["abac"], ("ab", True)),
        (["a", "b"], ["abc"], ("ab", False)),
        (["xyz"], ["z", "y"], ("x", True)),
        (["ab", "cd"], ["bcd", "c"], ("a", True)),
        (["ab", "cd"], ["bcd", "d"], ("a", True)),
        (["one\n", "\n", "two"], ["\n\n"], ("one", True)),
        (["", "a", "", "b"], ["ab"], ("", True)),
        (["é", "ö"], ["éö"], ("", True)),
    ],
)
def test_stop_string_examples(pieces, stop, want):
    assert stopped(pieces, stop) == want


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_against_the_whole_text(pieces, stop):
    """For any split into pieces, no stop string is shown and no other text is lost."""
    shown, hit = stopped(pieces, stop)
    text = "".join(pieces)
    assert (
        hit == any(s in text for s in stop)
        and text.startswith(shown)
        and not any(s in shown for s in stop)
    )
    if hit:
        # The text ends at the stop string that is complete first. If one piece completes several
        # of them, it ends at the one that begins first.
        reach = next(
            n for n in range(len(pieces) + 1) if any(s in "".join(pieces[:n]) for s in stop)
        )
        seen = "".join(pieces[:reach])
        assert shown == seen[: min(seen.find(s) for s in stop if s in seen)]
    else:
        assert shown == text


def test_an_incomplete_character_is_shown_at_the_end(trained_model):
    _, tok = trained_model
    half = tok.encode("é")[0]
    text = TextStream(tok, ())
    assert text.add(half) == ("", False) and text.rest() == "\ufffd"
    text = TextStream(tok, ("\ufffd",))
    assert text.add(half) == ("", False) and text.rest() == ""


# ---- sampling ----
def expected_probabilities(logits: list[float], p: SamplingParams) -> list[float]:
    """Compute the sampling distribution by its definition, in plain Python."""
    weights = [math.exp((x - max(logits)) / p.temperature) for x in logits]
    if p.top_k and p.top_k < len(logits):
        least = sorted(weights, reverse=True)[p.top_k - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    if p.top_p < 1:
        order = sorted(range(len(weights)), key=lambda i: -weights[i])
        total, mass = sum(weights), 0.0
        for i in order:
            keep = mass < p.top_p * total
            mass += weights[i]
            if not keep:
                weights[i] = 0.0
    weights = [w if w >= p.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    "p",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=1),
        dict(top_k=5),
        dict(top_k=50),
        dict(top_k=10**20),
        dict(top_p=0.3),
        dict(top_p=1e-9),
        dict(top_p=0.999),
        dict(min_p=0.1),
        dict(min_p=1.0),
        dict(temperature=2.0, top_k=20, top_p=0.8, min_p=0.05),
        dict(temperature=0.7, top_k=3, top_p=0.6),
    ],
    ids=str,
)
def test_distribution_matches_its_definition(p):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = torch.randn(50, generator=generator) * 3
        params = SamplingParams(**p)
        got = probabilities(logits, params)
        assert got.dtype == torch.float32 and torch.allclose(
            got.double(),
            torch.tensor(
                expected_probabilities(logits.double().tolist(), params), dtype=torch.float64
            ),
            atol=2e-6,
        )
        assert got.sum().item() == pytest.approx(1, abs=1e-5)


def test_draws_follow_the_distribution():
    params, generator = SamplingParams(temperature=0.8, top_p=0.9), torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -5.0])
    draws = (
        torch.tensor([sample(logits, params, generator) for _ in range(4000)]).bincount(minlength=5)
        / 4000
    )
    assert torch.allclose(draws, probabilities(logits, params), atol=0.03) and draws[4] == 0


def test_temperature_zero_and_tiny():
    logits = torch.tensor([0.1, 3.0, 2.9999, -4.0])
    assert (
        sample(logits, SamplingParams(temperature=0))
        == 1
        == sample(logits * 1e6, SamplingParams(temperature=0.0, top_k=2, top_p=0.1))
    )
    for t in (1e-4 / 30, 1e-20, 1e-40, 1e-300, 5e-324):  # the sampler must not compute inf / inf
        assert sample(logits, SamplingParams(temperature=t)) == 1
    assert probabilities(logits * 1e30, SamplingParams(temperature=1e-10)).tolist() == [0, 1, 0, 0]
    assert (
        probabilities(torch.full((4,), -1e30), SamplingParams(temperature=0.01)).tolist()
        == [0.25] * 4
    )


def test_banned_tokens_stay_banned():
    logits = torch.tensor([0.0, -math.inf, 1.0])
    assert probabilities(logits, SamplingParams(temperature=100, top_p=0.99))[1] == 0


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(temperature=101), "between 0"),
        (dict(temperature="hot"), "temperature must be float"),
        (dict(temperature=True), "temperature"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_p=1.01), "top_p"),
        (dict(top_p=math.nan), "top_p"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_k=1.5), "top_k must be int"),
        (dict(min_p=-0.1), "min_p"),
        (dict(min_p=1.1), "min_p"),
        (dict(min_p=math.nan), "min_p"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**63), "seed"),
        (dict(seed=1.0), "seed must be"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(max_tokens=-5), "max_tokens"),
        (dict(max_tokens=math.inf), "max_tokens must be int"),
        (dict(stop=""), "stop string is empty"),
        (dict(stop=["a", ""]), "empty"),
        (dict(stop=[1]), "stop must be"),
        (dict(stop=5), "stop must be"),
        (dict(ignore_eos=1), "ignore_eos must be bool"),
    ],
)
def test_invalid_parameters_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**bad)


def test_huge_but_valid_parameters():
    p = SamplingParams(
        temperature=100, top_k=10**30, max_tokens=10**30, seed=2**63 - 1, stop=["x" * 10**5] * 3
    )
    assert p.stop == ("x" * 10**5,) * 3 and p.generator().initial_seed() == 2**63 - 1
    assert SamplingParams(stop="ab").stop == ("ab",)


def test_generate_is_exported_by_the_package():
    params = lamoe.SamplingParams(temperature=0.0, max_tokens=2)
    pieces = list(lamoe.generate(model(), [1], params))
    assert pieces[0] == Piece(next(generate(model(), [1], GREEDY)).token_id, "")
