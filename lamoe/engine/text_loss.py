"""Bits per byte and perplexity of a model on held-out text, and the load of its experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from lamoe.backends.base import Backend


@dataclass(frozen=True)
class TextLoss:
    """Next-token loss over a text.

    nats: summed cross-entropy of all `targets` predicted tokens, in nats.
    load: [MoE layers, E], the fraction of each layer's assignments that each routed expert got.
    """

    nats: float
    targets: int
    load: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.targets)

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.targets

    def bits_per_byte(self, text_bytes: int) -> float:
        """Return the loss in bits per byte of text, which is comparable between tokenizers.

        Args:
            text_bytes: size in UTF-8 bytes of exactly the text that the rows contain.
        """
        return self.nats / math.log(2) / text_bytes


def text_loss(
    backend: Backend,
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    batch: int = 8,
    max_tokens: int | None = None,
    document_mask: bool = True,
) -> TextLoss:
    """Compute the loss of every target in rows of text, without dropping tokens.

    Args:
        rows: (ids, segments), integer [T + 1] each. A token is a target if its predecessor is in
            the same segment.
        batch: number of rows per forward pass.
        max_tokens: limit on the evaluated tokens, about. Rows are taken evenly from the text.
        document_mask: whether a token attends only to its own segment, see Backend.rows_loss.

    Raises:
        ValueError: if no token is a target.
    """
    nats, num_targets, load = 0.0, 0, np.zeros((0, 0))
    if max_tokens is not None:
        rows = list(rows)
        positions = sum(len(ids) - 1 for ids, _ in rows)
        rows = rows[:: max(1, -(-positions // max_tokens))]
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        ids, segments = (torch.from_numpy(np.stack(part)) for part in zip(*chunk))
        loss = backend.rows_loss(ids, segments, document_mask)
        nats, num_targets = nats + loss.nats, num_targets + loss.targets
        load = loss.load if not load.size else load + loss.load
    if not num_targets:
        raise ValueError(
            "there is nothing to evaluate on: no row has two consecutive tokens of one document"
        )
    return TextLoss(nats, num_targets, load / np.maximum(1, load.sum(-1, keepdims=True)))
