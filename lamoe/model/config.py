"""The architecture as data: a frozen dataclass with the field names of Hugging Face.

A config says what a model *is*. Recipes say how it is trained, and the engine's options say how it
is run. Every field either changes the model, or is carried for other programs (CARRIED). A value
that lamoe does not implement is refused, and the message names the field.

hf_config.py reads config.json, and presets.py lists the presets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamoe.model import presets
from lamoe.model.config_keys import check_facts
from lamoe.model.field_checks import (
    check_at_least,
    check_types,
    did_you_mean,
    is_finite,
    refuse_unknown,
)
from lamoe.model.hf_config import FAMILIES, check_family, read_fields
from lamoe.text.json_file import read_json

__all__ = [
    "CARRIED",
    "FAMILIES",
    "MAX_INT",
    "PRESETS",
    "ModelConfig",
    "RopeScaling",
    "check_types",
    "did_you_mean",
]

# Fields that are written to config.json for other programs and change nothing that lamoe computes.
# aux_loss_alpha is one of them, because released configs say 0.001 where the paper trained with
# 0.003. The trainer takes the weights of its balance losses from the recipe instead.
CARRIED = frozenset(
    {
        "aux_loss_alpha",
        "seq_aux",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
    }
)

# Upper limit of every size, count and token id in a config. A file with a larger one is broken or
# hostile.
MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's parameters.

    `mscale_all_dim` sets YaRN's factor on the softmax scale. The ratio of the factors that `mscale`
    and `mscale_all_dim` give multiplies cos and sin (see rope.softmax_scale, rope.amplitude).

    Source: paper 3.1.4; YaRN, arXiv 2309.00071.
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if not is_finite(getattr(self, f.name)):
                found = getattr(self, f.name)
                raise ValueError(f"rope_scaling.{f.name} must be a finite number, found {found!r}")
        if not self.factor >= 1:
            raise ValueError(
                f"rope_scaling.factor is {self.factor}; "
                "YaRN stretches the context, so it must be at least 1"
            )
        original = self.original_max_position_embeddings
        if original != int(original) or not 1 <= original <= MAX_INT:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings is {original}; "
                f"it must be a whole number from 1 to {MAX_INT}"
            )
        # JSON may say 4096.0.
        object.__setattr__(self, "original_max_position_embeddings", int(original))
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                "rope_scaling needs beta_fast > beta_slow > 0, "
                f"found {self.beta_fast} and {self.beta_slow}"
            )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"rope_scaling.{name} is {getattr(self, name)}; it must be at least 0"
                )
        for f in dataclasses.fields(self):  # keeps powers and logarithms of them finite
            value = getattr(self, f.name)
            if value > MAX_INT or 0 < value < 1 / MAX_INT:
                raise ValueError(
                    f"rope_scaling.{f.name} is {value}; it must be from 1 / {MAX_INT} to {MAX_INT}"
                )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the DeepSeek family.

    Fields have the names and meanings of Hugging Face configs. Derived sizes are properties.
    Attention is MLA if `kv_lora_rank` is set. Otherwise `num_key_value_heads` makes it MHA, GQA or
    MQA. If `n_routed_experts` is set, layers from `first_k_dense_replace` on are mixtures of
    experts. All other feed-forward layers are dense SwiGLU.

    Raises:
        ValueError: if a value is out of range, or a field has no effect or contradicts another.
    """

    model_type: str = "deepseek_v2"
    vocab_size: int = 102400
    hidden_size: int = 2048
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # None: num_attention_heads. Not used by MLA
    head_dim: int | None = None  # None: hidden_size / num_attention_heads. Not used by MLA
    # MLA (paper 2.1)
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # feed-forward (paper 2.2)
    intermediate_size: int = 10944
    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"  # or "group_limited_greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # the rest
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    torch_dtype: str = "bfloat16"
    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    # ---- derived sizes ---------------------------------------------------------------------------
    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts is not None

    @property
    def n_kv_heads(self) -> int:
        """Number G of key / value heads, which share the query heads in equal groups."""
        given = self.num_key_value_heads
        return self.num_attention_heads if given is None else given

    @property
    def qk_head_dim(self) -> int:
        """Width in elements of a query or key head. Under MLA this is N + R."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        even_split = self.hidden_size // self.num_attention_heads
        return even_split if self.head_dim is None else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width V of a value head, in elements."""
        return self.v_head_dim if self.is_mla else self.qk_head_dim

    @property
    def rope_dim(self) -> int:
        """Width R of the rotated part of a query or key head, in elements."""
        return self.qk_rope_head_dim if self.is_mla else self.qk_head_dim

    @property
    def rope_interleaved(self) -> bool:
        """Whether rotation pairs the elements (2k, 2k + 1), as in DeepSeek-V2 checkpoints.

        In llama and DeepSeekMoE-16B checkpoints it pairs the elements (k, k + R / 2).
        """
        return self.model_type == "deepseek_v2"

    @property
    def cache_row(self) -> tuple[int, int]:
        """Widths in elements of the two parts of a cache row, for one token and one layer.

        The parts are (latent, rotary key) under MLA, else (keys, values) of all heads.
        """
        if self.is_mla:
            return self.kv_lora_rank, self.qk_rope_head_dim
        return self.n_kv_heads * self.qk_head_dim, self.n_kv_heads * self.value_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether the feed-forward of layer `layer` is a mixture of experts."""
        return (
            self.is_moe and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> range:
        """Indices of the MoE layers, counted from 0.

        The result is a range, not a list, so that a hostile config with 2 billion layers costs
        neither time nor memory.
        """
        first = -(-self.first_k_dense_replace // self.moe_layer_freq) * self.moe_layer_freq
        return range(first, self.num_hidden_layers if self.is_moe else first, self.moe_layer_freq)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        ids = self.eos_token_id
        return frozenset(ids if isinstance(ids, tuple) else () if ids is None else (ids,))

    # ---- validation ------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        check_types(self)
        self._check_numbers()
        self._check_attention()
        if self.is_moe:
            self._check_moe()
        else:
            self._check_dense()
        # A config may spell out the value that a field has by default. Store the default itself
        # then, so that configs of equal models compare equal.
        if self.num_key_value_heads == self.num_attention_heads:
            object.__setattr__(self, "num_key_value_heads", None)
        width = self.head_dim
        if width is not None and width * self.num_attention_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", None)

    def _check_numbers(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "float" in f.type and not is_finite(value):
                raise ValueError(f"{f.name} must be a finite number, found {value!r}")
            if isinstance(value, int) and abs(value) > MAX_INT:
                raise ValueError(f"{f.name} is {value}; the limit is {MAX_INT}")
        check_family(self.model_type)
        self._at_least(
            1,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.rope_scaling is not None and not self.rope_theta > 1:
            raise ValueError(
                f"rope_theta is {self.rope_theta}; "
                "YaRN divides by the logarithm of rope_theta, so it must be above 1"
            )
        if self.torch_dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"torch_dtype is {self.torch_dtype!r}; known: float32, bfloat16, float16, float64"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for value in ids if isinstance(ids, tuple) else (ids,):
                if value is not None and not 0 <= value < self.vocab_size:
                    raise ValueError(
                        f"{name} is {value}, outside the vocabulary of {self.vocab_size} tokens"
                    )
        if self.aux_loss_alpha < 0:
            raise ValueError(f"aux_loss_alpha is {self.aux_loss_alpha}; it must be at least 0")

    def _at_least(self, low: int, *names: str) -> None:
        for name in names:
            check_at_least(name, getattr(self, name), low)

    def _check_attention(self) -> None:
        if self.is_mla:
            self._check_mla()
        else:
            self._check_heads()
        if self.rope_dim % 2:
            raise ValueError(
                f"the rotary width is {self.rope_dim}; "
                "rotary embedding rotates pairs, so it must be even"
            )

    def _check_mla(self) -> None:
        self._at_least(1, "kv_lora_rank")
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"kv_lora_rank is set, so attention is MLA and {name} must be given too"
                )
            self._at_least(1, name)
        if self.q_lora_rank is not None:
            self._at_least(1, "q_lora_rank")
        if self.head_dim is not None:
            raise ValueError(
                f"head_dim is {self.head_dim}, but MLA heads are {self.qk_head_dim} elements wide "
                f"({self.qk_rope_head_dim} of them rotary); leave head_dim out"
            )
        if self.n_kv_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {self.n_kv_heads}, but under MLA each of the "
                f"{self.num_attention_heads} heads has its own keys; leave num_key_value_heads out"
            )
        if self.model_type != "deepseek_v2":
            raise ValueError(
                "kv_lora_rank asks for MLA, which only model_type deepseek_v2 has; "
                f"found {self.model_type!r}"
            )

    def _check_heads(self) -> None:
        mla_only = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        given = [name for name in mla_only if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} belong to MLA, but kv_lora_rank is not set; "
                f"set kv_lora_rank, or leave out {', '.join(given)}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; give head_dim or change one"
            )
        check_at_least("head_dim", self.qk_head_dim, 1)
        check_at_least("num_key_value_heads", self.n_kv_heads, 1)
        if self.num_attention_heads % self.n_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.n_kv_heads}"
            )

    def _check_dense(self) -> None:
        """Raise ValueError if a dense model sets a field that only affects mixtures of experts."""
        sizes = ("moe_intermediate_size", "num_experts_per_tok")
        given = [name for name in sizes if getattr(self, name) is not None]
        if self.n_shared_experts:
            given.append("n_shared_experts")
        if given:
            raise ValueError(
                f"{', '.join(given)} belong to a mixture of experts, but n_routed_experts is not "
                f"set; set n_routed_experts, or leave out {', '.join(given)}"
            )
        for name in _MOE_ONLY:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it has no effect in a model without "
                    "routed experts; leave it out"
                )

    def _check_moe(self) -> None:
        if self.model_type == "llama":
            raise ValueError(
                "n_routed_experts is set, but model_type llama is dense; "
                "use deepseek (MHA / GQA) or deepseek_v2 (MLA)"
            )
        for name in ("moe_intermediate_size", "num_experts_per_tok"):
            if getattr(self, name) is None:
                raise ValueError(f"n_routed_experts is set, so {name} must be given too")
            self._at_least(1, name)
        self._at_least(1, "n_routed_experts", "n_group", "topk_group", "moe_layer_freq")
        self._at_least(0, "n_shared_experts", "first_k_dense_replace")
        if not self.moe_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} and moe_layer_freq "
                f"{self.moe_layer_freq} make all {self.num_hidden_layers} layers dense, but "
                "n_routed_experts is set; lower both, or leave n_routed_experts out"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"n_routed_experts {self.n_routed_experts}"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if self.topk_method not in ("greedy", "group_limited_greedy"):
            v3 = " (that is DeepSeek-V3's bias-corrected routing)"
            raise ValueError(
                f"topk_method {self.topk_method!r}{v3 if self.topk_method == 'noaux_tc' else ''} "
                "is not supported; known: greedy, group_limited_greedy"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} is not divisible into "
                f"n_group {self.n_group} groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        if self.topk_method == "greedy" and (self.n_group, self.topk_group) != (1, 1):
            raise ValueError(
                f"n_group {self.n_group} and topk_group {self.topk_group} do nothing under "
                "topk_method greedy; set both to 1, or topk_method to group_limited_greedy"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_method == "group_limited_greedy" and reachable < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group {self.topk_group} of {self.n_group} groups leaves {reachable} "
                f"experts, fewer than num_experts_per_tok {self.num_experts_per_tok}"
            )

    # ---- reading and writing ---------------------------------------------------------------------
    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with some fields changed, checked like a new config.

        Raises:
            ValueError: if a field name is unknown or a value is invalid.
        """
        refuse_unknown(changes, _field_types(ModelConfig), "ModelConfig")
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Return the preset called `name`.

        Raises:
            ValueError: if no preset has this name. The message lists all names.
        """
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}"
            )
        return PRESETS[name]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Convert the parsed content of a Hugging Face config.json to a config.

        Raises:
            ValueError: if a key is unknown or lamoe does not implement its value.
        """
        try:
            fields, facts = read_fields(raw, _field_types(ModelConfig), _field_types(RopeScaling))
            config = _from_fields(fields)
            check_facts(config, facts)
        except RecursionError:
            raise ValueError("a value is nested too deeply for a model config") from None
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a Hugging Face config.json and return it as a config.

        Raises:
            ValueError: if the file is not a valid config. The message begins with the path.
        """
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers, vLLM and SGLang read.

        `from_dict(config.to_dict())` equals `config`.
        """
        out: dict[str, Any] = {"architectures": [FAMILIES[self.model_type]]}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None or f.name in _WRITTEN_AS_NULL:
                out[f.name] = value
        yarn = self.rope_scaling
        if yarn is not None:
            out["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **dataclasses.asdict(yarn)}
        out["num_key_value_heads"] = self.n_kv_heads
        if not self.is_mla:
            out.pop("q_lora_rank")
            if self.model_type == "deepseek_v2":
                # Only lamoe has deepseek_v2 models without MLA. The key must be null: if it were
                # absent, transformers would fill in its default rank of 512.
                out["kv_lora_rank"] = None
            out["head_dim"] = self.qk_head_dim
        if self.is_moe:
            out["scoring_func"] = "softmax"
        else:
            for name in ("n_shared_experts", *_MOE_ONLY):
                out.pop(name)
            if self.is_mla:  # transformers fills in 64 experts, but makes none below this layer
                out["first_k_dense_replace"] = self.num_hidden_layers
        return {
            **out,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
        }


# Fields that have no effect in a model without routed experts. They must keep their defaults there.
_MOE_ONLY = (
    "n_group",
    "topk_group",
    "topk_method",
    "norm_topk_prob",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "moe_layer_freq",
    "aux_loss_alpha",
    "seq_aux",
)
# Fields that are written as null when they are None. For absent keys, transformers would fill in
# its own defaults (a q_lora_rank of 1536 and token ids).
_WRITTEN_AS_NULL = (
    "q_lora_rank",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_scaling",
)


def _field_types(cls: type) -> dict[str, str]:
    return {f.name: str(f.type) for f in dataclasses.fields(cls)}


def _from_fields(fields: dict[str, Any]) -> ModelConfig:
    """Make a config from a dict of its fields, in which rope_scaling is a dict or None."""
    fields = dict(fields)
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)


PRESETS = {name: _from_fields(fields) for name, fields in presets.FIELDS.items()}
