"""The architecture as data: one frozen dataclass with Hugging Face field names, read strictly, and the presets.

It says what a model *is*; nothing here says how it is trained (train/recipe.py) or run (engine/). Every field either changes
the model, is carried for other programs (listed in CARRIED), or is refused by name when it asks for something lamoe lacks.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = {  # model_type -> the class name other programs look for in config.json
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Written to config.json for other programs; they do not change what lamoe computes. (The trainer takes its balance
# coefficients from the recipe, never from here: released configs say 0.001 where the paper trained with 0.003.)
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

MAX_INT = (
    2**31 - 1
)  # no size, count or id of a model is larger; a file that says so is broken or hostile

# Keys of public config.json files that are read by other programs only. Their value is not looked at and not kept.
_FOREIGN = frozenset(
    """architectures auto_map transformers_version use_cache _name_or_path model_type_name id2label label2id
    problem_type return_dict output_attentions output_hidden_states output_router_logits is_encoder_decoder chunk_size_feed_forward
    qk_head_dim is_decoder _attn_implementation attn_implementation _commit_hash router_aux_loss_coef""".split()
)
# A config.json must say these; a silent default would be some other model.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Keys that are harmless at exactly these values and would change the model at any other.
_ONLY = {
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


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters (arXiv 2309.00071; paper 3.1.4). `mscale_all_dim` scales the softmax, `mscale / mscale_all_dim` the cos/sin."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if not _is_finite(getattr(self, f.name)):
                raise ValueError(
                    f"rope_scaling.{f.name} must be a finite number, found {getattr(self, f.name)!r}"
                )
        if not self.factor >= 1:
            raise ValueError(
                f"rope_scaling.factor is {self.factor}; YaRN stretches the context, so it must be at least 1"
            )
        original = self.original_max_position_embeddings
        if original != int(original) or not 1 <= original <= MAX_INT:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings is {original}; it must be a whole number from 1 to {MAX_INT}"
            )
        object.__setattr__(
            self, "original_max_position_embeddings", int(original)
        )  # JSON may say 4096.0
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"rope_scaling needs beta_fast > beta_slow > 0, found {self.beta_fast} and {self.beta_slow}"
            )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"rope_scaling.{name} is {getattr(self, name)}; it must be at least 0"
                )
        for f in dataclasses.fields(self):  # so that powers and logarithms of them are numbers too
            value = getattr(self, f.name)
            if value > MAX_INT or 0 < value < 1 / MAX_INT:
                raise ValueError(
                    f"rope_scaling.{f.name} is {value}; it must be from 1 / {MAX_INT} to {MAX_INT}"
                )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the DeepSeek family. Fields are Hugging Face's; derived sizes are properties.

    Attention is MLA when `kv_lora_rank` is set, else MHA / GQA / MQA by `num_key_value_heads`. The feed-forward is DeepSeekMoE
    from layer `first_k_dense_replace` on when `n_routed_experts` is set, else dense SwiGLU everywhere.
    """

    model_type: str = "deepseek_v2"
    vocab_size: int = 102400
    hidden_size: int = 2048
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_key_value_heads: int | None = (
        None  # None: as many as num_attention_heads. Without meaning under MLA
    )
    head_dim: int | None = None  # MHA / GQA / MQA only; None: hidden_size / num_attention_heads
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
    topk_method: str = "greedy"  # greedy | group_limited_greedy
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
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    # ---- derived sizes -------------------------------------------------------------------------------------------
    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts is not None

    @property
    def n_kv_heads(self) -> int:
        return (
            self.num_attention_heads
            if self.num_key_value_heads is None
            else self.num_key_value_heads
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of one query / key head: nope + rope under MLA."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return (
            self.head_dim
            if self.head_dim is not None
            else self.hidden_size // self.num_attention_heads
        )

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.is_mla else self.qk_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.is_mla else self.qk_head_dim

    @property
    def rope_interleaved(self) -> bool:
        """DeepSeek-V2 checkpoints pair elements (2k, 2k+1); llama and MoE-v1 checkpoints pair (k, k + R/2)."""
        return self.model_type == "deepseek_v2"

    @property
    def cache_row(self) -> tuple[int, int]:
        """The two parts of one token's cache row in one layer: (latent, rope key) under MLA, else (keys, values). Elements."""
        if self.is_mla:
            return self.kv_lora_rank, self.qk_rope_head_dim
        return self.n_kv_heads * self.qk_head_dim, self.n_kv_heads * self.value_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.is_moe and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> range:
        """Indices of the MoE layers. A range, so that a config that claims 2 billion layers costs nothing to look at."""
        first = -(-self.first_k_dense_replace // self.moe_layer_freq) * self.moe_layer_freq
        return range(first, self.num_hidden_layers if self.is_moe else first, self.moe_layer_freq)

    # ---- validation ----------------------------------------------------------------------------------------------
    def __post_init__(self):
        check_types(self)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "float" in f.type and not _is_finite(value):
                raise ValueError(f"{f.name} must be a finite number, found {value!r}")
            if isinstance(value, int) and abs(value) > MAX_INT:
                raise ValueError(f"{f.name} is {value}; the limit is {MAX_INT}")
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r} is not supported; known: {', '.join(FAMILIES)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.rope_scaling is not None and not self.rope_theta > 1:
            raise ValueError(
                f"rope_theta is {self.rope_theta}; YaRN divides by its logarithm, so it must be above 1"
            )
        if self.torch_dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"torch_dtype is {self.torch_dtype!r}; known: float32, bfloat16, float16, float64"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} is {value}, outside the vocabulary of {self.vocab_size} tokens"
                )
        if self.aux_loss_alpha < 0:
            raise ValueError(f"aux_loss_alpha is {self.aux_loss_alpha}; it must be at least 0")
        self._check_attention()
        self._check_moe()
        # One spelling per model: a default said aloud is kept as the default, so that equal models compare equal.
        if self.num_key_value_heads == self.num_attention_heads:
            object.__setattr__(self, "num_key_value_heads", None)
        if (
            self.head_dim is not None
            and self.head_dim * self.num_attention_heads == self.hidden_size
        ):
            object.__setattr__(self, "head_dim", None)

    def _check_attention(self):
        mla_dims = {
            n: getattr(self, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        }
        if self.is_mla:
            _at_least("kv_lora_rank", self.kv_lora_rank, 1)
            for name, value in mla_dims.items():
                if value is None:
                    raise ValueError(
                        f"kv_lora_rank is set, so attention is MLA and {name} must be given too"
                    )
                _at_least(name, value, 1)
            if self.q_lora_rank is not None:
                _at_least("q_lora_rank", self.q_lora_rank, 1)
            if self.head_dim is not None:
                raise ValueError(
                    f"head_dim is {self.head_dim}, but MLA heads are {self.qk_head_dim} wide ({self.qk_rope_head_dim} of it rotary); leave head_dim out"
                )
            if self.n_kv_heads != self.num_attention_heads:
                raise ValueError(
                    f"num_key_value_heads is {self.n_kv_heads}, but every one of the {self.num_attention_heads} heads of MLA has its own keys; leave it out"
                )
            if self.model_type != "deepseek_v2":
                raise ValueError(
                    f"kv_lora_rank asks for MLA, which only model_type deepseek_v2 has; found {self.model_type!r}"
                )
        else:
            given = [n for n, v in mla_dims.items() if v is not None] + (
                ["q_lora_rank"] if self.q_lora_rank is not None else []
            )
            if given:
                raise ValueError(
                    f"{', '.join(given)} belong to MLA, but kv_lora_rank is not set; set it, or leave them out"
                )
            if self.head_dim is None and self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; give head_dim or change one"
                )
            _at_least("head_dim", self.qk_head_dim, 1)
            _at_least("num_key_value_heads", self.n_kv_heads, 1)
            if self.num_attention_heads % self.n_kv_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.n_kv_heads}"
                )
        if self.rope_dim % 2:
            raise ValueError(
                f"the rotary width is {self.rope_dim}; rotary embedding turns pairs, so it must be even"
            )

    def _check_moe(self):
        if not self.is_moe:
            given = [
                n
                for n in ("moe_intermediate_size", "num_experts_per_tok")
                if getattr(self, n) is not None
            ]
            if given or self.n_shared_experts:
                given += ["n_shared_experts"] if self.n_shared_experts else []
                raise ValueError(
                    f"{', '.join(given)} belong to a mixture of experts, but n_routed_experts is not set; set it, or leave them out"
                )
            moe_only = {
                "n_group": 1,
                "topk_group": 1,
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
                "first_k_dense_replace": 0,
                "moe_layer_freq": 1,
                "aux_loss_alpha": 0.0,
                "seq_aux": True,
            }
            for name, inert in moe_only.items():
                if getattr(self, name) != inert:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r} in a model without routed experts, where it would do nothing; leave it out"
                    )
            return
        if self.model_type == "llama":
            raise ValueError(
                "n_routed_experts is set, but model_type llama is dense; use deepseek (MHA / GQA) or deepseek_v2 (MLA)"
            )
        for name in ("moe_intermediate_size", "num_experts_per_tok"):
            if getattr(self, name) is None:
                raise ValueError(f"n_routed_experts is set, so {name} must be given too")
            _at_least(name, getattr(self, name), 1)
        for name in ("n_routed_experts", "n_group", "topk_group", "moe_layer_freq"):
            _at_least(name, getattr(self, name), 1)
        for name in ("n_shared_experts", "first_k_dense_replace"):
            _at_least(name, getattr(self, name), 0)
        if not self.moe_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} and moe_layer_freq {self.moe_layer_freq} leave none of the "
                f"{self.num_hidden_layers} layers to the experts; lower them, or leave n_routed_experts out"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than n_routed_experts {self.n_routed_experts}"
            )
        if self.topk_method not in ("greedy", "group_limited_greedy"):
            hint = (
                " (that is DeepSeek-V3's bias-corrected routing)"
                if self.topk_method == "noaux_tc"
                else ""
            )
            raise ValueError(
                f"topk_method {self.topk_method!r}{hint} is not supported; known: greedy, group_limited_greedy"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} is not divisible into n_group {self.n_group} groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        if self.topk_method == "greedy" and (self.n_group, self.topk_group) != (1, 1):
            raise ValueError(
                f"n_group {self.n_group} and topk_group {self.topk_group} do nothing under topk_method greedy; "
                "set both to 1, or topk_method to group_limited_greedy"
            )
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_method == "group_limited_greedy" and reachable < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group {self.topk_group} of {self.n_group} groups leaves {reachable} experts, fewer than num_experts_per_tok {self.num_experts_per_tok}"
            )

    # ---- reading and writing -------------------------------------------------------------------------------------
    def replace(self, **changes) -> ModelConfig:
        """A copy with fields changed, checked anew; an unknown field name is a ValueError."""
        _refuse_unknown(changes, "ModelConfig")
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}"
            )
        return PRESETS[name]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the content of a Hugging Face config.json (both the older and the transformers-5 spelling). Strict: an unknown
        key, or a known key whose value lamoe does not implement, raises ValueError."""
        if not isinstance(raw, dict):
            raise ValueError(f"a model config must be a JSON object, found {type(raw).__name__}")
        raw = {k: v for k, v in raw.items() if k not in _FOREIGN}
        if raw.get("model_type") is None:
            raise ValueError(f"the config has no model_type; known: {', '.join(FAMILIES)}")
        if raw["model_type"] not in list(FAMILIES):  # a list: the value may be unhashable
            raise ValueError(
                f"model_type {raw['model_type']!r} is not supported; known: {', '.join(FAMILIES)}"
            )
        for key, allowed in _ONLY.items():
            if key in raw and (found := raw.pop(key)) not in allowed:
                raise ValueError(
                    f"{key} is {found!r}, which lamoe does not implement; supported: {' or '.join(map(repr, allowed))}"
                )
        _merge(raw, "torch_dtype", raw.pop("dtype", None))
        _read_rope(raw)
        # a null means "not given" in public configs, except where None is a value of its own
        raw = {k: v for k, v in raw.items() if v is not None}
        if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"]:
            raw["eos_token_id"] = raw["eos_token_id"][
                0
            ]  # several stop ids are generation_config.json's business
        _refuse_unknown(raw, "config.json")
        missing = [k for k in _REQUIRED if k not in raw]
        if missing:
            raise ValueError(f"the config does not say {', '.join(missing)}; these have no default")
        if "kv_lora_rank" in raw and raw.get("head_dim") == raw.get("qk_rope_head_dim"):
            raw.pop("head_dim", None)  # transformers 5 writes the rotary width of MLA here
        if (
            "n_routed_experts" not in raw
            and raw.get("first_k_dense_replace") == raw["num_hidden_layers"]
        ):
            del raw["first_k_dense_replace"]  # all layers dense, said aloud; see to_dict
        raw.setdefault("torch_dtype", "float32")
        return cls(**raw)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not valid JSON: {e}") from None
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be a model config") from None
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """The config.json content that transformers, vLLM and SGLang read. `from_dict(to_dict())` is the identity."""
        out: dict[str, Any] = {"architectures": [FAMILIES[self.model_type]]}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "rope_scaling":
                value = (
                    None
                    if value is None
                    else {"type": "yarn", "rope_type": "yarn", **dataclasses.asdict(value)}
                )
            elif value is None and f.name not in (
                "q_lora_rank",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            ):
                continue  # those four are said aloud: left out, transformers fills in 1536, 1, 2
            out[f.name] = value
        out["num_key_value_heads"] = self.n_kv_heads
        if not self.is_mla:
            out.pop("q_lora_rank")
            if self.model_type == "deepseek_v2":
                out["kv_lora_rank"] = (
                    None  # no other program has this; left out, transformers would fill in 512
                )
            out["head_dim"] = self.qk_head_dim
        if not self.is_moe:
            for name in (
                "n_shared_experts",
                "first_k_dense_replace",
                "moe_layer_freq",
                "n_group",
                "topk_group",
                "topk_method",
                "norm_topk_prob",
                "routed_scaling_factor",
                "aux_loss_alpha",
                "seq_aux",
            ):
                out.pop(name)
            if self.is_mla:  # transformers fills in 64 experts, but builds none below this layer
                out["first_k_dense_replace"] = self.num_hidden_layers
        else:
            out["scoring_func"] = "softmax"
        return {
            **out,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
        }


def did_you_mean(name: str, known) -> str:
    """', did you mean X?' when something known is close, else ''."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _is_finite(value) -> bool:
    """True for a real number that a double can hold; bools, NaN, infinities and integers beyond 1e308 are not."""
    try:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:
        return False


def _merge(raw: dict[str, Any], key: str, value):
    """raw[key] = value where `value` is the second spelling of the same fact; two different values are refused."""
    if value is None:
        return
    if raw.get(key) is not None and raw[key] != value:
        raise ValueError(f"the config says {key} twice and differently: {raw[key]!r} and {value!r}")
    raw[key] = value


def check_types(obj, where: str = "") -> None:
    """ValueError unless every field of the dataclass `obj` holds what its annotation says (scalars, `| None`, dataclasses, and
    tuples of scalars). `where` prefixes the field name in the message."""
    for f in dataclasses.fields(obj):
        value, kind = getattr(obj, f.name), str(f.type)
        options = [k.strip() for k in kind.split("|")]
        if not any(_is_a(value, option) for option in options):
            raise ValueError(f"{where}{f.name} must be {kind}, found {value!r}")


def _is_a(value, kind: str) -> bool:
    if kind.startswith("tuple["):
        return isinstance(value, tuple) and all(
            _is_a(v, kind[6:].split(",")[0].rstrip("]")) for v in value
        )
    if kind in ("int", "float"):
        return not isinstance(value, bool) and isinstance(
            value, int if kind == "int" else (int, float)
        )
    return type(value).__name__ == {"None": "NoneType"}.get(kind, kind)


def _at_least(name: str, value: int, low: int):
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def _refuse_unknown(keys, where: str):
    known = [f.name for f in dataclasses.fields(ModelConfig)]
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{did_you_mean(key, known)}")


def _read_rope(raw: dict[str, Any]):
    """Fold `rope_scaling` (older) or `rope_parameters` (transformers 5) into rope_theta and a RopeScaling, in place."""
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
    known = [f.name for f in dataclasses.fields(RopeScaling)]
    for key in rope:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in rope_scaling{did_you_mean(key, known)}")
    missing = [k for k in ("factor", "original_max_position_embeddings") if k not in rope]
    if missing:
        raise ValueError(f"rope_scaling of type yarn needs {' and '.join(missing)}")
    # A config without mscale_all_dim has no softmax factor; without mscale the factor on cos/sin follows mscale = 1 (remote code).
    raw["rope_scaling"] = RopeScaling(**{"mscale": 1.0, "mscale_all_dim": 0.0, **rope})


# ---- presets: paper 3.1.2, App. B and the released configs -------------------------------------------------------------
_V2 = dict(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
    rope_scaling=RopeScaling(),
    max_position_embeddings=163840,
    initializer_range=0.006,
    aux_loss_alpha=0.001,
    bos_token_id=100000,
    eos_token_id=100001,
)
_LITE = {
    **_V2,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
_SMALL = dict(
    model_type="deepseek_v2",
    q_lora_rank=None,
    n_shared_experts=1,
    first_k_dense_replace=1,
    rope_scaling=None,
    torch_dtype="float32",
    aux_loss_alpha=0.003,
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-v2": ModelConfig(**_V2),
    "deepseek-v2.5": ModelConfig(
        **{**_V2, "rope_scaling": RopeScaling(mscale=1.0, mscale_all_dim=1.0)}
    ),
    "deepseek-v2-lite": ModelConfig(**_LITE),
    "coder-v2-lite": ModelConfig(**_LITE),
    "deepseek-67b": ModelConfig(
        model_type="llama",
        vocab_size=102400,
        hidden_size=8192,
        num_hidden_layers=95,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=22016,
        max_position_embeddings=4096,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    "deepseek-moe-16b": ModelConfig(
        model_type="deepseek",
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
        aux_loss_alpha=0.001,
        bos_token_id=100000,
        eos_token_id=100001,
    ),
    # trains in minutes on two cores: the model of `make demo`
    "tiny": ModelConfig(
        **_SMALL,
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        initializer_range=0.02,
    ),
    # the geometry of the training benchmark: 24.6M parameters, 12.2M of them active beside the embedding
    "small": ModelConfig(
        **_SMALL,
        vocab_size=8192,
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        kv_lora_rank=96,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
    ),
}
