"""Tests of reading config.json: both spellings are understood, hostile files are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_configs import DENSE, MOE

from lamoe.model import accounting
from lamoe.model.config import FAMILIES, MAX_INT, PRESETS, ModelConfig, RopeScaling


# ---- hostile files ----
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"\xef\xbb\xbf{}", "no model_type"),
        (b"[]", "must be a JSON object, found list"),
        (b"null", "found NoneType"),
        (b'"llama"', "found str"),
        (b"NaN", "found float"),
        (b"[" * 200_000, "nested too deeply"),
        (
            b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
            "integer string conversion",
        ),
        (
            b'{"model_type": "llama", "rms_norm_eps": NaN, "hidden_size": 8, "vocab_size": 8, '
            b'"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}',
            "rms_norm_eps must be a finite number",
        ),
    ],
)
def test_hostile_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_file(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match="config.json"):
        ModelConfig.from_file(tmp_path / "config.json")


_scalar = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 64)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["yarn", "greedy", "llama", 10**400])
)
_json = st.recursive(
    _scalar,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
_rope = st.dictionaries(
    st.sampled_from(
        [*(f.name for f in dataclasses.fields(RopeScaling)), "type", "rope_type", "rope_theta"]
    ),
    _json,
    max_size=4,
)
_keys = st.sampled_from(
    [*MOE.to_dict(), "head_dim", "dtype", "rope_parameters", "pretraining_tp", "auto_map"]
) | st.text(max_size=8)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    base=st.sampled_from([MOE, DENSE]),
    changes=st.dictionaries(_keys, _json, max_size=3),
    rope=st.none() | _rope,
)
def test_any_json_is_read_or_refused(base, changes, rope):
    """Any JSON value gives a ValueError, or a config that is equal after writing and reading it."""
    raw = {**base.to_dict(), **changes, **({} if rope is None else {"rope_scaling": rope})}
    try:
        config = ModelConfig.from_dict(raw)
    except ValueError:
        return
    assert (
        ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    )
    assert accounting.parameters(config).total > 0


def test_accounting_of_two_billion_layers_is_instant():
    config = MOE.replace(num_hidden_layers=MAX_INT)
    assert len(config.moe_layers) == MAX_INT - 1 and accounting.parameters(config).total > 2**31


# ---- Hugging Face files ----
LITE_FILE = """{
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModelForCausalLM":
  "modeling_deepseek.DeepseekV2ForCausalLM"}, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
  "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
  "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
  "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
  "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling":
  {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
  "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
  "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings":
  false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
}"""


def test_released_file_older_spelling(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(LITE_FILE)
    assert ModelConfig.from_file(path) == PRESETS["deepseek-v2-lite"].replace(
        initializer_range=0.02
    )


def test_both_spellings_are_the_same_model():
    old = json.loads(LITE_FILE)
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    yarn_part = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new |= {
        "rope_parameters": {**yarn_part, "rope_type": "yarn", "rope_theta": 10000.0},
        "dtype": "bfloat16",
        "head_dim": 64,
    }
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old)
    default = {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert ModelConfig.from_dict(default) == ModelConfig.from_dict(
        {**old, "rope_scaling": None, "rope_theta": 5e5}
    )


def test_defaults_of_absent_fields():
    """Absent fields have documented defaults.

    Without a dtype, the model is float32. Without mscale, cos and sin are scaled as for mscale = 1.
    """
    raw = {k: v for k, v in MOE.to_dict().items() if k != "torch_dtype"}
    raw["rope_scaling"] = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64.0}
    config = ModelConfig.from_dict(raw)
    assert config.torch_dtype == "float32"
    assert config.rope_scaling == RopeScaling(
        factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.0
    )
    assert isinstance(config.rope_scaling.original_max_position_embeddings, int)


def test_lists_of_token_ids():
    raw = MOE.to_dict()
    config = ModelConfig.from_dict({**raw, "eos_token_id": [2, 3], "pad_token_id": [4]})
    assert config.eos_token_ids == {2, 3} and config.pad_token_id == 4
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict({**raw, "eos_token_id": [2, 10**6]}).eos_token_ids == {2}
    assert ModelConfig.from_dict({**raw, "eos_token_id": []}).eos_token_ids == frozenset()
    for name in ("bos_token_id", "pad_token_id"):
        with pytest.raises(ValueError, match=rf"{name} must be int \| None, found \[2, 3\]"):
            ModelConfig.from_dict({**raw, name: [2, 3]})


# Fields that have the same name in transformers 5. Missing here: rope settings, which are in
# rope_parameters, and dtype, which is an object.
SHARED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]
V2_ONLY = [
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "topk_method",
    "norm_topk_prob",
    "routed_scaling_factor",
]


@pytest.mark.parametrize(
    "config",
    [
        c
        for c in (*PRESETS.values(), MOE, DENSE, DENSE.replace(head_dim=16))
        if c.model_type != "deepseek"
    ],
)
def test_transformers_reads_and_rewrites_what_lamoe_writes(config, tmp_path):
    """transformers reads the same fields from a config of lamoe, and lamoe reads it back."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == FAMILIES[config.model_type].replace("ForCausalLM", "Config")
    for name in SHARED + (V2_ONLY if config.is_mla else []):
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.num_key_value_heads == config.n_kv_heads and theirs.head_dim == (
        config.rope_dim if config.is_mla else config.qk_head_dim
    )
    assert (
        theirs.rope_parameters["rope_theta"] == config.rope_theta
        and str(theirs.dtype) == f"torch.{config.torch_dtype}"
    )
    assert theirs.rope_parameters["rope_type"] == ("yarn" if config.rope_scaling else "default")
    for name, value in (
        dataclasses.asdict(config.rope_scaling).items() if config.rope_scaling else ()
    ):
        assert theirs.rope_parameters[name] == value
    theirs.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_file(tmp_path / "again" / "config.json") == config


def test_models_unlike_transformers_defaults_are_not_misread(tmp_path):
    """Models without experts or MLA are not misread after transformers has rewritten their config.

    transformers fills absent fields with its defaults, such as 64 experts and a latent of 512.
    """
    transformers = pytest.importorskip("transformers", minversion="5.17")
    dense_mla = MOE.replace(
        n_routed_experts=None,
        moe_intermediate_size=None,
        num_experts_per_tok=None,
        n_shared_experts=0,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )
    interleaved_gqa = DENSE.replace(model_type="deepseek_v2")
    for config in (dense_mla, interleaved_gqa):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "config.json").write_text(json.dumps(dense_mla.to_dict()))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    assert sum(w.numel() for w in model.parameters()) == accounting.parameters(dense_mla).total
    (tmp_path / "config.json").write_text(json.dumps(interleaved_gqa.to_dict()))
    with pytest.raises(Exception, match="kv_lora_rank"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_configs_written_by_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    v2 = transformers.DeepseekV2Config(
        num_experts_per_tok=6,
        vocab_size=1000,
        hidden_size=128,
        num_attention_heads=4,
        bos_token_id=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    )
    v2.save_pretrained(tmp_path / "v2")
    ours = ModelConfig.from_file(tmp_path / "v2" / "config.json")
    assert [getattr(ours, n) for n in SHARED] == [getattr(v2, n) for n in SHARED]
    assert [getattr(ours, n) for n in V2_ONLY if "group" not in n] == [
        getattr(v2, n) for n in V2_ONLY if "group" not in n
    ]
    # transformers writes null for the fields of group-limited routing.
    assert (ours.n_group, ours.topk_group, ours.rope_theta) == (
        1,
        1,
        500.0,
    )
    assert ours.rope_scaling == RopeScaling(factor=40.0)
    llama = transformers.LlamaConfig(
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype="bfloat16",
    )
    llama.save_pretrained(tmp_path / "llama")
    ours = ModelConfig.from_file(tmp_path / "llama" / "config.json")
    assert [getattr(ours, n) for n in SHARED] == [getattr(llama, n) for n in SHARED]
    assert (
        ours.n_kv_heads,
        ours.qk_head_dim,
        ours.rope_theta,
        ours.rope_scaling,
        ours.torch_dtype,
    ) == (8, 128, 1e6, None, "bfloat16")


def test_config_json_names_the_class_that_loaders_need():
    for config in PRESETS.values():
        out = config.to_dict()
        assert (
            out["architectures"] == [FAMILIES[config.model_type]]
            and out["hidden_act"] == "silu"
            and out["attention_bias"] is False
        )
        assert ("n_group" in out) == config.is_moe and ("q_lora_rank" in out) == config.is_mla


def test_model_geometries_of_the_figures_exist():
    """The two model geometries that docs/LOG.md and README name are in the repository."""
    folder = Path(__file__).parents[2] / "benchmarks"
    tiny8, lite8 = (ModelConfig.from_file(folder / f"{name}.json") for name in ("tiny-8", "lite-8"))
    assert lite8 == ModelConfig.preset("deepseek-v2-lite").replace(num_hidden_layers=8)
    assert (
        tiny8.num_hidden_layers,
        tiny8.hidden_size,
        tiny8.num_attention_heads,
        tiny8.kv_lora_rank,
        tiny8.q_lora_rank,
        tiny8.cache_row,
    ) == (8, 512, 8, 128, None, (128, 32))
    assert (
        tiny8.qk_nope_head_dim,
        tiny8.v_head_dim,
        tiny8.n_routed_experts,
        tiny8.num_experts_per_tok,
        tiny8.n_shared_experts,
    ) == (64, 64, 32, 4, 1)
    assert (
        tiny8.moe_intermediate_size,
        tiny8.intermediate_size,
        tiny8.first_k_dense_replace,
        tiny8.vocab_size,
        accounting.parameters(tiny8).total,
    ) == (256, 1536, 1, 8192, 108_652_032)
