"""AdamW with float32 master weights, DeepSeek-V2's learning-rate schedule and batch-size ramp.

The model computes in its own dtype (bfloat16 or float32). The optimizer keeps a float32 master of
every bfloat16 weight, sums the gradients of micro-batches in float32, and copies the rounded
masters back to the model after each step. Source: paper 3.1.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lamoe import kernels
from lamoe.kernels import native
from lamoe.model.config import check_types


@dataclass(frozen=True)
class Optim:
    """Section [optim] of a recipe.

    Attributes:
        lr: peak learning rate.
        warmup_steps: number of steps of the linear warm-up from 0.
        decay_at: fractions of all training tokens. After each of them, the learning rate is
            multiplied by `decay`.
        eps: AdamW's epsilon. The paper does not state it.
        weight_decay: AdamW's weight decay. It applies to matrices only, not to norm weights.
        clip: largest global gradient norm. Larger gradients are scaled down to it.
    """

    lr: float = 2.4e-4
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)
    decay: float = 0.316
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

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
                f"optim.weight_decay is {self.weight_decay} and optim.warmup_steps "
                f"{self.warmup_steps}; both must be finite and not negative"
            )
        if list(self.decay_at) != sorted(self.decay_at) or not all(
            0 < s <= 1 for s in self.decay_at
        ):
            raise ValueError(
                f"optim.decay_at is {list(self.decay_at)}; it must be increasing fractions of the "
                "training tokens, each above 0 and at most 1"
            )

    def lr_at(self, step: int, share: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: index of the step, counted from 0.
            share: fraction of all training tokens used before this step.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warmup * self.decay ** sum(share >= s for s in self.decay_at)


@dataclass(frozen=True)
class Batch:
    """Section [batch] of a recipe. All sizes are numbers of sequences.

    The batch size grows linearly from `ramp_from` to `size`, in whole micro-batches. The paper
    gives the ends of its ramp (2304 and 9216) and the length (225B tokens), but not the shape.

    Attributes:
        size: number of sequences per optimizer step.
        micro: number of sequences per forward and backward pass.
        ramp_from: number of sequences in the first step. 0 means no ramp.
        ramp_steps: number of steps until the full size.
    """

    size: int = 8
    micro: int = 8
    ramp_from: int = 0
    ramp_steps: int = 0

    def __post_init__(self):
        check_types(self, "batch.")
        if self.size < 1 or self.micro < 1:
            raise ValueError(
                f"batch.size {self.size} and batch.micro {self.micro} must be at least 1"
            )
        if self.size % self.micro:
            raise ValueError(
                f"batch.size {self.size} is not a multiple of batch.micro {self.micro}; "
                "gradients are accumulated over whole micro-batches"
            )
        if (
            bool(self.ramp_from) != bool(self.ramp_steps)
            or not 0 <= self.ramp_from <= self.size
            or self.ramp_steps < 0
        ):
            raise ValueError(
                f"batch.ramp_from is {self.ramp_from} and batch.ramp_steps {self.ramp_steps}; set "
                f"both or neither, with ramp_from at most batch.size {self.size}"
            )

    def size_at(self, step: int) -> int:
        """Return the number of sequences in step `step`, counted from 0."""
        if step >= self.ramp_steps:
            return self.size
        size = self.ramp_from + (self.size - self.ramp_from) * step / self.ramp_steps
        return max(1, round(size / self.micro)) * self.micro

    def before(self, step: int) -> int:
        """Return the number of sequences in all steps before `step`."""
        ramp = min(step, self.ramp_steps)
        return sum(map(self.size_at, range(ramp))) + (step - ramp) * self.size


class MasterAdamW:
    """AdamW over float32 master copies of a model's parameters.

    Call `collect` after the backward pass of each micro-batch, then `clip` and either `step` or
    `discard` once.

    On CPUs with training kernels, a bfloat16 model is updated in one pass over the memory, and
    the gradients of a single micro-batch stay in bfloat16.

    Attributes:
        params: the model's parameters.
        masters: one float32 tensor per parameter. A float32 parameter is its own master.
        grads: the collected gradient of each parameter, or None. Sums over micro-batches are
            float32.
        host_never_waits: whether `clip` returns a tensor, and the device decides about skipping.
    """

    def __init__(self, model: nn.Module, optim: Optim):
        self.params = list(model.parameters())
        self.masters = [
            p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.params
        ]
        groups = [
            {
                "params": [m for m in self.masters if m.dim() > 1],
                "weight_decay": optim.weight_decay,
            },
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        # The compiled update keeps its state here too, so both can read each other's checkpoints.
        self.adamw = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        self.max_norm = optim.clip
        # Only CUDA's kernel is known to read the decision on the device.
        self.host_never_waits = any(p.device.type == "cuda" for p in self.params)
        self.compiled = all(
            p.dtype == torch.bfloat16 and p.is_contiguous() for p in self.params
        ) and bool(kernels.compiled("adamw", *self.params, products=False))
        self.discard()

    def collect(self) -> None:
        """Add the model's gradients of one micro-batch to `grads` and clear them."""
        later = []  # gradients that the compiled kernel adds
        for i, param in enumerate(self.params):
            grad, collected, param.grad = param.grad, self.grads[i], None
            if grad is None:  # no token of this micro-batch used the weight
                continue
            if collected is None:
                self.grads[i] = grad.contiguous() if self.compiled else grad.float()
            elif self.compiled:
                self.grads[i] = collected.float()
                later.append((grad.contiguous(), self.grads[i]))
            else:
                collected.add_(grad)
        if later:
            native.add_gradients([native.adamw_tensor(*pair) for pair in later])

    def clip(self) -> float | torch.Tensor:
        """Scale the gradients to a global norm of at most `max_norm`.

        Returns:
            The norm before scaling. If it is not finite, the step must be skipped. It is a tensor
            if the host must not wait for it.
        """
        grads = [g for g in self.grads if g is not None]
        if self.compiled:
            tensors = [native.adamw_tensor(g, None) for g in grads]
            norm = native.gradient_norm(tensors) * self._grad_scale
            if math.isfinite(norm):  # `step` scales the gradients when it reads them
                self._grad_scale *= min(1.0, self.max_norm / (norm + 1e-6))
            return norm
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.host_never_waits:
            torch._foreach_mul_(grads, (self.max_norm / (total + 1e-6)).clamp(max=1))
            return total
        scale = (self.max_norm / (total + 1e-6)).item()
        if 0 < scale < 1:  # false if the norm is infinite or nan
            torch._foreach_mul_(grads, scale)
        return total.item()

    @torch.no_grad()
    def step(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """Update masters and model with the collected gradients, then clear the gradients.

        Args:
            skip: a bool scalar on the device. If it is true, the device updates nothing. The host
                does not wait for it.
        """
        # The attribute that torch's gradient scaler sets: fused AdamW leaves all state as it is.
        found_inf = None if skip is None else skip.float()
        setattr(self.adamw, "found_inf", found_inf)  # noqa: B010 (no declared attribute)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.compiled:
            self._compiled_step(lr)
        else:
            for master, grad in zip(self.masters, self.grads):
                master.grad = grad
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
            self._copy_to_model()
        self.discard()

    def _compiled_step(self, lr: float) -> None:
        (beta1, beta2), eps = self.adamw.defaults["betas"], self.adamw.defaults["eps"]
        decay = self.adamw.param_groups[0]["weight_decay"]
        tensors = []
        for param, master, grad in zip(self.params, self.masters, self.grads):
            if grad is None:
                continue
            state = self.adamw.state[master]
            if not state:  # as torch.optim.AdamW makes it
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)
            state["step"] += 1
            step = state["step"].item()
            tensors.append(
                native.adamw_tensor(
                    grad,
                    master,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    param,
                    decay if master.dim() > 1 else 0.0,
                    (1 - beta1**step, 1 - beta2**step),
                )
            )
        native.adamw(tensors, lr, beta1, beta2, eps, self._grad_scale)
        # The kernel writes through addresses, which autograd does not see.
        updated = [param for param, grad in zip(self.params, self.grads) if grad is not None]
        torch.autograd.graph.increment_version(updated)

    def discard(self) -> None:
        """Clear the collected gradients without an update."""
        self.grads: list[torch.Tensor | None] = [None] * len(self.params)
        self._grad_scale = 1.0  # factor on the gradients that `step` still has to apply

    def _copy_to_model(self) -> None:
        """Copy the masters to the parameters, rounded where the parameter has another dtype."""
        pairs = [(p, m) for p, m in zip(self.params, self.masters) if p.dtype != m.dtype]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def state_dict(self) -> dict:
        """Return the master weights and AdamW's state. The tensors are not copied."""
        return {"masters": self.masters, "adamw": self.adamw.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict` and copy the masters to the model."""
        torch._foreach_copy_(self.masters, state["masters"])
        self._copy_to_model()
        self.adamw.load_state_dict(
            {"state": state["adamw"], "param_groups": self.adamw.state_dict()["param_groups"]}
        )
