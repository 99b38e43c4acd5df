"""The engine's paged cache, and the view of it that one forward pass of the torch model gets.

Rows are stored in any format of cache_codec.py, in pages that sequences of any length share.
engine/pages.py decides which page belongs to which sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamoe.backends import cache_codec
from lamoe.model.cache import View
from lamoe.model.config import ModelConfig


class PagedCache:
    """`pages` pages of `page_size` cache rows each, for every layer.

    Attributes:
        rows: uint8 [layers, pages * page_size, row bytes]. The index of a row is called its slot:
            page * page_size + offset in the page.
        dtype: the dtype that rows are decoded to.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int = 16,
        format: str = "bf16",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if pages < 1 or page_size < 1:
            raise ValueError(
                "a paged cache needs at least one page with one row, "
                f"but the caller asked for {pages} of {page_size} rows"
            )
        self.widths, self.format, self.dtype = config.cache_row, format, dtype
        self.pages, self.page_size, self.device = pages, page_size, torch.device(device)
        row_bytes = cache_codec.row_bytes(format, self.widths)
        shape = (config.num_hidden_layers, pages * page_size, row_bytes)
        # numpy's zeros take physical memory only when written, but torch.zeros writes all of it.
        on_host = self.device.type == "cpu"
        self.rows = (
            torch.from_numpy(np.zeros(shape, np.uint8))
            if on_host
            else torch.zeros(shape, dtype=torch.uint8, device=self.device)
        )

    @property
    def nbytes(self) -> int:
        return self.rows.numel()

    def write(
        self, layer: int, slots: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Encode N rows, given as two parts [N, width], and store them in `slots`, int64 [N]."""
        self.rows[layer].index_copy_(0, slots, cache_codec.encode(self.format, parts))

    def read(self, layer: int, slots: torch.Tensor) -> list[torch.Tensor]:
        """Decode the rows in `slots`, int64 [b, S], and return their two parts [b, S, width]."""
        stored = self.rows[layer].index_select(0, slots.flatten())
        parts = cache_codec.decode(self.format, stored, self.widths, self.dtype)
        return [part.unflatten(0, slots.shape) for part in parts]


class Group(NamedTuple):
    """A group of b sequences whose tokens attend in one call.

    tokens: slice of the batch's tokens that belong to the group.
    slots: int64 [b, S], the cache slots of all rows of each sequence. Shorter sequences are padded
        in front.
    first: int64 [b], index of each sequence's first row that is not padding. None means no padding.
    """

    tokens: slice
    slots: torch.Tensor
    first: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """The cache of one forward pass over N tokens of many sequences, laid out as ids [1, N].

    position: int64 [N], the position of each token in its sequence.
    slot: int64 [N], the cache slot in which the new row of each token is stored.
    groups: the groups of sequences that attend together. They cover the N tokens in order.
    """

    cache: PagedCache
    position: torch.Tensor
    slot: torch.Tensor
    groups: list[Group]

    def __post_init__(self) -> None:
        n = len(self.position)
        assert len(self.slot) == n
        starts = [g.tokens.start for g in self.groups] + [n]
        assert starts == [0] + [g.tokens.stop for g in self.groups]

    def positions(self, tokens: int) -> torch.Tensor:
        return self.position[None]

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        """Store the new rows of a layer and return the rows that each group attends to."""
        self.cache.write(layer, self.slot, (new[0][0], new[1][0]))
        return [View(g.tokens, self.cache.read(layer, g.slots), g.first) for g in self.groups]

    def advance(self, tokens: int) -> None:
        """Do nothing: the scheduler counts computed tokens."""
