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

    weights: format of the weights, fp32 | bf16 | int8 | int4. None keeps the checkpoint's format.
    head: format of the output head, with the same choices. None uses the format of the weights.
    cache: format of the cache rows, fp32 | bf16 | int8 | 6bit | 4bit.
    """

    weights: str | None = None
    head: str | None = None
    cache: str = "bf16"


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass: N tokens of B sequences, laid side by side.

    ids: N token ids, the tokens of each sequence in order.
    positions: int64 [N], the position of each token in its sequence.
    sequences: int32 [B, 3], one row per sequence. Column 0 is the number of its tokens in this
        batch. Column 1 is the number of its tokens in the cache after this batch. Column 2 is the
        index in `pages` where its page table begins.
    pages: int32 [P], the page tables of all sequences, one after the other.
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

    output: float32 logits [len(output_rows), vocabulary]. If `forward` was called with head=False,
        the final normed states [len(output_rows), D] instead.
    experts: integer [MoE layers, N, K], the ids of the routed experts that each token chose. None
        unless `forward` was called with experts=True.
    """

    output: torch.Tensor
    experts: torch.Tensor | None


class RowsLoss(NamedTuple):
    """Next-token loss on some rows of text.

    nats: the summed cross-entropy in nats.
    targets: number of predicted tokens.
    load: float [MoE layers, E], how often each routed expert was chosen. [0, 0] without MoE layers.
    """

    nats: float
    targets: int
    load: np.ndarray


def next_token_targets(ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Return the target of each token, which is the next token of its row.

    Args:
        ids: [B, T + 1] token ids.
        segments: [B, T + 1] segment numbers.

    Returns:
        [B, T]. A target is -1 (ignored) where the next token begins another segment.
    """
    return ids[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], -1)


class Backend(ABC):
    """A loaded model that computes batches.

    Attributes:
        name: "torch" or "cpu".
        config: the architecture.
        weights: storage format of the weights, for example "bf16" or "int4".
        head: storage format of the output head.
        dtype: the dtype in which attention computes and to which cache rows are decoded.
        device: the device of the cache and the logits.
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
        """Append the cache rows of all tokens of `batch` and compute its output rows.

        Args:
            batch: the tokens to compute.
            cache: holds the rows of earlier tokens. The new rows are written to it.
            head: whether to apply the output head. False returns the final normed states.
            experts: whether to return the routed experts that each token chose.
        """

    @abstractmethod
    def rows_loss(
        self, ids: torch.Tensor, segments: torch.Tensor, document_mask: bool = True
    ) -> RowsLoss:
        """Compute the next-token loss of rows of text, without dropping tokens.

        Args:
            ids: int64 [B, T + 1] token ids.
            segments: integer [B, T + 1], the number of each token's document. A token is a target
                if its predecessor is in the same segment.
            document_mask: whether a token attends only to earlier tokens of its own segment. If
                False, it attends to all earlier tokens of its row.
        """

    def check(self) -> None:  # noqa: B027
        """Check that the weights are still those that were loaded. Called after every pass.

        By default there is nothing to check.

        Raises:
            RuntimeError: if not. Results of this backend cannot be trusted then.
        """

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return {name: stored weights}. The tensors are not copied."""

    @staticmethod
    @abstractmethod
    def state_bytes(
        config: ModelConfig, max_model_len: int, max_num_seqs: int, batch_tokens: int
    ) -> int:
        """Return an upper bound on the bytes of attention's partial results in one forward pass.

        The method is static, because the memory plan is made before the weights are read.

        Args:
            max_model_len: length of the longest sequence, in tokens.
            max_num_seqs: number of sequences that run at once.
            batch_tokens: largest number of tokens in one batch.
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

        Yields the result of each chunk. `head` and `experts` have the meaning that they have in
        `forward`.

        Args:
            last: number of tokens at the end of the sequence that get an output row. None: all.
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
        """Name of the cache format that stores rows exactly as attention computes them."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def tensor_bytes(self) -> dict[str, int]:
        """Return {name of a weight tensor: its stored bytes}."""
        return {name: t.numel() * t.element_size() for name, t in self.tensors().items()}

    def weight_bytes(self) -> int:
        """Return the total stored bytes of all weight tensors."""
        return sum(self.tensor_bytes().values())

    def digest(self) -> str:
        """Return a SHA-256 over the config and the weights, as hexadecimal text.

        Of a tensor larger than 1 MiB, only 256 evenly spaced blocks of 4 KiB are hashed. A digest
        is therefore fast for a model of any size. Training changes the digest, but a change of a
        few numbers in a large matrix may leave it the same.
        """
        config = self.config.to_dict()
        config.pop(
            "torch_dtype", None
        )  # the dtype of the checkpoint file; actual dtypes are hashed below
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
