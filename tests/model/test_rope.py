"""Tests of rotary embedding and YaRN: published constants, both pair layouts, precision."""

import math

import pytest
import torch

from lamoe.kernels import ref
from lamoe.model import rope
from lamoe.model.config import PRESETS, ModelConfig, RopeScaling
from oracles import naive, tiny

V2 = ModelConfig.preset("deepseek-v2")
PLAIN = V2.replace(rope_scaling=None)


# ---- constants of the paper and of the released configs ----
def test_mscale_of_the_paper():
    # Paper 3.1.4: 0.0707 ln 40 + 1.
    assert rope.mscale(40, 0.707) == pytest.approx(1.2608037774, abs=1e-10)
    assert rope.mscale(40, 1.0) == pytest.approx(1.3688879454, abs=1e-10)
    assert rope.mscale(1, 0.707) == rope.mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    "preset, scale",
    [
        ("deepseek-v2", 0.1147213868),
        ("deepseek-v2-lite", 0.1147213868),
        ("coder-v2-lite", 0.1147213868),
        ("deepseek-v2.5", 0.1352337789),
        ("deepseek-67b", 128**-0.5),
        ("deepseek-moe-16b", 128**-0.5),
        ("tiny", 64**-0.5),
        ("small", 96**-0.5),
        ("medium", 96**-0.5),
    ],
)
def test_softmax_scale_of_presets(preset, scale):
    assert rope.softmax_scale(PRESETS[preset]) == pytest.approx(scale, abs=1e-10)


def test_every_preset_has_its_scale_tested():
    tested = {
        p.values[0] if hasattr(p, "values") else p[0]
        for p in test_softmax_scale_of_presets.pytestmark[0].args[1]
    }
    assert tested == set(PRESETS)


def test_softmax_scale_with_and_without_yarn():
    plain = rope.softmax_scale(PLAIN)
    assert plain == pytest.approx(0.0721687836, abs=1e-10)
    assert rope.softmax_scale(V2) / plain == pytest.approx(1.5896261651, abs=1e-10)
    assert rope.softmax_scale(PRESETS["deepseek-v2.5"]) / plain == pytest.approx(
        1.8738542071, abs=1e-10
    )
    no_all_dim = V2.replace(rope_scaling=RopeScaling(mscale=1.0, mscale_all_dim=0.0))
    assert rope.softmax_scale(no_all_dim) == plain
    llama = PRESETS["deepseek-67b"]
    assert rope.softmax_scale(llama.replace(rope_scaling=RopeScaling())) == rope.softmax_scale(
        llama
    )


def test_amplitude_of_cos_and_sin():
    assert {rope.amplitude(c) for c in PRESETS.values()} == {1.0}
    assert rope.amplitude(
        V2.replace(rope_scaling=RopeScaling(mscale=1.0, mscale_all_dim=0.0))
    ) == pytest.approx(0.1 * math.log(40) + 1)
    two = RopeScaling(mscale=1.0, mscale_all_dim=0.707)
    assert rope.amplitude(V2.replace(rope_scaling=two)) == pytest.approx(
        1.3688879454 / 1.2608037774, abs=1e-9
    )


def test_ramp_limits():
    assert rope.yarn_ramp_limits(V2.rope_scaling, 64, 10000.0) == (10, 23)
    # The lower limit is clamped to 0, because it would be negative otherwise.
    assert (
        rope.yarn_ramp_limits(RopeScaling(original_max_position_embeddings=1), 64, 10000.0)[0] == 0
    )
    assert (
        rope.yarn_ramp_limits(RopeScaling(original_max_position_embeddings=2**31 - 1), 64, 10.0)[1]
        == 63
    )


def test_ramp_slows_each_pair_as_published():
    ratio = rope.inv_freq(V2, torch.float64) / rope.inv_freq(PLAIN, torch.float64)
    expected = {0: 1.0, 10: 1.0, 11: 0.925, 16: 0.55, 22: 0.1, 23: 1 / 40, 31: 1 / 40}
    for pair, value in expected.items():
        assert float(ratio[pair]) == pytest.approx(value, abs=1e-12), f"pair {pair}"
    assert (ratio.diff() <= 1e-15).all()


# ---- frequencies ----
@pytest.mark.parametrize(
    "c", [V2, PLAIN, PRESETS["deepseek-67b"], tiny.HARD], ids=["v2", "plain", "67b", "tiny-yarn"]
)
def test_freqs_are_the_angles_of_the_paper(c):
    positions = [0, 1, 4095, 4097, 40000, 163839]
    f = rope.freqs(c, torch.tensor(positions), torch.float64)
    assert f.dtype == torch.complex128 and f.shape == (6, c.rope_dim // 2)
    for row, position in zip(f, positions):
        for value, angle in zip(row.tolist(), naive.angles(c, position, c.rope_dim)):
            assert abs(value - complex(math.cos(angle), math.sin(angle))) < 1e-9


@pytest.mark.parametrize("preset", ["deepseek-v2", "deepseek-v2.5", "deepseek-67b"])
def test_float32_freqs_are_those_of_transformers_bit_for_bit(preset):
    """float32 frequencies equal those of transformers bit for bit.

    A different order of rounding would change angles noticeably at position 40,000.
    """
    transformers = pytest.importorskip(
        "transformers",
        reason="THE ORACLE IS MISSING: rotary tables were NOT compared with transformers",
    )
    c = ModelConfig.preset(preset)
    positions = torch.tensor([[0, 1, 4095, 4097, 40000, 100000]])
    ours = rope.freqs(c, positions)
    raw = {k: v for k, v in c.to_dict().items() if k not in ("architectures", "model_type")}
    if c.model_type == "deepseek_v2":
        theirs = transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2RotaryEmbedding(
            transformers.DeepseekV2Config(**raw)
        )
        assert torch.equal(ours, theirs(torch.zeros(1), positions))
    else:
        theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
            transformers.LlamaConfig(**raw)
        )
        cos, sin = theirs(torch.zeros(1), positions)
        assert (ours.real - cos[..., :64]).abs().max() < 1e-6 and (
            ours.imag - sin[..., :64]
        ).abs().max() < 1e-6


def test_freqs_depend_on_the_position_alone():
    """Frequencies depend only on the position, not on the number of positions or the dtype."""
    many = rope.freqs(V2, torch.arange(5000))
    assert torch.equal(rope.freqs(V2, torch.tensor([4097])), many[4097:4098])
    assert torch.equal(rope.freqs(V2, torch.tensor([[4097, 3]])), many[[4097, 3]][None])
    assert torch.equal(rope.freqs(V2, torch.arange(5000), torch.bfloat16), many)
    assert many.dtype == torch.complex64
    assert torch.equal(
        rope.freqs(V2.replace(max_position_embeddings=4096), torch.arange(5000)), many
    )


# ---- the two layouts ----
def rotate_half(x, freqs):
    """Rotate x [B, T, H, R] in the llama form, with cos and sin of repeated frequencies."""
    cos, sin = (
        torch.cat([freqs.real] * 2, -1)[:, :, None],
        torch.cat([freqs.imag] * 2, -1)[:, :, None],
    )
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def test_interleaved_is_deinterleave_then_rotate_half():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 64, dtype=torch.float64)
    freqs = rope.freqs(V2, torch.tensor([[0, 1, 4095, 4097, 40000]]), torch.float64)
    split = lambda t: t.unflatten(-1, (32, 2)).transpose(-1, -2).flatten(-2)
    assert torch.allclose(
        split(ref.rope(x, freqs, True)), rotate_half(split(x), freqs), rtol=0, atol=1e-13
    )
    assert torch.allclose(ref.rope(x, freqs, False), rotate_half(x, freqs), rtol=0, atol=1e-13)
    # At position 0 the two layouts agree.
    assert (ref.rope(x, freqs, True) - ref.rope(x, freqs, False))[:, 1:].abs().max() > 1
    assert torch.equal(ref.rope(x, freqs, True)[:, 0], x[:, 0])


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_alone(interleaved):
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(i, j):
        turn = lambda x, p: ref.rope(
            x, rope.freqs(V2, torch.tensor([[p]]), torch.float64), interleaved
        )
        return float((turn(q, i) * turn(k, j)).sum())

    assert score(40100, 40000) == pytest.approx(score(100, 0), abs=1e-9)
    assert abs(score(101, 0) - score(100, 0)) > 1e-3
