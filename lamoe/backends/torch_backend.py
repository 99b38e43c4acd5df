"""A backend that runs the model definition (lamoe/model) with torch ops, on any device."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from lamoe.backends.base import Backend, Batch, ForwardResult, RowsLoss, next_token_targets
from lamoe.backends.paged_cache import Group, PagedCache, Step
from lamoe.model import rope, routing
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer, check_ids

_FORMAT_OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Decoding sequences form a group, which is padded to one length and attends in one call. A group
# grows while its longest sequence has at most GROUP_GROWTH times the rows of its shortest one, plus
# GROUP_SLACK rows.
GROUP_GROWTH, GROUP_SLACK = 1.5, 64


class TorchBackend(Backend):
    """Runs a Transformer on the device and in the dtype of its weights."""

    name = "torch"

    def __init__(self, model: Transformer):
        weight = model.embed.weight
        self.model, self.config = model, model.config
        self.dtype, self.device = weight.dtype, weight.device
        dtype_name = str(weight.dtype).removeprefix("torch.")
        self.weights = self.head = _FORMAT_OF_DTYPE.get(weight.dtype, dtype_name)

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, *, head: bool = True, experts: bool = False
    ) -> ForwardResult:
        rope.check_length(self.config, int(batch.positions.max()) + 1)
        step = self._step(batch, cache)
        chosen = routing.Chosen() if experts else None
        ids = torch.tensor([batch.ids], device=self.device)
        hidden = self.model.hidden(ids, step, routing_hook=chosen)[0]
        states = hidden[torch.tensor(batch.output_rows, dtype=torch.int64, device=self.device)]
        output = self.model.logits(states) if head else states
        return ForwardResult(output, torch.stack(chosen.layers) if chosen else None)

    @torch.no_grad()
    def rows_loss(
        self, ids: torch.Tensor, segments: torch.Tensor, document_mask: bool = True
    ) -> RowsLoss:
        check_ids(ids, self.config)  # on the host: a check on the device would wait for it
        ids, segments = ids.to(self.device), segments.to(self.device)
        targets = next_token_targets(ids, segments)
        watch = routing.Training(routing.Balance(devices=1))
        seen = segments[:, :-1] if document_mask else None
        mean = self.model.loss(ids[:, :-1], targets, seen, watch)
        count = int((targets >= 0).sum())
        loads = [r.load for r in watch.records]
        load = torch.stack(loads).cpu().numpy() if loads else np.zeros((0, 0))
        return RowsLoss(mean.item() * count, count, load)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    @staticmethod
    def state_bytes(
        config: ModelConfig, max_model_len: int, max_num_seqs: int, batch_tokens: int
    ) -> int:
        return 0  # torch keeps no partial results: it frees its temporaries within each op

    def _step(self, batch: Batch, cache: PagedCache) -> Step:
        """Translate page tables into cache slots.

        The result has the slot of each new token, and the slots of all rows that each group reads.
        """
        slots, new_slots = [], []
        for count, end, first_page in batch.sequences.tolist():
            slots.append(sequence_slots(batch.pages[first_page:], end, cache.page_size))
            new_slots.append(slots[-1][end - count :])
        groups = _groups(batch.sequences[:, 0].tolist(), slots)
        return Step(
            cache,
            batch.positions.to(self.device),
            torch.cat(new_slots).to(self.device),
            [Group(g.tokens, g.slots.to(self.device), _to(g.first, self.device)) for g in groups],
        )


def sequence_slots(pages: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """Return the slots of the first `length` rows of a sequence, int64 [length].

    Args:
        pages: int [P], page table of the sequence. Entries after the last needed page are not read.
        length: number of rows.
        page_size: number of rows per page.
    """
    used = pages[: -(-length // page_size)].long()
    return (used[:, None] * page_size + torch.arange(page_size)).flatten()[:length]


def _groups(counts: list[int], slots: list[torch.Tensor]) -> list[Group]:
    """Group neighbouring decoding sequences of similar length. A prompt chunk is its own group.

    Args:
        counts: number of new tokens of each sequence. Decoding sequences have one.
        slots: cache slots of all rows of each sequence, int64 [S] each.
    """
    groups, begin = [], 0
    token_ends = list(accumulate(counts))
    while begin < len(counts):
        limit = GROUP_GROWTH * len(slots[begin]) + GROUP_SLACK
        end = begin + 1
        while end < len(counts) and counts[begin] == counts[end] == 1 and len(slots[end]) <= limit:
            end += 1
        members = slots[begin:end]
        longest = max(map(len, members))
        first = torch.tensor([longest - len(m) for m in members])
        # Pad with the sequence's first slot. It is valid to read, and attention masks it out.
        padded = torch.stack([torch.cat([m[:1].expand(longest - len(m)), m]) for m in members])
        tokens = slice(token_ends[begin] - counts[begin], token_ends[end - 1])
        groups.append(Group(tokens, padded, first if first.any() else None))
        begin = end
    return groups


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
