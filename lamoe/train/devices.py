"""Training on an accelerator: moving batches, values that are read later, torch.compile, the peak.

The host only queues work on an accelerator. It reads the values of many steps at once, so it never
waits within a step. On the CPU every step is read at once.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lamoe import kernels
from lamoe.backends.load import resolve_device
from lamoe.model.routing import LayerRecord, Training
from lamoe.model.transformer import Transformer
from lamoe.train.recipe import Run

# Steps that may be queued before their values are read, whatever run.log_every says.
MAX_QUEUED = 50
# The backend of torch.compile.
BACKEND: str | Callable = "inductor"


def resolve(name: str) -> torch.device:
    """Return the device that `run.device` names.

    Raises:
        ValueError: if this machine or torch build lacks it.
    """
    try:
        return resolve_device(name)
    except ValueError as e:
        raise ValueError(f"run.{e}".replace("device='cpu'", "--run.device cpu")) from None


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device without waiting for the copy. On the CPU, return it as is."""
    if device.type == "cpu":
        return tensor
    tensor = tensor.contiguous()
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def describe(device: torch.device) -> str:
    """Return the device in words, for people."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' * (threads != 1)}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_peak(
    dtype: torch.dtype, size: int = 0, repeats: int = 8, device: torch.device | str = "cpu"
) -> float:
    """Measure the FLOP/s of a device's fastest matrix product in `dtype`.

    The result is the denominator of MFU (model FLOPs utilisation). Takes well under a second.

    Args:
        size: rows and columns of the matrices. 0 means 2048 on the CPU and 8192 elsewhere.
    """
    device = torch.device(device)
    size = size or (2048 if device.type == "cpu" else 8192)
    # Use a separate generator: in a resumed run the global one must keep its restored state.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    a @ b
    best = math.inf
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


# ---- values of queued steps ----------------------------------------------------------------------
class MicroBatch(NamedTuple):
    """The result of one forward and backward pass.

    Attributes:
        share: number of targets of this micro-batch divided by that of the whole batch.
        cross_entropy: mean over the targets of this micro-batch, in nats, a scalar on the device.
        balance: weighted balance loss, multiplied by micro-batch size / batch size, a scalar.
        records: routing statistics of each MoE layer.
    """

    share: float
    cross_entropy: torch.Tensor
    balance: torch.Tensor
    records: list[LayerRecord]


@dataclass
class QueuedStep:
    """One training step. Loss, norm and whether it was skipped may still be on the device.

    Attributes:
        step: number of the step, counted from 1.
        ids: [B, T + 1] token ids of the batch, on the host.
        segments: [B, T + 1], on the host.
        micro_batches: the results of its passes.
        gradient_norm: norm before clipping, a float or a scalar on the device.
        known: further metrics, which the host knew when it queued the step.
    """

    step: int
    ids: torch.Tensor
    segments: torch.Tensor
    micro_batches: list[MicroBatch]
    gradient_norm: float | torch.Tensor
    known: dict[str, Any]
    skip: bool | torch.Tensor = False

    def decide(self, max_loss: float, max_norm: float) -> bool | torch.Tensor:
        """Decide whether the update must be skipped, keep the decision and return it.

        It must be skipped if loss or norm is not finite or exceeds its limit. If the norm is on the
        device, so is the decision, and the host does not wait for it.
        """
        norm = self.gradient_norm
        if isinstance(norm, torch.Tensor):
            loss = torch.stack([m.share * m.cross_entropy for m in self.micro_batches]).sum()
            good = (loss + norm).isfinite() & (loss <= max_loss) & (norm <= max_norm)
            self.skip = good.logical_not()
        else:
            finite = math.isfinite(self.loss) and math.isfinite(norm)
            self.skip = not (finite and self.loss <= max_loss and norm <= max_norm)
        return self.skip

    @functools.cached_property
    def loss(self) -> float:
        """Mean cross-entropy of the batch in nats."""
        return sum(m.share * m.cross_entropy.item() for m in self.micro_batches)

    @property
    def balance(self) -> float:
        """Weighted balance loss of the batch."""
        return sum(m.balance.item() for m in self.micro_batches)

    @property
    def norm(self) -> float:
        """Gradient norm before clipping."""
        return float(self.gradient_norm)

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped."""
        return bool(self.skip)


def is_read_at(device: torch.device, step: int, run: Run, queued: int) -> bool:
    """Whether the values of all queued steps are read after this step.

    Args:
        step: number of the step, counted from 1.
        run: gives log_every.
        queued: number of steps whose values have not been read.
    """
    if device.type == "cpu" or queued >= MAX_QUEUED:
        return True
    return step in (1, run.steps) or step % run.log_every == 0


# ---- torch.compile -------------------------------------------------------------------------------
def compile_model(
    model: Transformer, trial: Callable[[], Any], note: Callable[[str], None]
) -> bool:
    """Compile the blocks and the loss of a model in place. Return whether that worked.

    If the compiler fails, the model stays as it was, and a note says so. Blocks that recompute
    their activations are not compiled.

    Args:
        trial: runs one forward and backward pass with the shapes of the run. Everything that can
            fail in the compiler fails in it.
        note: shows one line to the user.
    """
    compiled_loss = torch.compile(kernels.cross_entropy, backend=BACKEND, dynamic=False)
    parts: list[_Part] = [(model, "cross_entropy", compiled_loss)]
    for block in model.layers:
        if "forward" not in vars(block):  # blocks that recompute their activations stay as they are
            parts.append((block, "forward", _compiled_forward(block)))
    _install(model, parts)
    begin = time.perf_counter()
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # compilers raise errors of any type
        _remove(model)
        reason = " ".join(str(e).split("\n\n")[0].split())
        note(
            f"run.compile: the compiler failed, so the blocks run uncompiled "
            f"({type(e).__name__}: {reason[:200]})"
        )
        return False
    note(f"compiled the blocks in {time.perf_counter() - begin:.0f} s")
    return True


def _compiled_forward(block: nn.Module) -> Callable:
    """Return the compiled `forward` of a block, for training passes.

    All MoE layers share one compiled graph. It must not see the growing list of records, whose
    length would make one graph per layer, so every call gets a hook of its own.
    """
    eager = block.forward
    compiled = torch.compile(eager, backend=BACKEND, dynamic=False)

    def forward(x, freqs, cache=None, segments=None, routing_hook=None, form=None):
        if cache is not None or not isinstance(routing_hook, Training):
            return eager(x, freqs, cache, segments, routing_hook, form)
        own = Training(routing_hook.balance, routing_hook.protected)
        out = compiled(x, freqs, None, segments, own, form)
        routing_hook.records += own.records
        return out

    return forward


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Run the model uncompiled in this block: other shapes would be compiled again."""
    parts = _remove(model)
    try:
        yield
    finally:
        _install(model, parts)


_Part = tuple[nn.Module, str, Callable]  # a module, and the attribute that is compiled


def _install(model: Transformer, parts: list[_Part]) -> None:
    for part, name, compiled in parts:
        setattr(part, name, compiled)
    vars(model)["compiled_parts"] = parts


def _remove(model: Transformer) -> list[_Part]:
    """Undo `_install` and return its parts."""
    parts = vars(model).pop("compiled_parts", [])
    for part, name, _ in parts:
        delattr(part, name)
    return parts
