"""Plots measurements as PNG files. This needs matplotlib (the extra lamoe[train])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {"model": "this model", "xz": "xz -9e", "gzip": "gzip -9", "uniform": "uniform"}


def report(r: dict[str, Any], name: str, file: Path) -> None:
    """Plot a report: loss curve, bits per byte, cache size and expert load."""
    plt = _pyplot()
    fig, ((loss, text), (cache, experts)) = plt.subplots(
        2, 2, figsize=(12, 8), layout="constrained"
    )
    fig.suptitle(name)
    if r.get("training"):
        _plot_loss(loss, r["training"])
    else:
        loss.axis("off")
    _plot_text(text, r["heldout"])
    _plot_cache(cache, r["cache"])
    if r["expert_load"]:
        _plot_experts(fig, experts, r)
    else:
        experts.axis("off")
    fig.savefig(file, dpi=110)
    plt.close(fig)


def needle(panels: dict[str, dict[str, Any]], file: Path) -> None:
    """Plot needle tests as heat maps over depth and length, side by side.

    Args:
        panels: {title: result of report.evaluate_needle}. A result may also have a key "trained",
            the training length in tokens, which is marked by a line.
    """
    plt = _pyplot()
    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1 + 4.5 * len(panels), 3.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, (title, r) in zip(axes[0], panels.items()):
        image = axis.imshow(r["found"], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), share in np.ndenumerate(np.array(r["found"])):
            axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(r["lengths"])), [f"{n:,}" for n in r["lengths"]], rotation=45)
        axis.set_yticks(range(len(r["depths"])), [f"{d:.0%}" for d in r["depths"]])
        axis.set(title=title, xlabel="tokens of the haystack")
        if "trained" in r:
            within = sum(n <= r["trained"] for n in r["lengths"])
            axis.axvline(within - 0.5, color="black", lw=2)
    axes[0, 0].set_ylabel("depth of the needle")
    fig.colorbar(image, ax=axes, label="needles found")
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plot_loss(axis, t: dict[str, Any]) -> None:
    step, loss, rate = zip(*t["curve"])
    axis.plot(step, loss, lw=1, label="training")
    axis.set(
        title=f"Loss ({t['tokens']:,} tokens, {t['tokens_per_s']:,.0f} tokens/s)",
        xlabel="step",
        ylabel="nats per token",
    )
    if t["heldout_curve"]:
        axis.plot(*zip(*t["heldout_curve"]), "o", color="tab:green", label="held out")
    axis.legend(loc="lower left")
    right = axis.twinx()
    right.plot(step, rate, color="tab:orange", lw=0.8, alpha=0.7)
    right.set_ylim(0)
    right.set_ylabel("learning rate", color="tab:orange")


def _plot_text(axis, heldout: list[dict[str, Any]]) -> None:
    width, places = 0.8 / len(heldout), np.arange(len(_KINDS))
    for i, h in enumerate(heldout):
        heights = [h[kind] for kind in _KINDS]
        bars = axis.bar(places + i * width, heights, width, label=_short(h["source"]))
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(places + 0.4 - width / 2, _KINDS.values())
    axis.set(title="Held-out text", ylabel="bits per byte")
    axis.legend()


def _plot_cache(axis, cache: dict[str, Any]) -> None:
    mine = f"this model ({cache['attention']})"
    sizes = {mine: cache["this model"]}
    sizes |= {k: v for k, v in cache.items() if k not in ("attention", "this model")}
    colors = ["tab:gray"] * (len(sizes) - 1) + ["tab:blue"]
    bars = axis.barh(list(sizes)[::-1], list(sizes.values())[::-1], color=colors)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3)
    axis.margins(x=0.15)
    axis.set(title="Cache at 16 bits", xlabel="bytes per token")


def _plot_experts(fig, axis, r: dict[str, Any]) -> None:
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    load = np.array(r["expert_load"])
    load *= load.shape[1]
    norm = TwoSlopeNorm(1, 0, max(2, load.max()))
    image = axis.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm)
    fig.colorbar(image, ax=axis, label="load / mean (white: even)")
    axis.set(title="Expert load on held-out text", xlabel="expert", ylabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = range(0, len(load), -(-len(load) // 20))  # at most 20 labels
    axis.set_yticks(shown, [r["moe_layers"][i] for i in shown])


def _short(source: str, width: int = 28) -> str:
    return source if len(source) <= width else "..." + source[3 - width :]
