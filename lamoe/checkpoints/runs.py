"""The folder of a training run as a source of models: its checkpoints and their manifests.

A run folder holds `step-00000123/` folders. Each has a manifest.json with the sizes and sha256
hashes of its files. The text file `latest` names the checkpoint saved last, for people and scripts.
(A link would not survive every file system, archive or copy.) The function `latest` does not trust
this file and reads the manifests. train/checkpoint.py writes checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from pathlib import Path

MANIFEST, RECIPE = "manifest.json", "recipe.json"
# .old: a complete checkpoint of the same step while its successor moves in
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


def name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps, e.g. step-00000480."""
    return f"step-{step:08d}"


def step_of(path: str | Path) -> int:
    """Return the number of steps in the name of a checkpoint folder."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint, for example {name(480)}")
    return int(match[1])


def latest(run_dir: str | Path) -> Path | None:
    """Return the last saved checkpoint whose hashes match, or None if the run has no checkpoint.

    Damaged checkpoints are skipped with a warning.

    Raises:
        ValueError: if all checkpoints are damaged, because a run must not silently start again.
    """
    run_dir = Path(run_dir)
    problems = []
    for path in folders(run_dir):
        try:
            verify(path)
        except ValueError as e:
            problems.append(str(e))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name} instead", stacklevel=2)
        return path
    if problems:
        raise ValueError(
            f"no checkpoint in {run_dir} is complete: {'; '.join(problems)}. "
            "Restore one from a copy, or start elsewhere"
        )
    return None


def model_of_run(run_dir: str | Path) -> Path:
    """Return the model folder of a run's last checkpoint.

    Raises:
        ValueError: if the run has no checkpoint yet.
    """
    last = latest(run_dir)
    if last is None:
        raise ValueError(
            f"{run_dir} is a training run without a checkpoint yet; wait for one, "
            "or set run.save_every"
        )
    return last / "model"


def model_folder(path: Path) -> Path:
    """Return the model folder of a run or checkpoint folder, and `path` itself for others.

    Raises:
        ValueError: if `path` is a run without a checkpoint.
    """
    if (path / "config.json").exists():
        return path
    if (path / RECIPE).exists():
        return model_of_run(path)
    return path / "model" if (path / "model" / "config.json").exists() else path


def verify(path: str | Path) -> dict:
    """Compare every file of a checkpoint with the manifest and return the manifest.

    Raises:
        ValueError: if a file is missing, or its size or hash differs. The message names the file.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for file_name, expected in manifest["files"].items():
        file = path / file_name
        if not file.is_file():
            raise ValueError(f"checkpoint {path} is damaged: {file_name} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {file_name} has {size} bytes, "
                f"expected {expected['bytes']}"
            )
        if _sha256(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint {path} is damaged: the contents of {file_name} do not match its hash"
            )
    return manifest


# ---- folders and manifests -----------------------------------------------------------------------
def folders(run_dir: Path) -> list[Path]:
    """Return all checkpoint folders of a run, the last saved first.

    Folders with an unreadable manifest come before all others, so that `latest` reports them.
    """
    if not run_dir.is_dir():
        return []
    found = [p for p in run_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    order = {p: m["sequence"] for p, m in complete(run_dir)}
    return sorted(found, key=lambda p: (order.get(p, math.inf), p.name), reverse=True)


def complete(run_dir: Path) -> list[tuple[Path, dict]]:
    """List (folder, manifest) of all checkpoints with a valid manifest, the last saved first."""
    found = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                found.append((path, _read_manifest(path)))
            except ValueError:
                continue
    return sorted(found, key=lambda item: item[1]["sequence"], reverse=True)


def write_manifest(folder: Path, step: int, sequence: int) -> None:
    """Hash all files of a checkpoint and write its manifest.

    `sequence` orders the saves of a run. Step numbers cannot, because a run that resumes from an
    older checkpoint repeats steps.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(
                f"a checkpoint holds files and folders only; {path.name} is something else"
            )
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
    if not files or MANIFEST in files:
        raise ValueError(
            "write() must put at least one file into the checkpoint, none of them named "
            f"{MANIFEST}; found {', '.join(files) or 'none'}"
        )
    content = {"step": step, "sequence": sequence, "files": files}
    (folder / MANIFEST).write_bytes(_manifest_bytes(content))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(content: dict) -> bytes:
    """Serialise a manifest together with the hash of its content."""
    own_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own_hash}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} is missing")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        manifest.pop("sha256")
        valid = _manifest_bytes(manifest) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} does not match its own hash")
    return manifest
