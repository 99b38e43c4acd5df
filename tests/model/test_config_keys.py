"""Tests of config.json as other tools write it: notes, other spellings, impossible ids."""

import logging
import math
import random

import pytest

from lamoe.model import config_keys
from lamoe.model.config import ModelConfig

PLAIN = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIG = ModelConfig.from_dict(PLAIN)
MLA = ModelConfig.preset("tiny").to_dict()


@pytest.mark.parametrize(
    "extra",
    [
        # notes of tools and trainers
        {"_attn_implementation_autoset": True, "_name_or_path": "x", "_commit_hash": "f"},
        {"unsloth_version": "2025.1.1", "unsloth_fixed": True, "is_llama_config": True},
        {"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}},
        {"axolotl_version": "0.5", "trained_by_axolotl": True, "lora_alpha": 16, "epoch": 3},
        {"learning_rate": 1e-4, "seed": 42, "gradient_checkpointing": False, "best_loss": math.nan},
        {"created_at": "2024-01-01", "license": "mit", "notes": "trained with attention to detail"},
        {"base_model": "a/b", "merge_method": "slerp", "slices": [{"sources": ["a"]}]},
        # training and sampling
        {"attention_dropout": 0.1, "hidden_dropout": 0.1, "attn_pdrop": 0.1, "init_std": 0.02},
        {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True, "num_beams": 4},
        {"moe_aux_loss": 0.1, "router_aux_loss_coef": 0.001, "label_smoothing": 0.1},
        {"decoder_start_token_id": 1, "sep_token_id": 5, "suppress_tokens": [1, 2]},
        {"attention_softmax_in_fp32": True, "masked_softmax_fusion": True, "freeze_base": True},
        # how other programs run it
        {"use_flash_attention_2": True, "attn_implementation": "eager", "use_liger_kernel": True},
        {"tensor_parallel_size": 2, "pretraining_tp": 2, "use_bfloat16": True, "torchscript": True},
        {"max_sequence_length": 2048, "model_max_length": 4096, "seq_length": 8192},
        {"id2label": {"0": "A"}, "label2id": {"A": 0}, "num_labels": 1, "problem_type": None},
        {"auto_map": {"AutoConfig": "c.C"}, "transformers_version": "4.1", "pruned_heads": {}},
        # arithmetic that is switched off
        {"sliding_window": None, "use_sliding_window": False},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
        {"attn_logit_softcapping": None, "final_logit_softcapping": 0.0, "clip_qkv": None},
        {"residual_multiplier": 1.0, "logit_scale": 1, "alibi": False, "use_qk_norm": False},
        {"num_local_experts": 0, "n_routed_experts": 0, "num_experts_per_tok": 0},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": None, "factor": None}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False}},
        {"quantization_config": {"quant_method": None, "bits": None}},
        # what lamoe does in any case, and fields under other names
        {"rope_interleaved": False, "use_rope": True, "is_causal": True, "norm_type": "rmsnorm"},
        {"hidden_act": "swish", "mlp_bias": None, "attention_bias": 0, "partial_rotary_factor": 1},
        {"d_model": 64, "n_layers": 2, "n_kv_heads": 2, "head_size": 16, "norm_eps": 1e-06},
    ],
    ids=lambda extra: ", ".join(extra)[:60],
)
def test_keys_that_change_nothing_are_ignored(extra):
    assert ModelConfig.from_dict({**PLAIN, **extra}) == CONFIG


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_sliding_window", True),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("no_rope_layers", [1, 0]),
        ("rope_interleaved", True),
        ("use_rope", False),
        ("is_causal", False),
        ("partial_rotary_factor", 0.5),
        ("hidden_act", "gelu"),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("norm_type", "layernorm"),
        ("attention_multiplier", 1.0),  # it would replace 1 / sqrt(head width)
        ("query_pre_attn_scalar", 256),
        ("attn_logit_softcapping", 50.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.0),
        ("embedding_multiplier", 12.0),
        ("scale_emb", 12),
        ("scale_depth", 1.4),
        ("ropescale", 2),
        ("ropeScaling", {"factor": 2}),
        ("mup_base_width", 256),
        ("clip_qkv", 8.0),
        ("alibi", True),
        ("use_qk_norm", True),
        ("attention_chunk_size", 8192),
        ("attn_temperature_tuning", True),
        ("interleave_moe_layer_step", 1),
        ("num_local_experts", 8),
        ("mlp_bias", True),
        ("vision_config", {"depth": 2}),
        ("is_encoder_decoder", True),
        ("d_model", 65),
        ("output_scale", 0.5),
        ("num_loops", 2),
        ("bidirectional", True),
        ("rmsnorm_offset", 1),
        ("layer_norm_eps", 1e-5),
        ("initialiser_range", 0.3),
    ],
)
def test_keys_that_may_change_the_model_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"\b{key}\b.* is .*{str(value)[:3].strip('[{')}"):
        ModelConfig.from_dict({**PLAIN, key: value})


def test_the_layout_of_rotary_pairs_is_that_of_the_family():
    assert ModelConfig.from_dict({**MLA, "rope_interleave": True})
    with pytest.raises(ValueError, match="rope_interleaved is False"):
        ModelConfig.from_dict({**MLA, "rope_interleaved": False})


def test_scaled_rope_is_refused_with_its_keys():
    for rope in ({"type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0}):
        with pytest.raises(ValueError, match="type .(linear|llama3). is not supported"):
            ModelConfig.from_dict({**PLAIN, "rope_scaling": rope})


def test_ignored_keys_are_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(config_keys, "_logged", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ModelConfig.from_dict({**PLAIN, "my_key": 3, "_private": 1, "use_cache": True})
    assert [r.message for r in caplog.records] == [
        "config.json: ignored keys that do not change the model: my_key"
    ]


@pytest.mark.parametrize(
    "change, fields",
    [
        ({"pad_token_id": -1}, {"pad_token_id": None}),
        ({"pad_token_id": 4096}, {"pad_token_id": None}),
        ({"pad_token_id": [7]}, {"pad_token_id": 7}),
        ({"pad_token_id": "7"}, {"pad_token_id": 7}),
        ({"pad_token_id": []}, {"pad_token_id": None}),
        ({"eos_token_id": 99999}, {"eos_token_id": None}),
        ({"bos_token_id": -1}, {"bos_token_id": None}),
        ({"torch_dtype": "torch.bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "BF16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "half", "torch_dtype": "torch.float16"}, {"torch_dtype": "float16"}),
        ({"torch_dtype": "auto"}, {}),
        ({"torch_dtype": "auto", "dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"hidden_size": 64.0, "vocab_size": "4096"}, {}),
        ({"rms_norm_eps": "1e-06", "rope_theta": "10000"}, {}),
        ({"tie_word_embeddings": 1}, {"tie_word_embeddings": True}),
        ({"tie_word_embeddings": "False"}, {}),
    ],
    ids=str,
)
def test_other_spellings_are_understood(change, fields):
    assert ModelConfig.from_dict({**PLAIN, **change}) == CONFIG.replace(**fields)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": 64.5}, "hidden_size must be int, found 64.5"),
        ({"hidden_size": "sixty"}, "hidden_size must be int, found 'sixty'"),
        ({"hidden_size": "9" * 5000}, "hidden_size must be int"),
        ({"hidden_size": 1e300}, "hidden_size must be int, found 1e"),
        ({"hidden_size": True}, "hidden_size must be int, found True"),
        ({"hidden_size": math.inf}, "hidden_size must be int, found inf"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings must be bool, found 2"),
        ({"pad_token_id": [1, 2]}, "pad_token_id must be"),
        ({"torch_dtype": "fp8"}, "torch_dtype is 'fp8'; known: float32, bfloat16"),
        ({"torch_dtype": 16}, "torch_dtype must be str, found 16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "twice and differently"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised .method MLX.*unquantised"),
        ({"quantization_config": [1]}, "quantization_config must be an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, "type .'yarn'. is not supported"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_wrong_values_name_the_field(change, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_dict({**PLAIN, **change})


@pytest.mark.parametrize("key", ["note", "layer_types", "rope_scaling", "attn_x", "vocab_size"])
def test_deep_values_and_long_keys_are_value_errors_or_notes(key):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    if key == "note":
        with pytest.raises(ValueError, match="nested too deeply"):
            ModelConfig.from_dict({**PLAIN, key: {"a": [deep, deep]}})
        return
    with pytest.raises(ValueError):
        ModelConfig.from_dict({**PLAIN, key: [*deep, 1]})


def test_long_and_many_keys_are_refused_unsorted():
    for key in ("_a" * 100_000, "note" * 100_000):
        with pytest.raises(ValueError, match="unknown key '.{80}.*which may change"):
            ModelConfig.from_dict({**PLAIN, key: 3})
    with pytest.raises(ValueError, match="config.json has 2,001 unknown keys"):
        ModelConfig.from_dict({**PLAIN, **{f"note{i}": i for i in range(2001)}})


def test_any_value_of_any_known_key_gives_a_config_or_a_value_error():
    rng = random.Random(1)
    numbers = [0, 1, -1, 2**70, 10**400, 1.5, math.nan, math.inf]
    plain = [None, True, False, *numbers, "", "x", "1e5", "1e999", "none"]
    lists = [[], [1], ["a"], [None], [[1]], [True, False], [2, 1]]
    ropes = [{"type": "yarn", "factor": v, "original_max_position_embeddings": 9} for v in plain]
    ropes += [{"rope_type": ["x"]}, {"full_attention": {"type": {}}}, {"type": "linear"}]
    others = [{}, {"a": 1}, {"quant_method": ["x"]}, {"load_in_4bit": None}]
    keys = [*MLA, *PLAIN, *config_keys.FACTS, "quantization_config", "rope_parameters", "dtype"]
    read = 0
    for i in range(1500):
        raw = dict(MLA if i % 2 else PLAIN)
        for _ in range(rng.randint(1, 3)):
            raw[rng.choice(keys)] = rng.choice(plain + lists + ropes + others)
        try:
            ModelConfig.from_dict(raw)
            read += 1
        except ValueError as e:
            assert str(e)
    assert 50 < read < 1400
