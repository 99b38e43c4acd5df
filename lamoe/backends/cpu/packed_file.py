"""A packed model as a folder: written by `lamoe quantize`, memory-mapped when it is loaded.

The folder holds tokenizer files, `packed-NNNNN.safetensors` with tensors in kernel layout (one file
per layer, one for embedding, norm and head) and config.json with a `quantization_config`:

    quant_method   "lamoe"
    version        version of the layout
    weights, head  storage formats; `head` is absent in older folders, where it equals `weights`
    source         identifies the checkpoint that was packed
    calibration    identifies the calibration text, or null without calibration

Loading maps the files. Processes share the mapped pages, and a model larger than memory runs from
disk. The checksums of the tensors (checkpoints/checksums.py) are verified while a small model
loads, and of a larger one in the background. If a model is larger than memory, only `lamoe doctor`
verifies it.

Writing keeps only one tensor in memory at a time. A file gets its final name when it is complete,
and complete files are kept. An interrupted `lamoe quantize` therefore continues where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch

from lamoe import atomic
from lamoe.backends.base import Formats
from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.cpu.packed import PackedTensor, Read, Weigh
from lamoe.checkpoints import checksums, hf, lock, shards, side_files
from lamoe.checkpoints.mapped import MappedFiles
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.text.json_file import read_json

METHOD, VERSION = "lamoe", 1
_CONFIG_PART = ".config.json.part"
# Up to this size a model is verified before it runs, which takes about a quarter of a second.
_VERIFY_FIRST_BYTES = 1 << 30
_ALIGN = 64  # bytes of one cache line; the kernels read whole lines
_SOURCE_SAMPLES, _SOURCE_SAMPLE_BYTES = 64, 4096


def is_packed(folder: str | Path) -> bool:
    """Return whether a folder holds a packed model, by the `quant_method` in its config.json."""
    return _quantization(Path(folder)).get("quant_method") == METHOD


def _quantization(folder: Path) -> dict:
    """Return the `quantization_config` of a folder's config.json, or {} if it has none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        found = read_json(path).get("quantization_config")
    except ValueError:
        return {}
    return {"head": found.get("weights")} | found if isinstance(found, dict) else {}


def read_config(folder: str | Path) -> tuple[ModelConfig, Formats]:
    """Return the config of a packed folder and the formats of weights and head.

    Raises:
        ValueError: if the folder is not a packed model of this version, or its config is invalid.
    """
    folder = Path(folder)
    quantization = _quantization(folder)
    if quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is not a model packed by lamoe: its config.json has no quantization_config "
            f"of quant_method {METHOD!r}; pack the model with `lamoe quantize`"
        )
    if quantization.get("version") != VERSION:
        raise ValueError(
            f"{folder} was packed in layout version {quantization.get('version')!r}, but "
            f"this lamoe reads version {VERSION}; quantize the model again"
        )
    for key in ("weights", "head"):
        if quantization.get(key) not in tuple(native.FORMATS):  # a list would not be hashable
            raise ValueError(
                f"{folder}/config.json says {key} {quantization.get(key)!r}; "
                f"known: {', '.join(native.FORMATS)}"
            )
    plain = read_json(folder / "config.json")
    plain.pop("quantization_config")
    try:
        config = ModelConfig.from_dict(plain)
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from None
    return config, Formats(quantization["weights"], quantization["head"])


def any_config(folder: str | Path) -> ModelConfig:
    """Read config.json of a model folder, packed or not, and return it as a config."""
    return read_config(folder)[0] if is_packed(folder) else hf.read_config(folder)


def bits_per_weight(folder: str | Path) -> float:
    """Return the mean stored bits per weight of a packed model, scales included."""
    config, formats = read_config(folder)
    element = packed.element_format(formats)
    tensors = packed.packed_tensors(config, formats)
    num_bytes = sum(packed.packed_bytes(t, element) for t in tensors)
    return 8 * num_bytes / accounting.parameters(config).total


def files(config: ModelConfig, formats: Formats) -> dict[str, list[PackedTensor]]:
    """Return {file name: tensors in this file}, in the order of writing.

    The files of the layers come first, because calibration reaches the head last.
    """
    out: dict[str, list[PackedTensor]] = {}
    for tensor in sorted(packed.packed_tensors(config, formats), key=lambda t: t.layer < 0):
        out.setdefault(_file_name(tensor.layer), []).append(tensor)
    return out


def _file_name(layer: int) -> str:
    return f"packed-{layer + 1:05d}.safetensors"


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a packed folder."""
    return sum(path.stat().st_size for path in folder.glob("packed-*.safetensors"))


# ---- reading -------------------------------------------------------------------------------------
def load(folder: str | Path, threads: int = 0, available: int | None = None) -> CpuBackend:
    """Load the packed model of a folder, memory-mapped.

    Args:
        folder: a folder that `write` has made.
        threads: number of threads of the kernels. 0 means torch's number of threads.
        available: free memory in bytes. Huge pages are requested only if the model fits into it.
            None requests no huge pages.

    Raises:
        ValueError: if a file or tensor is missing, extra, misplaced, of the wrong size, or does not
            match its checksum.
    """
    folder = Path(folder)
    config, formats = read_config(folder)
    headers = read_headers(folder)
    checksums.warn_of_changes(folder)
    # Request huge pages only for a model that fits into memory. A larger model reads single experts
    # from disk, and 2 MiB per page fault would be too much.
    size = stored_bytes(folder)
    huge = available is not None and size < available
    mapped_files = MappedFiles()
    element = packed.element_format(formats)
    tensors: dict[str, tuple[torch.Tensor, list[float]]] = {}
    for name, wanted in files(config, formats).items():
        path, header = folder / name, headers[name]
        mapped = mapped_files.open(path, header)
        if huge:
            native.request_huge_pages(mapped._mmap)  # type: ignore[attr-defined]
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        for tensor in wanted:
            begin = start + header[tensor.key].begin
            end = begin + packed.packed_bytes(tensor, element)
            scale_begin = start + header[f"{tensor.key}.scale"].begin
            scales = mapped[scale_begin : scale_begin + 4 * tensor.num_matrices].view(np.float32)
            if begin % _ALIGN or not np.isfinite(scales).all():
                raise ValueError(
                    f"{path}: {tensor.key!r} does not lie at a multiple of {_ALIGN} bytes, or has "
                    "scales that are not finite; quantize the model again"
                )
            tensors[tensor.key] = torch.from_numpy(mapped[begin:end]), scales.tolist()
    if size <= _VERIFY_FIRST_BYTES:
        mapped_files.verify()
    elif huge:
        mapped_files.verify_in_background()
    return CpuBackend(config, formats, tensors, threads, mapped_files)


def read_headers(folder: str | Path) -> dict[str, dict[str, shards.Found]]:
    """Return {file name: its header}, after checking that the files are those of config.json.

    Raises:
        ValueError: if a file or tensor is missing, extra or of the wrong size.
    """
    config, formats = read_config(folder)
    _check_file_names(Path(folder), config)
    element = packed.element_format(formats)
    return {
        name: _checked_header(Path(folder) / name, wanted, element)
        for name, wanted in files(config, formats).items()
    }


def _check_file_names(folder: Path, config: ModelConfig) -> None:
    found = {path.name for path in folder.glob("packed-*.safetensors")}
    count = config.num_hidden_layers + 1
    # The config may claim a billion layers. List only as many names as it takes to miss one.
    names = [_file_name(i - 1) for i in range(min(count, len(found) + 1))]
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{folder} has {len(found)} packed files, but its config.json needs {count} "
            f"({missing[0]} is missing). The packed model is incomplete; run `lamoe quantize` "
            "again, which continues where it stopped"
        )
    if surplus := sorted(found.difference(names)):
        raise ValueError(
            f"{folder} holds {shards.few(surplus)} beside the {count} files that its config.json "
            f"needs for {count - 1} layers. Either these are copies or files of another model, or "
            "config.json is that of another model; delete the files of the other model"
        )


def _checked_header(
    path: Path, wanted: list[PackedTensor], element: str
) -> dict[str, shards.Found]:
    """Return the header of a packed file after checking that it holds exactly the wanted tensors.

    Raises:
        ValueError: if a tensor is missing, extra or of another size.
    """
    header = shards.read_header(path)
    want = {t.key: ("U8", _padded(packed.packed_bytes(t, element))) for t in wanted}
    want |= {f"{t.key}.scale": ("F32", t.num_matrices) for t in wanted}
    wrong = [
        key
        for key in want.keys() | header.keys()
        if key not in header
        or key not in want
        or (header[key].dtype, math.prod(header[key].shape)) != want[key]
    ]
    if wrong:
        raise ValueError(
            f"{path} does not hold the tensors that config.json needs: "
            f"{shards.few(sorted(wrong))} missing, extra or of another size; quantize the model "
            "again"
        )
    return header


def _padded(size: int) -> int:
    """Round a size in bytes up to a multiple of _ALIGN.

    The padding becomes part of the tensor, because safetensors allows no holes between tensors.
    """
    return size + -size % _ALIGN


# ---- writing -------------------------------------------------------------------------------------
def write(
    source: str | Path,
    target: str | Path,
    formats: Formats,
    weigh: Weigh = lambda tensor, i: None,
    calibration: str | None = None,
) -> Iterator[tuple[PackedTensor, int]]:
    """Pack the model folder `source` into `target`.

    Yields (tensor, its packed bytes) after each tensor. The folder is complete when the iterator
    ends. A call with the same source, formats and calibration continues where an earlier call
    stopped.

    Args:
        source: the folder of the model to pack.
        target: the folder to write.
        formats: formats of weights and head.
        weigh: returns importance and feedback of a matrix (see calibrate.py). It is called in layer
            order.
        calibration: identifies the text from which `weigh` was computed.

    Raises:
        ValueError: if the compiled kernels are missing, or `target` holds something else.
    """
    if native.lib is None:
        raise ValueError(
            "packing needs the compiled kernels, which could not be imported "
            f"({native.missing()}); install lamoe with a C++ compiler"
        )
    folder, target = hf.resolve(source), Path(target)
    if is_packed(folder):
        raise ValueError(f"{folder} is a packed model already; quantize its original instead")
    config = hf.read_config(folder)
    read, element = reader(folder, config), packed.element_format(formats)
    plan = files(config, formats)
    quantization = {
        "quant_method": METHOD,
        "weights": formats.weights,
        "head": formats.head or formats.weights,
        "version": VERSION,
        "source": _source_digest(folder),
        "calibration": calibration,
    }
    _check_target(target, quantization, set(plan))
    target.mkdir(parents=True, exist_ok=True)
    _write_side_files(folder, target, config.to_dict() | {"quantization_config": quantization})
    for name, tensors in plan.items():
        if (target / name).exists():  # only a complete file has its final name
            try:
                _checked_header(target / name, tensors, element)
            except ValueError as e:
                raise ValueError(f"{e}. Delete this file; complete files are kept") from None
            yield from ((t, packed.packed_bytes(t, element)) for t in tensors)
        else:
            yield from _write_file(target / name, tensors, element, read, weigh)
    content = shards.json_text(checksums.of_folder(target))
    atomic.write_text(target / checksums.FILE, content)


def _write_side_files(folder: Path, target: Path, config: dict) -> None:
    """Write config.json atomically, and copy the tokenizer files.

    A half-written config.json would make the folder look like another model to a later call.
    """
    text = shards.json_text(config)
    atomic.write_text(target / "config.json", text, temporary=target / _CONFIG_PART)
    side_files.copy(folder, target)


def _source_digest(folder: Path) -> str:
    """Return a digest that identifies a checkpoint, from file sizes and samples of its bytes.

    It keeps two checkpoints of one training run from being mixed in one packed folder.
    """
    digest = hashlib.sha256()
    for path in sorted({f.path for f in shards.scan(folder).values()}):
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            last = max(0, size - _SOURCE_SAMPLE_BYTES)
            for i in range(_SOURCE_SAMPLES):
                f.seek(i * last // (_SOURCE_SAMPLES - 1))
                digest.update(f.read(_SOURCE_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _check_target(target: Path, quantization: dict, names: set[str]) -> None:
    """Raise ValueError unless `target` is empty or an unfinished copy of this packed model."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is packed into a folder")
    present = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if not present or present == [_CONFIG_PART]:
        return
    ours = names | {f".{n}.part" for n in names} | {_CONFIG_PART, "config.json", checksums.FILE}
    strange = [n for n in present if n not in ours and not side_files.is_carried(target / n)]
    found = _quantization(target)
    if not strange and found == quantization:
        return
    differences = ""
    if not strange and found.get("quant_method") == METHOD:
        changed = {k: v for k, v in quantization.items() if found.get(k) != v}
        differences = "; " + ", ".join(
            f"{k} was {found.get(k)}, is {v}" for k, v in changed.items()
        )
    raise ValueError(
        f"{target} is not empty and holds no unfinished copy of this packed model "
        f"({shards.few(strange or present)}{differences}); name another folder, or delete this one"
    )


def reader(folder: Path, config: ModelConfig) -> Read:
    """Return a function that reads a tensor of a checkpoint folder, given its stored name.

    The function raises ValueError if the tensor does not match its checksum.

    Raises:
        ValueError: if the stored tensors do not fit the config.
    """
    from safetensors import safe_open

    found = hf.named_as_in_model(config, shards.scan(folder))
    hf.check_tensors(folder, config, found)
    checksums.warn_of_changes(folder)
    # Keep the tensor that was read last, because three packed tensors in a row read kv_b_proj.
    last_name, last_tensor = "", torch.empty(0)

    def read(name: str) -> torch.Tensor:
        nonlocal last_name, last_tensor
        if last_name != name:
            path, checksum, stored = found[name].path, found[name].checksum, found[name].stored
            with safe_open(path, framework="pt", backend="pread") as f:
                last_name, last_tensor = name, f.get_tensor(stored or name)
            checksums.check_tensor(path, stored or name, checksum, last_tensor)
        return last_tensor

    return read


def _write_file(
    path: Path, tensors: list[PackedTensor], element: str, read: Read, weigh: Weigh
) -> Iterator[tuple[PackedTensor, int]]:
    sizes = [packed.packed_bytes(t, element) for t in tensors]
    part = path.with_name(f".{path.name}.part")
    # Not "wb": the file may be that of another process, until the lock says otherwise.
    with (
        atomic.naming(path, sum(map(_padded, sizes))),
        open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as f,
    ):
        _lock(f, part, path.parent)
        f.truncate(0)
        header = _header(tensors, sizes)
        f.write(shards.header_bytes(header, {}, checksums.blank(header), _ALIGN))
        hashes, all_scales = {}, []
        for tensor, size in zip(tensors, sizes):
            digest = checksums.hasher(tensor.key, "U8", header[tensor.key]["shape"])
            for data, scale in packed.pack_tensor(tensor, read, element, weigh):
                f.write(data.numpy().data)
                digest.update(data.numpy().data)
                all_scales.append(scale)
            padding = b"\0" * (_padded(size) - size)
            f.write(padding)
            digest.update(padding)
            hashes[tensor.key] = digest.hexdigest()
            yield tensor, size
        at = 0
        for tensor in tensors:
            scales = torch.tensor(all_scales[at : at + tensor.num_matrices])
            at += tensor.num_matrices
            f.write(scales.numpy().astype("<f4").data)
            name = f"{tensor.key}.scale"
            hashes[name] = checksums.of_tensor(name, scales)
        f.seek(0)
        f.write(shards.header_bytes(header, {}, checksums.join(hashes), _ALIGN))
        f.flush()
        os.fsync(f.fileno())
        os.replace(part, path)  # while the lock is held
    atomic.sync(path.parent)


def _header(tensors: list[PackedTensor], sizes: list[int]) -> dict[str, dict]:
    """Return the tensors of a safetensors file that holds all matrices, then all scales."""
    header, at = {}, 0
    for tensor, size in zip(tensors, sizes):
        end = at + _padded(size)
        header[tensor.key] = {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]}
        at = end
    for tensor in tensors:
        end = at + 4 * tensor.num_matrices
        header[f"{tensor.key}.scale"] = {
            "dtype": "F32",
            "shape": [tensor.num_matrices],
            "data_offsets": [at, end],
        }
        at = end
    return header


def _lock(f: IO[bytes], part: Path, folder: Path) -> None:
    """Lock a file for writing.

    Raises:
        ValueError: if another process is writing the file.
    """
    if not lock.try_lock(f):
        raise ValueError(f"another process is writing {folder}; wait until it ends")
    # The other process may have renamed the file between our opening and locking it.
    if not part.exists() or not os.path.samestat(os.fstat(f.fileno()), part.stat()):
        raise ValueError(
            f"another process was writing {folder}; run the command again, which keeps its files"
        )
