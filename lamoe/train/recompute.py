"""Activation recomputation: a block keeps its input only, and runs again in the backward pass.

It is applied to a finished model from outside, because model/ holds no training policy. Results do
not change: the second run computes the same bits from the same input (tested).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from lamoe.model.cache import Cache
from lamoe.model.config import ModelConfig
from lamoe.model.routing import Route, Training
from lamoe.model.transformer import Transformer


def apply(model: Transformer, blocks: int) -> None:
    """Make the first `blocks` blocks of a model recompute their activations in the backward pass.

    The first blocks are the best choice: when the backward pass reaches them, the activations of
    all later blocks are free. Parameter names stay the same, and passes without gradients do not
    change.
    """
    for block in list(model.layers)[:blocks]:
        block.forward = functools.partial(_run, block.forward)


def _run(
    forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
    freqs: torch.Tensor,
    cache: Cache | None = None,
    segments: torch.Tensor | None = None,
    routing_hook: Training | None = None,
    form: str | None = None,
) -> torch.Tensor:
    """Run a block. The arguments after the first are those of Block.forward."""
    if cache is not None or not torch.is_grad_enabled():
        return forward(x, freqs, cache, segments, routing_hook, form)
    hook = None if routing_hook is None else _RunTwice(routing_hook)
    return checkpoint(
        forward,
        x,
        freqs,
        None,
        segments,
        hook,
        form,
        use_reentrant=False,
        preserve_rng_state=False,  # the model draws no random numbers
    )


class _RunTwice:
    """Routing hook of a block that runs twice: only the first run records, the second repeats it.

    The second run executes the same operations, because autograd expects the same saved tensors in
    the same order. It uses the experts of the first run, so that a device whose sums differ between
    two runs cannot route a token elsewhere.
    """

    def __init__(self, hook: Training) -> None:
        self.hook = hook
        self.expert: torch.Tensor | None = None

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        if self.expert is None:
            route = self.hook.after_routing(route, sequences, config)
            self.expert = route.expert
            return route
        unrecorded = Training(self.hook.balance, self.hook.protected)
        route = unrecorded.after_routing(route, sequences, config)
        return Route(route.scores, self.expert, route.weight)
