"""Layers that attention and feed-forward share: RMSNorm, a linear map without bias, and the SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import nn

from lamoe import kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in at least float32. Weights start at one."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def linear(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=False)


class MLP(nn.Module):
    """w2(silu(gate) * up) with gate | up = w13(x). Rows of w13: gate first."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(kernels.swiglu(self.w13(x)))
