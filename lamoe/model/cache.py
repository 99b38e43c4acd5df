"""The cache that attention reads: its interface, and a plain contiguous implementation.

A cache row belongs to one token and one layer, and has two parts. Under MLA these are the latent
after its norm (C elements) and the rotary key after rotation (R elements). Otherwise they are the
keys and the values of all heads.

KVCache stores plain tensors for sequences of equal length. The engine uses another implementation,
backends/paged_cache.py. It stores quantised rows in pages that sequences of any length share.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from lamoe.model import rope
from lamoe.model.config import ModelConfig


class View(NamedTuple):
    """The cached rows that one group of queries attends to.

    tokens: the slice of the batch's tokens that are the group's queries. None means all tokens.
    rows: the two parts of the cached rows, each [b, S, width]. The last rows are the queries' own.
    first: [b] int64, index of each sequence's first row that is not padding. None means no padding.
    """

    tokens: slice | None
    rows: list[torch.Tensor]
    first: torch.Tensor | None


class Cache(Protocol):
    """The methods that the model calls on a cache.

    A forward pass calls `positions` once, `views` once per layer, then `advance` once.
    """

    def positions(self, tokens: int) -> torch.Tensor:
        """Return the positions of the next `tokens` tokens, integers [1, T]."""
        ...

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        """Append the new rows of one layer and return the rows that the queries attend to.

        Args:
            layer: index of the layer.
            new: the two parts of the new rows, each [B, T, width].

        Returns:
            One View per group of queries. Together they cover all queries.
        """
        ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens as cached, after all layers have appended their rows."""
        ...


class KVCache:
    """A contiguous cache for B sequences of equal length.

    Args:
        config: gives the number of layers and the widths of a row.
        batch: number of sequences B.
        capacity: largest number of tokens per sequence.
        dtype: dtype of the stored rows. Use the model's dtype.
        device: device of the stored rows. Use the model's device.

    Attributes:
        rows: the two parts of the rows, each [layers, B, capacity, width].
        length: number of cached tokens per sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if batch < 1 or capacity < 1:
            raise ValueError(
                "a cache needs at least one sequence and one token, but batch x capacity is "
                f"{batch} x {capacity}"
            )
        self.config = config
        shape = (config.num_hidden_layers, batch, capacity)
        self.rows = [
            torch.empty(*shape, width, dtype=dtype, device=device) for width in config.cache_row
        ]
        self.length = 0

    @property
    def capacity(self) -> int:
        """Largest number of tokens that the cache holds per sequence."""
        return self.rows[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the rows of all layers and sequences, used or not."""
        return sum(r.numel() * r.element_size() for r in self.rows)

    def append(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Write one layer's new rows after the cached ones.

        `length` does not change here. `advance` increases it after all layers have written.

        Args:
            layer: index of the layer.
            new: the two parts of the new rows, each [B, T, width].

        Returns:
            All rows of the layer so far, each part [B, length + T, width].
        """
        batch, end = new[0].shape[0], self.length + new[0].shape[1]
        if batch != self.rows[0].shape[1]:
            raise ValueError(
                f"the batch has {batch} sequences, but the cache was made for "
                f"{self.rows[0].shape[1]}; make a cache for this batch"
            )
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens do not fit in a cache of {self.capacity}; "
                "make the cache larger or the text shorter"
            )
        for rows, part in zip(self.rows, new):
            rows[layer, :, self.length : end] = part
        return [rows[layer, :, :end] for rows in self.rows]

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        """Append one layer's new rows and return a single view of all rows. See Cache.views."""
        return [View(None, self.append(layer, *new), None)]

    def positions(self, tokens: int) -> torch.Tensor:
        """Return the positions of the next `tokens` tokens, integers [1, T].

        Raises:
            ValueError: if the last position exceeds max_position_embeddings.
        """
        rope.check_length(self.config, self.length + tokens)
        return torch.arange(self.length, self.length + tokens, device=self.rows[0].device)[None]

    def advance(self, tokens: int) -> None:
        """Add `tokens` to `length`, after all layers have appended their rows."""
        self.length += tokens
