"""Choose a backend for a model, and load the model on it.

`prepare` estimates the memory of a model before any weight is read. `Prepared.load` then reads the
weights. `load` does both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lamoe.backends.base import Backend, Formats
from lamoe.backends.cpu import native, packed, packed_file
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.memory import available_memory
from lamoe.backends.torch_backend import TorchBackend
from lamoe.checkpoints import hf
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

BACKENDS: dict[str, type[Backend]] = {"torch": TorchBackend, "cpu": CpuBackend}
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class Prepared:
    """A model for which a backend is chosen, but whose weights are not loaded yet.

    weight_bytes: approximate size of the loaded weights, in bytes.
    available: bytes of memory that weights, cache and attention may take together. None if unknown.
    state_bytes: the method Backend.state_bytes of the chosen backend.
    folder: the folder of the model. None if the model is in memory.
    """

    config: ModelConfig
    weight_bytes: int
    available: int | None
    state_bytes: Callable[[ModelConfig, int, int, int], int]
    folder: Path | None
    load: Callable[[], Backend]


def load(
    model: Backend | Transformer | str | Path,
    formats: Formats = Formats(),
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    threads: int = 0,
) -> Backend:
    """Load a model and return its backend. The arguments are those of `prepare`."""
    return prepare(
        model, formats, dtype=dtype, device=device, backend=backend, threads=threads
    ).load()


def prepare(
    model: Backend | Transformer | str | Path,
    formats: Formats = Formats(),
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    threads: int = 0,
) -> Prepared:
    """Choose a backend for a model.

    Args:
        model: a loaded backend, a Transformer, or the folder (packed or not) or hub id of a model.
        formats: formats of weights and head. A quantised format needs the compiled kernels.
        dtype: dtype of the computation ("float32", "bfloat16"). None means the checkpoint's dtype.
        device: "auto" | "cpu" | "cuda" | "mps" or a torch.device. None means the device of `model`
            if it is a Transformer, else the CPU.
        backend: "cpu" (compiled kernels) or "torch". None means the value of the environment
            variable LAMOE_BACKEND. If it is unset, the compiled kernels run every model that they
            support.
        threads: number of threads of the compiled kernels. 0 means torch's number of threads.

    Returns:
        The prepared model, with the chosen backend and its memory needs.

    Raises:
        ValueError: if no backend can run the model with these options.
    """
    asked = backend
    backend = backend or os.environ.get("LAMOE_BACKEND") or None
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend is {backend!r}; known: {', '.join(BACKENDS)}")
    if isinstance(model, Backend):
        return _prepare_loaded(model, formats, device, asked)
    if isinstance(model, Transformer):
        return _prepare_transformer(model, formats, device, backend, threads)
    folder = hf.resolve(model)
    target = resolve_device(device)
    if packed_file.is_packed(folder):
        return _prepare_packed_folder(folder, formats, dtype, target, backend, threads)
    return _prepare_folder(folder, formats, dtype, target, backend, threads)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the torch device of a name. "auto" means CUDA if available, else MPS, else the CPU.

    Raises:
        ValueError: if the device is unknown, or this machine or torch build lacks it.
    """
    if device is None:
        return torch.device("cpu")
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next((d for d in ("cuda", "mps") if has[d]), "cpu"))
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; known: {', '.join(DEVICES)}") from None
    if not has.get(found.type, True):
        raise ValueError(
            f"device {str(device)!r} is not available: torch {torch.__version__} finds no such "
            "device; install a torch build that supports it, or use device='cpu'"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} is not available: there are {torch.cuda.device_count()} CUDA "
            "devices, numbered from 0"
        )
    return found


def _with_index(device: torch.device) -> torch.device:
    """Return a device with its index, as in Tensor.device. For example, "cuda" becomes "cuda:0"."""
    return torch.empty(0, device=device).device


def _prepare_loaded(
    model: Backend, formats: Formats, device: str | torch.device | None, backend: str | None
) -> Prepared:
    if backend not in (None, model.name):
        _refuse(model, f"backend={backend!r}")
    if device is not None and _with_index(resolve_device(device)) != model.device:
        raise ValueError(
            f"the model is on device {str(model.device)!r}, but device is {str(device)!r}; "
            "load the model on this device, or omit device"
        )
    if model.name == "cpu":
        _check_formats(formats, Formats(model.weights, model.head))
    elif formats.weights not in (None, model.weights) or formats.head not in (None, model.head):
        _refuse(model, f"weights={formats.weights!r}, head={formats.head!r}")
    size, free = model.weight_bytes(), available_memory(model.device)
    return Prepared(
        model.config,
        size,
        None if free is None else free + size,  # the weights are in memory already
        model.state_bytes,
        None,
        lambda: model,
    )


def _prepare_transformer(
    model: Transformer,
    formats: Formats,
    device: str | torch.device | None,
    backend: str | None,
    threads: int,
) -> Prepared:
    weight = model.embed.weight
    target = weight.device if device is None else resolve_device(device)
    chosen = choose(model.config, weight.dtype, formats, target, backend)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free = available_memory(target)
    in_place = _with_index(target) == weight.device

    def load() -> Backend:
        model.to(target)  # in place: the caller's model moves
        if chosen == "cpu":
            return CpuBackend.from_transformer(model, formats, threads)
        return TorchBackend(model.eval())

    return Prepared(
        model.config,
        size,
        None if free is None else free + size * in_place,
        BACKENDS[chosen].state_bytes,
        None,
        load,
    )


def _prepare_packed_folder(
    folder: Path,
    formats: Formats,
    dtype: str | None,
    device: torch.device,
    backend: str | None,
    threads: int,
) -> Prepared:
    config, stored = packed_file.read_config(folder)
    if dtype is not None:
        raise ValueError(
            f"dtype is {dtype}, but {folder} is a packed model, which fixes its dtype; omit dtype"
        )
    if device.type != "cpu":
        raise ValueError(
            f"{folder} is packed for the compiled CPU kernels and cannot run on {device}; use the "
            "model that it was packed from, or device='cpu'"
        )
    if not _kernels_usable(backend):
        raise ValueError(
            f"{folder} is packed for the compiled kernels, {_why_unusable()}, or use the model "
            "that it was packed from"
        )
    if backend == "torch":
        _refuse_other_backend(str(stored.weights))
    _check_formats(formats, stored)
    size, free = packed_file.stored_bytes(folder), available_memory()

    def load() -> Backend:
        return packed_file.load(folder, threads, available_memory())

    # The system may drop pages of a mapped file and read them again later. They count as available.
    available = None if free is None else free + size
    return Prepared(config, size, available, CpuBackend.state_bytes, folder, load)


def _prepare_folder(
    folder: Path,
    formats: Formats,
    dtype: str | None,
    device: torch.device,
    backend: str | None,
    threads: int,
) -> Prepared:
    config = hf.read_config(folder)
    compute = hf.DTYPES.get(dtype or config.torch_dtype or "", torch.float32)
    chosen = choose(config, compute, formats, device, backend)

    def load() -> Backend:
        if chosen == "cpu" and formats.weights is not None and dtype is None:
            # Convert one tensor at a time, so that the whole checkpoint need not fit into memory.
            read = packed_file.reader(folder, config)
            return CpuBackend.from_tensors(config, formats, read, threads)
        model = hf.load(folder, dtype)
        if chosen == "cpu":
            return CpuBackend.from_transformer(model, formats, threads)
        return TorchBackend(model.to(device).eval())

    return Prepared(
        config,
        _expected_bytes(config, formats, dtype),
        available_memory(device),
        BACKENDS[chosen].state_bytes,
        folder,
        load,
    )


def choose(
    config: ModelConfig,
    dtype: torch.dtype,
    formats: Formats,
    device: torch.device,
    backend: str | None,
) -> str:
    """Return the name of the backend that runs a model: "cpu" or "torch".

    Raises:
        ValueError: if an option needs the compiled kernels, but they cannot run the model.
    """
    quantised = formats.weights is not None or formats.head is not None
    if device.type != "cpu":
        if quantised or backend == "cpu":
            raise ValueError(
                f"the compiled kernels and their weight formats run on the CPU, not on {device}; "
                "omit weights, head and backend, or use device='cpu'"
            )
        return "torch"
    if backend == "torch" or not _kernels_usable(backend):
        if quantised or backend == "cpu":
            raise ValueError(
                f"quantised weights and backend='cpu' need the compiled kernels, {_why_unusable()}"
            )
        native.announce()
        return "torch"
    if quantised or backend == "cpu":
        return "cpu"
    return "torch" if why_torch(config, dtype) else "cpu"


def _kernels_usable(backend: str | None) -> bool:
    """Whether the compiled kernels may run. backend="cpu" overrides the environment."""
    return native.available() or (backend == "cpu" and native.lib is not None)


def _why_unusable() -> str:
    """Return why the compiled kernels do not run and what to do, as a relative clause."""
    if native.lib is None:
        return f"which are not installed ({native.missing()}); install lamoe with a C++ compiler"
    if why := native.why_switched_off():
        return f"which do not run because {why}; unset it"
    return "which backend='torch' excludes; omit it"


def why_torch(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return why torch runs this model on a CPU that has the compiled kernels, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled kernels compute in float32 and bfloat16, the model is {dtype}"
    return packed.unsupported(config)


def _expected_bytes(config: ModelConfig, formats: Formats, dtype: str | None) -> int:
    """Estimate the bytes of the loaded weights, from the config and the formats alone."""
    plain_bits = accounting.DTYPE_BITS.get(dtype or config.torch_dtype, 32)
    bits = native.BITS.get(formats.weights or "", plain_bits)
    extra_head_bits = native.BITS.get(formats.head or "", bits) - bits
    head_weights = config.vocab_size * config.hidden_size
    total = accounting.parameters(config).total
    return int((total * bits + head_weights * extra_head_bits) / 8)


def _check_formats(asked: Formats, stored: Formats) -> None:
    """Raise ValueError if the requested formats differ from those of a packed model."""
    if asked.weights not in (None, stored.weights):
        _refuse_other_backend(str(stored.weights))
    if asked.head not in (None, stored.head):
        raise ValueError(
            f"head is {asked.head}, but the model is packed with its output head as "
            f"{stored.head}; omit head, or pack the original model again with this head"
        )


def _refuse(model: Backend, asked: str) -> None:
    """Raise ValueError for options (`asked`) that differ from those of a loaded model."""
    if model.name == "cpu":
        _refuse_other_backend(model.weights)
    raise ValueError(
        f"{asked} was requested, but the model is already loaded on the {model.name} backend in "
        f"{model.weights}; load it from its folder with these options, or omit them"
    )


def _refuse_other_backend(weights: str) -> None:
    raise ValueError(
        f"the model is packed as {weights}; it runs on the compiled kernels in that format only"
    )
