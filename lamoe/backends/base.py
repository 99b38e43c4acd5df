"""The one interface between a model and everything that uses it (engine, server, measurements).

A `Backend` is a loaded model on a device. It computes one `Batch` at a time: some tokens of some
sequences, whose earlier tokens are in a `PagedCache`. Two backends exist:

- `torch_backend.TorchBackend` runs the model definition (lamoe/model) with torch ops on any device.
- `cpu.backend.CpuBackend` runs the compiled kernels (csrc/) on packed, possibly quantised weights.

To add one, implement the abstract methods here and teach `load.py` when to choose it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lamoe.backends.paged_cache import PagedCache
from lamoe.model.config import ModelConfig

_HASH_WHOLE_BYTES, _HASH_SAMPLES, _HASH_SAMPLE_BYTES = 1 << 20, 256, 4096


@dataclass(frozen=True)
class Formats:
    """Storage formats of the weights, the output head and the cache.

    weights: fp32 | bf16 | int8 | int4; None keeps the format of the checkpoint.
    head: the same for the output head; None uses the format of the weights.
    cache: fp32 | bf16 | int8 | 6bit | 4bit.
    """

    weights: str | None = None
    head: str | None = None
    cache: str = "bf16"


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass: N tokens of B sequences, laid side by side.

    ids: N token ids.
    positions: int64 [N], the position of each token in its sequence.
    sequences: int32 [B, 3], one row per sequence in the order of its tokens: number of its tokens
        in this batch; number of its tokens in the cache after this batch; index in `pages` where
        its page table begins.
    pages: int32 [P], the page tables of all sequences.
    output_rows: indices of the tokens (0 to N - 1) whose logits are wanted.

    All tensors are on the host. The backend copies what it needs to its device.
    """

    ids: list[int]
    positions: torch.Tensor
    sequences: torch.Tensor
    pages: torch.Tensor
    output_rows: list[int]

    def __post_init__(self) -> None:
        # Backends check the counts in `sequences`. To sum them here would delay every step.
        assert len(self.positions) == len(self.ids)


class ForwardResult(NamedTuple):
    """The output of one forward pass, on the backend's device.

    output: float32 [len(output_rows), vocabulary] logits, or [len(output_rows), D] final normed
        states when the head was not wanted.
    experts: integer [MoE layers, N, K], the routed experts that each token chose; None unless
        they were requested.
    """

    output: torch.Tensor
    experts: torch.Tensor | None


class RowsLoss(NamedTuple):
    """Next-token loss on some rows of text.

    nats: summed cross-entropy. targets: number of predicted tokens.
    load: float [MoE layers, E], how often each routed expert was chosen; [0, 0] without MoE layers.
    """

    nats: float
    targets: int
    load: np.ndarray


class Backend(ABC):
    """A loaded model that computes batches.

    Attributes:
        name: "torch" or "cpu".
        config: the architecture.
        weights: storage format of the weights, for example "bf16" or "int4".
        head: storage format of the output head.
        dtype: the dtype that attention computes in and cache rows are read in.
        device: where cache and logits live.
    """

    name: str
    config: ModelConfig
    weights: str
    head: str
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def forward(
        self, batch: Batch, cache: PagedCache, *, head: bool = True, experts: bool = False
    ) -> ForwardResult:
        """Append the rows of all tokens of `batch` to `cache` and compute its output rows.

        Args:
            head: whether to apply the output head; False returns final normed states.
            experts: whether to return the routed experts that each token chose.
        """

    @abstractmethod
    def rows_loss(
        self, ids: torch.Tensor, segments: torch.Tensor, document_mask: bool = True
    ) -> RowsLoss:
        """Compute the next-token loss of rows of text, without dropping tokens.

        Args:
            ids: int64 [B, T + 1].
            segments: integer [B, T + 1]; a token is a target if its predecessor is in the same
            segment.
            document_mask: whether a token sees only earlier tokens of its own segment. If False,
                it sees its whole row.
        """

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored weights by name. They are not copied."""

    @staticmethod
    @abstractmethod
    def state_bytes(
        config: ModelConfig, max_model_len: int, max_num_seqs: int, batch_tokens: int
    ) -> int:
        """Bound the bytes that attention needs for partial results in one forward pass.

        Static, because the memory plan is made before the weights are read.

        Args:
            max_model_len: longest sequence in tokens.
            max_num_seqs: sequences that run at once.
            batch_tokens: most tokens of one batch.
        """

    def run_sequence(
        self,
        ids: list[int],
        chunk: int,
        *,
        last: int | None = None,
        head: bool = True,
        experts: bool = False,
    ) -> Iterator[ForwardResult]:
        """Compute all tokens of one sequence from an empty cache, `chunk` tokens at a time.

        Yields the result of each chunk. `head` and `experts` are those of `forward`.

        Args:
            last: number of tokens at the end that get an output row; None means all.
        """
        first_output = 0 if last is None else len(ids) - last
        page_size = 16
        cache = self.new_cache(-(-len(ids) // page_size), page_size, self.lossless_cache_format)
        pages = torch.arange(cache.pages, dtype=torch.int32)
        for begin in range(0, len(ids), chunk):
            part = ids[begin : begin + chunk]
            end = begin + len(part)
            batch = Batch(
                ids=part,
                positions=torch.arange(begin, end),
                sequences=torch.tensor([[len(part), end, 0]], dtype=torch.int32),
                pages=pages,
                output_rows=list(range(max(0, first_output - begin), len(part))),
            )
            yield self.forward(batch, cache, head=head, experts=experts)

    def new_cache(self, pages: int, page_size: int, format: str) -> PagedCache:
        """Allocate an empty paged cache on this backend's device."""
        return PagedCache(self.config, pages, page_size, format, self.dtype, self.device)

    @property
    def lossless_cache_format(self) -> str:
        """The cache format that stores rows exactly as attention computes them."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def tensor_bytes(self) -> dict[str, int]:
        """Return the stored bytes of each weight tensor."""
        return {name: t.numel() * t.element_size() for name, t in self.tensors().items()}

    def weight_bytes(self) -> int:
        """Return the stored bytes of all weights."""
        return sum(self.tensor_bytes().values())

    def digest(self) -> str:
        """Return a SHA-256 over the config and the weights, as hexadecimal text.

        Of a tensor larger than 1 MiB only 256 evenly spaced blocks of 4 KiB are hashed, so that a
        digest takes a moment for a model of any size. Training changes the digest; a change of
        single numbers in a large matrix may not.
        """
        config = self.config.to_dict()
        config.pop("torch_dtype", None)  # the dtype in the file; the actual dtypes are hashed below
        h = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            h.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            if len(flat) <= _HASH_WHOLE_BYTES:
                h.update(flat.numpy().data)
                continue
            last = len(flat) - _HASH_SAMPLE_BYTES
            for i in range(_HASH_SAMPLES):
                at = last * i // (_HASH_SAMPLES - 1)
                h.update(flat[at : at + _HASH_SAMPLE_BYTES].numpy().data)
        return h.hexdigest()
