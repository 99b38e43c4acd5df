"""Load and save Hugging Face model folders, one tensor at a time.

One table of names serves both directions. In the folder, every expert has its own gate_proj,
up_proj and down_proj. In memory, the rows of gate and up form one matrix (w13), and experts are
stacked. So each entry of the table maps a stored tensor to a slice of a parameter. Loading copies
into the slice, and saving writes the slice out. Rotary rows are never permuted, because the model
follows the layout of its family.

Nothing in a model folder is executed. Only config.json and safetensors files are read. `auto_map`
and *.py are ignored, and pickles are refused (shards.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lamoe import atomic
from lamoe.checkpoints import checksums, foreign, runs, shards, side_files
from lamoe.checkpoints.foreign import few
from lamoe.checkpoints.shards import Found
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.os_errors import current_folder, explain

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Files of a hub id that are downloaded.
_WANTED = [
    *("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken"),
    *("LICENSE*", "NOTICE*"),
]
# What people write for a hub id: its page, its clone address, its folder with a slash at the end.
_HUB_URL = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|hf:)([\w.\-]+/[\w.\-]+)"
    r"|([\w\-][\w.\-]*/[\w.\-]+)(?:/|@.*)$"
)
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers in old checkpoints that are ignored, because the config determines their values.
_IGNORED = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)


# ---- the table of names --------------------------------------------------------------------------
class Entry(NamedTuple):
    """The stored tensor `disk` is `parameter[where]` of the model."""

    disk: str
    parameter: str
    where: tuple = ()


def table(config: ModelConfig) -> list[Entry]:
    """Return an entry for every stored tensor of a model.

    The entries cover every element of every parameter exactly once.
    """
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
    if config.n_shared_experts:  # one SwiGLU, as wide as all shared experts together
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
    """Return a view of `parameters` for every stored tensor, by its stored name.

    Raises:
        ValueError: if the parameters are not exactly those of this config.
    """
    entries = table(config)
    known = {e.parameter for e in entries}
    unknown, absent = [n for n in parameters if n not in known], sorted(known - set(parameters))
    if unknown or absent:
        raise ValueError(
            "the model does not have exactly the parameters of its config: unexpected "
            f"{few(unknown) or 'none'}, absent {few(absent) or 'none'}. A quantised, wrapped or "
            "sharded model cannot be saved in Hugging Face format; use the original model"
        )
    views = {e.disk: parameters[e.parameter][e.where] for e in entries}
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in parameters.values())
    return views


# ---- loading -------------------------------------------------------------------------------------
def load(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """Load a model, in eval mode. Peak memory is the model plus one stored tensor.

    Args:
        source: a Hugging Face model folder or a hub id (`owner/name`).
        dtype: dtype of all parameters. None means the config's torch_dtype. Tensors stored in
            another float type are cast.

    Raises:
        ValueError: if the config needs a feature that lamoe lacks, if a tensor is missing, extra,
            of the wrong shape or not a plain float, if a tensor does not match its checksum, or
            if a file breaks the format (see shards.scan).
    """
    folder = resolve(source)
    config = read_config(folder)
    dtype = _dtype(config.torch_dtype if dtype is None else dtype)
    found = named_as_in_model(config, shards.scan(folder))
    checksums.warn_of_changes(folder)
    model = _meta_model(config, folder, len(found))
    tied = _check(folder, config, found, views(config, dict(model.named_parameters())))

    parameters = {
        name: torch.empty(p.shape, dtype=dtype, device=device)
        for name, p in model.named_parameters()
    }
    places = views(config, parameters)
    shards.stream(
        {n: f for n, f in found.items() if n in places},
        lambda name, tensor: _copy(tensor, places[name]),
    )
    if tied is not None:
        shards.stream(
            {"lm_head.weight": tied},
            lambda _, tensor: _check_tied(folder, tensor, parameters["embed.weight"]),
        )
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def named_as_in_model(config: ModelConfig, found: dict[str, Found]) -> dict[str, Found]:
    """Return the tensors under the names of the model.

    Of two names for one tensor, safetensors.torch.save_model keeps the first in the alphabet. So a
    tied embedding may be stored as lm_head.weight only.
    """
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and embedding not in found and head in found:
        tensor = found[head]._replace(stored=head)
        return {**{n: f for n, f in found.items() if n != head}, embedding: tensor}
    return found


def _copy(stored: torch.Tensor, place: torch.Tensor) -> None:
    place.copy_(stored)


def resolve(source: str | Path) -> Path:
    """Return the model folder of a path or hub id. The model of a run is its newest checkpoint.

    The weights and the files of the tokenizer of a hub id are downloaded to the hub's cache. With
    HF_HUB_OFFLINE=1 they must be there already. HF_TOKEN gives access to gated models.

    Raises:
        ValueError: if `source` is neither a folder nor a model on the hub, or a run without a
            checkpoint.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = runs.model_folder(path)
        _check_is_model(folder)
        return folder
    if path.is_file():
        raise ValueError(foreign.file_problem(path))
    if path.exists():
        raise ValueError(f"{path} is neither a file nor a folder; give a model folder")
    if not isinstance(source, str) or not re.fullmatch(
        r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", source, re.ASCII
    ):
        id_inside = _HUB_URL.match(str(source))
        advice = f"write {id_inside[1] or id_inside[2]}" if id_inside else "check the path"
        raise ValueError(
            f"there is no folder {str(source)!r}, and it does not look like a hub id (owner/name); "
            f"{advice}"
        )
    # Imported late, because the import reads the HF_* variables.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=_WANTED,
                # all folders but additional_chat_templates
                ignore_patterns=["?/*", "[!a]*/*", "a[!d]*/*"],
            )
        )
    except (OSError, ValueError) as e:
        raise ValueError(
            f"there is no folder {source!r} (from {current_folder()}), and {_hub_problem(e)}"
        ) from e


def _hub_problem(error: Exception) -> str:
    """Return why the hub gave no model, and what to do, from an error of huggingface_hub."""
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return (
            "the hub has no model of this name that may be read; check the name, or set HF_TOKEN "
            "for a private or gated model"
        )
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        why = "HF_HUB_OFFLINE is set" if _hub_is_off() else "the hub cannot be reached"
        return f"{why} and its cache does not hold this model; check the name of the folder"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"the cache of the hub cannot be used: {explain(error)} (or set HF_HOME)"
    return f"the hub did not give a model of this name: {error}"


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json of a model folder.

    Raises:
        ValueError: if the folder has no config.json, or the config needs a feature that lamoe
            lacks.
    """
    _check_is_model(Path(folder))
    return ModelConfig.from_file(Path(folder) / "config.json")


def _check_is_model(folder: Path) -> None:
    """Raise ValueError, with advice, unless a folder has the config of a model."""
    if adapter := foreign.adapter_problem(folder):
        raise ValueError(adapter)
    if not (folder / "config.json").is_file():
        lacks = "has no config.json, so it is not a Hugging Face model folder"
        raise ValueError(foreign.folder_problem(folder, lacks))


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    return dtype


class _NoInit(TorchFunctionMode):
    """A context in which the functions of torch.nn.init leave their tensor as it is.

    On the meta device there is nothing to initialise. The call would import torch's compiler, which
    takes seconds and needs a writable folder for temporary files.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _meta_model(config: ModelConfig, folder: Path, num_tensors: int) -> Transformer:
    """Build the model on the meta device.

    The counts in the config are compared with the number of stored tensors first. Otherwise a
    hostile config with a billion layers would exhaust the memory.
    """
    num_moe_layers = len(config.moe_layers) if config.num_hidden_layers <= num_tensors else 1
    num_experts = (config.n_routed_experts or 0) * num_moe_layers
    counts = (("layers", config.num_hidden_layers), ("routed experts in all", num_experts))
    for what, count in counts:
        if count > num_tensors:
            raise ValueError(
                f"{folder}/config.json says {count:,} {what}, but the weights are only "
                f"{num_tensors:,} tensors; they do not belong together"
            )
    try:
        with torch.device("meta"), _NoInit():
            return Transformer(config)
    except RuntimeError as e:  # raised by torch if the bytes of a tensor overflow 64 bits
        raise ValueError(f"{folder}/config.json asks for a model that cannot be built: {e}") from e


def _check(
    folder: Path, config: ModelConfig, found: dict[str, Found], want: Mapping[str, torch.Tensor]
) -> Found | None:
    """Compare the stored tensors with those of the config, from the headers alone.

    Args:
        want: {stored name: tensor of the expected shape}.

    Returns:
        The stored lm_head of a model with tied embeddings, if there is one.
    """
    missing = [n for n in want if n not in found]
    tied = found.get("lm_head.weight") if config.tie_word_embeddings else None
    extra = [  # transformers saves empty tensors for zero shared experts
        n
        for n, tensor in found.items()
        if n not in want and n != "lm_head.weight" and not _IGNORED.fullmatch(n)
        if 0 not in tensor.shape
    ]
    if (missing or extra) and (problem := foreign.tensor_problem(extra)):
        raise ValueError(f"{folder}: {problem}")
    if missing:
        hint = (
            "; a model that shares the embedding needs tie_word_embeddings: true"
            if missing == ["lm_head.weight"]
            else ""
        )
        more = f", and {len(extra)} tensors are unexpected: {few(extra)}" if extra else ""
        raise ValueError(
            f"{folder}: {len(missing)} of {len(want)} tensors of the config are missing: "
            f"{few(missing)}{more}{hint}"
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
            f"{folder}: {len(shapes)} tensors do not have the shape of the config: "
            f"{_join_first(shapes)}"
        )
    types = [f"{n!r} is {found[n].dtype}" for n in checked if found[n].dtype not in FLOATS]
    if types:
        raise ValueError(
            f"{folder}: {len(types)} tensors are not plain floats ({', '.join(FLOATS)}): "
            f"{_join_first(types)}; use an unquantised checkpoint"
        )
    return tied


def check_tensors(folder: Path, config: ModelConfig, found: dict[str, Found]) -> None:
    """Check that the stored tensors are those of the config, from the headers alone.

    Raises:
        ValueError: if a tensor is missing, extra, of the wrong shape or not a plain float.
    """
    model = _meta_model(config, folder, len(found))
    _check(folder, config, found, views(config, dict(model.named_parameters())))


def _join_first(lines: list[str], show: int = 3) -> str:
    return "; ".join(lines[:show]) + (
        f"; and {len(lines) - show} more" if len(lines) > show else ""
    )


def _check_tied(folder: Path, stored: torch.Tensor, embed: torch.Tensor) -> None:
    if not torch.equal(stored.to(embed), embed):
        raise ValueError(
            f"{folder}: config.json says tie_word_embeddings: true, but the stored lm_head.weight "
            "differs from model.embed_tokens.weight; set it to false to use both"
        )


# ---- saving --------------------------------------------------------------------------------------
def save(
    model: Transformer,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extras_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as a Hugging Face folder that transformers, vLLM and SGLang can load.

    The folder appears complete or not at all (atomic.py). config.json states the dtype of the
    parameters.

    Args:
        max_shard_bytes: largest size of one weight file, in bytes.
        extras_from: a folder from which tokenizer, chat templates, generation config and licence
            are copied, see side_files.
        overwrite: whether to replace an existing model folder as a whole.

    Raises:
        ValueError: if the folder exists and `overwrite` is False, if it holds files that do not
            belong to a model, or if the model cannot be saved in this form.
        OSError: if writing failed. An existing folder is then unchanged.
    """
    if (
        isinstance(max_shard_bytes, bool)
        or not isinstance(max_shard_bytes, int)
        or max_shard_bytes < 1
    ):
        raise ValueError(
            f"max_shard_bytes is {max_shard_bytes!r}; it must be a whole number of bytes, "
            "at least 1"
        )
    if extras_from is not None and not Path(extras_from).is_dir():
        raise ValueError(f"extras_from is {str(extras_from)!r}, which is not a folder")
    # Resolve a symbolic link, so that its target is replaced and not the link.
    target = Path(os.path.realpath(Path(folder).expanduser()))
    _check_target(target, overwrite)
    tensors = views(model.config, dict(model.named_parameters()))
    config = model.config.replace(torch_dtype=_common_dtype(model))

    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with atomic.replace_folder(target, size=size) as temporary:
        shards.write_json(temporary / "config.json", config.to_dict())
        _write_extras(config, temporary, extras_from)
        shards.write(tensors, temporary, max_shard_bytes)
        shards.write_json(temporary / checksums.FILE, checksums.of_folder(temporary))


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is saved to a folder")
    there = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if not there:
        return
    if not overwrite:
        raise ValueError(
            f"{target} is not empty ({few(there)}); pass overwrite=True to replace a model, "
            "or name another folder"
        )
    ours = re.compile(
        r"config\.json|checksums\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    )
    unknown = [n for n in there if not ours.fullmatch(n) and not side_files.is_carried(target / n)]
    if unknown:
        raise ValueError(
            f"{target} holds more than a model lamoe saved ({few(unknown)}), and overwriting would "
            "delete it; move that away or name another folder"
        )


def _common_dtype(model: Transformer) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(names):
        raise ValueError(
            f"the parameters have the types {', '.join(sorted(map(str, dtypes)))}; a saved model "
            f"has one of {', '.join(DTYPES)}: use model.to(dtype)"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model is on the meta device and has no weights to save; "
            "load or initialise it first"
        )
    return names[dtypes.pop()]


def _write_extras(config: ModelConfig, folder: Path, extras_from: str | Path | None) -> None:
    """Write generation_config.json from the config; files of `extras_from` replace it."""
    ids = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if given := {n: i for n, i in ids.items() if i is not None}:
        shards.write_json(folder / "generation_config.json", given)
    if extras_from is not None:
        side_files.copy(Path(extras_from), folder)
