"""What attention remembers of earlier tokens. A row of one token and layer is (latent after its norm | rope key after rotation) under
MLA, kv_lora_rank + qk_rope_head_dim elements; keys | values otherwise.

KVCache is the plain form: contiguous, unpacked, all sequences of one length. PagedCache is the engine's: rows in any storage format of
codec.py, in pages that sequences of any length share; a `Step` is what one pass of the model sees of it. Both hand attention `views`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamoe import codec
from lamoe.config import ModelConfig


class View(NamedTuple):
    """What a group of queries attends to. tokens: which of the step's tokens (None: all, as they lie in the batch); rows: the two parts
    [b, S, width]; first: [b] int64, rows before it are padding (None: no padding). Queries are the last ones of the S positions."""

    tokens: slice | None
    rows: list[torch.Tensor]
    first: torch.Tensor | None


class KVCache:
    """Room for `capacity` tokens of `batch` sequences: two tensors [layers, B, capacity, width]. `length` tokens are filled."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32, device="cpu"):
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs room for at least one sequence and one token, asked for {batch} x {capacity}")
        shape = (config.num_hidden_layers, batch, capacity)
        self.rows = [torch.empty(*shape, width, dtype=dtype, device=device) for width in config.cache_row]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.rows[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(r.numel() * r.element_size() for r in self.rows)

    def append(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Write one layer's rows [B, T, width] behind the filled ones and return all rows so far, [B, length + T, width] each.
        `length` moves only with `advance`, once all layers have written."""
        batch, end = new[0].shape[0], self.length + new[0].shape[1]
        if batch != self.rows[0].shape[1]:
            raise ValueError(f"{batch} sequences do not go into a cache made for {self.rows[0].shape[1]}; make one cache per batch")
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.capacity}; make the cache larger or the text shorter")
        for rows, part in zip(self.rows, new):
            rows[layer, :, self.length : end] = part
        return [rows[layer, :, :end] for rows in self.rows]

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        return [View(None, self.append(layer, *new), None)]

    def positions(self, tokens: int) -> torch.Tensor:
        """Of the next tokens, [1, T]."""
        return torch.arange(self.length, self.length + tokens)[None]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length


class PagedCache:
    """`pages` pages of `page_size` rows in storage format `format`: one byte tensor [layers, pages * page_size, row bytes]. A slot is a row's
    number, page * page_size + place. Rows are read in `dtype`. Which page belongs to whom is engine/pages.py's business."""

    def __init__(self, config: ModelConfig, pages: int, page_size: int = 16, format: str = "bf16", dtype: torch.dtype = torch.float32):
        if pages < 1 or page_size < 1:
            raise ValueError(f"a paged cache needs at least one page of one row, asked for {pages} of {page_size}")
        self.widths, self.page_size, self.pages, self.format, self.dtype = config.cache_row, page_size, pages, format, dtype
        row = codec.row_bytes(format, self.widths)
        # numpy's zeros, not torch's: the system gives the memory when it is written, so a cache takes what its tokens take, not what it may come to
        self.rows = torch.from_numpy(np.zeros((config.num_hidden_layers, pages * page_size, row), np.uint8))

    @property
    def nbytes(self) -> int:
        return self.rows.numel()

    def write(self, layer: int, slots: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Store parts [N, width] in slots [N]."""
        self.rows[layer].index_copy_(0, slots, codec.encode(self.format, parts))

    def read(self, layer: int, slots: torch.Tensor) -> list[torch.Tensor]:
        """The parts of slots [b, S], [b, S, width] each."""
        stored = self.rows[layer].index_select(0, slots.flatten())
        return [part.unflatten(0, slots.shape) for part in codec.decode(self.format, stored, self.widths, self.dtype)]


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
        assert len(self.slot) == n and [g.tokens.start for g in self.groups] + [n] == [0] + [g.tokens.stop for g in self.groups]

    def positions(self, tokens: int) -> torch.Tensor:
        return self.position[None]

    def views(self, layer: int, *new: torch.Tensor) -> list[View]:
        self.cache.write(layer, self.slot, tuple(part[0] for part in new))
        return [View(g.tokens, self.cache.read(layer, g.slots), g.first) for g in self.groups]

    def advance(self, tokens: int) -> None:
        """Nothing to do: the scheduler counts."""
