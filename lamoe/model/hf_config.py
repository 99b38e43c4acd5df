"""Reads the content of a Hugging Face config.json strictly, as fields of ModelConfig.

Each key either becomes a field, or states a fact that the finished config must agree with, or
changes nothing (config_keys.py decides). Any other key is refused by name. The module reads the
older spelling of config.json and that of transformers 5 (dtype, rope_parameters), and values as
tools write them: 4096.0 for a count, "1e-06" for a number, "torch.bfloat16" for a dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lamoe.model.config_keys import asks_for_nothing, note_once, shorten, sort_keys, unknown_key

# model_type -> the class name that other programs look for in config.json
FAMILIES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Keys that a config must have. They have no default, because a guess would give another model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The fields that only a mixture of experts has. In a dense config, 0 means that they are absent.
_EXPERT_COUNTS = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
# What else describes experts.
_OF_EXPERTS = frozenset(
    """
    n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size n_group topk_group
    topk_method norm_topk_prob routed_scaling_factor first_k_dense_replace moe_layer_freq
    aux_loss_alpha seq_aux
    """.split()
)
_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


def read_fields(
    raw: dict[str, Any], types: Mapping[str, str], yarn_types: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the content of a config.json to fields of ModelConfig.

    Args:
        raw: the parsed file. It is not changed.
        types: {field of ModelConfig: its annotation}.
        yarn_types: {field of RopeScaling: its annotation}.

    Returns:
        ({field: value}, facts). "rope_scaling", when present, is a dict of RopeScaling's fields.
        The finished config must agree with the facts, see config_keys.check_facts.

    Raises:
        ValueError: if a key is missing, may change the model or contradicts another one, or if
            lamoe does not implement its value.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a model config must be a JSON object, found {type(raw).__name__}")
    if raw.get("model_type") is None:
        raise ValueError(f"the config has no model_type; known: {', '.join(FAMILIES)}")
    check_family(raw["model_type"])
    raw = {k: v for k, v in raw.items() if v is not None}  # public configs write null for "unset"
    for name in ("quantization_config", "quantization"):
        refuse_quantised(name, raw.pop(name, None))
    if raw.get("use_sliding_window") is False:
        raw.pop("sliding_window", None)  # a window that is switched off
    dtype = _dtype("dtype", raw.pop("dtype", None))
    raw["torch_dtype"] = _dtype("torch_dtype", raw.get("torch_dtype"))
    _merge(raw, "torch_dtype", dtype)
    if raw.get("initializer_range") == 0:
        del raw["initializer_range"]  # only training from the start uses it
    _read_rope(raw, yarn_types)
    raw = {k: v for k, v in raw.items() if v is not None}
    facts = sort_keys({k: v for k, v in raw.items() if k not in types}, types, "config.json")
    raw = {k: coerce(k, v, types[k]) for k, v in raw.items() if k in types}
    missing = [k for k in _REQUIRED if k not in raw]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}, for which there is no default")
    drop_impossible_ids(raw)
    if raw.get("n_routed_experts", 0) == 0:
        raw = {k: v for k, v in raw.items() if v != 0 or k not in _EXPERT_COUNTS}
    if "kv_lora_rank" in raw and raw.get("head_dim") == raw.get("qk_rope_head_dim"):
        raw.pop("head_dim", None)  # for MLA, transformers 5 writes the rotary width here
    if raw.get("first_k_dense_replace") == raw["num_hidden_layers"]:  # no layer has experts
        raw = {k: v for k, v in raw.items() if k not in _OF_EXPERTS}
    raw.setdefault("torch_dtype", "float32")
    return raw, facts


def refuse_quantised(name: str, found: Any) -> None:
    """Raise ValueError if `found`, the value of quantization_config, says that weights are packed.

    Tools leave the object behind with all its switches off. This is accepted.
    """
    if found is None or found == {}:
        return
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be an object, found {shorten(found)}")
    switches = {k: v for k, v in found.items() if re.fullmatch(r"_?load_in_\dbit", k)}
    if switches and not any(switches.values()):
        return
    if asks_for_nothing(name, found):
        return
    if found.get("quant_method") == "lamoe":
        raise ValueError(
            "the weights are packed by `lamoe quantize`, which this verb cannot read; give the "
            "folder of the original model"
        )
    method = found.get("quant_method") or ("MLX" if "group_size" in found else "unnamed")
    raise ValueError(
        f"{name} is {shorten(found)}: the weights are quantised (method {method}), which lamoe "
        "does not implement in Hugging Face folders; get the original, unquantised model, and "
        "pack it with `lamoe quantize` if it has to be small"
    )


def _dtype(key: str, value: Any) -> Any:
    """Return the plain name of a dtype, or None for "auto" and other ways to leave it open."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().removeprefix("torch.")
    return None if name in ("", "auto", "none", "null") else _DTYPES.get(name, name)


def coerce(name: str, value: Any, kind: str) -> Any:
    """Return `value` in the type of a field, if it says such a value in another spelling.

    4096.0 is the int 4096, "1e-06" is a number, 0 and "false" are False. [7] is the int 7. A value
    that fits no type of the field is returned as it is, for check_types to refuse.
    """
    options = [k.strip() for k in kind.split("|")]
    if value == [] and "None" in options:
        return None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (int, float, str)):
        value = value[0]
    if isinstance(value, list) and "tuple[int, ...]" in options:
        return tuple(value) or None
    if isinstance(value, str) and "str" not in options:
        value = _number(value)
    if "bool" in options and value in (0, 1):
        return bool(value)
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    if is_whole and "int" in options and "float" not in options:
        return int(value)
    return value


def _number(text: str) -> Any:
    """Return the number or truth value that a text says, or the text."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII):
        return int(text)
    decimal = r"[+-]?(\d{1,30}\.?|\d{0,30}\.\d{1,30})(e[+-]?\d{1,3})?"
    return float(text) if re.fullmatch(decimal, text, re.ASCII | re.IGNORECASE) else text


def drop_impossible_ids(raw: dict[str, Any], where: str = "config.json") -> None:
    """Remove token ids outside the vocabulary, in place, and say so.

    The first llama conversions wrote -1 for "none", and a pad token is often added without a row.
    Such a token never occurs, so the model computes the same without it.
    """
    vocab = raw["vocab_size"]
    for name in _IDS:
        ids = raw.get(name) if isinstance(raw.get(name), tuple) else (raw.get(name),)
        if not all(type(i) is int for i in (*ids, vocab)) or vocab <= 0:
            continue
        kept = tuple(i for i in ids if 0 <= i < vocab)
        raw[name] = kept[0] if len(kept) == 1 else kept or None
        for value in ids:
            if value not in kept and value != -1:
                note_once(
                    f"{where}: {name} is {value}, outside the vocabulary of {vocab} tokens; "
                    "it is taken as none"
                )


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


def _read_rope(raw: dict[str, Any], known: Mapping[str, str]) -> None:
    """Convert rope_parameters and rope_scaling in `raw`, in place.

    Afterwards raw["rope_theta"] is a number and raw["rope_scaling"] has RopeScaling's fields.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = raw.pop(key, None)
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{key} must be an object, found {part!r}")
        for name, value in _one_rope(part or {}).items():
            _merge(rope, name, value)
    _merge(raw, "rope_theta", rope.pop("rope_theta", None))
    kind = rope.pop("rope_type", None)
    if kind not in (None, "default", "yarn"):
        raise ValueError(f"rope_scaling type {kind!r} is not supported; known: yarn (or none)")
    original = raw.get("original_max_position_embeddings")
    if kind == "yarn":
        _merge(rope, "original_max_position_embeddings", original)
    raw.pop("original_max_position_embeddings", None)  # without scaling, nothing uses it
    for key, neutral in _ROPE_NEUTRAL.items():
        if rope.get(key) in neutral:
            del rope[key]
    if kind != "yarn":
        asks = [k for k, v in rope.items() if not asks_for_nothing(k, v)]
        if set(asks) - {"original_max_position_embeddings"}:
            raise ValueError(
                f"rope_scaling has {', '.join(rope)} but "
                f"{'no type' if kind is None else f'the type {kind}'}; say type yarn, or leave "
                f"{'it' if len(rope) == 1 else 'them'} out"
            )
        return
    for key in rope:
        if key not in known and key not in _YARN_NOTES:
            raise ValueError(unknown_key(key, rope[key], known, "rope_scaling"))
    rope = {k: coerce(k, v, known[k]) for k, v in rope.items() if k in known}
    missing = [k for k in ("factor", "original_max_position_embeddings") if k not in rope]
    if missing:
        raise ValueError(f"rope_scaling of type yarn needs {' and '.join(missing)}")
    # Defaults of the published code: without mscale_all_dim the softmax scale has no YaRN factor.
    # Without mscale, the factor on cos and sin is that of mscale = 1.
    if raw.get("model_type") == "llama" and not (rope.get("mscale") and rope.get("mscale_all_dim")):
        rope = {k: v for k, v in rope.items() if k not in ("mscale", "mscale_all_dim")}
    raw["rope_scaling"] = {"mscale": 1.0, "mscale_all_dim": 0.0, **rope}


def _one_rope(part: dict[str, Any]) -> dict[str, Any]:
    """Return rope_scaling or rope_parameters without nulls, with its type under rope_type.

    Scaling by a factor of 1 is none.
    """
    part = {k: v for k, v in part.items() if v is not None}
    if set(part) == {"full_attention"} and isinstance(part["full_attention"], dict):
        # transformers 5 may have one object for each kind of layer
        part = {k: v for k, v in part["full_attention"].items() if v is not None}
    _merge(part, "rope_type", part.pop("type", None))
    kind = part.get("rope_type")
    if isinstance(kind, str) and kind.lower() in ("", "none", "null", "default"):
        part["rope_type"] = "default"
    if kind in ("linear", "dynamic") and coerce("factor", part.get("factor"), "float") == 1:
        part["rope_type"] = "default"
        del part["factor"]
    return part


# Values in rope_scaling that say what lamoe does in any case, and notes without effect.
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "truncate": (True,),
    "factor_type": ("none",),
}
_YARN_NOTES = frozenset({"finetuned"})
