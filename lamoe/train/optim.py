"""The optimizer and its schedules: AdamW on float32 masters, the V2 learning-rate steps, the batch-size ramp.

Source: paper 3.1.2. The model computes in its own dtype (bfloat16 or float32); the optimizer owns a float32 master of every
bfloat16 weight, sums gradients of micro-batches in float32, and writes the rounded masters back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lamoe.model.config import check_types


@dataclass(frozen=True)
class Optim:
    """[optim] of a recipe."""

    lr: float = 2.4e-4  # peak
    warmup_steps: int = 2000  # linear from 0
    decay_at: tuple[float, ...] = (
        0.6,
        0.9,
    )  # shares of the training tokens after which lr is multiplied by decay
    decay: float = 0.316
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # the paper gives none
    weight_decay: float = 0.1  # on matrices; norms have none
    clip: float = 1.0  # largest global gradient norm

    def __post_init__(self):
        check_types(self, "optim.")
        for name in ("lr", "decay", "eps", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"optim.{name} is {getattr(self, name)}; it must be a finite number above 0"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optim.{name} is {getattr(self, name)}; it must be at least 0 and below 1"
                )
        if not 0 <= self.weight_decay < float("inf") or self.warmup_steps < 0:
            raise ValueError(
                f"optim.weight_decay is {self.weight_decay} and optim.warmup_steps {self.warmup_steps}; both must be finite and not negative"
            )
        if list(self.decay_at) != sorted(self.decay_at) or not all(
            0 < s <= 1 for s in self.decay_at
        ):
            raise ValueError(
                f"optim.decay_at is {list(self.decay_at)}; it must be rising shares of the training, each above 0 and at most 1"
            )

    def lr_at(self, step: int, share: float) -> float:
        """Learning rate of step `step` (from 0), before which `share` of all tokens were seen."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warm * self.decay ** sum(share >= s for s in self.decay_at)


@dataclass(frozen=True)
class Batch:
    """[batch] of a recipe, in sequences. The ramp is linear from `ramp_from` to `size` over `ramp_steps` steps (the paper gives
    its ends, 2304 and 9216, and its length, 225B tokens, not its shape), in whole micro-batches."""

    size: int = 8
    micro: int = 8
    ramp_from: int = 0  # 0: no ramp
    ramp_steps: int = 0

    def __post_init__(self):
        check_types(self, "batch.")
        if self.size < 1 or self.micro < 1:
            raise ValueError(
                f"batch.size {self.size} and batch.micro {self.micro} must be at least 1"
            )
        if self.size % self.micro:
            raise ValueError(
                f"batch.size {self.size} is not a multiple of batch.micro {self.micro}; gradients are accumulated over whole micro-batches"
            )
        if (
            bool(self.ramp_from) != bool(self.ramp_steps)
            or not 0 <= self.ramp_from <= self.size
            or self.ramp_steps < 0
        ):
            raise ValueError(
                f"batch.ramp_from {self.ramp_from} and batch.ramp_steps {self.ramp_steps} go together, with ramp_from at most batch.size {self.size}"
            )

    def size_at(self, step: int) -> int:
        """Sequences of step `step` (from 0)."""
        if step >= self.ramp_steps:
            return self.size
        size = self.ramp_from + (self.size - self.ramp_from) * step / self.ramp_steps
        return max(1, round(size / self.micro)) * self.micro

    def before(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        ramp = min(step, self.ramp_steps)
        return sum(map(self.size_at, range(ramp))) + (step - ramp) * self.size


class MasterAdamW:
    """AdamW over float32 masters of `model`'s parameters. Per micro-batch `collect`, then once `clip` and `step`."""

    def __init__(self, model: nn.Module, o: Optim):
        self.params = list(model.parameters())
        # a float32 weight is its own master
        self.masters = [
            p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.params
        ]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True
        )
        self.max_norm = o.clip

    def collect(self) -> None:
        """Move the gradients of one micro-batch to the masters, added up in float32. A weight nobody used has none."""
        for p, m in zip(self.params, self.masters):
            if p.grad is not None:
                m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
                p.grad = None

    def clip(self) -> float:
        """Scale the gradients to a global norm of at most `clip`; the norm before. Not finite: gradients are left as they are."""
        grads = [m.grad for m in self.masters if m.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scale = (self.max_norm / (norm + 1e-6)).item()
        if scale < 1:  # False for nan too
            torch._foreach_mul_(grads, scale)
        return norm.item()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._write_back()

    def _write_back(self):
        rounded = [(p, m) for p, m in zip(self.params, self.masters) if p.dtype != m.dtype]
        if rounded:
            torch._foreach_copy_(*map(list, zip(*rounded)))

    def state_dict(self) -> dict:
        return {"masters": self.masters, "adamw": self.adamw.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.masters, state["masters"])
        self._write_back()
        self.adamw.load_state_dict(
            {"state": state["adamw"], "param_groups": self.adamw.state_dict()["param_groups"]}
        )
