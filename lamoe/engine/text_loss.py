"""Bits per byte and perplexity on rows of held-out text, and which experts a model uses there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from lamoe.model import routing
from lamoe.model.transformer import Transformer


@dataclass(frozen=True)
class TextLoss:
    """nats: summed loss of `targets` tokens. load: for each MoE layer, the share of assignments every expert got, [layers, E]."""

    nats: float
    targets: int
    load: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.targets)

    def bits_per_byte(self, text_bytes: int) -> float:
        """`text_bytes`: UTF-8 bytes of exactly the text the rows came from. Comparable between tokenizers."""
        return self.nats / math.log(2) / text_bytes

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.targets


@torch.no_grad()
def text_loss(
    model: Transformer,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    batch: int = 8,
    max_tokens: int | None = None,
    document_mask: bool = True,
) -> TextLoss:
    """Loss of every target in `rows` of (ids, segments), each [T + 1]; a token is a target when it continues its predecessor's
    segment. No token is dropped by the router here. `max_tokens`: at most about that many, in rows spread evenly."""
    nats, targets, load = 0.0, 0, 0
    if max_tokens is not None:
        rows = list(rows)
        positions = sum(len(ids) - 1 for ids, _ in rows)
        rows = rows[:: max(1, -(-positions // max_tokens))]
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        ids, segments = (torch.from_numpy(np.stack(part)) for part in zip(*chunk))
        goal = shift(ids, segments)
        watch = routing.Training(routing.Balance(devices=1))
        mean = model.loss(ids[:, :-1], goal, segments[:, :-1] if document_mask else None, watch)
        count = int((goal >= 0).sum())
        nats, targets = nats + mean.item() * count, targets + count
        if watch.records:
            load = load + torch.stack([r.load for r in watch.records]).numpy()
    if not targets:
        raise ValueError(
            "there is nothing to evaluate on: the rows hold no token that follows another of its document"
        )
    return TextLoss(
        nats,
        targets,
        load / np.maximum(1, np.sum(load, -1, keepdims=True))
        if np.ndim(load)
        else np.zeros((0, 0)),
    )


def shift(ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The targets of rows ids [B, T + 1]: the next token, or -1 where the next one begins another segment. -> [B, T]"""
    return ids[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -1)
