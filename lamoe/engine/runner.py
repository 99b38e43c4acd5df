"""Compute the logits of a schedule: concatenate its tokens to one Batch and run it once."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch

from lamoe.backends.base import Backend, Batch
from lamoe.backends.paged_cache import PagedCache
from lamoe.engine.request import Sequence

Work = list[tuple[Sequence, int]]  # each sequence with the number of tokens to compute


class Ready(NamedTuple):
    """The result of one sequence whose last token was computed.

    logits: [1 + draft length, vocabulary], the logits after the last token and each draft token.
    checks: (sum, argmax) of each row of logits. The sum is not finite if any logit is not finite.
    """

    sequence: Sequence
    logits: torch.Tensor
    checks: list[tuple[float, int]]


def run(
    backend: Backend, cache: PagedCache, work: Work, count_experts: bool = False
) -> list[Ready]:
    """Compute the next tokens of each sequence, drafts included.

    Args:
        count_experts: whether to add the experts that computed the tokens to the counters
            `Sequence.experts`.

    Returns:
        One result for each sequence whose last token was computed. Sequences in the middle of
        their prompt have none.
    """
    ordered = _ordered(work)
    batch, ready = build_batch(ordered, cache.page_size)
    logits, experts = backend.forward(batch, cache, experts=count_experts)
    if experts is not None and count_experts:
        _count_experts(ordered, experts, backend.config.n_routed_experts or 0)
    if not ready:
        return []
    # Computed for all rows at once, because a loop over rows would slow down small models.
    checks = iter(_checks(logits))
    counts = [1 + len(sequence.draft) for sequence in ready]
    return [
        Ready(sequence, rows, list(islice(checks, count)))
        for sequence, rows, count in zip(ready, logits.split(counts), counts)
    ]


def build_batch(ordered: Work, page_size: int) -> tuple[Batch, list[Sequence]]:
    """Lay the tokens of all sequences side by side.

    Returns:
        The batch, and the sequences with output rows. Each of these has 1 + draft length rows.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[list[int]] = []
    pages: list[int] = []
    output_rows: list[int] = []
    ready: list[Sequence] = []
    for sequence, count in ordered:
        start, end = sequence.computed, sequence.computed + count
        ids += (sequence.tokens[start:] + sequence.draft)[:count]
        positions += range(start, end)
        spans.append([count, end, len(pages)])
        pages += sequence.pages[: -(-end // page_size)]
        if end >= len(sequence.tokens):
            ready.append(sequence)
            output_rows += range(len(ids) - 1 - len(sequence.draft), len(ids))
    batch = Batch(
        ids,
        torch.tensor(positions),
        torch.tensor(spans, dtype=torch.int32),
        torch.tensor(pages, dtype=torch.int32),
        output_rows,
    )
    return batch, ready


def _ordered(work: Work) -> Work:
    """Put decoding sequences first, sorted by length, so that similar ones attend in one group."""
    decoding = sorted(((s, n) for s, n in work if n == 1), key=lambda item: item[0].computed)
    return decoding + [(s, n) for s, n in work if n > 1]


def _checks(logits: torch.Tensor) -> list[tuple[float, int]]:
    if logits.device.type != "cpu":
        rows = torch.stack([logits.sum(-1), logits.argmax(-1).to(logits.dtype)], -1)
        return [(total, int(best)) for total, best in rows.tolist()]
    # Use numpy: torch would wake its own threads, which compete with those of the kernels.
    plain = logits.numpy()
    return list(zip(plain.sum(-1).tolist(), plain.argmax(-1).tolist()))


def _count_experts(ordered: Work, experts: torch.Tensor, num_experts: int) -> None:
    """Add experts [MoE layers, N, K] to the counters of the sequences that the tokens belong to."""
    experts = experts.cpu()
    owner = torch.repeat_interleave(torch.tensor([n for _, n in ordered]))
    layers = torch.arange(experts.shape[0])
    counts = torch.zeros(len(ordered), experts.shape[0], num_experts, dtype=torch.int64)
    index = (owner[None, :, None], layers[:, None, None], experts)
    counts.index_put_(index, torch.ones((), dtype=torch.int64), accumulate=True)
    for (sequence, _), count in zip(ordered, counts):
        sequence.experts = count if sequence.experts is None else sequence.experts + count
