"""Tests that computed costs equal the numbers of the paper and those of real models.

A real model gives its parameters, its counted matrix products and its allocated cache.
"""

import io
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lamoe import kernels
from lamoe.model import accounting as acc
from lamoe.model.attention import cheaper_form
from lamoe.model.cache import KVCache
from lamoe.model.config import PRESETS, ModelConfig
from lamoe.model.transformer import Transformer

V2, LITE, DENSE67, MOE16, SMALL = (
    ModelConfig.preset(n)
    for n in ("deepseek-v2", "deepseek-v2-lite", "deepseek-67b", "deepseek-moe-16b", "small")
)
MLA = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    intermediate_size=22,
    moe_intermediate_size=7,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    max_position_embeddings=64,
    torch_dtype="float32",
)
GQA = ModelConfig(
    model_type="llama",
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=22,
    max_position_embeddings=64,
    torch_dtype="float32",
)
MODELS = {
    **PRESETS,
    "mla": MLA,
    "gqa": GQA,
    "mla tied": MLA.replace(tie_word_embeddings=True),
    "gqa tied": GQA.replace(tie_word_embeddings=True),
    "lite tied": LITE.replace(tie_word_embeddings=True),
    "every other layer": MLA.replace(num_hidden_layers=5, moe_layer_freq=2),
    "no shared": MLA.replace(n_shared_experts=0),
    "wide heads": GQA.replace(head_dim=6),
}


# ---- parameters ----
@pytest.mark.parametrize(
    "config, total",
    [
        (V2, 235_741_434_880),
        (LITE, 15_706_484_224),
        (DENSE67, 67_425_001_472),
        (MOE16, 16_375_728_128),
    ],
)
def test_parameter_totals_equal_published_ones(config, total):
    assert acc.parameters(config).total == total


def test_parameters_of_parts_equal_published_ones():
    v2, lite = acc.parameters(V2), acc.parameters(LITE)
    assert (v2.attention_per_layer, v2.routed_expert, v2.moe_ffn_per_layer) == (
        149_227_520,
        23_592_960,
        3_822_878_720,
    )
    assert (lite.attention_per_layer, lite.routed_expert, lite.moe_ffn_per_layer) == (
        13_763_072,
        8_650_752,
        571_080_704,
    )


@pytest.mark.parametrize(
    "config, body, with_head, with_both",
    [
        (V2, "20.327", "20.852", "21.376"),
        (LITE, "2.242", "2.451", "2.661"),
        (MOE16, "2.409", "2.619", "2.829"),
    ],
)
def test_activated_parameters_equal_published_ones(config, body, with_head, with_both):
    p = acc.parameters(config)
    assert [f"{n / 1e9:.3f}" for n in (p.activated_body, p.activated, p.activated_all)] == [
        body,
        with_head,
        with_both,
    ]


def plain_twin(config, kv_heads):
    """Return the config with ordinary attention instead of MLA, and value heads of the same width.

    `kv_heads` selects MHA, GQA or MQA.
    """
    mla = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    changes = {"model_type": "deepseek", **dict.fromkeys(mla)} if config.is_mla else {}
    return config.replace(**changes, head_dim=config.value_head_dim, num_key_value_heads=kv_heads)


def test_mha_twin_of_lite_equals_table_9():
    """Lite with MHA (Table 9) has 15.79 B parameters, 2.53 B active, 110,592 cache elements."""
    mha = plain_twin(LITE, LITE.num_attention_heads)
    p = acc.parameters(mha)
    assert (round(p.total / 1e9, 2), round(p.activated / 1e9, 2)) == (15.79, 2.53)
    assert acc.cache_elements(mha) == 110_592 and acc.cache_elements(LITE) == 15_552


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_the_model_on_the_meta_device(name):
    config = MODELS[name]
    with torch.device("meta"):
        model = Transformer(config)
    p = acc.parameters(config)
    assert sum(w.numel() for w in model.parameters()) == p.total
    assert sum(w.numel() for w in model.layers[0].attn.parameters()) == p.attention_per_layer
    moe = [model.layers[i].ffn for i in config.moe_layers]
    assert sum(w.numel() for ffn in moe for w in ffn.experts.parameters()) == p.routed_experts
    assert (
        sum(w.numel() for ffn in moe if ffn.shared for w in ffn.shared.parameters())
        == p.shared_experts
    )
    assert sum(ffn.gate.weight.numel() for ffn in moe) == p.router
    if config.first_k_dense_replace or not config.is_moe:
        assert sum(w.numel() for w in model.layers[0].ffn.parameters()) == p.dense_ffn_per_layer


def test_tied_embedding_is_stored_once_and_used_twice():
    free, tied = acc.parameters(LITE), acc.parameters(LITE.replace(tie_word_embeddings=True))
    table = LITE.vocab_size * LITE.hidden_size
    assert free.total - tied.total == table and tied.head == 0
    # A tied head is a matrix product too.
    assert tied.activated == free.activated
    assert tied.activated_all == tied.activated == free.activated_all - table


# ---- FLOPs ----
def counted(config, monkeypatch, run) -> int:
    """Return the FLOPs of the reference ops during run(model), as counted by torch."""
    monkeypatch.setattr(kernels, "_DEFAULT", "ref")
    model = Transformer(config).init_weights(0)
    with FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def filled(config, depth):
    cache = KVCache(config, 1, depth + 1)
    for rows in cache.rows:
        rows.zero_()
    cache.advance(depth)
    return cache


@pytest.mark.parametrize(
    "name, form",
    [
        ("mla", "expand"),
        ("mla", "absorb"),
        ("mla tied", "absorb"),
        ("gqa", None),
        ("wide heads", None),
        ("no shared", "absorb"),
    ],
)
def test_decode_flops_equal_the_counted_products(name, form, monkeypatch):
    config, depth = MODELS[name], 17
    ids = torch.tensor([[7]])
    found = counted(config, monkeypatch, lambda m: m(ids, cache=filled(config, depth), form=form))
    assert acc.decode_flops(config, depth, form).total == found


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_forward_and_training_flops_equal_the_counted_products(name, monkeypatch):
    """FLOPs of forward and training passes equal those that torch counts.

    The reference op computes all T x T pairs of tokens, but the formulas count only causal pairs.
    The test adds the difference.
    """
    config, t = MODELS[name], 9
    ids = torch.arange(t)[None]
    ours = acc.forward_flops(config, t, form="expand")
    # t t - t (t + 1) / 2 pairs lie above the diagonal, t (t + 1) / 2 on and below it.
    above_diagonal = ours.attention * (t - 1) // (t + 1)
    assert (
        counted(config, monkeypatch, lambda m: m(ids, form="expand" if config.is_mla else None))
        == ours.total + above_diagonal
    )
    found = counted(
        config,
        monkeypatch,
        lambda m: m(ids, form="expand" if config.is_mla else None).sum().backward(),
    )
    assert (
        found
        == acc.training_flops(config, t) * t + 3 * above_diagonal
        == 3 * (ours.total + above_diagonal)
    )


def test_training_flops_of_the_benchmark_model():
    assert acc.training_flops(SMALL, 512) == pytest.approx(84.9e6, rel=1e-3)
    p = acc.parameters(SMALL)
    attention = 6 * SMALL.num_hidden_layers * SMALL.num_attention_heads * (96 + 64) * (512 + 1) / 2
    gains = p.norms + SMALL.num_hidden_layers * SMALL.kv_lora_rank
    assert acc.training_flops(SMALL, 512) == 6 * (p.activated - gains) + attention
    assert 6 * p.activated + attention == pytest.approx(84.9e6, rel=3e-4)


def test_mla_products_per_head_and_cached_token():
    """Multiply-adds per head of V2 equal those of Appendix C of the paper.

    Expanding a cached token takes 131,072. Attending to it takes 320 expanded and 1,088 absorbed.
    """
    per = 2 * V2.num_hidden_layers * V2.num_attention_heads
    step = {
        f: acc.decode_flops(V2, 101, f).total - acc.decode_flops(V2, 100, f).total
        for f in ("expand", "absorb")
    }
    assert step == {"expand": per * (320 + 131_072), "absorb": per * 1_088}


def test_prefill():
    whole, parts = (
        acc.prefill_flops(LITE, 512, form="expand"),
        [acc.forward_flops(LITE, 1, d, "absorb") for d in range(512)],
    )
    assert whole.projections == sum(p.projections for p in parts) and whole.feed_forward == sum(
        p.feed_forward for p in parts
    )
    assert whole.head == parts[0].head  # a prefill computes logits of only one position
    assert whole.attention * 1_088 == sum(p.attention for p in parts) * 320
    assert (
        acc.prefill_flops(LITE, 512).total
        == whole.total
        < acc.prefill_flops(LITE, 512, form="absorb").total
    )
    assert (
        acc.prefill_flops(LITE, 4, depth=4096).total
        == acc.prefill_flops(LITE, 4, 4096, "absorb").total
    )
    assert acc.prefill_flops(LITE, 512).total / 512 == pytest.approx(4.5e9, rel=0.03)


@pytest.mark.parametrize("depth", [1, 5, 4096])
def test_the_model_chooses_the_form_that_accounting_finds_cheaper(depth):
    best = min(("expand", "absorb"), key=lambda f: acc.decode_flops(LITE, depth, f).total)
    assert cheaper_form(LITE, 1, depth + 1) == best == "absorb"
    assert (
        cheaper_form(LITE, 512, 512 + depth)
        == min(("expand", "absorb"), key=lambda f: acc.prefill_flops(LITE, 512, depth, f).total)
        == "expand"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: acc.forward_flops(V2, 0),
        lambda: acc.forward_flops(V2, 1, -1),
        lambda: acc.forward_flops(V2, 1.5),
        lambda: acc.forward_flops(V2, True),
        lambda: acc.forward_flops(V2, 1, 0, "naive"),
        lambda: acc.training_flops(V2, 0),
        lambda: acc.decode_bytes(V2, 0, 16, 16, 0),
    ],
)
def test_impossible_flop_arguments_are_refused(call):
    with pytest.raises(ValueError, match="tokens is|depth is|form is|sequences is"):
        call()


# ---- cache ----
def test_cache_constants():
    assert (
        sum(V2.cache_row) == 576
        and acc.cache_elements(V2) == 34_560
        and acc.cache_elements(DENSE67) == 194_560
    )
    assert acc.cache_twins(V2) == {
        "MHA": 1_966_080,
        "GQA, 8 groups": 122_880,
        "MQA": 15_360,
        "expanded K, V": 128 * 320 * 60,
    }
    assert (
        acc.equivalent_groups(V2) == acc.equivalent_groups(LITE) == 2.25
        and acc.equivalent_groups(DENSE67) == 8
    )
    assert (
        acc.stored_bytes(acc.cache_elements(V2), 6) == 25_920
        and acc.stored_bytes(194_560, 16) == 389_120
    )
    assert (
        acc.stored_bytes(acc.expanded_elements(LITE), 16) == 276_480
        and acc.stored_bytes(acc.cache_elements(LITE), 16) == 31_104
    )


@pytest.mark.parametrize("bits, saving", [(6, 0.9334), (8, 0.9112), (16, 0.8224)])
def test_the_published_cache_reduction_needs_the_six_bit_cache(bits, saving):
    assert round(acc.cache_saving(V2, bits, DENSE67, 16), 4) == saving


@pytest.mark.parametrize(
    "heads, groups", [(128, 8), (16, 8), (12, 6), (8, 4), (6, 3), (4, 2), (7, 1), (1, 1)]
)
def test_gqa_groups_of_unusual_head_counts(heads, groups):
    assert (
        acc.gqa_groups(GQA.replace(num_attention_heads=heads, num_key_value_heads=None, head_dim=8))
        == groups
    )


@pytest.mark.parametrize("name", ["mla", "gqa", "wide heads", "tiny"])
def test_cache_bytes_are_what_the_cache_allocates(name):
    config, batch, capacity = MODELS[name], 2, 11
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        cache = KVCache(config, batch, capacity, dtype=dtype)
        assert cache.nbytes == acc.stored_bytes(acc.cache_elements(config), bits) * batch * capacity


@pytest.mark.parametrize("config", [MLA, GQA])
def test_twin_cache_sizes_equal_those_of_real_models(config):
    for name, groups in (("MHA", config.num_attention_heads), ("MQA", 1)):
        twin = plain_twin(config, groups)
        model = Transformer(twin).init_weights(0)
        cache = KVCache(twin, 1, 4)
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        assert cache.nbytes == acc.cache_twins(config)[name] * 4 * 4


def test_report_of_value_heads_of_odd_width():
    assert acc.report(MLA.replace(v_head_dim=5))["cache"]["twins"]["MQA"] == 2 * 5 * 3


@pytest.mark.parametrize("bits", [0, -1, 65, float("nan"), "8", True, None])
def test_impossible_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match="it must be a number above 0 and at most 64"):
        acc.stored_bytes(100, bits)


# ---- memory ----
def test_plan_of_the_paper_node():
    """640 GB hold 15.6 M cached tokens of V2 and 1.30 M of DeepSeek 67B.

    V2 has FP8 weights and a 6-bit cache, DeepSeek 67B 16 bits for both.
    """
    v2, dense = acc.plan(V2, 8, 6, 640 * 10**9, 32_768), acc.plan(DENSE67, 16, 16, 640 * 10**9)
    assert v2.weight_bytes == 235_741_434_880 and v2.cache_bytes_per_token == 25_920
    assert (
        v2.cache_tokens == (640 * 10**9 - 235_741_434_880) // 25_920
        and round(v2.cache_tokens / 1e6, 1) == 15.6
    )
    assert (
        round(dense.cache_tokens / 1e6, 2) == 1.30
        and dense.context == dense.longest_context == 4096
    )
    assert (
        v2.sequences == v2.cache_tokens // 32_768
        and v2.longest_context == V2.max_position_embeddings
    )
    assert (
        v2.expanded_bytes_per_token == 2_457_600 * 6 / 8
        and v2.expanded_sequences == v2.sequences // 71
    )


def test_plan_is_exact_to_the_byte():
    n = acc.parameters(MLA).total
    weights, row = (n * 9 + 15) // 16, 3 * 18 * 6 / 8  # 4.5 bits per weight
    for rows in (0, 1, 9, 10, 11):
        memory = weights + int(-(-rows * row // 1))
        fit = acc.plan(MLA, 4.5, 6, memory + 100, 10, reserve_bytes=100)
        assert (fit.weight_bytes, fit.cache_tokens, fit.longest_context, fit.sequences) == (
            weights,
            rows,
            rows,
            rows // 10,
        )
        if rows:  # with one byte less memory, one row less fits
            assert acc.plan(MLA, 4.5, 6, memory - 1, 10).cache_tokens == rows - 1
    with pytest.raises(ValueError, match="more than the"):
        acc.plan(MLA, 4.5, 6, weights - 1, 10)
    with pytest.raises(ValueError, match="100 B of it reserved"):
        acc.plan(MLA, 4.5, 6, weights + 99, 10, reserve_bytes=100)


def test_refusals_of_the_plan_name_the_numbers():
    with pytest.raises(
        ValueError,
        match=r"235,741,434,880 parameters at 16 bits are 471.5 GB, more than the 24.00 GB of "
        r"memory; no storage format",
    ):
        acc.plan(V2, 16, 6, 24 * 10**9)
    with pytest.raises(
        ValueError,
        match=r"15,706,484,224 parameters at 16 bits are 31.41 GB, more than the 24.00 GB of "
        r"memory; at most 12.22 bits",
    ):
        acc.plan(LITE, 16, 6, 24 * 10**9)
    with pytest.raises(
        ValueError, match=r"context is 163,841 tokens.* max_position_embeddings is 163,840"
    ):
        acc.plan(LITE, 4.5, 6, 24 * 10**9, 163_841)
    for bad in (
        {"context": 0},
        {"memory_bytes": 2.5},
        {"reserve_bytes": -1},
        {"cache_bits": 0},
        {"weight_bits": float("inf")},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            acc.plan(
                **{
                    "config": LITE,
                    "weight_bits": 4.5,
                    "cache_bits": 6,
                    "memory_bytes": 24 * 10**9,
                    **bad,
                }
            )


def test_training_memory_is_what_adamw_holds():
    memory = acc.training_memory(V2)
    assert memory.total == 16 * 235_741_434_880
    assert (
        memory.weights,
        memory.gradients,
        memory.master,
        memory.first_moment,
        memory.second_moment,
    ) == tuple(n * 235_741_434_880 for n in (2, 2, 4, 4, 4))
    model = Transformer(MLA).init_weights(0)
    master = [w.detach().clone().requires_grad_() for w in model.parameters()]
    optimizer = torch.optim.AdamW(master)
    model.bfloat16()(torch.tensor([[1, 2, 3]])).sum().backward()
    for w, p in zip(master, model.parameters()):
        w.grad = p.grad.float() if p.grad is not None else torch.zeros_like(w)
    optimizer.step()
    held = [
        sum(t.nbytes for t in ts)
        for ts in (
            model.parameters(),
            [p.grad for p in model.parameters()],
            master,
            [optimizer.state[w]["exp_avg"] for w in master],
            [optimizer.state[w]["exp_avg_sq"] for w in master],
        )
    ]
    ours = acc.training_memory(MLA)
    assert held == [
        ours.weights,
        ours.gradients,
        ours.master,
        ours.first_moment,
        ours.second_moment,
    ]


def test_decode_bytes():
    assert acc.decode_bytes(LITE, 0, 16, 16) == 2 * acc.parameters(LITE).activated
    assert acc.decode_bytes(LITE, 4096, 16, 6) - acc.decode_bytes(LITE, 0, 16, 6) == 4096 * 11_664
    p = acc.parameters(LITE)
    rest = p.activated - p.routed_active
    touched = (acc.decode_bytes(LITE, 0, 8, 6, sequences=16) - rest) / p.routed_experts * 64
    assert round(touched) == 51  # a batch of 16 sequences reads 51 of 64 experts
    assert acc.decode_bytes(DENSE67, 0, 16, 16, sequences=9) == acc.decode_bytes(DENSE67, 0, 16, 16)


# ---- the report ----
@pytest.mark.parametrize("name", [*PRESETS, "mla", "gqa tied"])
def test_report_is_json_and_agrees_with_the_functions(name):
    config = MODELS[name]
    r = acc.report(config, name=name, memory_bytes=10**13, weight_bits=8)
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert ModelConfig.from_dict(r["config"]) == config
    assert r["parameters"]["total"] == acc.parameters(config).total and r["cache"][
        "elements_per_token"
    ] == acc.cache_elements(config)
    assert r["plan"]["sequences"] == acc.plan(config, 8, 6, 10**13).sequences > 0
    last = r["flops"]["decode"][-1]
    assert last["depth"] == config.max_position_embeddings - 1
    assert (
        last["absorb" if config.is_mla else "plain"]
        == acc.decode_flops(config, last["depth"], "absorb").total
    )


def test_report_options():
    assert acc.report(V2)["plan"] is None and acc.report(V2)["memory"]["weight_bits"] == 16
    assert acc.report(SMALL)["memory"]["weight_bits"] == 32  # the torch_dtype of SMALL is float32
    assert acc.report(V2, context=1)["flops"]["decode"][-1]["depth"] == 0
    for bad in ({"sequence": 5000}, {"context": 5000}):
        with pytest.raises(
            ValueError, match="is 5,000, but the model's max_position_embeddings is 4,096"
        ):
            acc.report(DENSE67, **bad)


def drawn(config, width=100, **options) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(acc.render(config, **options))
    return console.export_text()


@pytest.mark.parametrize("name", [*PRESETS, "mla", "gqa tied"])
def test_render_fits_a_terminal_and_breaks_no_number(name):
    text = drawn(MODELS[name], name=name, memory_bytes=10**13)
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    assert "…" not in text and f"{acc.parameters(MODELS[name]).total:,}" in text and name in text


def test_render_shows_the_numbers_of_the_paper():
    text = drawn(V2, name="deepseek-v2", memory_bytes=640 * 10**9, weight_bits=8)
    for said in (
        "235,741,434,880",
        "20.85 B",
        "34,560",
        "1,966,080",
        "122,880",
        "15,360",
        "194,560",
        "389.1 kB",
        "25.92 kB",
        "2.25 GQA groups",
        "93.3% less",
        "15,596,395 tokens fit",
        "top 6 of 160 routed, from 3 of 8 groups",
        "YaRN x40",
    ):
        assert said in text, said
    assert "Plan for" not in drawn(V2) and "expanded" not in drawn(DENSE67, memory_bytes=10**12)


@pytest.mark.parametrize(
    "n, said",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.000 kB"),
        (25_920, "25.92 kB"),
        (999_499, "999.5 kB"),
        (999_960, "1.000 MB"),
        (471_482_869_760, "471.5 GB"),
        (3e20, "3.000e+05 PB"),
        (4.5, "4.5 B"),
    ],
)
def test_human_bytes(n, said):
    assert acc.human_bytes(n) == said


def test_imports_neither_torch_nor_rich():
    code = (
        "import sys, lamoe.model.accounting as a; from lamoe.model.config import ModelConfig; "
        "a.report(ModelConfig.preset('deepseek-v2'), memory_bytes=10**12); "
        "sys.exit(bool({'torch', 'numpy', 'rich', 'lamoe.model.transformer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
