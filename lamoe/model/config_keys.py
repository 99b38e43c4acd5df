"""Decides by their meaning which unknown keys of a foreign config may be ignored.

Programs leave many notes in config.json, and a closed list of them is always too short. A key is
sorted by the first rule that applies:

1. It states a fact that follows from the config (FACTS): accepted at this value, else refused.
2. Its value asks for nothing (null, empty, false, a scale of 1, a cap of 0): ignored.
3. Its name belongs to a tool, a trainer, sampling or another program's options: ignored.
4. A word of its name belongs to the arithmetic of a model, or it resembles a field: refused.
5. Anything else is a note: ignored.

Ignored keys of rules 3 and 5 are logged once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lamoe.model.field_checks import did_you_mean

log = logging.getLogger("lamoe.model")
_logged: set[str] = set()

# Limits beyond every real config. They bound the time that sorting the keys of a file takes.
MAX_KEYS, MAX_KEY = 2_000, 200  # keys, and characters of one
_SILU = ("silu", "swish", "swiglu")
_RMS = ("rmsnorm", "rms_norm", "rms", "llamarmsnorm")
_ROPE = ("rope", "rotary")
_FULL = ("full", "full_attention", "global", "softmax", "causal", "gqa", "mha", "mla")
# Fields of a config under other programs' names.
_ALIASES = {
    "hidden_size": "d_model dim n_embd n_embed hidden_dim embed_dim embedding_size model_dim"
    " word_embed_proj_dim",
    "num_hidden_layers": "n_layer n_layers num_layers",
    "num_attention_heads": "n_head n_heads num_heads",
    "n_kv_heads": "n_kv_heads n_head_kv num_kv_heads num_query_groups multi_query_group_num",
    "intermediate_size": "ffn_dim ffn_hidden_size ffn_intermediate_size n_inner inner_dim",
    "qk_head_dim": "head_size head_width attention_head_dim attention_head_size kv_channels"
    " qk_head_dim d_head",
    "rope_dim": "rope_dim rotary_dim rotary_ndims",
    "rope_theta": "rope_base rotary_base rotary_emb_base rope_freq_base",
    "rms_norm_eps": "norm_eps norm_epsilon rms_eps rms_norm_epsilon layer_norm_eps"
    " layer_norm_epsilon layernorm_epsilon layernorm_eps",
    "vocab_size": "n_vocab padded_vocab_size",
    "tie_word_embeddings": "tie_embeddings tied_embeddings tie_lm_head weight_tying tie_weights"
    " share_embeddings share_input_output_embed",
    "num_experts_per_tok": "num_experts_per_token moe_topk moe_top_k num_selects",
}


def _value_of(field: str) -> Callable[[Any], tuple[Any, ...]]:
    return lambda config: (getattr(config, field),)


# {key: the values that agree with a config}
FACTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    **{alias: _value_of(field) for field, aliases in _ALIASES.items() for alias in aliases.split()},
    **dict.fromkeys(
        "num_experts num_local_experts n_experts moe_num_experts".split(),
        lambda c: (c.n_routed_experts,) if c.is_moe else (0, 1),
    ),
    **dict.fromkeys(
        "hidden_act hidden_activation activation_function act_fn activation activation_fn"
        " mlp_activation mlp_type ffn_type".split(),
        lambda c: _SILU,
    ),
    **dict.fromkeys("norm_type normalization layernorm_type".split(), lambda c: _RMS),
    **dict.fromkeys(
        "position_embedding_type position_encoding_type pos_emb pe_type".split(), lambda c: _ROPE
    ),
    **dict.fromkeys("rope_interleave rope_interleaved".split(), lambda c: (c.rope_interleaved,)),
    **dict.fromkeys(
        "partial_rotary_factor rotary_pct rotary_percent rotary_percentage rope_pct"
        " rotary_emb_fraction".split(),
        lambda c: (1,),
    ),
    **dict.fromkeys(
        "is_causal causal attention_causal use_rope use_rotary rotary use_rotary_embeddings"
        " rotary_embedding use_rms_norm rms_norm gated_mlp use_swiglu swiglu glu pre_norm"
        " use_pre_norm no_bias".split(),
        lambda c: (True,),
    ),
    **dict.fromkeys(
        "use_sliding_window use_parallel_residual parallel_residual is_encoder_decoder".split(),
        lambda c: (False,),
    ),
    **dict.fromkeys("attention_bias mlp_bias".split(), lambda c: (False,)),
    "num_nextn_predict_layers": lambda c: (0,),
    "sliding_window": lambda c: (None, 0, -1),
    "attention_type": lambda c: _FULL,
    "layer_types": lambda c: ("full_attention",),
    "attention_types": lambda c: _FULL,
    "no_rope_layers": lambda c: (1,),  # 1 means that this layer has rotary embeddings
    "rope_type": lambda c: ("default", "none") if c.rope_scaling is None else ("yarn",),
    "scoring_func": lambda c: ("softmax",),
    "use_mla": lambda c: (c.is_mla,),
    "use_gqa": lambda c: (not c.is_mla and c.n_kv_heads < c.num_attention_heads,),
    "multi_query": lambda c: (c.n_kv_heads == 1,),
}

# Names that transformers itself writes to every config. They are ignored without a word.
_STANDARD = frozenset(
    """
    architectures auto_map chunk_size_feed_forward dtype_plan finetuning_task id2label is_decoder
    label2id model_type_name num_labels output_attentions output_hidden_states output_router_logits
    output_scores pretraining_tp problem_type return_dict return_dict_in_generate
    router_aux_loss_coef task_specific_params tokenizer_class torchscript transformers_version
    use_bfloat16 use_cache ep_size
    """.split()
)
# Families of names that concern another program, training, sampling or the form of the output.
_BOOKKEEPING = re.compile(
    r"""
    (.*_)?(version|revision|date|timestamp|time|author|authors|license|licence|url|path|file|note
        |notes|comment|comments|description|info|name|names|readme|citation|tags?|language
        |sha|hash|commit|model_id|checkpoint|tokenizer|dataset|datasets|data|corpus)
    |(unsloth|axolotl|peft|trl|deepspeed|megatron|nemo|wandb|llamafactory|torchtune|liger|mergekit
        |onnx|openvino|neuron|transformers(\.|_?)js|vllm|sglang|mlx|gguf|ollama|lora)(_.*)?
    |(.*_)?(trainer|training|train|finetune|finetuned|finetuning|optimizer|scheduler|epochs?
        |batch_size|lr|learning_rate|seed|warmup|weight_decay|grad|gradient|checkpointing
        |label_smoothing)(_.*)?|(.*_)?(p?drop|p?dropout|droppath)(_.*)?
    |((max|num|global|total|save|logging|eval|warmup)_)?steps?
    |(.*_)?(loss|loss_coef|loss_coeff|loss_alpha|loss_weight|loss_lambda)
    |(initializer|init|initialization)_.*|.*_(init|init_std|init_method|initializer_range)|init_std
    |output_(attentions|hidden_states|scores|logits|router_logits|past|dir)|return_.*|freeze_.*
    |.*_in_fp32|.*_fusion|.*_dtype
    |.*_implementation|.*(flash|sdpa|xformers|memory_efficient|fused|triton).*|use_.*kernels?
    |(.*_)?backend|(model|tensor|pipeline|expert|data|sequence|context)_parallel.*
    |(base|parent|teacher|reward|draft|source|original|target|merged)_model
    |(tp|pp|dp|cp)_(size|degree|plan)|base_model_(tp|pp|ep)_plan|torch_compile.*|offload.*
    |(model_)?max_(seq|sequence|context|model)(_len|_length)?|(seq|sequence|context)_(len|length)
    |model_max_length|max_(target|train)_.*|seq_?length|max_seq_?len(gth)?|n_ctx|n_positions
    |block_size|max_block_size
    |(max|min)_(new_tokens|length|tokens)|do_sample|early_stopping|num_(beams|beam_groups)
    |num_return_sequences|temperature|top_[kph]|(min|typical)_p|(epsilon|eta)_cutoff|.*_penalty
    |(encoder_)?no_repeat_ngram_size|bad_words_ids|force_words_ids|(begin_)?suppress_tokens
    |remove_invalid_values|renormalize_logits|guidance_scale|cache_implementation|.*cache_config
    |(decoder_start|sep|cls|unk|mask|eot|eom|forced_bos|forced_eos|bos|eos|pad)_token(_ids?)?
    |(bos|eos|pad)_ids?|chat_template|(.*_)?prompt|stop(_.*)?|generation_config
    |(is|was)_.*|tie_encoder_decoder|local_rank|world_size|max_window_layers|sliding_window_pattern
    |original_max_position_embeddings|(router_)?jitter_noise|router_jitter_noise
    """,
    re.VERBOSE,
)
# Words of names that belong to the arithmetic of a model.
_ARITHMETIC = frozenset(
    """
    act activation alibi alpha attention attn audio base bias bidirectional bits block cap causal
    centered chunk clamp clip clipping compress compression conv cross decay decoder depth dilated
    dim dims dual emb embed embedding embeddings encoder eps epsilon expert experts factor ffn gain
    gamma gate gated gating global glu group groups head heads hidden hyper image interleave
    interleaved intermediate interval k kv latent layer layernorm layers local logit logits loop
    loops mamba mask memory mlp mm moe mrope mscale mtp mult multimodal multiplier mup nextn nope
    norm normalization norms ntk offset parallel partial pattern pos position positional positions
    prefix projector q qk qkv quant quantization quantized query rank recurrence recurrent
    recursion residual rms rmsnorm rope rotary routed router routing sandwich scalar scale scaled
    scaler scales scaling share shared sharing sigmoid sink sinks skip sliding smear soft softcap
    softcapping softmax softplus sparse sparsity speech ssm state stride swiglu tanh temp text
    theta tie tied topk untie untied v value video vision vocab width window windows yarn
    """.split()
)
# Words that are also recognised inside a longer one, as in "ropescale".
_STEMS = tuple(
    "alibi attention attn embed expert logit multiplier residual rotary router scale softcap"
    " window".split()
)
# Words of things that are off at 0, and words of factors that are off at 1.
_OFF_AT_0 = frozenset(
    """
    alibi bias cap clamp clip clipping dropout pdrop experts expert freq interval layers loss moe
    mtp n nextn noise num predict sink sinks sliding softcap softcapping window lora decay sparsity
    """.split()
)
_OFF_AT_1 = frozenset("factor gain mult multiplier scale scaling scaler pct".split())
# With these words a factor of 1 replaces 1 / sqrt(head width), which is not 1.
_SOFTMAX_SCALE = frozenset("attention attn query qk softmax kv q k".split())
# Words of what every model of lamoe has. `false` would ask for a model without it.
_ALWAYS_ON = frozenset("affine causal gated glu norm prenorm rms rope rotary silu swiglu".split())
_FILLER = frozenset("use is has with do enable enabled mlp".split())


def words_of(key: str) -> set[str]:
    """Return the words of a name, for example {"rope", "scaling"} of "ropeScaling"."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", key)
    return set(re.split(r"[^a-z0-9]+", spaced.lower())) - {""}


def asks_for_nothing(key: str, value: Any) -> bool:
    """Return whether the value of an unknown key leaves the model as it is."""
    words = words_of(key)
    if isinstance(value, (list, tuple)):
        return all(asks_for_nothing(key, v) for v in value)
    if isinstance(value, dict):
        return all(asks_for_nothing(str(k), v) for k, v in value.items())
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "null")
    if value is False:
        return not words & _ALWAYS_ON or bool(words - _ALWAYS_ON - _FILLER)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        off_at_0 = value == 0 and bool(words & _OFF_AT_0) and not words & _OFF_AT_1
        off_at_1 = value == 1 and bool(words & _OFF_AT_1) and not words & _SOFTMAX_SCALE
        no_window = value == -1 and bool(words & {"window", "sliding"})
        return off_at_0 or off_at_1 or no_window
    return value is None


def is_bookkeeping(key: str) -> bool:
    """Return whether a name says that its value changes no arithmetic."""
    if len(key) > MAX_KEY:
        return False
    return key.startswith("_") or bool(_BOOKKEEPING.fullmatch(key.lower()))


def is_arithmetic(key: str) -> bool:
    """Return whether a word of a name belongs to the arithmetic of a model."""
    if len(key) > MAX_KEY:
        return True
    words = words_of(key)
    joined = any(stem in word for word in words for stem in _STEMS)
    return joined or bool(words & _ARITHMETIC)


def unknown_key(key: str, value: Any, known: Iterable[str], where: str) -> str:
    """Return the message for a key that is refused."""
    return (
        f"unknown key {shorten(key)} in {where}: it is {shorten(value)}, which may change the model"
        f"{did_you_mean(key, known, 0.8)}; if it does not, remove the key"
    )


def sort_keys(unknown: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """Refuse the keys that may change the model, and log the ones that are ignored.

    Args:
        unknown: {key: value} of the keys that are not fields.
        known: names of the fields.
        where: the source of the keys, for messages.

    Returns:
        The keys of FACTS, for check_facts.

    Raises:
        ValueError: if a key may change the model. The message names it and its value.
    """
    if len(unknown) > MAX_KEYS:
        raise ValueError(f"{where} has {len(unknown):,} unknown keys; the limit is {MAX_KEYS:,}")
    facts, ignored = {}, []
    for key, value in unknown.items():
        if key in FACTS:
            facts[key] = value
        elif key in _STANDARD or asks_for_nothing(key, value):
            continue
        elif is_bookkeeping(key):
            ignored.append(key)
        elif is_arithmetic(key) or did_you_mean(key, known, 0.85):
            raise ValueError(unknown_key(key, value, known, where))
        else:
            ignored.append(key)
    if ignored := [k for k in ignored if not k.startswith("_")]:
        note_once(f"{where}: ignored keys that do not change the model: {', '.join(ignored)[:500]}")
    return facts


def check_facts(config: Any, facts: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError if a fact (see FACTS) contradicts the config."""
    for key, value in facts.items():
        supported = FACTS[key](config)
        if not is_one_of(value, supported):
            raise ValueError(
                f"{where}{key} is {shorten(value)}, which lamoe does not implement; "
                f"supported: {' or '.join(map(repr, supported))}"
            )


def is_one_of(value: Any, supported: Collection[Any]) -> bool:
    """Return whether a value, or every entry of a list, is supported. None and {} always are.

    Numbers are compared as in float32, texts without upper case.
    """
    if isinstance(value, (list, tuple)):
        return all(is_one_of(v, supported) for v in value)
    if value is None or value == {}:
        return True
    if isinstance(value, str):
        return value.lower() in supported
    return any(_equal(value, s) for s in supported)


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, (bool, int, float)) or not isinstance(b, (bool, int, float)):
        return False
    try:
        return a == b or abs(a - b) <= 1e-6 * abs(b)
    except OverflowError:  # an integer beyond 1e308
        return False


def shorten(value: Any, limit: int = 80) -> str:
    """Return the text of a value for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def note_once(text: str) -> None:
    """Log a warning, once in this process."""
    if text not in _logged:
        _logged.add(text)
        log.warning(text)
