"""Tests of ModelConfig: the effect of every field, and every error message."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_configs import DENSE, MOE, YARN

from lamoe.model import accounting
from lamoe.model.config import (
    CARRIED,
    MAX_INT,
    PRESETS,
    ModelConfig,
    RopeScaling,
    did_you_mean,
)
from lamoe.model.transformer import Transformer

IDS = torch.arange(36).view(2, 18)


def logits(config: ModelConfig) -> torch.Tensor:
    with torch.no_grad():
        return Transformer(config).init_weights(seed=0)(IDS)


def numbers(config: ModelConfig) -> dict:
    report = accounting.report(config, sequence=32, context=64)
    return {k: report[k] for k in ("parameters", "flops", "cache", "memory")}


# ---- effect of every field ----
# {field: (effect, change)}. The effect of changing the field of the base model is "counts" (the
# accounting), "logits" (with equal weights), "carried" (config.json only) or "refused". The change
# is a new value, or a dict when other fields must change too.
ON_MOE = {
    "model_type": ("refused", "deepseek"),
    "vocab_size": ("counts", 41),
    "hidden_size": ("counts", 40),
    "num_hidden_layers": ("counts", 4),
    "num_attention_heads": ("counts", 2),
    "num_key_value_heads": ("refused", 2),
    "head_dim": ("refused", 16),
    "q_lora_rank": ("counts", None),
    "kv_lora_rank": ("counts", 16),
    "qk_nope_head_dim": ("counts", 8),
    "qk_rope_head_dim": ("counts", 8),
    "v_head_dim": ("counts", 12),
    "intermediate_size": ("counts", 50),
    "moe_intermediate_size": ("counts", 20),
    "n_routed_experts": ("counts", 12),
    "n_shared_experts": ("counts", 2),
    "num_experts_per_tok": ("counts", 2),
    "first_k_dense_replace": ("counts", 2),
    "moe_layer_freq": ("counts", 2),
    "n_group": ("logits", 2),
    "topk_group": ("logits", 3),
    "topk_method": ("logits", {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "norm_topk_prob": ("logits", True),
    "routed_scaling_factor": ("logits", 1.0),
    "rope_theta": ("logits", 500.0),
    "rope_scaling": ("logits", None),
    "rms_norm_eps": ("logits", 1e-2),
    "tie_word_embeddings": ("counts", True),
    "initializer_range": ("logits", 0.2),
    "torch_dtype": ("counts", "bfloat16"),
    "aux_loss_alpha": ("carried", 0.5),
    "seq_aux": ("carried", False),
    "bos_token_id": ("carried", 1),
    "eos_token_id": ("carried", 2),
    "pad_token_id": ("carried", 3),
    "max_position_embeddings": ("carried", 128),
}
ON_DENSE = {
    **ON_MOE,
    "model_type": ("logits", "deepseek_v2"),  # deepseek_v2 interleaves rotary pairs
    "num_key_value_heads": ("counts", 1),
    "head_dim": ("counts", 16),
    "hidden_size": ("counts", 48),
    "rope_scaling": ("logits", YARN),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        ("refused", 16),
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "first_k_dense_replace",
            "moe_layer_freq",
            "n_group",
            "topk_group",
        ),
        ("refused", 2),
    ),
    "topk_method": ("refused", "group_limited_greedy"),
    "norm_topk_prob": ("refused", True),
    "routed_scaling_factor": ("refused", 2.0),
    "aux_loss_alpha": ("refused", 0.1),
    "seq_aux": ("refused", False),
}
FIELDS = [f.name for f in dataclasses.fields(ModelConfig)]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("base, table", [(MOE, ON_MOE), (DENSE, ON_DENSE)], ids=["moe", "dense"])
def test_every_field_has_its_documented_effect(base, table, field):
    effect, change = table[field]
    change = change if isinstance(change, dict) else {field: change}
    assert change[field] != getattr(base, field)
    if effect == "refused":
        with pytest.raises(ValueError, match=field if field != "model_type" else "MLA"):
            base.replace(**change)
        return
    changed = base.replace(**change)
    assert changed != base and changed.to_dict() != base.to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    if effect == "counts":
        assert numbers(changed) != numbers(base)
        return
    assert numbers(changed) == numbers(base)  # same shapes, so the same seed gives the same weights
    difference = (logits(changed) - logits(base)).abs().max().item()
    assert difference > 1e-3 if effect == "logits" else difference == 0
    assert (effect == "carried") == (field in CARRIED)


def test_effects_are_listed_for_every_field():
    assert set(ON_MOE) == set(ON_DENSE) == set(FIELDS)
    assert CARRIED == {f for f, (effect, _) in ON_MOE.items() if effect == "carried"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("factor", 8.0),
        ("original_max_position_embeddings", 512),
        ("beta_fast", 200.0),
        ("beta_slow", 8.0),
        ("mscale", 0.1),
        ("mscale_all_dim", 0.1),
    ],
)
def test_every_yarn_parameter_changes_the_logits(field, value):
    assert value != getattr(YARN, field)
    changed = MOE.replace(rope_scaling=dataclasses.replace(YARN, **{field: value}))
    assert ModelConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    # Position 0 is left out, because it does not depend on the softmax scale.
    assert (logits(changed) - logits(MOE))[:, 1:].abs().max() > 1e-3


def test_the_yarn_test_covers_every_parameter():
    assert {f.name for f in dataclasses.fields(RopeScaling)} == {
        test_every_yarn_parameter_changes_the_logits.pytestmark[0].args[1][i][0] for i in range(6)
    }


def test_texts_beyond_the_position_limit_are_refused():
    """max_position_embeddings is carried, but a text beyond it is refused."""
    model = Transformer(DENSE.replace(max_position_embeddings=17)).init_weights(0)
    with pytest.raises(ValueError, match="18 positions .* max_position_embeddings 17"):
        model(IDS)


# ---- derived sizes ----
def test_derived_sizes():
    assert (
        MOE.is_mla,
        MOE.is_moe,
        MOE.qk_head_dim,
        MOE.value_head_dim,
        MOE.rope_dim,
        MOE.cache_row,
    ) == (True, True, 28, 10, 16, (24, 16))
    assert (
        DENSE.is_mla,
        DENSE.is_moe,
        DENSE.qk_head_dim,
        DENSE.value_head_dim,
        DENSE.rope_dim,
        DENSE.cache_row,
    ) == (False, False, 8, 8, 8, (16, 16))
    assert (
        DENSE.n_kv_heads == 2
        and MOE.n_kv_heads == 4
        and MOE.rope_interleaved
        and not DENSE.rope_interleaved
    )


@pytest.mark.parametrize("layers", [1, 2, 5, 6])
@pytest.mark.parametrize("first", [0, 1, 2, 4])
@pytest.mark.parametrize("freq", [1, 2, 3])
def test_moe_layers(layers, first, freq):
    expected = [i for i in range(layers) if i >= first and i % freq == 0]
    change = dict(num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=freq)
    if not expected:
        with pytest.raises(ValueError, match="layers dense"):
            MOE.replace(**change)
        return
    config = MOE.replace(**change)
    assert (
        list(config.moe_layers) == expected == [i for i in range(layers) if config.is_moe_layer(i)]
    )
    assert len(DENSE.moe_layers) == 0


def test_explicit_defaults_equal_absent_fields():
    assert DENSE.replace(num_key_value_heads=4) == DENSE.replace(num_key_value_heads=None)
    assert DENSE.replace(head_dim=8) == DENSE and DENSE.replace(head_dim=16) != DENSE
    assert MOE.replace(num_key_value_heads=4) == MOE


def test_configs_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MOE.hidden_size = 3
    assert {MOE: 1}[MOE.replace()] == 1


def test_presets():
    assert {
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v2.5",
        "coder-v2-lite",
        "deepseek-67b",
        "deepseek-moe-16b",
        "tiny",
        "small",
    } <= set(PRESETS)
    for name, config in PRESETS.items():
        assert ModelConfig.preset(name) is config
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        PRESETS["deepseek-v2"].rope_scaling.mscale_all_dim == 0.707
        and PRESETS["deepseek-v2.5"].rope_scaling.mscale_all_dim == 1.0
    )


# ---- error messages ----
def moe(**change):
    return lambda: MOE.replace(**change)


def dense(**change):
    return lambda: DENSE.replace(**change)


def read(base=MOE, without=(), **change):
    """Return a function that reads base's config.json with keys changed or left out."""
    return lambda: ModelConfig.from_dict(
        {k: v for k, v in {**base.to_dict(), **change}.items() if k not in without}
    )


def yarn(**change):
    return read(
        rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, **change}
    )


ERRORS = [
    # types and ranges
    (moe(hidden_size="32"), r"hidden_size must be int, found '32'"),
    (moe(hidden_size=32.0), r"hidden_size must be int, found 32.0"),
    (moe(hidden_size=True), r"hidden_size must be int, found True"),
    (moe(hidden_size=None), r"hidden_size must be int, found None"),
    (moe(norm_topk_prob=1), r"norm_topk_prob must be bool, found 1"),
    (moe(rope_theta="1e4"), r"rope_theta must be float, found '1e4'"),
    (moe(rope_theta=False), r"rope_theta must be float, found False"),
    (moe(rope_scaling={"factor": 4}), r"rope_scaling must be RopeScaling \| None, found"),
    (moe(torch_dtype=None), r"torch_dtype must be str, found None"),
    (moe(rms_norm_eps=math.nan), r"rms_norm_eps must be a finite number, found nan"),
    (moe(rope_theta=math.inf), r"rope_theta must be a finite number, found inf"),
    (moe(rope_theta=10**400), r"rope_theta must be a finite number"),
    (moe(aux_loss_alpha=math.nan), r"aux_loss_alpha must be a finite number"),
    (moe(vocab_size=MAX_INT + 1), r"vocab_size is 2147483648; the limit is 2147483647"),
    (moe(hidden_size=-(10**30)), r"hidden_size is -1000000000000000000000000000000; the limit"),
    *(
        (moe(**{name: 0}), rf"{name} is 0; it must be at least 1")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "kv_lora_rank",
            "q_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "moe_layer_freq",
        )
    ),
    *(
        (moe(**{name: -1}), rf"{name} is -1; it must be at least 0")
        for name in ("n_shared_experts", "first_k_dense_replace", "aux_loss_alpha")
    ),
    *(
        (moe(**{name: value}), rf"{name} is {value}; it must be above 0")
        for value in (0.0, -1.0)
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range")
    ),
    (moe(torch_dtype="int8"), r"torch_dtype is 'int8'; known: float32, bfloat16, float16, float64"),
    *(
        (moe(**{name: 40}), rf"{name} is 40, outside the vocabulary of 40 tokens")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    ),
    (moe(bos_token_id=-1), r"bos_token_id is -1, outside the vocabulary"),
    # attention
    (
        moe(model_type="gpt2"),
        r"model_type 'gpt2' is not supported; known: deepseek_v2, deepseek, llama",
    ),
    (
        moe(v_head_dim=None),
        r"kv_lora_rank is set, so attention is MLA and v_head_dim must be given too",
    ),
    (
        moe(head_dim=28),
        r"head_dim is 28, but MLA heads are 28 elements wide \(16 of them rotary\)",
    ),
    (
        moe(num_key_value_heads=1),
        r"num_key_value_heads is 1, but under MLA each of the 4 heads has its own keys",
    ),
    (
        moe(model_type="deepseek"),
        r"kv_lora_rank asks for MLA, which only model_type deepseek_v2 has; found 'deepseek'",
    ),
    (moe(kv_lora_rank=None), r"q_lora_rank belong to MLA, but kv_lora_rank is not set"),
    (
        dense(num_attention_heads=3, num_key_value_heads=None),
        r"hidden_size 32 is not divisible by num_attention_heads 3; give head_dim or change one",
    ),
    (
        dense(num_key_value_heads=3),
        r"num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    (dense(num_key_value_heads=0), r"num_key_value_heads is 0; it must be at least 1"),
    (dense(head_dim=0), r"head_dim is 0; it must be at least 1"),
    (
        dense(head_dim=7),
        r"the rotary width is 7; rotary embedding rotates pairs, so it must be even",
    ),
    (moe(qk_rope_head_dim=15), r"the rotary width is 15"),
    # experts
    (
        moe(n_routed_experts=None),
        r"moe_intermediate_size, num_experts_per_tok, n_shared_experts belong to a mixture of "
        r"experts",
    ),
    (
        dense(n_group=2),
        r"n_group is 2, but it has no effect in a model without routed experts; leave it out",
    ),
    (
        dense(first_k_dense_replace=1),
        r"first_k_dense_replace is 1, but it has no effect in a model",
    ),
    (
        dense(n_routed_experts=4, moe_intermediate_size=8, num_experts_per_tok=2),
        r"model_type llama is dense; use deepseek",
    ),
    (
        moe(moe_intermediate_size=None),
        r"n_routed_experts is set, so moe_intermediate_size must be given too",
    ),
    (
        moe(num_experts_per_tok=None),
        r"n_routed_experts is set, so num_experts_per_tok must be given too",
    ),
    (
        moe(first_k_dense_replace=3),
        r"first_k_dense_replace 3 and moe_layer_freq 1 make all 3 layers dense",
    ),
    (moe(num_experts_per_tok=9), r"num_experts_per_tok 9 is more than n_routed_experts 8"),
    (
        moe(topk_method="noaux_tc"),
        r"topk_method 'noaux_tc' \(that is DeepSeek-V3's bias-corrected routing\) is not supported",
    ),
    (
        moe(topk_method="gready"),
        r"topk_method 'gready' is not supported; known: greedy, group_limited_greedy",
    ),
    (moe(n_group=3), r"n_routed_experts 8 is not divisible into n_group 3 groups"),
    (moe(topk_group=5), r"topk_group 5 is more than n_group 4"),
    (moe(topk_method="greedy"), r"n_group 4 and topk_group 2 do nothing under topk_method greedy"),
    (
        moe(topk_group=1),
        r"topk_group 1 of 4 groups leaves 2 experts, fewer than num_experts_per_tok 3",
    ),
    # YaRN
    (lambda: RopeScaling(factor="4"), r"rope_scaling.factor must be a finite number, found '4'"),
    (
        lambda: RopeScaling(factor=0.5),
        r"rope_scaling.factor is 0.5; YaRN stretches the context, so it must be at least 1",
    ),
    (
        lambda: RopeScaling(beta_fast=math.inf),
        r"rope_scaling.beta_fast must be a finite number, found inf",
    ),
    (
        lambda: RopeScaling(original_max_position_embeddings=0),
        r"original_max_position_embeddings is 0; it must be a whole number",
    ),
    (
        lambda: RopeScaling(original_max_position_embeddings=4096.5),
        r"original_max_position_embeddings is 4096.5; it must be a whole number",
    ),
    (
        lambda: RopeScaling(original_max_position_embeddings=2**31),
        r"it must be a whole number from 1 to 2147483647",
    ),
    (
        lambda: RopeScaling(beta_fast=1.0, beta_slow=1.0),
        r"rope_scaling needs beta_fast > beta_slow > 0, found 1.0 and 1.0",
    ),
    (lambda: RopeScaling(mscale=-0.1), r"rope_scaling.mscale is -0.1; it must be at least 0"),
    (
        lambda: RopeScaling(mscale_all_dim=-0.1),
        r"rope_scaling.mscale_all_dim is -0.1; it must be at least 0",
    ),
    (
        lambda: RopeScaling(factor=10**30),
        r"rope_scaling.factor is 1000000000000000000000000000000; it must be from 1 / 2147483647 "
        r"to 2147483647",
    ),
    (lambda: RopeScaling(mscale=1e308), r"rope_scaling.mscale is 1e\+308; it must be from"),
    (
        lambda: RopeScaling(mscale_all_dim=1e308),
        r"rope_scaling.mscale_all_dim is 1e\+308; it must be from",
    ),
    (lambda: RopeScaling(beta_slow=5e-324), r"rope_scaling.beta_slow is 5e-324; it must be from"),
    (
        moe(rope_theta=1.0),
        r"rope_theta is 1.0; YaRN divides by the logarithm of rope_theta, so it must be above 1",
    ),
    # names
    (moe(hidden_sise=3), r"unknown key 'hidden_sise' in ModelConfig, did you mean 'hidden_size'\?"),
    (
        lambda: ModelConfig.preset("deepseekv2"),
        r"unknown preset 'deepseekv2', did you mean 'deepseek-v2'\?; known: deepseek-v2, ",
    ),
    # files
    (lambda: ModelConfig.from_dict([]), r"a model config must be a JSON object, found list"),
    (
        lambda: ModelConfig.from_dict({}),
        r"the config has no model_type; known: deepseek_v2, deepseek, llama",
    ),
    (read(model_type="mixtral"), r"model_type 'mixtral' is not supported"),
    (read(model_type=["llama"]), r"model_type \['llama'\] is not supported"),
    (
        read(without=["vocab_size", "hidden_size"]),
        r"the config lacks vocab_size, hidden_size",
    ),
    (read(hidden_size=None), r"the config lacks hidden_size"),
    (
        read(n_routed_expert=4),
        r"unknown key 'n_routed_expert' in config.json: it is 4, which may change the model, did "
        r"you mean 'n_routed_experts'\?; if it does not, remove the key",
    ),
    (read(window=4), r"unknown key 'window' in config.json: it is 4, which may change"),
    (
        read(hidden_act="gelu"),
        r"hidden_act is 'gelu', which lamoe does not implement; supported: 'silu'",
    ),
    (read(attention_bias=True), r"attention_bias is True, which lamoe does not implement"),
    (read(scoring_func="sigmoid"), r"scoring_func is 'sigmoid', which"),
    (
        read(quantization_config={"quant_method": "fp8"}),
        r"quantization_config is .*fp8.*: the weights are quantised .*get the original",
    ),
    (read(num_nextn_predict_layers=1), r"num_nextn_predict_layers is 1, which"),
    (read(sliding_window=4096), r"sliding_window is 4096, which"),
    (read(partial_rotary_factor=0.5), r"partial_rotary_factor is 0.5, which"),
    (read(head_dim=17), r"head_dim is 17, but MLA heads are 28 elements wide"),
    (
        read(dtype="bfloat16"),
        r"the config says torch_dtype twice and differently: 'float32' and 'bfloat16'",
    ),
    (
        read(rope_parameters={"rope_theta": 5.0}),
        r"the config says rope_theta twice and differently: 10000.0 and 5.0",
    ),
    (
        read(rope_parameters={"rope_type": "yarn", "factor": 5}),
        r"the config says factor twice and differently: 5 and 4.0",
    ),
    (read(rope_scaling="yarn"), r"rope_scaling must be an object, found 'yarn'"),
    (read(rope_scaling=[]), r"rope_scaling must be an object, found \[\]"),
    (yarn(type="linear"), r"rope_scaling type 'linear' is not supported; known: yarn \(or none\)"),
    (
        yarn(rope_type="linear"),
        r"the config says rope_type twice and differently: 'linear' and 'yarn'",
    ),
    (
        yarn(type=None),
        r"rope_scaling has factor, original_max_position_embeddings but no type; say type yarn",
    ),
    (yarn(factr=1), r"unknown key 'factr' in rope_scaling: it is 1, .*, did you mean 'factor'\?"),
    (yarn(attention_factor=1.3), r"unknown key 'attention_factor' in rope_scaling"),
    (yarn(factor=None), r"rope_scaling of type yarn needs factor$"),
    (yarn(factor="4x"), r"rope_scaling.factor must be a finite number, found '4x'"),
    (
        yarn(original_max_position_embeddings=math.inf),
        r"original_max_position_embeddings must be a finite number, found inf",
    ),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_every_config_error_has_its_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_suggestion_without_a_similar_name():
    assert (
        did_you_mean("zzz", FIELDS) == ""
        and did_you_mean(7, FIELDS) == ""
        and did_you_mean("kv_lora", FIELDS) == ", did you mean 'kv_lora_rank'?"
    )
