"""Layers used by several modules: RMSNorm, a linear map without bias, the SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import nn

from lamoe import kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, with statistics in at least float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """Make a linear map without bias: no layer of this model family has one."""
    return nn.Linear(d_in, d_out, bias=False)


class MLP(nn.Module):
    """SwiGLU feed-forward layer [..., D] -> [..., D]: w2(silu(gate) * up), gate | up = w13(x).

    w13 is one [2 F, D] matrix: the rows of the gate, then the rows of up.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w13 = linear(dim, 2 * width)
        self.w2 = linear(width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(kernels.swiglu(self.w13(x)))
