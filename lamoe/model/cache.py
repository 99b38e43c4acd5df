"""What attention remembers of earlier tokens. A row of one token and layer is (latent after its norm | rope key after rotation) under
MLA, kv_lora_rank + qk_rope_head_dim elements; keys | values otherwise.

KVCache is the plain form: contiguous, unpacked, all sequences of one length. PagedCache is the engine's: rows in any storage format of
codec.py, in pages that sequences of any length share; a `Step` is what one pass of the model sees of it. Both hand attention `views`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from lamoe.model.config import ModelConfig


class View(NamedTuple):
    """What a group of queries attends to. tokens: which of the step's tokens (None: all, as they lie in the batch); rows: the two parts
    [b, S, width]; first: [b] int64, rows before it are padding (None: no padding). Queries are the last ones of the S positions."""

    tokens: slice | None
    rows: list[torch.Tensor]
    first: torch.Tensor | None


class Cache(Protocol):
    """What attention asks of a cache: KVCache here, backends.paged_cache.Step in the engine."""

    def positions(self, tokens: int) -> torch.Tensor: ...

    def views(self, layer: int, *new: torch.Tensor) -> list[View]: ...

    def advance(self, tokens: int) -> None: ...


class KVCache:
    """Room for `capacity` tokens of `batch` sequences: two tensors [layers, B, capacity, width]. `length` tokens are filled."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ):
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"a cache needs room for at least one sequence and one token, asked for {batch} x {capacity}"
            )
        shape = (config.num_hidden_layers, batch, capacity)
        self.rows = [
            torch.empty(*shape, width, dtype=dtype, device=device) for width in config.cache_row
        ]
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
            raise ValueError(
                f"{batch} sequences do not go into a cache made for {self.rows[0].shape[1]}; make one cache per batch"
            )
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens do not fit in a cache of {self.capacity}; make the cache larger or the text shorter"
            )
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
