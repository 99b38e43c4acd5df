"""Reads the content of a Hugging Face config.json strictly, as fields of ModelConfig.

Each key either becomes a field, or is known to be irrelevant (_FOREIGN), or is accepted only at
values that change nothing (_ONLY). Any other key is refused by name. The module reads the older
spelling of config.json and that of transformers 5 (dtype, rope_parameters).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lamoe.model.field_checks import refuse_unknown

# model_type -> the class name that other programs look for in config.json
FAMILIES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Keys that only other programs use. Their values are neither checked nor kept.
_FOREIGN = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map
    chunk_size_feed_forward id2label is_decoder is_encoder_decoder label2id model_type_name
    output_attentions output_hidden_states output_router_logits problem_type qk_head_dim return_dict
    router_aux_loss_coef transformers_version use_cache
    """.split()
)
# Keys that a config must have. They have no default, because a guess would give another model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# {key: values that lamoe implements}. Any other value of these keys would change the model, so it
# is refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "hidden_act": ("silu",),
    "scoring_func": ("softmax",),
    "ep_size": (1, None),
    "pretraining_tp": (1, None),
    "num_nextn_predict_layers": (0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "rope_interleave": (True, None),
    "partial_rotary_factor": (1.0, 1, None),
}


def read_fields(
    raw: dict[str, Any], known: Collection[str], known_yarn: Collection[str]
) -> dict[str, Any]:
    """Convert the content of a config.json to fields of ModelConfig.

    Args:
        raw: the parsed file. It is not changed.
        known: names of ModelConfig's fields.
        known_yarn: names of RopeScaling's fields.

    Returns:
        {field: value}. "rope_scaling", when present, is a dict of RopeScaling's fields.

    Raises:
        ValueError: if a key is unknown, missing or contradicts another one, or if lamoe does not
            implement its value.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a model config must be a JSON object, found {type(raw).__name__}")
    raw = {k: v for k, v in raw.items() if k not in _FOREIGN}
    if raw.get("model_type") is None:
        raise ValueError(f"the config has no model_type; known: {', '.join(FAMILIES)}")
    check_family(raw["model_type"])
    for key, allowed in _ONLY.items():
        if key in raw and (found := raw.pop(key)) not in allowed:
            raise ValueError(
                f"{key} is {found!r}, which lamoe does not implement; "
                f"supported: {' or '.join(map(repr, allowed))}"
            )
    _merge(raw, "torch_dtype", raw.pop("dtype", None))
    _read_rope(raw, known_yarn)
    raw = {k: v for k, v in raw.items() if v is not None}  # public configs write null for "unset"
    if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"]:
        raw["eos_token_id"] = raw["eos_token_id"][0]  # generation_config.json has all stop ids
    refuse_unknown(raw, known, "config.json")
    missing = [k for k in _REQUIRED if k not in raw]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}, for which there is no default")
    if "kv_lora_rank" in raw and raw.get("head_dim") == raw.get("qk_rope_head_dim"):
        raw.pop("head_dim", None)  # for MLA, transformers 5 writes the rotary width here
    all_dense = raw.get("first_k_dense_replace") == raw["num_hidden_layers"]
    if all_dense and "n_routed_experts" not in raw:
        del raw["first_k_dense_replace"]  # in dense models, to_dict writes it for transformers
    raw.setdefault("torch_dtype", "float32")
    return raw


def check_family(model_type: Any) -> None:
    """Raise ValueError when lamoe does not implement the model family."""
    if model_type not in list(FAMILIES):  # a list, because the value may be unhashable
        raise ValueError(
            f"model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )


def _merge(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set raw[key] to `value`, which another spelling of the key had.

    Raises:
        ValueError: if both spellings are present with different values.
    """
    if value is None:
        return
    if raw.get(key) is not None and raw[key] != value:
        raise ValueError(f"the config says {key} twice and differently: {raw[key]!r} and {value!r}")
    raw[key] = value


def _read_rope(raw: dict[str, Any], known: Collection[str]) -> None:
    """Convert rope_parameters and rope_scaling in `raw`, in place.

    Afterwards raw["rope_theta"] is a number and raw["rope_scaling"] has RopeScaling's fields.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = raw.pop(key, None)
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{key} must be an object, found {part!r}")
        for name, value in (part or {}).items():
            _merge(rope, name, value)
    _merge(raw, "rope_theta", rope.pop("rope_theta", None))
    _merge(rope, "rope_type", rope.pop("type", None))
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_scaling type {kind!r} is not supported; known: yarn (or none)")
    if kind == "default":
        if rope:
            raise ValueError(
                f"rope_scaling has {', '.join(rope)} but no type; say type yarn, or leave it out"
            )
        return
    refuse_unknown(rope, known, "rope_scaling")
    missing = [k for k in ("factor", "original_max_position_embeddings") if k not in rope]
    if missing:
        raise ValueError(f"rope_scaling of type yarn needs {' and '.join(missing)}")
    # Defaults of the published code: without mscale_all_dim the softmax scale has no YaRN factor.
    # Without mscale, the factor on cos and sin is that of mscale = 1.
    raw["rope_scaling"] = {"mscale": 1.0, "mscale_all_dim": 0.0, **rope}
