"""Plots the training curves of a run as curves.png, from metrics.jsonl. This needs matplotlib."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lamoe import atomic
from lamoe.checkpoints.runs import RECIPE

NAME = "curves.png"
# Colours of Okabe and Ito, which colour-blind people can tell apart.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_GREY = "#999999"
_FEW = 60  # lines of metrics.jsonl up to which each one is marked by a point
_Line = dict[str, Any]  # a line of metrics.jsonl


def read(run: Path) -> tuple[list[_Line], list[_Line]]:
    """Read the metrics.jsonl of a run, finished or not.

    Returns:
        (lines, repeated): the lines in order of steps, without "expert_load"; and the lines of
        steps that were trained again after a restart, in order of time.

    Raises:
        ValueError: if the file does not exist.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{run} has no metrics.jsonl; name the folder of a training run")
    lines: list[_Line] = []
    repeated: list[_Line] = []
    with open(file, encoding="utf-8", errors="replace") as f:
        for text in f:
            try:
                line = json.loads(_without_expert_load(text))
                step = line["step"] + 0
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a live run may be incomplete
            if "restart_from" in line:
                step = line["restart_from"]
            at = len(lines)
            while at and lines[at - 1]["step"] > step:
                at -= 1
            repeated += lines[at:]
            del lines[at:]
            lines.append(line | {"step": step})
    return lines, repeated


def _without_expert_load(text: str) -> str:
    """Cut a list of lists out of a line, because it can be most of the bytes of the file."""
    begin = text.find(', "expert_load": [[')
    end = text.find("]]", begin)
    return text[:begin] + text[end + 2 :] if 0 <= begin < end else text


def draw(run: Path, file: Path | None = None) -> Path:
    """Plot the curves of a run and return the file that was written.

    Args:
        run: the run folder. A process may be training in it.
        file: the PNG file to write, by default curves.png in the run folder.

    Raises:
        ValueError: if the run has not logged a step.
        ImportError: if matplotlib is not installed.
    """
    lines, repeated = read(run)
    if not any("loss" in line for line in lines + repeated):
        raise ValueError(f"{run} has not logged a step yet; its metrics.jsonl holds no loss")
    picture = figure(lines, repeated, _recipe(run), run.resolve().name)
    file = file or run / NAME
    with atomic.replace_path(file) as temporary:
        picture.savefig(temporary, dpi=110, format="png")
    return file


def _recipe(run: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def figure(lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any], name: str):
    """Return a matplotlib figure of the curves.

    Fields that the lines do not have, for example those of a router, have no panel.

    Args:
        lines, repeated: see `read`.
        recipe: the recipe of the run as {section: {key: value}}, or empty.
        name: the name of the run.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [m for m in lines if "loss" in m]
    panels = [p for p in _PANELS if p is _plot_loss or _has(steps + repeated, _FIELDS[p])]
    layout = _layout(panels)
    width, height = 6.0 * len(layout[0]), 2.4 * len(layout) + 0.6
    figure = Figure(figsize=(width, height))
    axes = figure.subplot_mosaic(layout, sharex=True)
    # Fixed margins in inches: an automatic layout takes half of the time to draw.
    left, right, top, bottom = 0.65 / width, 1 - 0.2 / width, 1 - 0.75 / height, 0.5 / height
    figure.subplots_adjust(left, bottom, right, top, wspace=0.2, hspace=0.25)
    figure.text(0.2 / width, 1 - 0.3 / height, _title(lines, recipe, name), fontsize=11)
    for plot in panels:
        axis = axes[plot.__name__]
        plot(axis, lines, repeated, recipe)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        for step in {m["restart_from"] for m in lines + repeated if "restart_from" in m}:
            axis.axvline(step, color=_GREY, ls=":", lw=1)
        handles, labels = axis.get_legend_handles_labels()
        if labels and labels != ["training"]:
            unique = dict(zip(labels, handles))
            axis.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)
    for place in layout[-1]:
        axes[place].set_xlabel("step", fontsize=9)
    first = axes[layout[-1][0]]  # the panels share the x axis
    first.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    first.set_xlim(0, 1.02 * max(m["step"] for m in lines + repeated))
    return figure


def _layout(panels: list) -> list[Any]:
    """Arrange the panels in two columns. The loss takes the space that is left."""
    names = [p.__name__ for p in panels]
    if len(names) < 4:
        return [[name] for name in names]
    left, right = names[: len(names) // 2], names[len(names) // 2 :]
    left = [left[0]] * (len(right) - len(left)) + left
    return [list(row) for row in zip(left, right)]


def _title(lines: list[_Line], recipe: dict[str, Any], name: str) -> str:
    """Return the name of the run and its last numbers."""
    last = next((m for m in reversed(lines) if "loss" in m), {})
    parts = []
    if "step" in last:
        total = recipe.get("run", {}).get("steps")
        parts.append(f"step {last['step']:,}" + (f" of {total:,}" if total else ""))
    if "tokens" in last:
        parts.append(f"{_human(last['tokens'])} tokens")
    if "loss" in last and last["loss"] is not None:
        parts.append(f"loss {last['loss']:.3f}")
    for field, unit in (
        ("heldout_bits_per_byte", "bits per byte"),
        ("heldout_bits_per_token", "bits per token"),
    ):
        found = [m[field] for m in lines if isinstance(m.get(field), float)]
        if found:
            parts.append(f"held out {found[-1]:.3f} {unit}")
            break
    skipped, restarts = last.get("skipped_steps", 0), last.get("restarts", 0)
    parts += [f"{skipped} step{'s' * (skipped != 1)} skipped"] * bool(skipped)
    parts += [f"{restarts} restart{'s' * (restarts != 1)}"] * bool(restarts)
    return f"{name}: " + ", ".join(parts)


# ---- panels --------------------------------------------------------------------------------------
def _plot_loss(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Loss (nats per token)", loc="left", fontsize=9)
    _plot(axis, lines, repeated, "loss", _BLUE, label="training")
    held = [m for m in lines if isinstance(m.get("heldout_bits_per_token"), (int, float))]
    if held:
        nats = [m["heldout_bits_per_token"] * math.log(2) for m in held]
        points = dict(color=_ORANGE, marker="o", ms=5, lw=1.2, zorder=4)
        axis.plot([m["step"] for m in held], nats, label="held out", **points)
    _mark_skipped(axis, lines + repeated)


def _plot_norm(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_title("Gradient norm before clipping", loc="left", fontsize=9)
    axis.set_yscale("log")
    _plot(axis, lines, repeated, "grad_norm", _BLUE)
    clip = recipe.get("optim", {}).get("clip")
    if isinstance(clip, (int, float)) and clip > 0:
        axis.axhline(clip, color=_ORANGE, ls="--", lw=1, label=f"clipped to {clip:g}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    _mark_skipped(axis, lines + repeated)


def _plot_rate(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Learning rate", loc="left", fontsize=9)
    _plot(axis, lines, [], "lr", _BLUE, smooth=False)
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _plot_entropy(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Router entropy (nats)", loc="left", fontsize=9)
    _plot(axis, lines, [], "router_entropy", _GREEN)
    experts = recipe.get("model", {}).get("n_routed_experts")
    if isinstance(experts, int) and experts > 1:
        most = math.log(experts)
        axis.axhline(most, color=_GREY, ls="--", lw=1, label=f"even over {experts} experts")
        axis.set_ylim(0, 1.1 * most)
    else:
        axis.set_ylim(0)


def _plot_load(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Load of the busiest expert / mean", loc="left", fontsize=9)
    _plot(axis, lines, [], "load_max_over_mean", _GREEN)
    axis.set_ylim(1)


def _plot_drops(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Dropped assignments", loc="left", fontsize=9)
    _plot(axis, lines, [], "drop_rate", _GREEN)
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def _plot_speed(axis, lines: list[_Line], repeated: list[_Line], recipe: dict[str, Any]) -> None:
    axis.set_title("Tokens per second", loc="left", fontsize=9)
    _plot(axis, lines, [], "tokens_per_s", _BLUE)
    axis.set_ylim(0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


_FIELDS = {
    _plot_loss: "loss",
    _plot_norm: "grad_norm",
    _plot_rate: "lr",
    _plot_entropy: "router_entropy",
    _plot_load: "load_max_over_mean",
    _plot_drops: "drop_rate",
    _plot_speed: "tokens_per_s",
}
_PANELS = list(_FIELDS)


def _has(lines: list[_Line], field: str) -> bool:
    return any(isinstance(m.get(field), (int, float)) for m in lines)


def _plot(
    axis,
    lines: list[_Line],
    repeated: list[_Line],
    field: str,
    color: str,
    label: str | None = None,
    smooth: bool = True,
) -> None:
    """Plot a field of the accepted steps. Many points become a faint line and a running mean."""
    for part in _runs_of_steps(repeated):
        axis.plot(*_points(part, field), color=_GREY, lw=0.9, label="before a restart")
    x, y = _points(lines, field)
    few = dict(marker=".", ms=5) if len(x) <= _FEW else {}
    width = len(x) // 50
    if not smooth or width < 3:
        axis.plot(x, y, color=color, lw=1.2, label=label, **few)
        return
    axis.plot(x, y, color=color, alpha=0.3, lw=0.7)
    if axis.get_yscale() == "log":
        mean = np.exp(_running_mean(np.log(np.maximum(y, 1e-30)), width))
    else:
        mean = _running_mean(y, width)
    axis.plot(x, mean, color=color, lw=1.5, label=label)


def _points(lines: list[_Line], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values) of the accepted steps that have a finite value."""
    found = [(m["step"], m[field]) for m in lines if "skipped" not in m and _finite(m.get(field))]
    x, y = np.array(found, float).reshape(-1, 2).T
    return x, y


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of about `width` values around each place, or of fewer at the ends."""
    sums, place = np.cumsum(np.concatenate(([0.0], y))), np.arange(len(y))
    begin = np.maximum(0, place - width // 2)
    end = np.minimum(len(y), place + width // 2 + 1)
    return (sums[end] - sums[begin]) / (end - begin)


def _runs_of_steps(lines: list[_Line]) -> list[list[_Line]]:
    """Split lines where the steps begin again with a smaller number."""
    parts: list[list[_Line]] = []
    for m in lines:
        if not parts or m["step"] < parts[-1][-1]["step"]:
            parts.append([])
        parts[-1].append(m)
    return parts


def _mark_skipped(axis, lines: list[_Line]) -> None:
    """Mark the skipped steps at the top edge of the panel."""
    steps = sorted({m["step"] for m in lines if m.get("skipped")})
    if steps:
        axis.plot(
            steps,
            [0.97] * len(steps),
            "v",
            color=_RED,
            ms=6,
            transform=axis.get_xaxis_transform(),
            label="skipped step" + "s" * (len(steps) != 1),
        )


def _human(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"
