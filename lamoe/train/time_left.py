"""Estimates the remaining time of a training run from its recent steps."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

from lamoe.train.recipe import Recipe

_RECENT = 20  # steps, and pauses of each kind, that count
Kind = tuple[bool, bool]  # whether the model is evaluated and whether it is saved


@dataclass
class _Pause:
    """The time between two steps, and the number of steps that were read at once after it."""

    seconds: float
    steps: int = 1


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
        self._pauses: dict[Kind, deque[_Pause]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._last_pause: _Pause | None = None
        self._last_end_s: float | None = None

    def update(self, step: int, seconds: float, now_s: float) -> float | None:
        """Record a step and return the seconds until the last step ends.

        On a GPU, several steps are read at once; then several calls have the same `now_s`. The
        first steps warm up, so they only start the clock, and the result is None.

        Args:
            step: number of the step, counted from 1.
            seconds: duration of the step.
            now_s: time at the end of the step, in seconds.
        """
        pause_s = now_s - (now_s if self._last_end_s is None else self._last_end_s) - seconds
        self._last_end_s = now_s
        is_read_with_last = pause_s < -seconds / 2
        if is_read_with_last:
            if self._last_pause is None:
                return None
            self._last_pause.seconds += pause_s
            self._last_pause.steps += 1
        else:
            kind = (_is_due(step - 1, self.run.eval_every), _is_due(step - 1, self.run.save_every))
            self._last_pause = _Pause(pause_s)
            self._pauses[kind].append(self._last_pause)
        self._per_sequence.append(seconds / self.batch.size_at(step - 1))
        sequences = self.batch.before(self.run.steps) - self.batch.before(step)
        return sequences * median(self._per_sequence) + sum(
            count * self._typical_pause(kind) for kind, count in self._pauses_after(step).items()
        )

    def _typical_pause(self, kind: Kind) -> float:
        """Return the seconds of a pause, or 0 if there was none of this kind.

        Between other steps only little happens, once for all steps that are read at once.
        """
        if not self._pauses[kind]:
            return 0.0
        return median(p.seconds / (1 if any(kind) else p.steps) for p in self._pauses[kind])

    def _pauses_after(self, step: int) -> dict[Kind, int]:
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
