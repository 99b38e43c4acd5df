"""Finds training steps that would damage the weights, and counts how many were skipped in a row.

A step is skipped if its loss or gradient norm is not finite, or if one of them is a spike. A spike
lies more than `sigmas` standard deviations above the median of the last accepted steps. The loss is
compared in nats, the gradient norm by its logarithm. The standard deviation is 1.4826 times the
median absolute deviation, so earlier outliers do not widen it, and at least SIGMA_FLOOR, so a quiet
history does not make the rule strict. With 6 sigmas, a spike is at least 11 times the median norm
or 2.4 nats above the median loss. The rule begins after half a window of accepted steps.

Sources: OLMo-core's skip-step optimizer compares loss and norm with 6 standard deviations of the
last 128 steps. PaLM (arXiv 2204.02311, section 5.1) restarts from a checkpoint before the spike and
skips the batches up to its end.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamoe.model.config import check_types
from lamoe.train import checkpoint

SIGMA_FLOOR = 0.4  # smallest standard deviation, in nats of the loss and of the log of the norm


@dataclass(frozen=True)
class Spikes:
    """Section [spikes] of a recipe: steps that are skipped, and restarts.

    Attributes:
        skip: whether to skip a step whose loss or gradient norm is not finite or a spike. If false,
            spikes are trained on, and the first value that is not finite stops the run.
        sigmas: number of standard deviations above the median that make a spike.
        window: number of accepted steps that a step is compared with.
        max_in_a_row: number of skipped steps in a row after which the run stops.
        restarts: how often the run may restart by itself, instead of stopping, from the last
            checkpoint before the skipped steps. It continues with the batches after them.
    """

    skip: bool = True
    sigmas: float = 6.0
    window: int = 128
    max_in_a_row: int = 10
    restarts: int = 0

    def __post_init__(self):
        check_types(self, "spikes.")
        if not 0 < self.sigmas < math.inf:
            raise ValueError(
                f"spikes.sigmas is {self.sigmas}; it must be a finite number above 0. To skip only "
                "values that are not finite, set a large number such as 1000"
            )
        for name, low in dict(window=8, max_in_a_row=1, restarts=0).items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"spikes.{name} is {getattr(self, name)}; it must be at least {low}"
                )


class SpikeGuard:
    """Decides for each step whether it is skipped. Its state is part of a checkpoint.

    Attributes:
        in_a_row: number of steps that were skipped since the last accepted one.
        skipped: number of steps skipped so far, repeated ones included.
        restarts: number of restarts so far.
        good_step: step of the last checkpoint that was saved while no step was being skipped.
    """

    def __init__(self, spikes: Spikes):
        self.spikes = spikes
        self._forget()

    def _forget(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.spikes.window)
        self.log_norms: deque[float] = deque(maxlen=self.spikes.window)
        self.in_a_row = self.skipped = self.restarts = 0
        self.good_step: int | None = None

    def check(self, loss: float, norm: float, skipped: bool | None = None) -> str:
        """Return why a step must be skipped, or an empty text if it is accepted.

        Args:
            loss: mean loss of the step, in nats.
            norm: global gradient norm before clipping.
            skipped: whether an accelerator has skipped the step, by the `limits` of the time when
                it was queued. None if it is decided here.
        """
        fault = self._fault(loss, norm) if skipped is not False else ""
        if skipped and not fault:
            fault = f"loss {loss:.4g}, gradient norm {norm:.4g}, above the limits some steps before"
        if fault:
            self.in_a_row += 1
            self.skipped += 1
        else:
            self.in_a_row = 0
            self.losses.append(loss)
            self.log_norms.append(_log(norm))
        return fault

    def _fault(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        max_loss, max_norm = self.limits()
        count = len(self.losses)
        if norm > max_norm:
            times = norm / math.exp(statistics.median(self.log_norms))
            return (
                f"gradient norm {norm:.4g}, {times:.3g} times the median "
                f"of the last {count} accepted steps"
            )
        if loss > max_loss:
            above = loss - statistics.median(self.losses)
            return (
                f"loss {loss:.4g}, {above:.3g} above the median of the last {count} accepted steps"
            )
        return ""

    def limits(self) -> tuple[float, float]:
        """Return the largest loss and gradient norm that are no spikes, inf for no limit."""
        if not self.spikes.skip or len(self.losses) < self.spikes.window // 2:
            return math.inf, math.inf
        tops = []
        for values in (self.losses, self.log_norms):
            median = statistics.median(values)
            tops.append(median + self.spikes.sigmas * _sigma(values, median))
        return tops[0], math.exp(min(tops[1], 700.0))  # exp overflows above 709

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.in_a_row >= (self.spikes.max_in_a_row if self.spikes.skip else 1)

    def checkpoint_saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is about to be saved."""
        if not self.in_a_row:
            self.good_step = step

    def restart_point(self, run: Path) -> Path | None:
        """Return the checkpoint to restart from, or None if the run has to stop."""
        if self.restarts >= self.spikes.restarts or self.good_step is None:
            return None
        folder = run / checkpoint.name(self.good_step)
        if not folder.is_dir():  # pruned: a signal has saved later ones between skipped steps
            return None
        checkpoint.verify(folder)
        return folder

    def metrics(self, fault: str) -> dict[str, Any]:
        """Return the fields of this step for metrics.jsonl. `fault` is the result of `check`."""
        counts = {"skipped_steps": self.skipped, "restarts": self.restarts}
        return {"skipped": fault, **counts} if fault else counts

    def describe(self) -> str:
        """Return the counts for people, for example " (3 steps skipped, 1 restart)"."""
        counts = ((self.skipped, "step"), (self.restarts, "restart"))
        steps, restarts = (f"{n} {what}{'s' * (n != 1)}" for n, what in counts)
        found = [f"{steps} skipped"] * bool(self.skipped) + [restarts] * bool(self.restarts)
        return f" ({', '.join(found)})" if found else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming, a dict of numbers and lists of numbers."""
        return {
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "restarts": self.restarts,
            "good_step": self.good_step,
        }

    def load_state_dict(self, state: dict[str, Any] | None, step: int) -> None:
        """Load the result of `state_dict`, or begin anew if an older checkpoint has none.

        Args:
            step: step of the checkpoint.
        """
        self._forget()
        self.good_step = step
        if state is not None:
            self.losses.extend(state["losses"])
            self.log_norms.extend(state["log_norms"])
            self.in_a_row, self.good_step = state["in_a_row"], state["good_step"]
            self.skipped, self.restarts = state["skipped"], state["restarts"]


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _sigma(values: Iterable[float], median: float) -> float:
    return max(1.4826 * statistics.median(abs(v - median) for v in values), SIGMA_FLOOR)
