"""A packed model as a folder: config.json with `quantization_config` {"quant_method": "lamoe", "weights": FORMAT, "version"}, tokenizer files, and
packed-NNNNN.safetensors, one file per layer plus one for embedding, norm and head, in kernel layout. Files are memory-mapped: loading reads
headers only, processes share the pages, and a model larger than memory runs from disk.

Writing streams: one tensor is in memory at a time, a file is complete when it has its name, and files that are already there are kept, so an
interrupted `lamoe quantize` goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lamoe import packed
from lamoe.config import ModelConfig
from lamoe.convert import hf, shards
from lamoe.packed import PackedModel, Piece, Read

METHOD, VERSION = "lamoe", 1
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
    return found if isinstance(found, dict) else {}


def read_config(folder: str | Path) -> tuple[ModelConfig, str]:
    """(config, weight format) of a packed folder."""
    folder = Path(folder)
    said = _quantization(folder)
    if said.get("quant_method") != METHOD:
        raise ValueError(f"{folder} is not a model packed by lamoe: its config.json has no quantization_config of quant_method {METHOD!r}; make one with `lamoe quantize`")
    if said.get("version") != VERSION:
        raise ValueError(f"{folder} was packed in layout version {said.get('version')!r}, this lamoe reads {VERSION}; quantize the model again")
    if said.get("weights") not in packed.WEIGHTS:
        raise ValueError(f"{folder}/config.json says weights {said.get('weights')!r}; known: {', '.join(packed.WEIGHTS)}")
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain.pop("quantization_config")
    return ModelConfig.from_dict(plain), said["weights"]


def files(config: ModelConfig, weights: str) -> dict[str, list[Piece]]:
    """{file name: its pieces}."""
    out: dict[str, list[Piece]] = {}
    for piece in packed.pieces(config, weights):
        out.setdefault(f"packed-{piece.layer + 1:05d}.safetensors", []).append(piece)
    return out


# ---- reading ---------------------------------------------------------------------------------------------------------------
def load(folder: str | Path, threads: int = 0) -> PackedModel:
    """The packed model of a folder, memory-mapped. ValueError when a tensor is missing, extra or not of the config's size."""
    folder = Path(folder)
    config, weights = read_config(folder)
    elem, tensors = packed.element(weights), {}
    for name, pieces in files(config, weights).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}; the packed model is incomplete, run `lamoe quantize` again (it goes on where it stopped)")
        header = shards.read_header(path)
        want = {p.key: packed.piece_bytes(p, elem) for p in pieces} | {f"{p.key}.scale": 4 * p.count for p in pieces}
        wrong = [k for k in want.keys() | header.keys() if k not in header or k not in want or _bytes(header[k]) < want[k]]
        if wrong:
            raise ValueError(f"{path} does not hold the tensors of its config: {shards.few(sorted(wrong))} missing, extra or of another size")
        mapped = np.memmap(path, dtype=np.uint8, mode="c")  # private: nothing is ever written, and torch wants writable memory
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        for piece in pieces:
            begin, scale = start + header[piece.key].begin, start + header[f"{piece.key}.scale"].begin
            data = torch.from_numpy(mapped[begin : begin + want[piece.key]])
            tensors[piece.key] = data, mapped[scale : scale + 4 * piece.count].view(np.float32).tolist()
    return PackedModel(config, weights, tensors, threads)


def _bytes(found: shards.Found) -> int:
    return math.prod(found.shape) * shards.ITEM_BYTES[found.dtype]


# ---- writing ---------------------------------------------------------------------------------------------------------------
def write(source: str | Path, target: str | Path, weights: str, importance: Callable[[Piece, int], torch.Tensor | None] = lambda piece, i: None) -> Iterator[tuple[Piece, int]]:
    """Pack the model folder `source` into `target`: yields (piece, bytes) after each one, for progress; finished when exhausted. Goes on where an earlier
    call with the same source config and format stopped; ValueError when `target` holds something else."""
    folder, target = hf.resolve(source), Path(target)
    config = hf.read_config(folder)
    plan = files(config, weights)
    said = config.to_dict() | {"quantization_config": {"quant_method": METHOD, "weights": weights, "version": VERSION}}
    _check_target(target, said, set(plan))
    target.mkdir(parents=True, exist_ok=True)
    shards.write_json(target / "config.json", said)
    read = reader(folder, config)
    for name, pieces in plan.items():
        if (target / name).exists():  # it got its name when it was complete
            yield from ((p, packed.piece_bytes(p, packed.element(weights))) for p in pieces)
        else:
            yield from _write_file(target / name, pieces, weights, read, importance)
    for extra in hf.EXTRAS:
        if (folder / extra).is_file():
            shards.copy(folder / extra, target / extra)
    shards.sync(target)


def _check_target(target: Path, said: dict, names: set[str]) -> None:
    there = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a model is packed into a folder")
    if not there:
        return
    ours = names | {f".{n}.part" for n in names} | {"config.json", *hf.EXTRAS}
    strange = [n for n in there if n not in ours]
    config = target / "config.json"
    same = config.is_file() and json.loads(config.read_text(encoding="utf-8")) == said
    if strange or not same:
        raise ValueError(f"{target} is not empty and not the beginning of this packed model ({shards.few(strange or there)}); name another folder, or delete it")


def reader(folder: Path, config: ModelConfig) -> Read:
    """read(name) of a checkpoint folder: one stored tensor at a time. ValueError for a checkpoint that is not the config's."""
    from safetensors import safe_open

    found = shards.scan(folder)
    hf.check_tensors(folder, config, found)
    last: list = [None, None]  # the tensor read last: kv_b_proj is asked for by three pieces, head by head

    def read(name: str) -> torch.Tensor:
        if last[0] != name:
            with safe_open(found[name].path, framework="pt", backend="pread") as f:
                last[:] = name, f.get_tensor(name)
        return last[1]

    return read


def _write_file(path: Path, pieces: list[Piece], weights: str, read: Read, importance) -> Iterator[tuple[Piece, int]]:
    elem = packed.element(weights)
    sizes = [packed.piece_bytes(p, elem) for p in pieces]
    header, at = {}, 0
    for piece, size in zip(pieces, sizes):
        size += -size % _ALIGN  # safetensors has no holes, so a tensor is filled up itself
        header[piece.key] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    for piece in pieces:
        header[f"{piece.key}.scale"] = {"dtype": "F32", "shape": [piece.count], "data_offsets": [at, at + 4 * piece.count]}
        at += 4 * piece.count
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        scales = []
        for piece, size in zip(pieces, sizes):
            for data, scale in packed.build(piece, read, elem, importance):
                f.write(data.numpy())
                scales.append(scale)
            f.write(b"\0" * (-size % _ALIGN))
            yield piece, size
        f.write(np.array(scales, dtype="<f4").tobytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    shards.sync(path.parent)
