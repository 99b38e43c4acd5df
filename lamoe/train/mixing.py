"""Mix sources by weight: decide which source gives each row of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MIN_SHARE = 1e-5  # smallest share of a source, because it determines the size of a window
_WINDOW_ROWS = 1000


class Mixture:
    """Assigns rows to sources, so that each source gets its share of the rows.

    The rows are assigned in windows. After each window the number of rows of every source differs
    from its share by less than one. Within a window the order is random. Any row can be computed
    from its index, so there is no state.

    Args:
        weights: one positive number per source; they need not add up to 1.
        seed: 0 to 2**32 - 1.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = np.array(weights, np.float64) / math.fsum(weights)
        self.shares, self.seed = shares, seed
        self._ends = np.append(np.cumsum(shares)[:-1], 1.0)
        # With two rows of every source per window, rounding cannot make a number negative.
        self._window_rows = max(_WINDOW_ROWS, math.ceil(2 / shares.min()))
        # (window, source of each row, number of earlier rows of the same source in the window)
        self._window: tuple[int, np.ndarray, np.ndarray] | None = None

    def place(self, row: int) -> tuple[int, int]:
        """Return (source, index of the row among all rows of that source)."""
        window, at = divmod(row, self._window_rows)
        sources, ranks = self._assign(window)
        source = int(sources[at])
        return source, int(self._counts(window)[source] + ranks[at])

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows each source gives, int64 [sources]."""
        window, at = divmod(rows, self._window_rows)
        counts = self._counts(window)
        if at:
            counts += np.bincount(self._assign(window)[0][:at], minlength=len(counts))
        return counts

    def _counts(self, window: int) -> np.ndarray:
        """Return the number of rows of each source before a window, int64 [sources]."""
        ends = np.rint(self._ends * (window * self._window_rows)).astype(np.int64)
        return np.diff(ends, prepend=0)

    def _assign(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        if self._window is None or self._window[0] != window:
            numbers = self._counts(window + 1) - self._counts(window)
            # RandomState and not Generator: numpy guarantees that its streams never change.
            order = np.random.RandomState([self.seed, 2, window]).permutation(self._window_rows)
            sources = np.repeat(np.arange(len(numbers)), numbers)[order]
            ranks = np.empty_like(sources)
            for source, number in enumerate(numbers):
                ranks[sources == source] = np.arange(number)
            self._window = window, sources, ranks
        return self._window[1:]
