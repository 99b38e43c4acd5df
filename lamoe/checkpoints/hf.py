"""A Hugging Face model folder <-> lamoe.model.Transformer: one name table used in both directions, strict, one tensor at a time.

On disk every expert has its own gate_proj, up_proj and down_proj; in memory gate and up rows are one matrix (w13) and the experts
are stacked. So an entry of the table is a disk name and a slice of a parameter: loading copies into the slice, saving writes the
slice out. Rotary rows are never permuted, the model follows the family's layout. Nothing in a model folder is executed: only
config.json and safetensors are read, `auto_map` and *.py are ignored, pickles are refused (shards.py).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lamoe.checkpoints import atomic, shards
from lamoe.checkpoints.shards import Found, few
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and every config implies.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What travels with the weights from `extras_from`, unread.
EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


# ---- the table -------------------------------------------------------------------------------------------------------------
class Entry(NamedTuple):
    """The tensor `disk` of a checkpoint is `parameter[where]` of the model."""

    disk: str
    parameter: str
    where: tuple = ()


def table(config: ModelConfig) -> list[Entry]:
    """Every tensor of the config's checkpoint and its place in the model. The places tile every parameter exactly once."""
    entries = [
        Entry("model.embed_tokens.weight", "embed.weight"),
        Entry("model.norm.weight", "norm.weight"),
    ]
    if not config.tie_word_embeddings:
        entries.append(Entry("lm_head.weight", "head.weight"))
    for i in range(config.num_hidden_layers):
        disk, own = f"model.layers.{i}.", f"layers.{i}."
        entries += [
            Entry(f"{disk}{a}.weight", f"{own}{b}.weight") for a, b in _attention(config) + _NORMS
        ]
        if config.is_moe_layer(i):
            entries += _moe(config, f"{disk}mlp.", f"{own}ffn.")
        else:
            entries += _swiglu(
                f"{disk}mlp.",
                f"{own}ffn.w13.weight",
                f"{own}ffn.w2.weight",
                config.intermediate_size,
            )
    return entries


_NORMS = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")]


def _attention(config: ModelConfig) -> list[tuple[str, str]]:
    if not config.is_mla:
        return [(f"self_attn.{x}_proj", f"attn.w{x}") for x in "qkvo"]
    query = [("self_attn.q_proj", "attn.wq")]
    if config.q_lora_rank is not None:
        query = [
            ("self_attn.q_a_proj", "attn.wq_a"),
            ("self_attn.q_a_layernorm", "attn.q_norm"),
            ("self_attn.q_b_proj", "attn.wq_b"),
        ]
    return query + [
        ("self_attn.kv_a_proj_with_mqa", "attn.wkv_a"),
        ("self_attn.kv_a_layernorm", "attn.kv_norm"),
        ("self_attn.kv_b_proj", "attn.wkv_b"),
        ("self_attn.o_proj", "attn.wo"),
    ]


def _moe(config: ModelConfig, disk: str, own: str) -> list[Entry]:
    width = config.moe_intermediate_size
    entries = [Entry(f"{disk}gate.weight", f"{own}gate.weight")]
    for e in range(config.n_routed_experts):
        entries += _swiglu(
            f"{disk}experts.{e}.", f"{own}experts.w13", f"{own}experts.w2", width, (e,)
        )
    if config.n_shared_experts:  # one SwiGLU as wide as all shared experts together
        entries += _swiglu(
            f"{disk}shared_experts.",
            f"{own}shared.w13.weight",
            f"{own}shared.w2.weight",
            config.n_shared_experts * width,
        )
    return entries


def _swiglu(disk: str, w13: str, w2: str, width: int, at: tuple = ()) -> list[Entry]:
    return [
        Entry(f"{disk}gate_proj.weight", w13, (*at, slice(0, width))),
        Entry(f"{disk}up_proj.weight", w13, (*at, slice(width, 2 * width))),
        Entry(f"{disk}down_proj.weight", w2, at),
    ]


def views(config: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{disk name: view of its place in `parameters`}. ValueError when the parameters are not those of this config."""
    entries = table(config)
    known = {e.parameter for e in entries}
    strange, absent = [n for n in parameters if n not in known], sorted(known - set(parameters))
    if strange or absent:
        raise ValueError(
            f"the model does not have exactly the parameters of its config: unexpected {few(strange) or 'none'}, "
            f"absent {few(absent) or 'none'}. "
            "A quantised, wrapped or sharded model has no Hugging Face form; use the model it was made from"
        )
    views = {e.disk: parameters[e.parameter][e.where] for e in entries}
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in parameters.values())
    return views


# ---- in --------------------------------------------------------------------------------------------------------------------
def load(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of a Hugging Face folder or hub id (`owner/name`), in eval mode.

    dtype: of all parameters; None is the config's torch_dtype. Tensors stored in another float type are cast. Peak memory is the
    model plus one stored tensor. ValueError when the config asks for something lamoe lacks, when a tensor is missing, extra,
    misshapen or not a plain float, and when a file is not what its header promises (see shards.scan).
    """
    folder = resolve(source)
    config = read_config(folder)
    dtype = _dtype(config.torch_dtype if dtype is None else dtype)
    found = shards.scan(folder)
    model = _meta_model(config, folder, len(found))
    tied = _check(folder, config, found, views(config, dict(model.named_parameters())))

    parameters = {
        name: torch.empty(p.shape, dtype=dtype, device=device)
        for name, p in model.named_parameters()
    }
    places = views(config, parameters)
    shards.stream(
        {n: f for n, f in found.items() if n in places},
        lambda name, tensor: places[name].copy_(tensor),
    )
    if tied is not None:
        shards.stream(
            {"lm_head.weight": tied},
            lambda _, tensor: _check_tied(folder, tensor, parameters["embed.weight"]),
        )
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def resolve(source: str | Path) -> Path:
    """The folder of a path or hub id. A hub id is downloaded to the hub's cache (only its *.json and *.safetensors) or, under
    HF_HUB_OFFLINE=1, found there; HF_TOKEN opens gated models. ValueError when `source` is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = (
            "make a folder of it first: lamoe convert FILE.gguf FOLDER"
            if path.suffix == ".gguf"
            else "give the model folder that holds config.json and the weights"
        )
        raise ValueError(f"{path} is a file; {hint}")
    if not isinstance(source, str) or not re.fullmatch(
        r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", source, re.ASCII
    ):
        raise ValueError(
            f"there is no folder {str(source)!r}, and it does not look like a hub id (owner/name); check the path"
        )
    from huggingface_hub import snapshot_download  # here: it fixes the HF_* variables when imported

    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as e:
        raise ValueError(
            f"there is no folder {source!r}, and the hub did not give a model of this name: {e}"
        ) from e


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a model folder. ValueError without a config.json, or for one that lamoe cannot follow exactly."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if path.stat().st_size > shards.MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes; a config of more than {shards.MAX_JSON_BYTES:,} bytes is refused"
        )
    return ModelConfig.from_file(path)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    return dtype


def _meta_model(config: ModelConfig, folder: Path, tensors: int) -> Transformer:
    """The model without storage. A config of a billion layers must not cost more than the files that come with it, so the counts
    are compared with the number of stored tensors first."""
    experts = (config.n_routed_experts or 0) * (
        len(config.moe_layers) if config.num_hidden_layers <= tensors else 1
    )
    for what, count in (("layers", config.num_hidden_layers), ("routed experts in all", experts)):
        if count > tensors:
            raise ValueError(
                f"{folder}/config.json says {count:,} {what}, but the weights are only {tensors:,} tensors; "
                "they do not belong together"
            )
    try:
        with torch.device("meta"):
            return Transformer(config)
    except RuntimeError as e:  # torch's own words for a tensor beyond 64 bits of bytes
        raise ValueError(f"{folder}/config.json asks for a model that cannot be built: {e}") from e


def _check(
    folder: Path, config: ModelConfig, found: dict[str, Found], want: Mapping[str, torch.Tensor]
) -> Found | None:
    """Stored tensors against the config, from headers alone. Returns the stored lm_head of a tied model when there is one."""
    missing = [n for n in want if n not in found]
    tied = found.get("lm_head.weight") if config.tie_word_embeddings else None
    extra = [
        n for n in found if n not in want and n != "lm_head.weight" and not _HARMLESS.fullmatch(n)
    ]  # an untied lm_head is in want
    if missing:
        hint = (
            "; a model that shares the embedding needs tie_word_embeddings: true"
            if missing == ["lm_head.weight"]
            else ""
        )
        more = f", and {len(extra)} are there that it does not know: {few(extra)}" if extra else ""
        raise ValueError(
            f"{folder}: {len(missing)} of {len(want)} tensors of the config are missing: {few(missing)}{more}{hint}"
        )
    if extra:
        raise ValueError(
            f"{folder}: {len(extra)} tensors do not belong to the config: {few(extra)}; "
            "config.json and the weights must be of one model"
        )
    checked = dict(want)
    if tied:
        checked["lm_head.weight"] = want["model.embed_tokens.weight"]
    shapes = [
        f"{n!r} is {list(found[n].shape)}, not {list(t.shape)}"
        for n, t in checked.items()
        if found[n].shape != tuple(t.shape)
    ]
    if shapes:
        raise ValueError(
            f"{folder}: {len(shapes)} tensors do not have the shape of the config: {_first(shapes)}"
        )
    types = [f"{n!r} is {found[n].dtype}" for n in checked if found[n].dtype not in _FLOATS]
    if types:
        raise ValueError(
            f"{folder}: {len(types)} tensors are not plain floats ({', '.join(_FLOATS)}): {_first(types)}; "
            "use an unquantised checkpoint"
        )
    return tied


def check_tensors(folder: Path, config: ModelConfig, found: dict[str, Found]) -> None:
    """ValueError when the stored tensors, told by their headers, are not those of the config."""
    _check(
        folder,
        config,
        found,
        views(config, dict(_meta_model(config, folder, len(found)).named_parameters())),
    )


def _first(lines: list[str], show: int = 3) -> str:
    return "; ".join(lines[:show]) + (
        f"; and {len(lines) - show} more" if len(lines) > show else ""
    )


def _check_tied(folder: Path, stored: torch.Tensor, embed: torch.Tensor):
    if not torch.equal(stored.to(embed), embed):
        raise ValueError(
            f"{folder}: config.json says tie_word_embeddings: true, but the stored lm_head.weight differs from model.embed_tokens.weight; "
            "set it to false to use both"
        )


# ---- out -------------------------------------------------------------------------------------------------------------------
def save(
    model: Transformer,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extras_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as a Hugging Face folder that transformers, vLLM and SGLang load: config.json (torch_dtype = the parameters'),
    generation_config.json, safetensors with one tensor per expert. Tokenizer, chat template and generation config are copied from
    the folder `extras_from` when it has them.

    All or nothing: everything is written and synced beside the target and renamed at the end. With overwrite=True an existing
    model folder is replaced as a whole; a folder that holds anything else is refused.
    """
    if (
        isinstance(max_shard_bytes, bool)
        or not isinstance(max_shard_bytes, int)
        or max_shard_bytes < 1
    ):
        raise ValueError(
            f"max_shard_bytes is {max_shard_bytes!r}; it must be a whole number of bytes, at least 1"
        )
    if extras_from is not None and not Path(extras_from).is_dir():
        raise ValueError(f"extras_from is {str(extras_from)!r}, which is not a folder")
    target = Path(
        os.path.realpath(Path(folder).expanduser())
    )  # through a symlink, so that the link stays
    _check_target(target, overwrite)
    tensors = views(model.config, dict(model.named_parameters()))
    config = model.config.replace(torch_dtype=_common_dtype(model))

    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_folder(target) as temporary:
        shards.write_json(temporary / "config.json", config.to_dict())
        _write_extras(config, temporary, extras_from)
        shards.write(tensors, temporary, max_shard_bytes)


def _check_target(target: Path, overwrite: bool):
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is saved to a folder")
    there = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if not there:
        return
    if not overwrite:
        raise ValueError(
            f"{target} is not empty ({few(there)}); pass overwrite=True to replace a model, or name another folder"
        )
    ours = {"config.json", shards.INDEX, *EXTRAS}
    strange = [
        n
        for n in there
        if n not in ours and not re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", n)
    ]
    if strange:
        raise ValueError(
            f"{target} holds more than a model lamoe saved ({few(strange)}), and overwriting would delete it; "
            "move that away or name another folder"
        )


def _common_dtype(model: Transformer) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(names):
        raise ValueError(
            f"the parameters have the types {', '.join(sorted(map(str, dtypes)))}; a saved model has one of "
            f"{', '.join(DTYPES)}: use model.to(dtype)"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model is on the meta device and has no weights to save; load or initialise it first"
        )
    return names[dtypes.pop()]


def _write_extras(config: ModelConfig, folder: Path, extras_from: str | Path | None):
    ids = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if given := {n: i for n, i in ids.items() if i is not None}:
        shards.write_json(folder / "generation_config.json", given)
    for name in EXTRAS if extras_from is not None else ():
        if (Path(extras_from) / name).is_file():
            shutil.copyfile(Path(extras_from) / name, folder / name)
