"""Tests of the modules MLA and Attention: both forms agree, the cheaper one runs, segments, caches.

test_oracles.py compares these modules with the paper and with transformers.
"""

import pytest
import torch

from lamoe.model import accounting, attention, rope
from lamoe.model.attention import MLA, Attention, cheaper_form
from lamoe.model.cache import KVCache
from lamoe.model.config import ModelConfig
from oracles import tiny

V2, LITE = ModelConfig.preset("deepseek-v2"), ModelConfig.preset("deepseek-v2-lite")


def inputs(m, b: int, t: int, start: int = 0, seed: int = 0):
    """Return x [B, T, D] and the rotations of positions start, start + 1, ..., in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, m.config.hidden_size, generator=generator, dtype=torch.float64)
    return x, rope.freqs(m.config, torch.arange(start, start + t)[None], torch.float64)


def layer(c):
    return tiny.model(c).layers[0].attn


@pytest.mark.parametrize("name", tiny.V2_CASES)
@pytest.mark.parametrize("t", [1, 3, 65, 130])
def test_expand_equals_absorb(name, t, impl):
    m = layer(tiny.V2_CASES[name])
    assert isinstance(m, MLA)
    x, freqs = inputs(m, 2, t)
    expand, absorb = m(x, freqs, form="expand"), m(x, freqs, form="absorb")
    assert (expand - absorb).abs().max() < 1e-12 * max(1, float(expand.detach().abs().max()))


def test_expand_equals_absorb_in_gradients(impl):
    grads = {}
    for form in ("expand", "absorb"):
        m = layer(tiny.HARD)
        x, freqs = inputs(m, 2, 33)
        m(x.requires_grad_(), freqs, form=form).square().sum().backward()
        grads[form] = [x.grad, *(p.grad for p in m.parameters())]
    for a, b in zip(grads["expand"], grads["absorb"]):
        assert torch.allclose(a, b, rtol=0, atol=1e-11 * float(a.abs().max()))


@pytest.mark.parametrize(
    "c",
    [
        tiny.HARD,
        tiny.config("llama"),
        tiny.config("llama", num_key_value_heads=2),
        tiny.config("llama", num_key_value_heads=1),
    ],
    ids=["mla", "mha", "gqa", "mqa"],
)
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [8, 1], [2, 3, 4]])
def test_cached_outputs_equal_uncached_ones(c, sizes, impl):
    m = layer(c)
    x, freqs = inputs(m, 2, 9)
    for form in ("expand", "absorb", None) if c.is_mla else (None,):
        cache, out = KVCache(c, 2, 12, torch.float64), []
        for rows in cache.rows:
            rows.fill_(float("nan"))  # unused rows must not be read
        for part, turn in zip(x.split(sizes, 1), freqs.split(sizes, 1)):
            with torch.no_grad():
                out.append(m(part, turn, cache, form=form))
            cache.advance(part.shape[1])
        assert torch.allclose(torch.cat(out, 1), m(x, freqs), rtol=0, atol=1e-12)


def test_cache_rows_are_normed_latents_and_rotated_keys():
    m = layer(tiny.HARD)
    c = m.config
    x, freqs = inputs(m, 1, 5, start=7)
    cache = KVCache(c, 1, 5, torch.float64)
    with torch.no_grad():
        m(x, freqs, cache)
        down, key = m.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = down / (down.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.kv_norm.weight
        turned = torch.view_as_real(
            torch.view_as_complex(key.unflatten(-1, (-1, 2)).contiguous()) * freqs
        ).flatten(-2)
    assert torch.allclose(cache.rows[0][0], latent, rtol=0, atol=1e-13)
    assert torch.allclose(cache.rows[1][0], turned, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "c", [tiny.HARD, tiny.config("llama", num_key_value_heads=2)], ids=["mla", "gqa"]
)
def test_segments_do_not_see_each_other(c, impl):
    m = layer(c)
    x, freqs = inputs(m, 1, 9)
    segments = torch.tensor([[5, 5, 5, 5, 2, 2, 2, 2, 2]])  # segment numbers may also decrease
    whole = m(x, freqs, segments=segments)
    apart = torch.cat([m(x[:, :4], freqs[:, :4]), m(x[:, 4:], freqs[:, 4:])], 1)
    assert torch.allclose(whole, apart, rtol=0, atol=1e-12)
    assert (whole - m(x, freqs))[:, 4:].abs().max() > 1e-3


def test_absorb_refuses_segments():
    m = layer(tiny.HARD)
    x, freqs = inputs(m, 1, 4)
    with pytest.raises(ValueError, match="form='expand'"):
        m(x, freqs, segments=torch.zeros(1, 4, dtype=torch.long), form="absorb")


def test_outputs_do_not_depend_on_later_tokens(impl):
    for c in (tiny.HARD, tiny.config("llama")):
        m = layer(c)
        x, freqs = inputs(m, 1, 130)
        before = m(x, freqs)
        x[:, 100:] = 1e3
        after = m(x, freqs)
        assert torch.equal(before[:, :100], after[:, :100]) and not torch.equal(
            before[:, 100:], after[:, 100:]
        )


# ---- choice of the form of attention ----
@pytest.mark.parametrize("c", [V2, LITE], ids=["v2", "lite"])
def test_decode_absorbs_and_prefill_expands(c):
    for cached in (1, 10, 1000, 128_000):
        assert cheaper_form(c, 1, cached) == ("expand" if cached == 1 else "absorb")
    for tokens in (128, 1000, 32_768):
        assert cheaper_form(c, tokens, tokens) == "expand"


def test_cheaper_form_counts_multiply_adds():
    """The form with fewer multiply-adds is chosen (paper, section 2.1).

    Expanding a row takes 131,072 multiply-adds per head. A query and a row then take 320, against
    1,088 in the absorbed form.
    """
    for t, s in ((1, 7), (16, 4096), (170, 4096), (171, 1 << 20), (5, 5)):
        expand, absorb = 131_072 * s + 320 * t * s, 131_072 * t + 1_088 * t * s
        assert cheaper_form(V2, t, s) == ("expand" if expand < absorb else "absorb")
    # The forms cost the same at 131,072 / 768 = 170.7 queries.
    assert (cheaper_form(V2, 170, 1 << 30), cheaper_form(V2, 171, 1 << 30)) == (
        "absorb",
        "expand",
    )


def test_the_cheaper_form_is_run(monkeypatch):
    m, ran = layer(tiny.HARD), []
    for form in ("expand", "absorb"):
        inner = getattr(MLA, form)
        monkeypatch.setattr(
            MLA,
            form,
            lambda self, *a, _inner=inner, _form=form: ran.append(_form) or _inner(self, *a),
        )
    c = m.config
    cache = KVCache(c, 1, 65, torch.float64)
    with torch.no_grad():
        for t in (64, 1):
            x, freqs = inputs(m, 1, t, start=cache.length)
            m(x, freqs, cache)
            cache.advance(t)
    assert ran == [cheaper_form(c, 64, 64), cheaper_form(c, 1, 65)] == ["expand", "absorb"]


def test_gqa_equals_mha_with_repeated_kv_heads():
    """GQA equals MHA with repeated key and value rows."""
    gqa, mha = layer(tiny.config("llama", num_key_value_heads=2)), layer(tiny.config("llama"))
    assert isinstance(gqa, Attention)
    with torch.no_grad():
        for name in ("wq", "wo"):
            getattr(mha, name).weight.copy_(getattr(gqa, name).weight)
        for name in ("wk", "wv"):
            rows = (
                getattr(gqa, name)
                .weight.unflatten(0, (2, -1))
                .repeat_interleave(2, 0)
                .flatten(0, 1)
            )
            getattr(mha, name).weight.copy_(rows)
    x, freqs = inputs(gqa, 2, 10)
    assert torch.allclose(gqa(x, freqs), mha(x, freqs), rtol=0, atol=1e-13)


# ---- the cache ----
@pytest.mark.parametrize(
    "c",
    [
        tiny.HARD,
        tiny.config("llama"),
        tiny.config("llama", num_key_value_heads=1, head_dim=12),
        tiny.config("deepseek"),
    ],
)
@pytest.mark.parametrize("dtype, bits", [(torch.float32, 32), (torch.bfloat16, 16)])
def test_cache_bytes_are_the_closed_form(c, dtype, bits):
    cache = KVCache(c, 3, 7, dtype)
    assert cache.nbytes == accounting.stored_bytes(accounting.cache_elements(c), bits) * 3 * 7
    assert cache.nbytes == sum(r.untyped_storage().nbytes() for r in cache.rows)
    assert cache.capacity == 7 and cache.length == 0


def test_cache_of_v2_has_34560_elements_per_token():
    with torch.device("meta"):
        cache = KVCache(V2, 1, 1, torch.bfloat16, device="meta")
    assert cache.nbytes == 2 * 34_560


def test_cache_errors_name_the_numbers():
    for batch, capacity in ((0, 4), (1, 0), (-1, 4)):
        with pytest.raises(ValueError, match=f"{batch} x {capacity}"):
            KVCache(tiny.HARD, batch, capacity)
    m = tiny.model(tiny.HARD)
    cache = KVCache(m.config, 1, 4, torch.float64)
    m(tiny.ids(m.config, 1, 3), cache)
    with pytest.raises(ValueError, match="5 tokens do not fit in a cache of 4"):
        m(tiny.ids(m.config, 1, 2), cache)
    assert cache.length == 3  # a refused call does not change the length


def test_cache_refuses_another_number_of_sequences():
    m = tiny.model(tiny.HARD)
    for batch in (1, 3):
        with pytest.raises(
            ValueError, match=f"batch has {batch} sequences, but the cache was made for 2"
        ):
            m(tiny.ids(m.config, batch, 3), KVCache(m.config, 2, 8, torch.float64))


def test_rms_norm_module_uses_its_epsilon():
    norm = attention.RMSNorm(4, 0.5).double()
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(norm(x), x / 1.5**0.5)
