"""DeepSeekMoE: shared experts for every token plus routed experts for some (paper 2.2, eq. 20).

routing.py decides which experts compute a token. This file holds the experts' weights and sums
their outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from lamoe import kernels
from lamoe.model import routing
from lamoe.model.config import ModelConfig
from lamoe.model.layers import MLP


class Experts(nn.Module):
    """E SwiGLU experts as two stacked tensors, w13 [E, 2 F, D] and w2 [E, D, F].

    The tensors are stacked so that a kernel can sort tokens by expert and multiply all tokens of an
    expert at once.
    """

    def __init__(self, n: int, dim: int, width: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(n, 2 * width, dim))
        self.w2 = nn.Parameter(torch.empty(n, dim, width))

    def forward(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sum the weighted outputs of each row's K experts.

        Args:
            x: [N, D] input rows.
            expert: [N, K] int64 expert ids. Id E means no expert.
            weight: [N, K] factors on the experts' outputs.

        Returns:
            [N, D].
        """
        return kernels.experts(x, expert, weight, self.w13, self.w2)


class Gate(nn.Module):
    """The router's weight [E, D]. `routing.route` converts it to float32 whatever its dtype."""

    def __init__(self, n: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, dim))


class MoE(nn.Module):
    """The mixture-of-experts feed-forward layer, [B, T, D] -> [B, T, D].

    The shared experts are stored as one MLP of their total width, because a sum of SwiGLU layers
    equals one wider SwiGLU layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d, f = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config.n_routed_experts, d)
        self.experts = Experts(config.n_routed_experts, d, f)
        self.shared = MLP(d, config.n_shared_experts * f) if config.n_shared_experts else None

    def forward(
        self, x: torch.Tensor, routing_hook: routing.RoutingHook | None = None
    ) -> torch.Tensor:
        flat = x.flatten(0, 1)
        r = routing.route(flat, self.gate.weight, self.config)
        if routing_hook is not None:
            r = routing_hook.after_routing(r, x.shape[0], self.config)
        out = self.experts(flat, r.expert, r.weight)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)
