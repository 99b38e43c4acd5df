"""Feed sequences to a packed model in any chunks and batches, over a cache full of NaN."""

import torch

from lamoe.backends.base import Batch
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.paged_cache import PagedCache


class Run:
    """Named sequences on one backend and cache.

    Pages are assigned in random order. Rows that were not written hold 0xFF, which is NaN in every
    format.
    """

    def __init__(
        self,
        packed: CpuBackend,
        format: str = "fp32",
        page: int = 16,
        pages: int = 64,
        seed: int = 0,
    ):
        self.packed = packed
        self.cache = PagedCache(packed.config, pages, page, format, packed.dtype)
        self.cache.rows.fill_(0xFF)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tokens: dict[str, list[int]] = {}
        self.pages: dict[str, list[int]] = {}

    def feed(
        self, work: dict[str, list[int]], experts: bool = False, rows: list[int] | None = None
    ):
        """Run one step.

        Args:
            work: the next tokens of each sequence, by name.
            experts: whether to return the chosen experts too.
            rows: the tokens to compute logits for; None means all.

        Returns:
            logits [N, vocabulary], or (logits, chosen experts).
        """
        ids, positions, seqs, table = [], [], [], []
        for name, new in work.items():
            text, pages = self.tokens.setdefault(name, []), self.pages.setdefault(name, [])
            positions += range(len(text), len(text) + len(new))
            text += new
            while len(pages) * self.cache.page_size < len(text):
                pages.append(self.free.pop())
            seqs.append([len(new), len(text), len(table)])
            # The kernels must not read entries after the pages of a sequence.
            table += [*pages, 2**31 - 1, -7]
            ids += new
        rows = list(range(len(ids))) if rows is None else rows
        batch = Batch(
            ids,
            torch.tensor(positions),
            torch.tensor(seqs, dtype=torch.int32),
            torch.tensor(table, dtype=torch.int32),
            rows,
        )
        logits, chosen = self.packed.forward(batch, self.cache, experts=experts)
        return (logits, chosen) if experts else logits

    def all(self, text: list[int], cuts: list[int], name: str = "a") -> torch.Tensor:
        """Feed a text in chunks of `cuts` tokens, repeating the last size.

        Returns:
            logits [N, vocabulary].
        """
        out, at, cuts = [], 0, list(cuts)
        while at < len(text):
            size = cuts.pop(0) if len(cuts) > 1 else cuts[0]
            out.append(self.feed({name: text[at : at + size]}))
            at += size
        return torch.cat(out)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference relative to the largest |logit|, or inf if not finite."""
    if not got.isfinite().all():
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
