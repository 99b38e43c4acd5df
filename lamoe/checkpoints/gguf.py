"""A GGUF file -> a model folder: files of the llama architecture, whatever their quantisation. The `gguf` package (extra `gguf`) reads and
dequantises; here is only what it does not know: which facts make up our config, and how the files differ from a Hugging Face checkpoint.

One difference in the weights: rows of Q and K are stored for rotary pairs (2k, 2k + 1), Hugging Face's for (k, k + R/2), so each head's rows are put back.
Strict as hf.py is: a fact of the architecture or a tensor that is not understood is refused by name, because the model would be another one without it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lamoe.checkpoints import gguf_tokenizer, hf
from lamoe.checkpoints.shards import few
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

# What a fact `llama.<name>` is called in our config.
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
# Harmless at these values; anything else would be another model. A callable is given the config.
_ONLY = {
    "expert_count": lambda c: (0,),
    "expert_used_count": lambda c: (0,),
    "rope.scaling.type": lambda c: ("none",),
    "rope.dimension_count": lambda c: (c.qk_head_dim,),
    "attention.value_length": lambda c: (c.value_head_dim,),
    "vocab_size": lambda c: (c.vocab_size,),
}
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


class File(NamedTuple):
    """A GGUF file with its directory read: facts by key (strings, numbers, lists of them) and the package's tensor records by name."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Any]


def read(path: str | Path) -> File:
    """Facts and directory of a GGUF file (memory-mapped; no tensor is read). ValueError when it is none, is broken, or one of several parts."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        import gguf
    except ImportError as e:
        raise ValueError(
            f"reading GGUF files needs a package that is not installed ({e.name}); pip install 'lamoe[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        facts = {key: _plain(field.contents()) for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as e:  # what its parser meets in a file that lies
        raise ValueError(
            f"{path} is not a complete GGUF file: {type(e).__name__}: {e}; download it again"
        ) from None
    if (parts := facts.get("split.count", 1)) != 1:
        raise ValueError(
            f"{path} is one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
    return File(path, facts, tensors)


def _plain(value: Any) -> Any:
    """Python's own types. float32 numbers by their shortest spelling: 1e-05, not 9.999999747378752e-06."""
    return (
        float(str(np.float32(value)))
        if isinstance(value, float) and np.float32(value) == value
        else value
    )


def config_of(file: File) -> ModelConfig:
    """The config of a file; torch_dtype is bfloat16 unless the matrices are stored as float32 or float16. ValueError for what lamoe lacks."""
    if (found := file.facts.get("general.architecture")) != "llama":
        raise ValueError(
            f"{file.path} has the architecture {found!r}; of GGUF files lamoe reads llama only, the rest from Hugging Face folders"
        )
    facts = {k.removeprefix("llama."): v for k, v in file.facts.items() if k.startswith("llama.")}
    if missing := [n for n in _NEEDED if n not in facts]:
        raise ValueError(
            f"{file.path} does not say {', '.join('llama.' + n for n in missing)}; these have no default"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(
            f"{file.path} has no tensor token_embd.weight; it holds a vocabulary or a part of a model"
        )
    stored = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1}
    ids = {
        f"{name}_token_id": file.facts.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    try:
        config = ModelConfig(
            model_type="llama",
            vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
            tie_word_embeddings="output.weight" not in file.tensors,
            torch_dtype={("F32",): "float32", ("F16",): "float16"}.get(tuple(stored), "bfloat16"),
            **ids,
            **{_FIELDS[k]: v for k, v in facts.items() if k in _FIELDS},
        )
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}") from None
    for key, value in facts.items():
        allowed = _ONLY[key](config) if key in _ONLY else ()
        if key not in _FIELDS and value not in allowed:
            raise ValueError(
                f"{file.path}: llama.{key} is {value!r}, which lamoe does not implement"
                + (f"; supported: {allowed[0]!r}" if allowed else "")
            )
    return config


def load(file: File, dtype: torch.dtype | str | None = None) -> Transformer:
    """The model of a file in eval mode, dequantised, one tensor at a time. dtype: None is the config's torch_dtype; float32 keeps every value as it is.
    ValueError when the tensors are not exactly those of the config."""
    config = config_of(file)
    places = _places(file, config)
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except RuntimeError as e:  # torch's own words for a tensor beyond 64 bits of bytes
        raise ValueError(f"{file.path} asks for a model that cannot be built: {e}") from None
    expected = hf.views(config, dict(model.named_parameters()))
    for name, entry in places.items():  # before memory is asked for
        if (found := file.tensors[name].shape[::-1].tolist()) != (
            want := list(expected[entry.disk].shape)
        ):
            raise ValueError(f"{file.path}: {name} is {found}, not {want} as the other facts say")
    dtype = hf.DTYPES[config.torch_dtype] if dtype is None else hf.DTYPES.get(dtype, dtype)
    parameters = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    for name, entry in places.items():
        heads = {
            "attn_q.weight": config.num_attention_heads,
            "attn_k.weight": config.n_kv_heads,
        }.get(name.split(".", 2)[-1])
        tensor = _dequantised(file, name)
        parameters[entry.parameter][entry.where].copy_(
            _half_split(tensor, heads) if heads else tensor
        )
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def _places(file: File, config: ModelConfig) -> dict[str, hf.Entry]:
    """{the file's name of a tensor: its entry of hf.table}. ValueError unless they are the file's tensors exactly."""
    if config.num_hidden_layers > len(file.tensors):
        raise ValueError(
            f"{file.path} says {config.num_hidden_layers:,} layers, but holds only {len(file.tensors):,} tensors"
        )
    places = {}
    for entry in hf.table(config):
        layer, name = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", entry.disk).groups()
        places[f"{f'blk.{layer}.' if layer else ''}{_NAMES[name]}.weight"] = entry
    if missing := [n for n in places if n not in file.tensors]:
        raise ValueError(
            f"{file.path}: {len(missing)} of {len(places)} tensors of its architecture are missing: {few(missing)}"
        )
    if extra := [n for n in file.tensors if n not in places]:
        raise ValueError(
            f"{file.path}: {len(extra)} tensors are not known and would change the model: {few(extra)}"
        )
    return places


def _dequantised(file: File, name: str) -> torch.Tensor:
    import gguf

    found = file.tensors[name]
    try:
        values = gguf.quants.dequantize(found.data, found.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{file.path}: {name} is stored as {found.tensor_type.name}, which the gguf package cannot dequantise"
        ) from None
    return torch.from_numpy(
        np.array(values, dtype=np.float32)
    )  # a copy: what the package gives of unquantised tensors is the mapped file


def _half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * R, D] of interleaved rotary pairs -> halves: row (k, j) of each head becomes row (j, k)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_folder(
    path: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    **options,
) -> None:
    """Write the model of a GGUF file as a Hugging Face folder, tokenizer, chat template and stop tokens included (`tokenizer`: a folder to take them from
    instead). `options` are those of hf.save. ValueError as `read`, `load`, hf.save and gguf_tokenizer.write."""
    file = read(path)
    with tempfile.TemporaryDirectory() as extras:
        if tokenizer is None:
            gguf_tokenizer.write(file.facts, Path(extras), str(file.path))
        hf.save(
            load(file, dtype),
            target,
            extras_from=extras if tokenizer is None else tokenizer,
            **options,
        )
