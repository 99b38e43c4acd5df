"""Convert GGUF files of the llama architecture, in any quantisation, to Hugging Face folders.

gguf_file.py reads the file. This module maps metadata to a ModelConfig and tensor names to
parameters. Rows of Q and K are reordered: GGUF stores them for rotary pairs (2k, 2k + 1), Hugging
Face for pairs (k, k + R/2).

Unknown tensors, and metadata of the architecture that may change the model, are refused by name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lamoe.checkpoints import gguf_file, gguf_tokenizer, hf
from lamoe.checkpoints.foreign import few
from lamoe.checkpoints.gguf_file import File
from lamoe.model import hf_config
from lamoe.model.config import ModelConfig
from lamoe.model.config_keys import (
    asks_for_nothing,
    is_arithmetic,
    is_bookkeeping,
    is_one_of,
    shorten,
)
from lamoe.model.transformer import Transformer

# {key of the metadata `llama.<key>`: field of ModelConfig}.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_NEEDED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# {key of the metadata `llama.<key>`: the values that agree with a config}. Programs write 0 for a
# factor that is absent.
_FACTS: dict[str, Callable[[ModelConfig], tuple[Any, ...]]] = {
    "attention.causal": lambda c: (True,),
    "attention.layer_norm_epsilon": lambda c: (c.rms_norm_eps,),
    "attention.scale": lambda c: (0, c.qk_head_dim**-0.5),
    "attention.value_length": lambda c: (c.value_head_dim,),
    "embedding_length_out": lambda c: (0, c.hidden_size),
    "leading_dense_block_count": lambda c: (0, c.num_hidden_layers),
    "pooling_type": lambda c: (0,),
    "rope.dimension_count": lambda c: (c.qk_head_dim,),
    "tensor_data_layout": lambda c: ("meta ai original pth",),
    "use_parallel_residual": lambda c: (False,),
    "vocab_size": lambda c: (c.vocab_size,),
    **dict.fromkeys(
        "embedding_scale expert_weights_scale logit_scale residual_scale rope.freq_scale"
        " rope.scale rope.scale_linear rope.scaling.alpha rope.scaling.attn_factor"
        " rope.scaling.factor rope.scaling.yarn_attn_factor".split(),
        lambda c: (1, 0),
    ),
}
# Facts about a scaling of rotary embeddings, which is itself refused.
_UNUSED = frozenset({"rope.scaling.original_context_length", "rope.scaling.finetuned"})
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read(path: str | Path) -> File:
    """Read the metadata and the list of tensors of a GGUF file. No tensor data is read.

    Raises:
        ValueError: if the file is missing, is not a complete GGUF file, or is one of several parts.
    """
    file = gguf_file.read(path)
    if (parts := file.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{file.path} is one of {shorten(parts)} parts; join them first (llama-gguf-split "
            "--merge)"
        )
    return file


def config_of(file: File) -> ModelConfig:
    """Build the config of a file.

    torch_dtype is bfloat16 unless all matrices are stored as float32 or all as float16.

    Raises:
        ValueError: if the metadata is incomplete, or needs a feature that lamoe lacks.
    """
    _check_kind(file)
    llama = {
        k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")
    }
    llama = {k: _one_for_all_layers(v, llama.get("block_count")) for k, v in llama.items()}
    if missing := [n for n in _NEEDED if n not in llama]:
        raise ValueError(
            f"{file.path} does not say {', '.join('llama.' + n for n in missing)}; "
            "these have no default"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(
            f"{file.path} has no tensor token_embd.weight; "
            "it holds a vocabulary or a part of a model"
        )
    if uneven := [k for k in _FIELDS if isinstance(llama.get(k), list)]:
        raise ValueError(
            f"{file.path}: llama.{uneven[0]} is {shorten(llama[uneven[0]])}; lamoe implements only "
            "one value for all layers"
        )
    stored = {t.kind.name for t in file.tensors.values() if len(t.shape) > 1}
    fields = {_FIELDS[k]: v for k, v in llama.items() if k in _FIELDS}
    fields |= {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    try:
        hf_config.drop_impossible_ids(fields, "the metadata")
        config = ModelConfig(
            model_type="llama",
            tie_word_embeddings="output.weight" not in file.tensors,
            torch_dtype={("F32",): "float32", ("F16",): "float16"}.get(tuple(stored), "bfloat16"),
            **fields,
        )
        _check_facts(config, {k: v for k, v in llama.items() if k not in _FIELDS})
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}") from None
    return config


def _check_kind(file: File) -> None:
    """Raise ValueError unless the file is a whole model of the llama architecture."""
    kind = file.metadata.get("general.type", "model")
    found = file.metadata.get("general.architecture")
    if kind == "adapter":
        raise ValueError(
            f"{file.path} is a LoRA adapter and not a model; merge it into its base model first "
            "(llama-export-lora), or merge the adapter's folder with peft and convert that"
        )
    if kind == "mmproj" or found == "clip":
        raise ValueError(
            f"{file.path} is the image projector of a multimodal model; give the file of the "
            "language model"
        )
    if found != "llama":
        raise ValueError(
            f"{file.path} has the architecture {shorten(found)}; of GGUF files lamoe reads llama "
            "only, the rest from Hugging Face folders"
        )
    if kind in ("vocab", "imatrix") or not file.tensors:
        raise ValueError(
            f"{file.path} holds a vocabulary or statistics, but no weights; give the file of a "
            "model"
        )


def _one_for_all_layers(value: Any, num_layers: Any) -> Any:
    """Return the value of a list that has the same entry for each layer, else the value itself."""
    if isinstance(value, list) and value and len(value) == num_layers:
        return value[0] if all(v == value[0] for v in value) else value
    return value


def _check_facts(config: ModelConfig, llama: dict[str, Any]) -> None:
    """Raise ValueError for metadata that contradicts the config, or may change the model."""
    for key, value in llama.items():
        unscaled = value == "linear" and llama.get("rope.scaling.factor") == 1
        if key in _UNUSED or (key == "rope.scaling.type" and unscaled):
            continue
        allowed = _FACTS[key](config) if key in _FACTS else ()
        group, _, name = key.rpartition(".")
        is_note = is_bookkeeping(name) and not is_arithmetic(group)
        harmless = is_note or asks_for_nothing(key, value)
        if not (is_one_of(value, allowed) if allowed else harmless):
            raise ValueError(
                f"llama.{key} is {shorten(value)}, which lamoe does not implement"
                + (f"; supported: {' or '.join(map(repr, allowed))}" if allowed else "")
            )


def load(file: File, dtype: torch.dtype | str | None = None) -> Transformer:
    """Load and dequantise the model, in eval mode, one tensor at a time.

    Args:
        file: the GGUF file, from `read`.
        dtype: dtype of all parameters. None means the config's torch_dtype. float32 keeps every
            value exactly.

    Raises:
        ValueError: if the tensors are not exactly those of the config.
    """
    config = config_of(file)
    places = _places(file, config)
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except RuntimeError as e:  # raised by torch if the bytes of a tensor overflow 64 bits
        raise ValueError(f"{file.path} asks for a model that cannot be built: {e}") from None
    expected = hf.views(config, dict(model.named_parameters()))
    for name, entry in places.items():  # checked before the parameters are allocated
        found, want = list(file.tensors[name].shape), list(expected[entry.disk].shape)
        if found != want:
            raise ValueError(f"{file.path}: {name} is {found}, not {want} as the metadata says")
    dtype = config.torch_dtype if dtype is None else dtype
    if isinstance(dtype, str):
        dtype = hf.DTYPES[dtype]
    parameters = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    for name, entry in places.items():
        tensor = torch.from_numpy(file.read(name))
        if name.endswith("attn_q.weight"):
            tensor = _half_split(tensor, config.num_attention_heads)
        elif name.endswith("attn_k.weight"):
            tensor = _half_split(tensor, config.n_kv_heads)
        parameters[entry.parameter][entry.where].copy_(tensor)
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def _places(file: File, config: ModelConfig) -> dict[str, hf.Entry]:
    """Map every tensor name of the file to its entry of hf.table.

    Raises:
        ValueError: if the file does not hold exactly the tensors that its architecture needs.
    """
    if config.num_hidden_layers > len(file.tensors):
        raise ValueError(
            f"{file.path} says {config.num_hidden_layers:,} layers, "
            f"but holds only {len(file.tensors):,} tensors"
        )
    places = {}
    for entry in hf.table(config):
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", entry.disk)
        assert match is not None, entry.disk
        layer, name = match.groups()
        places[f"{f'blk.{layer}.' if layer else ''}{_NAMES[name]}.weight"] = entry
    if missing := [n for n in places if n not in file.tensors]:
        raise ValueError(
            f"{file.path}: {len(missing)} of {len(places)} tensors of its architecture are "
            f"missing: {few(missing)}"
        )
    if extra := [n for n in file.tensors if n not in places]:
        raise ValueError(
            f"{file.path}: {len(extra)} tensors are not known and would change the model: "
            f"{few(extra)}"
        )
    return places


def _half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of Q or K from interleaved rotary pairs to halves.

    Args:
        rows: [heads * R, D]. Row 2k + j of each head becomes row k + j R/2.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_folder(
    path: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    **options,
) -> None:
    """Convert a GGUF file to a Hugging Face folder with tokenizer, chat template and stop tokens.

    Args:
        dtype: dtype of the parameters, see `load`.
        tokenizer: a folder with tokenizer files. If given, they are used instead of those of the
            GGUF file.
        options: keyword arguments of hf.save.

    Raises:
        ValueError: see `read`, `load`, hf.save and gguf_tokenizer.write.
    """
    file = read(path)
    with tempfile.TemporaryDirectory() as extras:
        if tokenizer is None:
            gguf_tokenizer.write(file.metadata, Path(extras), str(file.path))
        hf.save(
            load(file, dtype),
            target,
            extras_from=extras if tokenizer is None else tokenizer,
            **options,
        )
