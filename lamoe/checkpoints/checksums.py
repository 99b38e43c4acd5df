"""Checksums of the files that lamoe writes, so that no damaged byte goes unnoticed.

Two places hold XXH3 hashes of 64 bits, as hexadecimal digits:

- the metadata of a safetensors file, under "lamoe.xxh3": one hash per tensor, separated by spaces,
  in the order of the sorted names. A hash covers name, dtype, shape and data.
- checksums.json, for the other files in a model folder. People edit these files on purpose, so
  loading only warns if one of them has changed. `lamoe doctor MODEL` reports it as a problem.

Files without checksums load without a check: those of other programs and of earlier versions.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

log = logging.getLogger("lamoe.checkpoints")

KEY = "lamoe.xxh3"
FILE = "checksums.json"
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_DIGITS = 16
_MAX_BYTES = 1 << 20  # a larger checksums.json is not ours


def enabled() -> bool:
    """Whether checksums are verified. LAMOE_VERIFY=0 turns this off."""
    return os.environ.get("LAMOE_VERIFY") != "0"


# ---- tensors -------------------------------------------------------------------------------------
def hasher(name: str, dtype: str, shape: Iterable[int]) -> Any:
    """Return an XXH3 object to which only the data of a tensor must be added.

    Args:
        dtype: name of the dtype in safetensors, for example "BF16".
    """
    head = f"{name} {dtype} {' '.join(map(str, shape))}\n"
    return xxhash.xxh3_64(head.encode("utf-8", "surrogatepass"))


def of_tensor(name: str, tensor: torch.Tensor) -> str:
    """Return the checksum of a contiguous tensor in CPU memory."""
    digest = hasher(name, SAFETENSORS_DTYPES[tensor.dtype], tensor.shape)
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def join(checksums: Mapping[str, str]) -> str:
    """Return the metadata value for {tensor name: checksum}."""
    return " ".join(checksums[name] for name in sorted(checksums))


def blank(names: Iterable[str]) -> str:
    """Return a value as long as that of `join`, to reserve its place in a header."""
    return join(dict.fromkeys(names, "0" * _DIGITS))


def split(path: Path, value: str | None, names: Iterable[str]) -> dict[str, str]:
    """Return {tensor name: checksum} from the metadata value of a file, or {} if it has none.

    Raises:
        ValueError: if the value is damaged.
    """
    if value is None:
        return {}
    names, found = sorted(names), value.split(" ")
    if len(found) != len(names) or not all(re.fullmatch(r"[0-9a-f]{16}", c) for c in found):
        raise ValueError(
            f"{path}: the checksums in its header do not belong to its {len(names)} tensors; "
            f"the file is damaged. {ADVICE}"
        )
    return dict(zip(names, found))


ADVICE = (
    "Restore it from a copy, or make it again. If another program has changed the tensors and "
    "kept the old checksums, LAMOE_VERIFY=0 skips this check"
)


def check_tensor(path: Path, name: str, checksum: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if a tensor that was read from `path` does not have its checksum."""
    if checksum and enabled() and of_tensor(name, tensor) != checksum:
        raise damaged(path, name)


def damaged(path: Path, name: str) -> ValueError:
    """Return the error for a tensor that does not match its checksum."""
    return ValueError(
        f"{path} is damaged: the tensor {name!r} does not match its checksum. {ADVICE}"
    )


# ---- other files ---------------------------------------------------------------------------------
def of_folder(folder: Path) -> dict[str, Any]:
    """Return the content of checksums.json: all files of a model folder but weights."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    files = {name: _of_file(folder / name) for name in names if _is_covered(name)}
    return {"hash": "xxh3_64", "files": files}


def _is_covered(name: str) -> bool:
    """Whether checksums.json may name a file. Weights have checksums of their own."""
    parts = name.split("/")
    is_plain = all(re.fullmatch(r"[^.\\/:\0][^\\/:\0]*", part) for part in parts)
    return is_plain and name != FILE and not name.endswith(".safetensors")


def _of_file(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "xxh3": xxhash.xxh3_64(data).hexdigest()}


def changed_files(folder: Path) -> list[str]:
    """Return a sentence for each file that differs from its entry in checksums.json."""
    path = folder / FILE
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return []
    try:
        content = json.loads(path.read_bytes())
        entries = [
            (name, entry["bytes"], entry["xxh3"]) for name, entry in content["files"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{path} is damaged and cannot be read; delete it"]
    problems = []
    for name, size, checksum in entries:
        file = folder / name
        if not _is_covered(name):
            problems.append(f"{path} names {name!r}, which it does not cover; delete it")
        elif not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != size or _of_file(file)["xxh3"] != checksum:
            problems.append(
                f"{file} has changed since it was written. If this was not on purpose, restore it; "
                f"if it was, delete its entry in {FILE}"
            )
    return problems


def warn_of_changes(folder: Path) -> None:
    """Log a warning for each file that differs from its entry in checksums.json."""
    for problem in changed_files(folder) if enabled() else ():
        log.warning(problem)
