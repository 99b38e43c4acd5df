"""Reports the metrics of a training run to metrics.jsonl, TensorBoard and the terminal.

curves.py plots them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from lamoe import atomic
from lamoe.model.routing import LayerRecord
from lamoe.train import curves
from lamoe.train.recipe import Recipe
from lamoe.train.time_left import TimeLeft


class MetricsLog:
    """Write metrics to metrics.jsonl, to TensorBoard if it is installed, and to the screen.

    Args:
        run: the run folder.
        step: the step from which the run starts or resumes.
        restarts: number of automatic restarts before that step.
    """

    def __init__(self, run: Path, step: int, screen: Screen, restarts: int = 0):
        self.file, self.screen = run / "metrics.jsonl", screen
        self.logged = False  # whether this process has written a line
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = _lines_before(lines, step, restarts) if step else []
            atomic.write_text(self.file, "".join(line + "\n" for line in kept))
        self._open_board(step)
        if self.board is None:
            screen.note(
                "TensorBoard is not installed (pip install 'lamoe[train]'); "
                "metrics go to metrics.jsonl only"
            )

    def _open_board(self, step: int) -> None:
        """Open TensorBoard's file, and hide earlier events of steps after `step`."""
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.file.parent / "tensorboard"), purge_step=step + 1)
        except ImportError:
            pass

    def step(self, step: int, recipe: Recipe, records: list[list[LayerRecord]], **values) -> None:
        """Show the metrics of one step.

        They are also written if the step is the first, the last, skipped, or a multiple of
        run.log_every.

        Args:
            records: [micro-batch][MoE layer], the routing statistics of each layer.
            values: metrics of the whole step, over all its micro-batches.
        """
        self.screen.step(step, values)
        skipped = values.get("skipped")
        if skipped:
            self.screen.note(
                f"step {step}: skipped, {skipped}; {values['skipped_steps']} skipped so far"
            )
        elif step % recipe.run.log_every and step != recipe.run.steps and step != 1:
            return
        self.write(step, {**values, **router_metrics(records, recipe.balance.devices)})

    def restart(self, step: int, good_step: int, reason: str) -> None:
        """Write and show that the run goes back from `step` to the checkpoint of `good_step`."""
        self.write(step, {"restart_from": good_step, "reason": reason})
        self.screen.note(f"step {step}: restarting from step {good_step}, because {reason}")
        if self.board is not None:
            self.board.close()
            self._open_board(good_step)

    def heldout(self, step: int, values: dict[str, float]) -> None:
        """Write and show the results of an evaluation, and plot the curves."""
        self.write(step, values)
        self._draw()
        text = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in values.items())
        self.screen.note(f"step {step}: {text}")

    def write(self, step: int, values: dict) -> None:
        """Append one line to metrics.jsonl and pass the numbers to TensorBoard."""
        self.logged = True
        rounded = {k: _rounded(v) for k, v in values.items()}
        with atomic.naming(self.file), open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            for layer, load in enumerate(values.get("expert_load", [])):
                self.board.add_scalar(f"expert_load_max/moe_layer_{layer}", max(load), step)
                self.board.add_scalar(f"expert_load_min/moe_layer_{layer}", min(load), step)
            self.board.flush()

    def _draw(self) -> Path | None:
        """Plot the curves if matplotlib is installed. A failure does not end the run."""
        try:
            return curves.draw(self.file.parent)
        except ImportError:
            return None
        except Exception as e:
            self.screen.note(f"warning: the curves were not plotted: {type(e).__name__}: {e}")
            return None

    def close(self) -> None:
        """Plot the curves, and close TensorBoard's file."""
        if self.board is not None:
            self.board.close()
        if self.logged and (file := self._draw()):
            self.screen.note(f"plotted the training curves: {file}")


def _rounded(value):
    """Return a number for JSON, which has no NaN and no infinity: they become null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _lines_before(lines: list[str], step: int, restarts: int) -> list[str]:
    """Return the lines of metrics.jsonl up to a checkpoint. A resumed run repeats all later steps.

    Args:
        step: step of the checkpoint.
        restarts: number of automatic restarts before it. Each one is a line, and the steps after
            it begin again with a smaller number.
    """
    kept: list[tuple[int, str]] = []  # steps and lines
    begin = 0  # of the lines since the last restart
    for line in lines:
        try:
            values = json.loads(line)
            if "restart_from" in values:
                if not restarts:
                    break
                restarts, begin = restarts - 1, len(kept) + 1
            kept.append((int(values["step"]), line))
        except (ValueError, KeyError, TypeError):  # a killed process may leave half a line
            continue
    return [line for i, (at, line) in enumerate(kept) if i < begin or at <= step]


def router_metrics(records: list[list[LayerRecord]], devices: int) -> dict:
    """Summarise the routing statistics of one step, over all its micro-batches.

    Args:
        records: [micro-batch][MoE layer], the routing statistics of each layer.
        devices: number of virtual devices.

    Returns:
        A dict of metrics, empty for a model without MoE layers:
        expert_load: [layer][expert], fraction of a layer's assignments, before dropping.
        balance_expert, balance_device, balance_communication: unweighted losses, mean over layers.
        load_max_over_mean: largest load over mean load of an expert, mean over layers.
        router_entropy: entropy of a token's router scores in nats, mean over tokens and layers.
        drop_rate: number of dropped assignments divided by that of all assignments.
    """
    if not records or not records[0]:
        return {}
    layers = list(zip(*records))
    load = torch.stack([torch.stack([r.load for r in layer]).sum(0) for layer in layers])
    share = load / load.sum(1, keepdim=True)  # [layers, experts]
    losses = torch.stack(
        [torch.stack([r.losses.detach() for r in layer]).mean(0) for layer in layers]
    ).mean(0)
    return {
        "balance_expert": losses[0].item(),
        "balance_device": losses[1].item(),
        "balance_communication": losses[2].item(),
        "load_max_over_mean": (share.max(1).values * load.shape[1]).mean().item(),
        "router_entropy": sum(r.entropy.item() for layer in layers for r in layer)
        / sum(map(len, layers)),
        "drop_rate": (sum(int(r.dropped) for layer in layers for r in layer) / load.sum()).item(),
        "expert_load": [[round(v, 5) for v in row] for row in share.tolist()],
    }


class Screen:
    """Shows progress as a bar on a terminal and as plain lines elsewhere. Quiet shows nothing."""

    def __init__(self, recipe: Recipe, quiet: bool, bar=None, task=None):
        self.recipe, self.quiet, self.bar, self.task = recipe, quiet, bar, task
        self.time_left = TimeLeft(recipe)

    def note(self, text: str) -> None:
        """Show one line of text."""
        if not self.quiet:
            self.bar.console.print(text, highlight=False) if self.bar else print(text, flush=True)

    def step(self, step: int, values: dict) -> None:
        """Show loss, speed and remaining time after a step."""
        if self.quiet:
            return
        total, tokens = self.recipe.run.steps, self.recipe.batch.size_at(step - 1)
        tokens *= self.recipe.data.seq_len
        left_s = self.time_left.update(step, tokens / values["tokens_per_s"], time.perf_counter())
        left = "" if left_s is None else f"  {timedelta(seconds=round(left_s))} left"
        line = (
            f"loss {values['loss']:.3f}  {values['tokens_per_s']:,.0f} tok/s  "
            f"MFU {values['mfu']:.0%}  lr {values['lr']:.1e}"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, info=line + left)
        elif step % self.recipe.run.log_every == 0 or step in (1, total):
            print(f"step {step}/{total}  {line}{left}", flush=True)


@contextmanager
def open_screen(recipe: Recipe, quiet: bool) -> Iterator[Screen]:
    """Yield the Screen of a run. It has a progress bar if standard error is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield Screen(recipe, quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("train"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Screen(recipe, quiet, bar, bar.add_task("train", total=recipe.run.steps, info=""))
