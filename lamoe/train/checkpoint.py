"""Checkpoints that are either complete or not there: a folder is written aside, hashed, flushed to the disk, and then renamed.

A run folder holds `step-00000123/` folders, each with a manifest.json of sizes and sha256 hashes, and the text file `latest` with the
name of the last one (a plain file, because links do not survive every file system, archive or copy). `latest()` here does
not trust that file: it looks at the manifests. One process at a time writes to a run folder. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lamoe.checkpoints import atomic

MANIFEST = "manifest.json"
_LABEL = "step"  # the beginning of temporary names
# .old: a complete checkpoint of the same step, while it is being replaced
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


def name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps, e.g. step-00000480."""
    return f"step-{step:08d}"


def step_of(path: str | Path) -> int:
    """Return the number of steps that the name of a checkpoint folder tells."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint, for example {name(480)}")
    return int(match[1])


def save(run_dir: str | Path, step: int, write: Callable[[Path], None], keep: int = 3) -> Path:
    """Write a checkpoint and return its folder. `write(folder)` puts the files there; it need not flush anything.

    Whatever happens at whatever moment (kill, power cut, full disk), the checkpoints that were complete before stay as they are.
    Only after the new one is in place are old ones removed, until the `keep` last saved are left (0: all are kept). When
    writing fails, the partial folder is removed and the error goes on, an OSError with the words what is still there.
    """
    run_dir = Path(run_dir)
    if step < 0 or keep < 0:
        raise ValueError(
            f"step {step} and keep {keep} must both be at least 0 (keep 0 keeps every checkpoint)"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    for label in (_LABEL, "latest"):
        atomic.remove_leftovers(run_dir, label)
    path = run_dir / name(step)
    try:
        with atomic.replace_folder(path, _LABEL, path.with_name(path.name + ".old")) as folder:
            write(folder)
            sequence = 1 + max((m["sequence"] for _, m in _complete(run_dir)), default=0)
            _seal(folder, step, sequence)
        atomic.write_text(run_dir / "latest", path.name + "\n")
    except OSError as e:
        before = [p.name for p, _ in _complete(run_dir)]
        still = (
            f"{before[0]} is complete and untouched" if before else "there is no earlier checkpoint"
        )
        cure = "; free some space on the disk" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        words = f"the checkpoint of step {step} could not be saved in {run_dir}: {e.strerror or e}; {still}{cure}"
        raise OSError(e.errno, words, e.filename) from e
    _prune(run_dir, keep)
    return path


def latest(run_dir: str | Path) -> Path | None:
    """The checkpoint saved last among those that verify; None when the run has none at all.

    A damaged one is passed over with a warning; when all are damaged that is a ValueError, so that nobody starts afresh by accident.
    """
    run_dir = Path(run_dir)
    complaints = []
    for path in folders(run_dir):
        try:
            verify(path)
        except ValueError as e:
            complaints.append(str(e))
            continue
        for complaint in complaints:
            warnings.warn(f"{complaint}; using {path.name} instead", stacklevel=2)
        return path
    if complaints:
        raise ValueError(
            f"no checkpoint in {run_dir} is complete: {'; '.join(complaints)}. Restore one from a copy, or start elsewhere"
        )
    return None


def model_of_run(run_dir: str | Path) -> Path:
    """The model folder of a run's newest whole checkpoint. ValueError when it has none yet."""
    last = latest(run_dir)
    if last is None:
        raise ValueError(
            f"{run_dir} is a training run without a checkpoint yet; wait for one, or set run.save_every"
        )
    return last / "model"


def verify(path: str | Path) -> dict:
    """The manifest of a checkpoint, after every file's size and hash has been compared with it; ValueError names the damaged file."""
    path = Path(path)
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing")
        if (size := file.stat().st_size) != facts["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {size} bytes, expected {facts['bytes']}"
            )
        if _sha256(file) != facts["sha256"]:
            raise ValueError(
                f"checkpoint {path} is damaged: the contents of {name} do not match its hash"
            )
    return manifest


# ---- folders ---------------------------------------------------------------------------------------------------------------
def folders(run_dir: Path) -> list[Path]:
    """Return all checkpoint folders of a run, the last saved first.

    Folders whose manifest cannot be read come before the others, so that `latest` reports them.
    """
    found = (
        [p for p in run_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        if run_dir.is_dir()
        else []
    )
    order = {p: m["sequence"] for p, m in _complete(run_dir)}
    return sorted(found, key=lambda p: (order.get(p, math.inf), p.name), reverse=True)


def _complete(run_dir: Path) -> list[tuple[Path, dict]]:
    """(folder, manifest) of the checkpoints with a sound manifest, the last saved first. Their files are not read."""
    out = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                out.append((path, _read_manifest(path)))
            except ValueError:
                continue
    return sorted(out, key=lambda found: found[1]["sequence"], reverse=True)


def _seal(folder: Path, step: int, sequence: int):
    """Hash and flush all files, then write the manifest. `sequence` counts the saves of a run: steps may go back, it does not."""
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
            f"write() must put at least one file into the checkpoint, none of them named {MANIFEST}; "
            f"found {', '.join(files) or 'none'}"
        )
    (folder / MANIFEST).write_bytes(
        _manifest_bytes({"step": step, "sequence": sequence, "files": files})
    )


def _prune(run_dir: Path, keep: int):
    try:
        for old, _ in _complete(run_dir)[keep:] if keep else ():
            atomic.remove_folder(old, _LABEL)
    except OSError as e:  # the new checkpoint is safe: no reason to stop a training run
        warnings.warn(f"an old checkpoint in {run_dir} could not be removed: {e}", stacklevel=3)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(content: dict) -> bytes:
    """The one way to write a manifest; it carries the hash of its own content."""
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} is missing")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        manifest.pop("sha256")
        sound = _manifest_bytes(manifest) == data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} does not match its own hash")
    return manifest


# ---- tensors and plain values ----------------------------------------------------------------------------------------------
def save_tensors(path: str | Path, state: Any):
    """Write nested dicts, lists and tuples of tensors, numpy arrays and plain values (an optimizer's state_dict) to one safetensors file.

    Dict keys are str or int; plain values are None, bool, int, float, str. Anything else is a ValueError saying where it sits. The
    structure is JSON in the file's metadata: tuples and int keys come back as such, arrays come back as tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    structure = _pack(state, "state", tensors, names)
    try:
        save_file(tensors, path, metadata={"format": "pt", "lamoe_state": json.dumps(structure)})
    except SafetensorError as e:  # the library hides the operating system's error in its text
        code = re.search(r"os error (\d+)", str(e))
        raise OSError(
            int(code[1]) if code else errno.EIO, f"{path} could not be written: {e}"
        ) from e
    except RuntimeError as e:
        raise ValueError(
            f"{path} was not written: tensors that overlap in memory cannot be saved, clone them first ({e})"
        ) from None


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """What `save_tensors` wrote, bit for bit. The tensors own their memory: the file may be removed afterwards."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            structure = json.loads((file.metadata() or {})["lamoe_state"])
            tensors = {
                name: file.get_tensor(name).clone() for name in file.keys()
            }  # a mapped tensor would follow its file
        return _unpack(structure, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is not a file that save_tensors wrote, or is damaged: {type(e).__name__}: {e}"
        ) from None


def _pack(value: Any, where: str, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> Any:
    """The JSON form: containers are one-key objects, tensors become names. One tensor met twice is stored once."""
    identity = id(
        value
    )  # of what the caller holds: the id of a converted array could be given out again
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        if identity not in names:
            tensors[where] = value.detach().contiguous()
            names[identity] = where
        return {"tensor": names[identity]}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(
                    f"{where} has the key {key!r} of type {type(key).__name__}; only str and int keys can be saved"
                )
        return {
            "dict": [
                [k, _pack(v, where + (f".{k}" if isinstance(k, str) else f"[{k}]"), tensors, names)]
                for k, v in value.items()
            ]
        }
    if type(value) in (list, tuple):
        return {
            type(value).__name__: [
                _pack(v, f"{where}[{i}]", tensors, names) for i, v in enumerate(value)
            ]
        }
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}; tensors, dicts, lists, tuples and plain values can "
        "be saved (nothing is pickled)"
    )


def _unpack(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return {"list": list, "tuple": tuple}[kind](items)


def rng_state() -> dict:
    """The random generators of torch (CPU and every CUDA device), numpy (the global one) and Python, as `save_tensors` takes them."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "kind": kind,
            "keys": keys.astype(np.int64),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": gauss,
        },
        "python": {"version": version, "words": np.array(words, np.int64), "gauss": next_gauss},
    }


def set_rng_state(state: dict):
    """Undo of `rng_state`. Another number of CUDA devices is refused: their random numbers would silently differ."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        raise ValueError(
            f"the checkpoint holds random states of {len(state['cuda'])} CUDA devices, this machine has {devices}; "
            "resume on as many, or leave the random states out"
        )
    torch.set_rng_state(state["torch"].cpu())
    if devices:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    n, p = state["numpy"], state["python"]
    np.random.set_state(
        (
            n["kind"],
            np.asarray(n["keys"]).astype(np.uint32),
            n["position"],
            n["has_gauss"],
            n["gauss"],
        )
    )
    random.setstate((p["version"], tuple(int(w) for w in p["words"]), p["gauss"]))
