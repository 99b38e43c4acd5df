"""From a schedule to logits: lays the scheduled tokens of all sequences side by side, gives each a slot in the cache, runs the model once."""

from __future__ import annotations

from itertools import accumulate, islice

import torch

from lamoe.backends.cpu.packed import PackedModel
from lamoe.backends.paged_cache import Group, PagedCache, Step
from lamoe.engine.request import Sequence
from lamoe.model.routing import Chosen
from lamoe.model.transformer import Transformer

SPREAD = 64  # decoding sequences share a group while the longest has at most 1.5 x the rows of the shortest, plus this


def run(
    model: Transformer | PackedModel,
    cache: PagedCache,
    work: list[tuple[Sequence, int]],
    count_experts: bool = False,
) -> list[tuple[Sequence, torch.Tensor, list[tuple[float, int]]]]:
    """Compute the next n tokens of each (sequence, n), its draft included. (sequence, logits [1 + draft, vocabulary], the sum and the place of the
    largest of each row) of those whose last token was among them: what comes after that token and after each token of the draft. count_experts: add the experts that computed them to each
    sequence's `experts` (a model with MoE layers only)."""
    decode = sorted((seq for seq, n in work if n == 1), key=lambda s: s.computed)
    ordered = [(seq, 1) for seq in decode] + [(seq, n) for seq, n in work if n > 1]
    ids = [t for seq, n in ordered for t in (seq.tokens[seq.computed :] + seq.draft)[:n]]
    position = torch.tensor(
        [at for seq, n in ordered for at in range(seq.computed, seq.computed + n)]
    )
    ready, rows, end = [], [], 0
    for seq, n in ordered:
        end += n
        if seq.computed + n >= len(seq.tokens):
            ready.append(seq)
            rows += range(end - 1 - len(seq.draft), end)
    compute = _native if isinstance(model, PackedModel) else _torch
    logits, chosen = compute(model, cache, ordered, ids, position, rows, count_experts)
    if count_experts:
        _count(ordered, chosen, model.config.n_routed_experts)
    if not ready:
        return []
    # Of all rows at once: row by row it is a third of a small model's step. By numpy: torch would wake its own threads, which fight with the kernels'.
    plain = logits.numpy()
    looks = iter(list(zip(plain.sum(-1).tolist(), plain.argmax(-1).tolist())))
    counts = [1 + len(seq.draft) for seq in ready]
    return [
        (seq, rows, list(islice(looks, n)))
        for seq, rows, n in zip(ready, logits.split(counts), counts)
    ]


def _torch(model: Transformer, cache: PagedCache, ordered, ids, position, rows, count_experts):
    slots = {seq.id: _slots(seq, seq.computed + n, cache.page_size) for seq, n in ordered}
    step = Step(
        cache,
        position,
        torch.cat([slots[seq.id][-n:] for seq, n in ordered]),
        _groups(ordered, slots),
    )
    chosen = Chosen() if count_experts else None
    h = model.hidden(torch.tensor([ids]), step, routing_hook=chosen)[0]
    return model.logits(h[rows]) if rows else None, torch.stack(chosen.layers) if chosen else None


def _native(model: PackedModel, cache: PagedCache, ordered, ids, position, rows, count_experts):
    used = [seq.pages[: -(-(seq.computed + n) // cache.page_size)] for seq, n in ordered]
    begin = [0, *accumulate(map(len, used))]
    seqs = torch.tensor(
        [[n, seq.computed + n, at] for (seq, n), at in zip(ordered, begin)], dtype=torch.int32
    )
    pages = torch.tensor([page for pages in used for page in pages], dtype=torch.int32)
    logits, chosen = model.run(ids, position, seqs, pages, cache, rows, experts=count_experts)
    return logits, chosen.long()


def _count(ordered: list[tuple[Sequence, int]], expert: torch.Tensor, experts: int) -> None:
    """Add expert [MoE layers, tokens, K] to the counters of the sequences that the tokens belong to, in order."""
    owner = torch.repeat_interleave(torch.tensor([n for _, n in ordered]))
    counts = torch.zeros(len(ordered), expert.shape[0], experts, dtype=torch.int64)
    counts.index_put_(
        (owner[None, :, None], torch.arange(expert.shape[0])[:, None, None], expert),
        torch.ones((), dtype=torch.int64),
        accumulate=True,
    )
    for (seq, _), count in zip(ordered, counts):
        seq.experts = count if seq.experts is None else seq.experts + count


def _slots(seq: Sequence, length: int, page_size: int) -> torch.Tensor:
    """The slot of each of the first `length` rows of a sequence."""
    pages = torch.tensor(seq.pages[: -(-length // page_size)])
    return (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:length]


def _groups(ordered: list[tuple[Sequence, int]], slots: dict[int, torch.Tensor]) -> list[Group]:
    """Decoding sequences of similar length together, padded in front; every chunk of a prompt by itself."""
    groups, at = [], 0
    while at < len(ordered):
        shortest, end = len(slots[ordered[at][0].id]), at + 1
        while (
            end < len(ordered)
            and ordered[at][1] == ordered[end][1] == 1
            and len(slots[ordered[end][0].id]) <= 1.5 * shortest + SPREAD
        ):
            end += 1
        token = sum(n for _, n in ordered[:at])
        members = [slots[seq.id] for seq, _ in ordered[at:end]]
        longest = max(map(len, members))
        first = torch.tensor([longest - len(m) for m in members])
        padded = torch.stack([torch.cat([m[:1].expand(longest - len(m)), m]) for m in members])
        tokens = slice(token, token + sum(n for _, n in ordered[at:end]))
        groups.append(Group(tokens, padded, first if first.any() else None))
        at = end
    return groups
