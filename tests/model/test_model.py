"""Tests of the whole model: caches, packed documents, loss, precision, initial weights, errors.

test_oracles.py compares its numbers with the paper, transformers and frozen goldens.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lamoe import kernels
from lamoe.model import accounting
from lamoe.model.attention import MLA, Attention
from lamoe.model.cache import KVCache
from lamoe.model.config import PRESETS
from lamoe.model.layers import MLP
from lamoe.model.moe import MoE
from lamoe.model.routing import Balance, Training
from lamoe.model.transformer import Transformer
from oracles import tiny

FAMILIES = {
    "v2": tiny.HARD,
    "v2-lite": tiny.V2_CASES["plain-yarn-greedy-1dense"],
    "moe-v1": tiny.config("deepseek"),
    "llama-gqa": tiny.config("llama", num_key_value_heads=2),
    "llama-tied": tiny.config("llama", tie_word_embeddings=True),
}


@pytest.fixture(params=FAMILIES)
def config(request):
    return FAMILIES[request.param]


# ---- structure ----
@pytest.mark.parametrize("name", PRESETS)
def test_preset_models_have_the_parameters_of_accounting(name):
    c = PRESETS[name]
    with torch.device("meta"):
        m = Transformer(c)
    assert sum(p.numel() for p in m.parameters()) == accounting.parameters(c).total
    assert all(isinstance(b.attn, MLA if c.is_mla else Attention) for b in m.layers)
    assert [i for i, b in enumerate(m.layers) if isinstance(b.ffn, MoE)] == list(c.moe_layers)


@pytest.mark.parametrize(
    "first, freq, moe_layers",
    [
        (0, 1, [0, 1, 2, 3, 4]),
        (1, 1, [1, 2, 3, 4]),
        (2, 1, [2, 3, 4]),
        (1, 2, [2, 4]),
        (0, 3, [0, 3]),
    ],
)
def test_dense_first_layers(first, freq, moe_layers):
    m = Transformer(
        tiny.config(num_hidden_layers=5, first_k_dense_replace=first, moe_layer_freq=freq)
    )
    assert [i for i, b in enumerate(m.layers) if isinstance(b.ffn, MoE)] == moe_layers
    for i, b in enumerate(m.layers):
        if i not in moe_layers:
            # Dense layers have a different width than experts.
            assert isinstance(b.ffn, MLP) and b.ffn.w2.in_features == m.config.intermediate_size


def test_a_tied_head_is_the_embedding():
    m = tiny.model(FAMILIES["llama-tied"])
    assert m.head_weight is m.embed.weight and not hasattr(m, "head")
    assert torch.allclose(
        m(tiny.ids(m.config, 1, 3)), m.hidden(tiny.ids(m.config, 1, 3)) @ m.embed.weight.t()
    )


# ---- caches ----
@pytest.mark.parametrize("form", ["expand", "absorb", None])
def test_logits_do_not_depend_on_the_cache_capacity(config, form, impl):
    """Logits do not depend on the capacity of the cache. Unused rows hold NaN."""
    m = tiny.model(config)
    tokens = tiny.ids(config, 2, 9)
    out = []
    for capacity in (9, 10, 5000):
        cache = KVCache(config, 2, capacity, torch.float64)
        for rows in cache.rows:
            rows.fill_(float("nan"))
        with torch.no_grad():
            out.append(
                torch.cat([m(part, cache, form=form) for part in tokens.split([5, 1, 1, 2], 1)], 1)
            )
        assert cache.length == 9
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert torch.allclose(out[0], m(tokens), rtol=0, atol=1e-11)


def test_max_position_embeddings_changes_nothing_but_the_limit(config):
    tokens = tiny.ids(config, 1, 9)
    a, b = (tiny.model(config.replace(max_position_embeddings=n))(tokens) for n in (9, 1 << 20))
    assert torch.equal(a, b)


# ---- packed documents ----
def test_packed_documents_equal_separate_ones(config, impl):
    m = tiny.model(config)
    tokens = tiny.ids(config, 2, 40)
    cuts = [[0, 1, 17, 40], [0, 30, 39, 40]]
    segments = torch.stack(
        [torch.repeat_interleave(torch.arange(3), torch.tensor(c).diff()) for c in cuts]
    )
    packed, unseparated = m(tokens, segments=segments), m(tokens)
    for row, cut in enumerate(cuts):
        for a, b in itertools.pairwise(cut):
            alone = m(tokens[row : row + 1, a:b])[0]
            assert torch.allclose(packed[row, a:b], alone, rtol=0, atol=1e-10)
            assert a == 0 or (unseparated[row, a:b] - alone).abs().max() > 1e-3


# ---- loss ----
def test_loss_is_the_mean_over_targets(config, impl):
    m = tiny.model(config)
    tokens = tiny.ids(config, 2, 12)
    targets = tokens.roll(-1, 1)
    targets[:, -1], targets[0, :5] = -1, -100
    expected = F.cross_entropy(
        m(tokens).flatten(0, 1), targets.flatten().clamp_min(-1), ignore_index=-1
    )
    assert m.loss(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-12)


def test_training_pass_gives_every_parameter_a_gradient(config, impl):
    m = tiny.model(config, dtype=torch.float32).train()
    tokens = tiny.ids(config, 4, 32)
    training = Training(Balance(devices=config.n_group)) if config.is_moe else None
    loss = m.loss(tokens, tokens.roll(-1, 1), routing_hook=training)
    (loss if training is None else loss + training.loss()).backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    if training is not None:
        assert len(training.records) == len(config.moe_layers)


# ---- precision ----
def test_bfloat16_is_finite_and_close(config, impl):
    """bfloat16 logits are finite and close to float32.

    All experts are chosen, so rounding cannot change the routing.
    """
    if config.is_moe:
        config = config.replace(
            num_experts_per_tok=8,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            routed_scaling_factor=1.0,
        )
    exact, low = tiny.model(config), tiny.model(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), low.parameters()):
            p.copy_(q)  # both models have the same rounded weights
    tokens = tiny.ids(config, 2, 40)
    a, b = exact(tokens), low(tokens)
    assert b.dtype == torch.float32 and b.isfinite().all()
    assert F.cosine_similarity(a.flatten(), b.double().flatten(), dim=0) > 0.995
    assert (a - b).abs().mean() < 0.1 * a.abs().mean()
    loss = low.loss(tokens, tokens.roll(-1, 1))
    loss.backward()
    assert loss.dtype == torch.float32 and all(
        p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.parameters()
    )


@pytest.mark.parametrize("form", ["expand", "absorb"])
def test_bfloat16_decodes_from_its_cache(form, impl):
    m = tiny.model(tiny.HARD, dtype=torch.bfloat16)
    tokens = tiny.ids(tiny.HARD, 2, 12)
    cache = KVCache(tiny.HARD, 2, 12, torch.bfloat16)
    with torch.no_grad():
        parts = torch.cat([m(part, cache, form=form) for part in tokens.split([9, 1, 1, 1], 1)], 1)
    assert parts.isfinite().all()
    assert F.cosine_similarity(parts.flatten(), m(tokens).flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_is_not_needed_and_logits_are_at_least_float32(config, dtype):
    m = tiny.model(config, dtype=dtype)
    assert m(tiny.ids(config, 1, 3)).dtype == torch.promote_types(dtype, torch.float32)
    assert m.hidden(tiny.ids(config, 1, 3)).dtype == dtype


# ---- initial weights ----
def test_initial_weights_have_the_std_of_the_config():
    m = Transformer(
        tiny.config(hidden_size=128, vocab_size=512, moe_intermediate_size=64)
    ).init_weights(0)
    for name, p in m.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            # 0.006 is the value of the paper, also for gates and the embedding.
            assert p.std().item() == pytest.approx(0.006, rel=0.1), name
            assert abs(p.mean().item()) < 0.006 * 5 / math.sqrt(p.numel()), name
    wide = Transformer(m.config.replace(initializer_range=0.02)).init_weights(0)
    assert torch.allclose(wide.embed.weight, m.embed.weight * (0.02 / 0.006))


def test_a_seed_means_the_same_weights_in_every_dtype(config):
    base = Transformer(config).init_weights(5)
    for dtype in (torch.float64, torch.bfloat16):
        other = Transformer(config).to(dtype).init_weights(5)
        for p, q in zip(base.parameters(), other.parameters()):
            assert torch.equal(p.to(dtype), q)
    again, another = Transformer(config).init_weights(5), Transformer(config).init_weights(6)
    assert torch.equal(base.embed.weight, again.embed.weight) and not torch.equal(
        base.embed.weight, another.embed.weight
    )


def test_untrained_loss_is_that_of_uniform_guessing():
    m = Transformer(tiny.HARD).init_weights(0)
    tokens = tiny.ids(tiny.HARD, 4, 16)
    assert m.loss(tokens, tokens.roll(-1, 1)).item() == pytest.approx(math.log(64), abs=0.01)


# ---- invalid input ----
@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.tensor([[1, 64]]), "64 is outside the vocabulary of 64"),
        (torch.tensor([[1, -1]]), "-1 is outside the vocabulary of 64"),
        (torch.tensor([[2**40]]), "outside the vocabulary of 64"),
        (torch.tensor([1, 2]), r"\(2,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"\(1, 2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"\(1, 0\)"),
        (torch.zeros(0, 4, dtype=torch.long), r"\(0, 4\)"),
        (torch.zeros(1, 4), "float32"),
        (torch.zeros(1, 4, dtype=torch.bool), "bool"),
    ],
)
def test_impossible_ids_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        tiny.model(tiny.HARD)(bad)


def test_too_many_positions_are_refused():
    c = tiny.HARD.replace(max_position_embeddings=10)
    m = tiny.model(c)
    assert m(tiny.ids(c, 1, 10)).shape == (1, 10, 64)
    with pytest.raises(ValueError, match="11 positions.*max_position_embeddings 10"):
        m(tiny.ids(c, 1, 11))
    cache = KVCache(c, 1, 100, torch.float64)
    m(tiny.ids(c, 1, 8), cache)
    with pytest.raises(ValueError, match="11 positions.*max_position_embeddings 10"):
        m(tiny.ids(c, 1, 3), cache)
    assert cache.length == 8 and m(tiny.ids(c, 1, 2), cache).shape == (1, 2, 64)


def test_int32_ids_are_accepted():
    m = tiny.model(tiny.HARD)
    tokens = tiny.ids(tiny.HARD, 1, 4)
    assert torch.equal(m(tokens), m(tokens.int()))


def test_both_op_implementations_give_the_same_model(config):
    m, tokens = tiny.model(config), tiny.ids(config, 2, 70)
    default, out = kernels._DEFAULT, {}
    try:
        for kernels._DEFAULT in ("ref", "fused"):
            m.zero_grad()
            m.loss(tokens, tokens.roll(-1, 1)).backward()
            out[kernels._DEFAULT] = [m(tokens).detach(), *(p.grad.clone() for p in m.parameters())]
    finally:
        kernels._DEFAULT = default
    for a, b in zip(out["ref"], out["fused"]):
        assert torch.allclose(a, b, rtol=0, atol=1e-11 * max(1.0, float(a.abs().max())))
