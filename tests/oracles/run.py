"""The golden run: ten steps of SGD on a tiny model, with every training feature switched on."""

from __future__ import annotations

import torch

from lamoe.model import routing
from lamoe.model.transformer import Transformer
from oracles import tiny


def ten_steps() -> dict[str, list[float]]:
    """Run ten steps.

    Returns:
        losses: before each step. gradient: the norm of each parameter's gradient in step 1.
    """
    c = tiny.HARD.replace(initializer_range=0.1, num_hidden_layers=2)
    model = Transformer(c).init_weights(seed=3)
    tokens = tiny.ids(c, 4, 24)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    segments = (torch.arange(24) >= torch.tensor([[24], [9], [16], [24]])).long()
    protected = torch.tensor([True, False, False, False])
    balance = routing.Balance(devices=c.n_group, capacity_factor=1.0)
    losses, gradient = [], []
    for _ in range(10):
        training = routing.Training(balance, protected)
        loss = model.loss(tokens, targets, segments, training)
        model.zero_grad()
        (loss + training.loss()).backward()
        losses.append((loss + training.loss()).item())
        gradient = gradient or [float(p.grad.norm()) for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
    return {"losses": losses, "gradient": gradient}
