"""A packed model as a folder: config.json with `quantization_config` {"quant_method": "lamoe", "weights": FORMAT, "head": FORMAT of the output head
(folders of before have none: that of the weights), "version", "source": what it was made from, "calibration": the rows it was calibrated on},
tokenizer files, and packed-NNNNN.safetensors in kernel layout, one for each layer and one for embedding, norm and head. Files are memory-mapped:
loading reads headers only, processes share the pages, and a model larger than memory runs from disk.

Writing streams: one tensor is in memory at a time, a file is complete when it has its name, and files that are already there are kept, so an
interrupted `lamoe quantize` goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.packed import PackedModel, Piece, Read, Weigh
from lamoe.checkpoints import atomic, hf, lock, shards
from lamoe.model import accounting
from lamoe.model.config import ModelConfig

METHOD, VERSION = "lamoe", 1
_CONFIG_PART = ".config.json.part"
_ALIGN = 64  # bytes; tiles are read in cache lines


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds a packed model."""
    return _quantization(Path(folder)).get("quant_method") == METHOD


def _quantization(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > shards.MAX_JSON_BYTES:
        return {}
    try:
        found = json.loads(path.read_bytes()).get("quantization_config")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {"head": found.get("weights")} | found if isinstance(found, dict) else {}


def read_config(folder: str | Path) -> tuple[ModelConfig, str, str]:
    """(config, weight format, format of the output head) of a packed folder."""
    folder = Path(folder)
    said = _quantization(folder)
    if said.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is not a model packed by lamoe: its config.json has no quantization_config of quant_method {METHOD!r}; make one with `lamoe quantize`"
        )
    if said.get("version") != VERSION:
        raise ValueError(
            f"{folder} was packed in layout version {said.get('version')!r}, this lamoe reads {VERSION}; quantize the model again"
        )
    for what in ("weights", "head"):
        if said.get(what) not in packed.WEIGHTS:
            raise ValueError(
                f"{folder}/config.json says {what} {said.get(what)!r}; known: {', '.join(packed.WEIGHTS)}"
            )
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain.pop("quantization_config")
    try:
        return ModelConfig.from_dict(plain), said["weights"], said["head"]
    except ValueError as e:
        raise ValueError(f"{folder / 'config.json'}: {e}") from None


def any_config(folder: str | Path) -> ModelConfig:
    """The config of a model folder, packed or not."""
    return read_config(folder)[0] if is_packed(folder) else hf.read_config(folder)


def bits(folder: str | Path) -> float:
    """Bits of a packed folder for each weight of the model, everything included."""
    config, weights, head = read_config(folder)
    return (
        8
        * sum(
            packed.piece_bytes(p, packed.element(weights))
            for p in packed.pieces(config, weights, head)
        )
        / accounting.parameters(config).total
    )


def files(config: ModelConfig, weights: str, head: str) -> dict[str, list[Piece]]:
    """{file name: its pieces}, layers first: calibration reaches the head last."""
    out: dict[str, list[Piece]] = {}
    for piece in sorted(packed.pieces(config, weights, head), key=lambda p: p.layer < 0):
        out.setdefault(_name(piece.layer), []).append(piece)
    return out


def _name(layer: int) -> str:
    return f"packed-{layer + 1:05d}.safetensors"


def stored_bytes(folder: Path) -> int:
    """Of the weights of a packed folder."""
    return sum(path.stat().st_size for path in folder.glob("packed-*.safetensors"))


# ---- reading ---------------------------------------------------------------------------------------------------------------
def load(folder: str | Path, threads: int = 0, free: int | None = None) -> PackedModel:
    """The packed model of a folder, memory-mapped; in huge pages (where the file system can) when it takes less than `free`
    bytes. ValueError when a file or a tensor is missing, extra, misplaced or not of the config's size."""
    folder = Path(folder)
    config, weights, head = read_config(folder)
    there, count = (
        {path.name for path in folder.glob("packed-*.safetensors")},
        config.num_hidden_layers + 1,
    )
    names = [
        _name(i - 1) for i in range(min(count, len(there) + 1))
    ]  # enough to miss one: the config may name a billion
    if absent := [name for name in names if name not in there]:
        raise ValueError(
            f"{folder} has {len(there)} packed files and its config.json names {count} ({absent[0]} is missing); the packed model is incomplete, "
            "run `lamoe quantize` again (it goes on where it stopped)"
        )
    if surplus := sorted(there.difference(names)):
        raise ValueError(
            f"{folder} holds {shards.few(surplus)} beside the {count} files that its config.json names for {count - 1} layers: copies, "
            "or of another model, or config.json is. Delete what does not belong there"
        )
    # A model larger than memory reads its experts one by one, and two megabytes for each page fault would be too many.
    huge = free is not None and stored_bytes(folder) < free
    elem, tensors = packed.element(weights), {}
    for name, pieces in files(config, weights, head).items():
        path, header = folder / name, _header(folder / name, pieces, elem)
        mapped = np.memmap(
            path, dtype=np.uint8, mode="c"
        )  # private: nothing is ever written, and torch wants writable memory
        if huge:
            native.huge_pages(mapped._mmap)
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        for piece in pieces:
            begin, scale = (
                start + header[piece.key].begin,
                start + header[f"{piece.key}.scale"].begin,
            )
            scales = mapped[scale : scale + 4 * piece.count].view(np.float32)
            if begin % _ALIGN or not np.isfinite(scales).all():
                raise ValueError(
                    f"{path}: {piece.key!r} does not lie at a multiple of {_ALIGN} bytes, or has scales that are no numbers; quantize the model again"
                )
            tensors[piece.key] = (
                torch.from_numpy(mapped[begin : begin + packed.piece_bytes(piece, elem)]),
                scales.tolist(),
            )
    return PackedModel(config, weights, tensors, threads, head)


def _header(path: Path, pieces: list[Piece], elem: str) -> dict[str, shards.Found]:
    """The header of a file that holds exactly these pieces. ValueError for any other."""
    header = shards.read_header(path)
    want = {p.key: ("U8", _padded(packed.piece_bytes(p, elem))) for p in pieces} | {
        f"{p.key}.scale": ("F32", p.count) for p in pieces
    }
    wrong = [
        k
        for k in want.keys() | header.keys()
        if k not in header
        or k not in want
        or (header[k].dtype, math.prod(header[k].shape)) != want[k]
    ]
    if wrong:
        raise ValueError(
            f"{path} does not hold the tensors of its config: {shards.few(sorted(wrong))} missing, extra or of another size"
        )
    return header


def _padded(size: int) -> int:
    return size + -size % _ALIGN  # safetensors has no holes, so a tensor is filled up itself


# ---- writing ---------------------------------------------------------------------------------------------------------------
def write(
    source: str | Path,
    target: str | Path,
    weights: str,
    weigh: Weigh = lambda piece, i: None,
    calibration: str | None = None,
    head: str | None = None,
) -> Iterator[tuple[Piece, int]]:
    """Pack the model folder `source` into `target`: yields (piece, bytes) after each one, for progress; finished when exhausted. `head`: another format for the output
    head (packed.pieces). `calibration` names what `weigh` comes from; it is asked layer by layer. Goes on where an earlier call with the same weights, formats and
    calibration stopped; ValueError when `target` holds something else."""
    if native.lib is None:
        raise ValueError(
            f"packing needs the compiled kernels, which are not there ({native.missing()}); install lamoe with a C++ compiler"
        )
    folder, target = hf.resolve(source), Path(target)
    if is_packed(folder):
        raise ValueError(f"{folder} is a packed model already; quantize the model it was made from")
    config, head = hf.read_config(folder), head or weights
    read = reader(folder, config)
    plan = files(config, weights, head)
    said = {
        "quant_method": METHOD,
        "weights": weights,
        "head": head,
        "version": VERSION,
        "source": _source(folder),
        "calibration": calibration,
    }
    _check_target(target, said, set(plan))
    target.mkdir(parents=True, exist_ok=True)
    # Complete or absent: the call that resumes would take half a config for another model.
    atomic.write_text(
        target / "config.json",
        shards.json_text(config.to_dict() | {"quantization_config": said}),
        temporary=target / _CONFIG_PART,
    )
    for extra in hf.EXTRAS:
        if (folder / extra).is_file():
            shutil.copyfile(folder / extra, target / extra)
            atomic.sync(target / extra)
    for name, pieces in plan.items():
        if (
            target / name
        ).exists():  # it got its name when it was complete; what happened to it since is another matter
            try:
                _header(target / name, pieces, packed.element(weights))
            except ValueError as e:
                raise ValueError(f"{e}. Delete this file; the others are kept") from None
            yield from ((p, packed.piece_bytes(p, packed.element(weights))) for p in pieces)
        else:
            yield from _write_file(target / name, pieces, weights, read, weigh)
    atomic.sync(target)


def _source(folder: Path) -> str:
    """Names a checkpoint by its sizes and samples of its bytes, so that two checkpoints of one run are not mixed."""
    digest = hashlib.sha256()
    for path in sorted({f.path for f in shards.scan(folder).values()}):
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            for i in range(64):
                f.seek(i * max(0, size - 4096) // 63)
                digest.update(f.read(4096))
    return digest.hexdigest()[:16]


def _check_target(target: Path, said: dict, names: set[str]) -> None:
    there = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is packed into a folder")
    if not there:
        return
    ours = names | {f".{n}.part" for n in names} | {_CONFIG_PART, "config.json", *hf.EXTRAS}
    strange, found = [n for n in there if n not in ours], _quantization(target)
    if strange or (found != said and there != [_CONFIG_PART]):
        other = (
            ""
            if strange or found.get("quant_method") != METHOD
            else "; "
            + ", ".join(
                f"{k} was {found.get(k)}, is {v}" for k, v in said.items() if found.get(k) != v
            )
        )
        raise ValueError(
            f"{target} is not empty and not the beginning of this packed model ({shards.few(strange or there)}{other}); name another folder, or delete it"
        )


def reader(folder: Path, config: ModelConfig) -> Read:
    """read(name) of a checkpoint folder: one stored tensor at a time. ValueError for a checkpoint that is not the config's."""
    from safetensors import safe_open

    found = shards.scan(folder)
    hf.check_tensors(folder, config, found)
    last: list = [
        None,
        None,
    ]  # the tensor read last: kv_b_proj is asked for by three pieces, head by head

    def read(name: str) -> torch.Tensor:
        if last[0] != name:
            with safe_open(found[name].path, framework="pt", backend="pread") as f:
                last[:] = name, f.get_tensor(name)
        return last[1]

    return read


def _write_file(
    path: Path, pieces: list[Piece], weights: str, read: Read, weigh: Weigh
) -> Iterator[tuple[Piece, int]]:
    elem = packed.element(weights)
    sizes = [packed.piece_bytes(p, elem) for p in pieces]
    header, at = {}, 0
    for piece, size in zip(pieces, sizes):
        header[piece.key] = {
            "dtype": "U8",
            "shape": [_padded(size)],
            "data_offsets": [at, at + _padded(size)],
        }
        at += _padded(size)
    for piece in pieces:
        header[f"{piece.key}.scale"] = {
            "dtype": "F32",
            "shape": [piece.count],
            "data_offsets": [at, at + 4 * piece.count],
        }
        at += 4 * piece.count
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    part = path.with_name(f".{path.name}.part")
    with open(part, "ab") as f:
        if not lock.try_lock(f):
            raise ValueError(f"another process is writing {path.parent}; let it finish")
        if not part.exists() or not os.path.samestat(
            os.fstat(f.fileno()), part.stat()
        ):  # it has finished between our opening and locking
            raise ValueError(
                f"another process was writing {path.parent}; call again, and what it made is kept"
            )
        f.truncate(0)
        f.write(len(text).to_bytes(8, "little") + text)
        scales = []
        for piece, size in zip(pieces, sizes):
            for data, scale in packed.build(piece, read, elem, weigh):
                f.write(data.numpy())
                scales.append(scale)
            f.write(b"\0" * (_padded(size) - size))
            yield piece, size
        f.write(np.array(scales, dtype="<f4").tobytes())
        f.flush()
        os.fsync(f.fileno())
        os.replace(part, path)  # before the lock goes
    atomic.sync(path.parent)
