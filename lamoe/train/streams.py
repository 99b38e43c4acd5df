"""The documents of one split, and endless shuffled rows of some of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """The training or held-out part of a corpus.

    Attributes:
        tokens: [N] uint16 or uint32, memory-mapped.
        starts: int64 [documents], position of each document's BOS in `tokens`.
        sizes: int64 [documents], UTF-8 bytes of each text.
        sources: int64 [documents], number of each document's source.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, BOS and EOS included, int64 [documents]."""
        return np.diff(self.starts, append=len(self.tokens))

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, BOS and EOS included, as a view of the file."""
        stop = self.starts[i + 1] if i + 1 < len(self) else len(self.tokens)
        return self.tokens[self.starts[i] : stop]


class Stream:
    """The rows of an endless stream of documents, in which each epoch has an order of its own.

    Args:
        documents: indices of the documents in `split`. None means all.
        source: the end of all seeds, so that equal sources differ in their order.
    """

    def __init__(
        self,
        split: Split,
        documents: np.ndarray | None,
        seq_len: int,
        seed: int,
        source: tuple[int, ...] = (),
    ):
        self._split, self._documents, self._width = split, documents, seq_len + 1
        self._seed, self._source = seed, source
        self._lengths = split.lengths if documents is None else split.lengths[documents]
        self.num_tokens = int(self._lengths.sum())
        self._window_rows = max(1, self.num_tokens // self._width)
        # epoch -> _epoch_order(epoch); two are kept, because a window may span two epochs
        self._epoch_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._row_order: tuple[int, np.ndarray] | None = None  # (window, permutation)

    def fill(self, row: int, ids: np.ndarray, segments: np.ndarray) -> None:
        """Write row `row` of the shuffled rows to ids and segments, both [seq_len + 1]."""
        start, filled, segment = self._shuffled(row) * self._width, 0, 0
        while filled < self._width:
            epoch, offset = divmod(start + filled, self.num_tokens)
            order, ends = self._epoch_order(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            document = self._split.document(int(order[place]))
            rest = document[offset - int(ends[place]) :]  # a negative index: counted from the end
            count = min(len(rest), self._width - filled)
            ids[filled : filled + count] = rest[:count]
            segments[filled : filled + count] = segment
            filled, segment = filled + count, segment + 1

    def _shuffled(self, row: int) -> int:
        """Return the index in the stream of the row that the shuffle puts at position `row`."""
        window, place = divmod(row, self._window_rows)
        if self._row_order is None or self._row_order[0] != window:
            self._row_order = window, self._permutation(1, window, self._window_rows)
        return window * self._window_rows + int(self._row_order[1][place])

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in shuffled order, and where each ends in its stream."""
        if epoch not in self._epoch_orders:
            order = self._permutation(0, epoch, len(self._lengths))
            ends = np.cumsum(self._lengths[order])
            if self._documents is not None:
                order = self._documents[order]
            kept = {e: o for e, o in self._epoch_orders.items() if abs(e - epoch) == 1}
            self._epoch_orders = kept | {epoch: (order, ends)}
        return self._epoch_orders[epoch]

    def _permutation(self, purpose: int, number: int, size: int) -> np.ndarray:
        # RandomState and not Generator: numpy guarantees that its streams never change.
        return np.random.RandomState([self._seed, purpose, number, *self._source]).permutation(size)
