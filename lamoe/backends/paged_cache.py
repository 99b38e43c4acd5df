"""The engine's cache: rows in any storage format of cache_codec.py, in pages that sequences of any length share; a `Step` is what one pass of the model sees of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamoe.backends import cache_codec
from lamoe.model.cache import View
from lamoe.model.config import ModelConfig


class PagedCache:
    """`pages` pages of `page_size` rows in storage format `format`: one byte tensor [layers, pages * page_size, row bytes]. A slot is a row's
    number, page * page_size + place. Rows are read in `dtype`. Which page belongs to whom is engine/pages.py's business."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int = 16,
        format: str = "bf16",
        dtype: torch.dtype = torch.float32,
    ):
        if pages < 1 or page_size < 1:
            raise ValueError(
                f"a paged cache needs at least one page of one row, asked for {pages} of {page_size}"
            )
        self.widths, self.page_size, self.pages, self.format, self.dtype = (
            config.cache_row,
            page_size,
            pages,
            format,
            dtype,
        )
        row = cache_codec.row_bytes(format, self.widths)
        # numpy's zeros, not torch's: the system gives the memory when it is written, so a cache takes what its tokens take, not what it may come to
        self.rows = torch.from_numpy(
            np.zeros((config.num_hidden_layers, pages * page_size, row), np.uint8)
        )

    @property
    def nbytes(self) -> int:
        return self.rows.numel()

    def write(self, layer: int, slots: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Store parts [N, width] in slots [N]."""
        self.rows[layer].index_copy_(0, slots, cache_codec.encode(self.format, parts))

    def read(self, layer: int, slots: torch.Tensor) -> list[torch.Tensor]:
        """The parts of slots [b, S], [b, S, width] each."""
        stored = self.rows[layer].index_select(0, slots.flatten())
        return [
            part.unflatten(0, slots.shape)
            for part in cache_codec.decode(self.format, stored, self.widths, self.dtype)
        ]


class Group(NamedTuple):
    """Sequences that attend together: their tokens in the step, the slots of all their rows [b, S] (padded in front), `first` as in View."""

    tokens: slice
    slots: torch.Tensor
    first: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """One pass over N tokens of many sequences, laid side by side as ids [1, N]. position [N] and slot [N] of every token; groups cover the
    tokens in order."""

    cache: PagedCache
    position: torch.Tensor
    slot: torch.Tensor
    groups: list[Group]

    length = 0  # of what the ids continue: positions are given, not counted

    def __post_init__(self):
        n = len(self.position)
        assert len(self.slot) == n and [g.tokens.start for g in self.groups] + [n] == [0] + [
            g.tokens.stop for g in self.groups
        ]

    def positions(self, tokens: int) -> torch.Tensor:
        return self.position[None]

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        self.cache.write(layer, self.slot, tuple(part[0] for part in new))
        return [View(g.tokens, self.cache.read(layer, g.slots), g.first) for g in self.groups]

    def advance(self, tokens: int) -> None:
        """Nothing to do: the scheduler counts."""
