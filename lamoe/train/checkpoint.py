"""Write checkpoints of a training run. A checkpoint folder is complete, or it does not exist.

checkpoints/runs.py describes the folders and reads their manifests. One process at a time writes to
a run folder. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lamoe import atomic
from lamoe.checkpoints import runs
from lamoe.checkpoints.runs import MANIFEST, folders, latest, model_of_run, name, step_of, verify
from lamoe.os_errors import FileError, number_of

__all__ = [
    "MANIFEST",
    "folders",
    "latest",
    "load_tensors",
    "model_of_run",
    "name",
    "rng_state",
    "save",
    "save_tensors",
    "set_rng_state",
    "step_of",
    "verify",
]
_LABEL = "step"  # the beginning of temporary names


def save(run_dir: str | Path, step: int, write: Callable[[Path], None], keep: int = 3) -> Path:
    """Write a checkpoint and return its folder.

    If saving fails or the process is killed at any moment, earlier checkpoints stay complete. Old
    checkpoints are removed only after the new one is in place.

    Args:
        run_dir: the run folder.
        step: number of finished steps.
        write: function that writes the files into the empty folder that it gets. It need not flush
            them.
        keep: number of checkpoints to keep, the last saved ones. 0 keeps all.

    Raises:
        OSError: if the checkpoint could not be saved. The message names the last complete one.
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
            sequence = 1 + max((m["sequence"] for _, m in runs.complete(run_dir)), default=0)
            runs.write_manifest(folder, step, sequence)
        atomic.write_text(run_dir / "latest", path.name + "\n")
    except OSError as e:
        before = [p.name for p, _ in runs.complete(run_dir)]
        state = (
            f"{before[0]} is complete and untouched" if before else "there is no earlier checkpoint"
        )
        number = e.errno or errno.EIO
        raise FileError(
            number,
            f"the checkpoint of step {step} could not be saved in {run_dir}: "
            f"{e.strerror or e}; {state}",
        ) from e
    _prune(run_dir, keep)
    return path


def _prune(run_dir: Path, keep: int) -> None:
    try:
        for old, _ in runs.complete(run_dir)[keep:] if keep else ():
            atomic.remove_folder(old, _LABEL)
    except OSError as e:  # the new checkpoint is saved, so training can continue
        warnings.warn(f"an old checkpoint in {run_dir} could not be removed: {e}", stacklevel=3)


# ---- tensors and plain values --------------------------------------------------------------------
def save_tensors(path: str | Path, state: Any) -> None:
    """Write nested containers of tensors and plain values to one safetensors file.

    The structure is stored as JSON in the metadata of the file, so tuples and int keys survive.

    Args:
        state: dicts (str or int keys), lists and tuples of tensors, numpy arrays (read back as
            tensors), None, bool, int, float and str. An optimizer's state_dict, for example.

    Raises:
        ValueError: if `state` holds a value of another type. The message says where.
        OSError: if the file could not be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    structure = _pack(state, "state", tensors, names)
    try:
        save_file(tensors, path, metadata={"format": "pt", "lamoe_state": json.dumps(structure)})
    except SafetensorError as e:
        number = number_of(e)
        raise OSError(number, os.strerror(number), str(path)) from e
    except RuntimeError as e:
        raise ValueError(
            f"{path} was not written: tensors that overlap in memory cannot be saved, "
            f"clone them first ({e})"
        ) from None


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read a file of `save_tensors` and return the same state, bit for bit.

    The tensors own their memory, so the file may be removed afterwards.
    """
    try:
        # pread and not mmap: a mapped file that is truncated meanwhile would kill the process
        with safe_open(path, framework="pt", device=str(device), backend="pread") as file:
            structure = json.loads((file.metadata() or {})["lamoe_state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        return _unpack(structure, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is not a file that save_tensors wrote, or is damaged: {type(e).__name__}: {e}"
        ) from None


def _pack(value: Any, where: str, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> Any:
    """Convert `value` to JSON: a container becomes {its type: items}, a tensor {"tensor": name}.

    Args:
        value: a part of the state.
        where: the place of `value` in the state. It serves as the tensor's name and in messages.
        tensors: dict that receives {name: tensor}. A tensor that occurs twice is stored once.
        names: {id of a tensor or array that was seen: its name}.
    """
    identity = id(value)  # taken before an array is converted: ids of temporaries are reused
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        if identity not in names:
            tensors[where] = value.detach().cpu().contiguous()
            names[identity] = where
        return {"tensor": names[identity]}
    if isinstance(value, dict):
        items = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(
                    f"{where} has the key {key!r} of type {type(key).__name__}; "
                    "only str and int keys can be saved"
                )
            place = f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"
            items.append([key, _pack(item, place, tensors, names)])
        return {"dict": items}
    if type(value) in (list, tuple):
        return {
            type(value).__name__: [
                _pack(item, f"{where}[{i}]", tensors, names) for i, item in enumerate(value)
            ]
        }
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}; tensors, dicts, lists, "
        "tuples and plain values can be saved (nothing is pickled)"
    )


def _unpack(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)


# ---- random generators ---------------------------------------------------------------------------
def rng_state() -> dict:
    """Return the states of the random generators of torch, numpy (the global one) and Python.

    torch's is that of the CPU: training draws nothing on other devices, so a run may resume on
    another one. `save_tensors` can store the result.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": {
            "kind": kind,
            "keys": np.asarray(keys).astype(np.int64),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": gauss,
        },
        "python": {"version": version, "words": np.array(words, np.int64), "gauss": next_gauss},
    }


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    n, p = state["numpy"], state["python"]
    keys = np.asarray(n["keys"]).astype(np.uint32)
    np.random.set_state((n["kind"], keys, n["position"], n["has_gauss"], n["gauss"]))
    random.setstate((p["version"], tuple(int(w) for w in p["words"]), p["gauss"]))
