"""Convert GGUF files of the llama architecture, in any quantisation, to Hugging Face folders.

The `gguf` package (extra `gguf`) reads and dequantises the file. This module maps metadata to a
ModelConfig and tensor names to parameters. Rows of Q and K are reordered: GGUF stores them for
rotary pairs (2k, 2k + 1), Hugging Face for pairs (k, k + R/2).

Unknown tensors and unknown metadata of the architecture are refused by name, because ignoring them
would give another model.
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
# Metadata keys without a field in ModelConfig. The function of a key returns the values that lamoe
# supports.
_ALLOWED = {
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


# Exceptions that the parser of the gguf package raises for a damaged or hostile file.
_PARSER_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class File(NamedTuple):
    """A GGUF file whose metadata has been read.

    Attributes:
        metadata: {key: value}. Values are strings, numbers and lists of them.
        tensors: {tensor name: tensor record of the gguf package}.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]


def read(path: str | Path) -> File:
    """Read the metadata and the list of tensors of a GGUF file. No tensor data is read.

    Raises:
        ValueError: if the file is missing, is not a complete GGUF file, or is one of several parts.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        import gguf
    except ImportError as e:
        raise ValueError(
            f"reading GGUF files needs a package that is not installed ({e.name}); "
            "pip install 'lamoe[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _plain(field.contents()) for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except _PARSER_ERRORS as e:
        raise ValueError(
            f"{path} is not a complete GGUF file: {type(e).__name__}: {e}; download it again"
        ) from None
    if (parts := metadata.get("split.count", 1)) != 1:
        raise ValueError(
            f"{path} is one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
    return File(path, metadata, tensors)


def _plain(value: Any) -> Any:
    """Convert a float32 number to the float of its shortest spelling: 1e-05, not 9.99999974e-06."""
    return (
        float(str(np.float32(value)))
        if isinstance(value, float) and np.float32(value) == value
        else value
    )


def config_of(file: File) -> ModelConfig:
    """Build the config of a file.

    torch_dtype is bfloat16 unless all matrices are stored as float32 or all as float16.

    Raises:
        ValueError: if the metadata is incomplete, or needs a feature that lamoe lacks.
    """
    if (found := file.metadata.get("general.architecture")) != "llama":
        raise ValueError(
            f"{file.path} has the architecture {found!r}; of GGUF files lamoe reads llama only, "
            "the rest from Hugging Face folders"
        )
    llama = {
        k.removeprefix("llama."): v for k, v in file.metadata.items() if k.startswith("llama.")
    }
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
    stored = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1}
    ids = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    try:
        config = ModelConfig(
            model_type="llama",
            vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
            tie_word_embeddings="output.weight" not in file.tensors,
            torch_dtype={("F32",): "float32", ("F16",): "float16"}.get(tuple(stored), "bfloat16"),
            **ids,
            **{_FIELDS[k]: v for k, v in llama.items() if k in _FIELDS},
        )
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}") from None
    for key, value in llama.items():
        allowed = _ALLOWED[key](config) if key in _ALLOWED else ()
        if key not in _FIELDS and value not in allowed:
            raise ValueError(
                f"{file.path}: llama.{key} is {value!r}, which lamoe does not implement"
                + (f"; supported: {allowed[0]!r}" if allowed else "")
            )
    return config


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
        found, want = file.tensors[name].shape[::-1].tolist(), list(expected[entry.disk].shape)
        if found != want:
            raise ValueError(f"{file.path}: {name} is {found}, not {want} as the metadata says")
    dtype = config.torch_dtype if dtype is None else dtype
    if isinstance(dtype, str):
        dtype = hf.DTYPES[dtype]
    parameters = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    for name, entry in places.items():
        tensor = _dequantise(file, name)
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


def _dequantise(file: File, name: str) -> torch.Tensor:
    """Return the tensor `name` of a GGUF file, dequantised to float32."""
    import gguf

    found = file.tensors[name]
    try:
        values = gguf.quants.dequantize(found.data, found.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{file.path}: {name} is stored as {found.tensor_type.name}, "
            "which the gguf package cannot dequantise"
        ) from None
    # np.array copies: for unquantised tensors the package returns a view of the mapped file.
    return torch.from_numpy(np.array(values, dtype=np.float32))


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
