"""Run sequences on a packed model in any order and chunking, over a cache full of NaN."""

import torch

from lamoe.backends.base import Batch
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.backends.paged_cache import PagedCache


class Run:
    """Sequences by name.

    Pages are assigned in random order. Unwritten slots hold 0xFF, which is NaN in every format.
    """

    def __init__(
        self,
        packed: CpuBackend,
        format: str = "fp32",
        page: int = 16,
        pages: int = 64,
        seed: int = 0,
    ):
        self.packed, self.cache = (
            packed,
            PagedCache(packed.config, pages, page, format, packed.dtype),
        )
        self.cache.rows.fill_(0xFF)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tokens: dict[str, list[int]] = {}
        self.pages: dict[str, list[int]] = {}

    def feed(
        self, work: dict[str, list[int]], experts: bool = False, rows: list[int] | None = None
    ):
        """Run one step with the next tokens of each sequence.

        Returns logits [N, vocabulary] of all tokens or of `rows`, and on request the chosen
        experts.
        """
        ids, positions, seqs, table = [], [], [], []
        for name, new in work.items():
            text, pages = self.tokens.setdefault(name, []), self.pages.setdefault(name, [])
            positions += range(len(text), len(text) + len(new))
            text += new
            while len(pages) * self.cache.page_size < len(text):
                pages.append(self.free.pop())
            seqs.append([len(new), len(text), len(table)])
            table += [
                *pages,
                2**31 - 1,
                -7,
            ]  # page numbers after those of a sequence must not be read
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
        """Run a whole text in chunks and return its logits [N, vocabulary].

        `cuts` are the chunk sizes; the last one repeats.
        """
        out, at, cuts = [], 0, list(cuts)
        while at < len(text):
            size = cuts.pop(0) if len(cuts) > 1 else cuts[0]
            out.append(self.feed({name: text[at : at + size]}))
            at += size
        return torch.cat(out)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinity if not finite."""
    return (
        float((got.double() - want.double()).abs().max() / want.double().abs().max())
        if got.isfinite().all()
        else float("inf")
    )
