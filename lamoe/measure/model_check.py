"""`lamoe doctor MODEL`: read every byte of a model and report what is damaged.

Files that lamoe wrote have checksums. Of other files, the structure and the values are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lamoe.backends.cpu import packed_file
from lamoe.checkpoints import checksums, foreign, gguf, hf, mapped, runs, shards
from lamoe.engine import prefix_file
from lamoe.model.accounting import human_bytes
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import data


def examine(model: str | Path) -> dict[str, Any]:
    """Check a run folder, model folder (packed or not), GGUF file, saved prefix or hub id.

    Returns:
        JSON-compatible facts, with the keys "problems", "notes" and "verdict".
    """
    check = _Check(model)
    check.attempt(check.run)
    if check.num_tensors and not check.num_verified and check.kind != "GGUF file":
        check.notes.append(
            "its tensors have no checksums, so only structure and values were checked; "
            "`lamoe convert` and `lamoe quantize` write checksums"
        )
    return {
        "model": str(model),
        "kind": check.kind or "not a model",
        "tensors": check.num_tensors,
        "with_checksum": check.num_verified,
        "bytes": check.num_bytes,
        "problems": check.problems,
        "notes": check.notes,
        "verdict": "damaged" if check.problems else "good",
    }


def render(found: dict[str, Any]) -> str:
    """Format the facts as lines of text. The last line is the verdict."""
    rows = [
        ("model", f"{found['model']} ({found['kind']})"),
        (
            "read",
            f"{found['tensors']} tensors, {human_bytes(found['bytes'])}; "
            f"{found['with_checksum']} compared with their checksum",
        ),
        *(("note", n) for n in found["notes"]),
        *(("problem", p) for p in found["problems"]),
        ("verdict", found["verdict"]),
    ]
    return "\n".join(f"{name:9} {text}" for name, text in rows)


class _Check:
    """The state of one examination."""

    def __init__(self, model: str | Path):
        self.model, self.kind = model, ""
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.num_tensors = self.num_verified = self.num_bytes = 0

    def attempt(self, work: Callable[..., object], *args) -> None:
        """Call `work`, and note its error as a problem."""
        try:
            work(*args)
        except (ValueError, OSError) as e:
            self.problems.append(str(e))

    def run(self) -> None:
        path = Path(self.model).expanduser()
        if not checksums.enabled():
            self.problems.append("LAMOE_VERIFY=0 turns the comparison of checksums off; unset it")
        if foreign.is_gguf(path):
            self.kind = "GGUF file"
            self.gguf(path)
        elif path.is_file():
            self.prefix(path)
        elif (path / runs.RECIPE).exists():
            self.kind = "run folder"
            for folder in runs.folders(path):
                self.attempt(runs.verify, folder)
            if (path / "data").is_dir():
                self.attempt(data.verify, path / "data")
            self.folder(runs.model_of_run(path))
        else:
            self.folder(hf.resolve(self.model))

    def gguf(self, path: Path) -> None:
        for name, tensor in gguf.load(gguf.read(path)).named_parameters():
            self.num_tensors += 1
            self.values(f"{path}: {name!r}", tensor)
        self.num_bytes = path.stat().st_size

    def prefix(self, path: Path) -> None:
        found = shards.read_header(path)
        if not prefix_file.is_cache(path):
            raise ValueError(f"{path} is neither a GGUF file nor a saved prefix")
        self.kind = "saved prefix"
        self.tensors(found)

    def folder(self, folder: Path) -> None:
        """Check a model folder: side files, tokenizer, names and shapes, and every tensor."""
        self.problems += checksums.changed_files(folder)
        if (folder / "tokenizer.json").exists():
            self.attempt(Tokenizer.load, folder)
        if packed_file.is_packed(folder):
            self.kind = self.kind or "packed folder"
            for header in packed_file.read_headers(folder).values():
                self.tensors(header)
            return
        config = hf.read_config(folder)
        self.kind = self.kind or "Hugging Face folder"
        found = shards.scan(folder)
        self.attempt(hf.check_tensors, folder, config, hf.named_as_in_model(config, found))
        self.tensors(found)

    def tensors(self, found: dict[str, shards.Found]) -> None:
        """Compare tensors with their checksums, and check the values of plain floats."""
        for name, tensor in found.items():
            self.num_tensors += 1
            self.num_verified += bool(tensor.checksum)
            self.num_bytes += shards.num_bytes(tensor)
            if tensor.dtype in hf.FLOATS:
                # Stream also compares the checksum, before it passes the tensor on.
                place, zero = f"{tensor.path}: {name!r}", bool(tensor.checksum)
                check = partial(self.values, place, may_be_zero=zero)
                self.attempt(shards.stream, {name: tensor}, lambda _, t, check=check: check(t))
            else:
                self.attempt(mapped.verify, tensor.path, {name: tensor})

    def values(self, place: str, tensor: torch.Tensor, may_be_zero: bool = False) -> None:
        """Check that all values of a tensor are finite, and that a matrix is not all zero."""
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            self.problems.append(f"{place} has {count:,} values that are not finite")
        elif not may_be_zero and tensor.ndim > 1 and not tensor.any():
            self.problems.append(f"{place} is all zero; a download may have left a hole")
