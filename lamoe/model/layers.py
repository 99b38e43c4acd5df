"""Layers used by several modules: RMSNorm, a linear map without bias, the SwiGLU MLP."""

from __future__ import annotations

import torch
from torch import nn

from lamoe import kernels


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with statistics in at least float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + residual and its norm."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)


class Embedding(nn.Embedding):
    """Table of vectors, one per token id. The gradients of an id's tokens are summed in float32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return kernels.embedding(self.weight, ids)


class Linear(nn.Linear):
    """Linear layer without bias, computed by `kernels.linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, self.weight)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """Make a linear layer without bias. No layer of this model family has a bias."""
    return Linear(d_in, d_out, bias=False)


class MLP(nn.Module):
    """SwiGLU feed-forward layer [..., D] -> [..., D].

    It computes w2(silu(gate) * up), where gate and up are the two halves of w13(x). The matrix of
    w13 is [2 F, D], first the rows of gate, then the rows of up.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w13 = linear(dim, 2 * width)
        self.w2 = linear(width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(kernels.swiglu(self.w13(x)))
