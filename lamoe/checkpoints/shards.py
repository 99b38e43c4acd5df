"""Check, read and write the safetensors files of a model folder.

The files may come from anyone, so every header is checked here before the safetensors library opens
the file: the header lies inside the file, dtypes are known, every shape matches its byte range, and
the ranges cover the data exactly. The index may name only plain files in the same folder. Anything
else is a ValueError. The library reads and writes the tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lamoe.checkpoints import checksums, foreign
from lamoe.checkpoints.foreign import few
from lamoe.text import json_file
from lamoe.text.json_file import foreign_content, parse_object, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Headers with more bytes are refused unread. DeepSeek-V2 needs about a quarter of this limit, and
# JSON of this size parses in a second.
MAX_JSON_BYTES = json_file.MAX_BYTES
MAX_DIMS = 8
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "C64": 8,
}


class Found(NamedTuple):
    """A tensor in a checked file.

    Attributes:
        dtype: name of the dtype in safetensors, for example "BF16".
        begin: offset of the data from the end of the header, in bytes.
        checksum: the checksum in the file (checksums.py), or "" if the file has none.
        stored: the name in the file, or "" if it is the name in the model.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    checksum: str = ""
    stored: str = ""


def num_bytes(tensor: Found) -> int:
    """Return the bytes of a tensor's data."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


# ---- reading -------------------------------------------------------------------------------------
def scan(folder: Path) -> dict[str, Found]:
    """List all tensors of a model folder by name. Reads headers only, no tensor data.

    The tensors are in model.safetensors, or in the shards that model.safetensors.index.json names.

    Raises:
        ValueError: if the folder has no such files, or two sets of them, or a file breaks the
            format.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        return _scan_both(single, index)
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _scan_index(index)
    for link in (single, index):
        if link.is_symlink():
            raise ValueError(
                f"{link} is a link to {os.readlink(link)}, which does not exist; download it again"
            )
    raise ValueError(foreign.weights_problem(folder, SINGLE, INDEX, read_header))


def _scan_both(single: Path, index: Path) -> dict[str, Found]:
    """List the tensors of a folder that has model.safetensors and an index.

    Some tools write an index even for one file. Then there is nothing to choose between.
    """
    shards = set(_read_weight_map(index).values())
    if shards == {SINGLE}:
        return read_header(single)
    if SINGLE in shards:
        return _scan_index(index)
    absent = sorted(s for s in shards if not (index.parent / s).is_file())
    if absent:
        raise ValueError(
            f"{index} names {few(absent)}, which are not there, and not the {SINGLE} beside it; "
            f"if {SINGLE} is the complete model, delete the index, else download the named files"
        )
    raise ValueError(
        f"{index.parent} has both {SINGLE} and the files that {INDEX} names ({few(sorted(shards))})"
        ", so it is not clear which weights are meant; delete the stale ones"
    )


def _scan_index(index: Path) -> dict[str, Found]:
    placed = _read_weight_map(index)
    found: dict[str, Found] = {}
    for shard in sorted(set(placed.values())):
        path = index.parent / shard
        if not path.is_file():
            count = list(placed.values()).count(shard)
            raise ValueError(
                f"{index} places {count} tensors in {shard}, but this file does not exist; "
                "download it again"
            )
        header = read_header(path)
        absent = [name for name, where in placed.items() if where == shard and name not in header]
        if absent:
            them = "it" if len(absent) == 1 else "them"
            raise ValueError(
                f"{index} places {few(absent)} in {shard}, but that shard does not hold {them}"
            )
        twice = [name for name in header if name in found]
        if twice:
            raise ValueError(
                f"{path} holds {few(twice)}, which another shard of {INDEX} holds too; "
                "a tensor must be in one shard only"
            )
        # Tensors that the index does not list are included: the caller reports them as extra.
        found.update(header)
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(
            f"{index} has no weight_map object that says which shard holds which tensor"
        )
    for name, shard in placed.items():
        # Symbolic links are followed: in the hub's cache every file is one.
        if not isinstance(shard, str) or not re.fullmatch(
            r"(\./)?[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.safetensors", shard
        ):
            raise ValueError(
                f"{index} places {name!r} in {shard!r}; only plain .safetensors file names of the "
                "same folder are allowed"
            )
    return {name: shard.removeprefix("./") for name, shard in placed.items()}


def read_header(path: Path) -> dict[str, Found]:
    """Read and check the header of one safetensors file; return its tensors by name.

    Raises:
        ValueError: if the file breaks the format. The message says where.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        if len(head) < 8:
            raise ValueError(
                f"{path} has {size} bytes, too few for a safetensors file; it is truncated, "
                "download or save it again"
            )
        length = int.from_bytes(head, "little")
        if length > size - 8 and (what := foreign_content(head + f.read(200))):
            raise ValueError(f"{path} is {what}")
        if length > MAX_JSON_BYTES:
            raise ValueError(
                f"{path} claims a header of {length:,} bytes, more than the {MAX_JSON_BYTES:,} "
                "allowed; is it safetensors?"
            )
        if length > size - 8:
            raise ValueError(
                f"{path} claims a header of {length:,} bytes but has only {size:,} bytes in all; "
                "it is truncated or not safetensors"
            )
        raw = f.read(length)
    header = parse_object(raw, f"the header of {path}")
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    spans = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    _check_tiling(path, spans, size - 8 - length, size)
    found = {
        name: Found(path, header[name]["dtype"], tuple(header[name]["shape"]), begin)
        for name, (begin, _) in spans.items()
    }
    stored = checksums.split(path, meta.get(checksums.KEY), found)
    return {name: f._replace(checksum=stored.get(name, "")) for name, f in found.items()}


def _check_entry(path: Path, name: str, entry) -> tuple[int, int]:
    """Check that dtype, shape and byte range of a header entry agree.

    Returns the range (begin, end) in bytes.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{path}: the entry of {name!r} must have exactly dtype, shape and data_offsets, "
            f"found {str(entry)[:100]}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(
            f"{path}: {name!r} has unknown dtype {str(dtype)[:40]!r}; "
            f"known: {', '.join(ITEM_BYTES)}"
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise ValueError(
            f"{path}: {name!r} has shape {str(shape)[:100]}; "
            f"it must be at most {MAX_DIMS} whole numbers >= 0"
        )
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{path}: {name!r} has data_offsets {str(offsets)[:100]}; "
            "they must be two whole numbers >= 0"
        )
    begin, end = offsets
    need = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != need:
        raise ValueError(
            f"{path}: {name!r} of shape {shape} in {dtype} needs {need:,} bytes, "
            f"but its data_offsets {offsets} span {end - begin:,}"
        )
    return begin, end


def _are_counts(values) -> bool:
    """Return whether `values` is a list of integers from 0 to 2**63 - 1. Bools do not count."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_tiling(
    path: Path, spans: dict[str, tuple[int, int]], data_bytes: int, file_bytes: int
) -> None:
    """Check that the byte ranges cover the data after the header without overlap or gap."""
    header_bytes = file_bytes - data_bytes
    promised = max((end for _, end in spans.values()), default=0)
    if promised > data_bytes:
        raise ValueError(
            f"{path} has {file_bytes:,} bytes, but its header promises "
            f"{header_bytes + promised:,}; it is truncated, download or save it again"
        )
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            problem = (
                "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            )
            raise ValueError(
                f"{path}: {name!r} starts at byte {begin:,} of the data, expected {position:,}; "
                f"it {problem}"
            )
        position = end
    if position != data_bytes:
        raise ValueError(
            f"{path} has {data_bytes - position:,} bytes after its last tensor "
            f"({file_bytes:,} bytes, the header promises {header_bytes + position:,})"
        )


def stream(found: Mapping[str, Found], use: Callable[[str, torch.Tensor], None]) -> None:
    """Call use(name, tensor) for every tensor of `found`, in file order.

    One tensor is in memory at a time, unless `use` keeps it.

    Raises:
        ValueError: if a file cannot be read, or a tensor does not match its checksum.
    """
    for path in sorted({f.path for f in found.values()}):
        inside = sorted((f.begin, name) for name, f in found.items() if f.path == path)
        try:
            # pread and not mmap: mapped pages count as memory of the process, and a mapped file
            # that is truncated meanwhile would kill it with SIGBUS.
            with safe_open(path, framework="pt", backend="pread") as f:
                for _, name in inside:
                    stored = found[name].stored or name
                    tensor = f.get_tensor(stored)
                    checksums.check_tensor(path, stored, found[name].checksum, tensor)
                    use(name, tensor)
        except SafetensorError as e:
            raise ValueError(f"{path} could not be read: {e}; download or save it again") from None


# ---- writing -------------------------------------------------------------------------------------
def write(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write named tensors to an empty folder: model.safetensors, or shards and their index.

    The files are not flushed to the disk; atomic.replace_folder does that.

    Args:
        tensors: {name: tensor}. Views are written without a copy.
        folder: the empty folder.
        max_shard_bytes: largest size of the data in a shard. A larger tensor gets its own shard.
    """
    # Imported late, because the import reads the HF_* variables.
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda t: t.numel() * t.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for filename, names in plan.filename_to_tensors.items():
        path = folder / filename
        try:
            _write_shard(path, {n: tensors[n] for n in names})
        except OSError as e:  # a full disk, for example
            e.filename = e.filename or str(path)
            raise
    if plan.is_sharded:
        write_json(
            folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file with checksums, in the order of the safetensors library.

    The library itself would write the metadata in a random order, so that equal models would give
    different files.
    """
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    entries, at = {}, 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": checksums.SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    metadata = {"format": "pt"}  # transformers requires it
    hashes = {}
    with open(path, "wb") as file:
        file.write(header_bytes(entries, metadata, checksums.blank(names)))
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            hashes[name] = checksums.of_tensor(name, tensor)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.seek(0)
        file.write(header_bytes(entries, metadata, checksums.join(hashes)))


def header_bytes(
    entries: Mapping[str, dict], metadata: Mapping[str, str], hashes: str, align: int = 8
) -> bytes:
    """Return the bytes of a safetensors file before its data.

    A writer reserves the place with checksums.blank and writes the header again at the end.

    Args:
        entries: {tensor name: its dtype, shape and data_offsets}.
        hashes: the checksums, from checksums.join.
        align: the data begins at a multiple of this.
    """
    header = {"__metadata__": {**metadata, checksums.KEY: hashes}, **entries}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    return len(raw).to_bytes(8, "little") + raw


def write_json(path: Path, content: dict) -> None:
    """Write `content` to a new file inside a folder that is not visible yet."""
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: dict) -> str:
    """Return the JSON text of a model folder's config and index files."""
    return json.dumps(content, indent=2) + "\n"
