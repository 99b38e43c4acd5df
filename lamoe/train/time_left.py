"""Estimates the remaining time of a training run from its recent steps."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from lamoe.train.recipe import Recipe

_RECENT = 20  # steps, and pauses of each kind, that count


class TimeLeft:
    """The remaining time of a run.

    A step counts with the median time per sequence of recent steps, so a slow start is soon
    forgotten, and a growing batch is no surprise. The pause after a step for an evaluation, a
    checkpoint or both counts with the median of recent pauses of that kind. The last evaluation and
    the last checkpoint do not count.
    """

    def __init__(self, recipe: Recipe):
        self.run, self.batch = recipe.run, recipe.batch
        self._per_sequence: deque[float] = deque(maxlen=_RECENT)  # seconds
        # (evaluates, saves) -> seconds between two steps
        self._pauses: dict[tuple[bool, bool], deque[float]] = defaultdict(
            lambda: deque(maxlen=_RECENT)
        )
        self._last_end_s: float | None = None

    def update(self, step: int, seconds: float, now_s: float) -> float | None:
        """Record a step and return the seconds until the last step ends.

        The first step warms up, so it only starts the clock, and the result is None.

        Args:
            step: number of the step, counted from 1.
            seconds: duration of the step.
            now_s: time at the end of the step, in seconds.
        """
        if self._last_end_s is not None:
            kind = (_is_due(step - 1, self.run.eval_every), _is_due(step - 1, self.run.save_every))
            self._pauses[kind].append(now_s - self._last_end_s - seconds)
            self._per_sequence.append(seconds / self.batch.size_at(step - 1))
        self._last_end_s = now_s
        if not self._per_sequence:
            return None
        sequences = self.batch.before(self.run.steps) - self.batch.before(step)
        return sequences * median(self._per_sequence) + sum(
            count * median(self._pauses[kind])
            for kind, count in self._pauses_after(step).items()
            if kind in self._pauses
        )

    def _pauses_after(self, step: int) -> dict[tuple[bool, bool], int]:
        """Count the pauses of each kind from the end of `step` to the beginning of the last."""

        def count(every: int) -> int:
            return (self.run.steps - 1) // every - (step - 1) // every if every else 0

        evaluations, saves = count(self.run.eval_every), count(self.run.save_every)
        both = count(math.lcm(self.run.eval_every, self.run.save_every))
        return {
            (True, True): both,
            (True, False): evaluations - both,
            (False, True): saves - both,
            (False, False): self.run.steps - step - evaluations - saves + both,
        }


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
