"""Formats measurements as Markdown tables and as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from lamoe.measure.bench import Result
from lamoe.measure.timing import Line, Machine


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells: str) -> list[str]:
    """Return the heading of a table and the line below it."""
    return [_row(*cells), "|---" * len(cells) + "|"]


# ---- bench ---------------------------------------------------------------------------------------
def bench(result: Result) -> str:
    """Format the result of `lamoe bench`: model, machine, speeds, and the peer's speeds."""
    r, machine, isa = result, result.machine, result.versions["isa"]
    out = [
        f"{r.model}: weights {r.weights}, head {r.head}, {r.weight_bytes / 1e9:.3g} GB, ready in "
        f"{r.load_s:.1f} s; cache {r.cache}; {r.threads} thread{'s' * (r.threads != 1)}, {isa}; "
        f"peak memory {r.peak_rss / 1e9:.2f} GB",
        f"limits measured here: read {machine.read / 1e9:.1f} GB/s, int8 "
        f"{2 * machine.int8 / 1e9:.0f} Gop/s, bf16 {2 * machine.bf16 / 1e9:.0f} GFLOP/s",
        "",
        speeds(r.lines, machine, r.weights),
    ]
    if any(x.peer for x in r.lines):
        out += ["", peer_speeds(r.lines)]
    return "\n".join(out)


def speeds(lines: list[Line], machine: Machine, weights: str) -> str:
    """Format speeds, with bandwidth and arithmetic as shares of the limits of the same run."""
    peak = machine.peak(weights)
    out = _head(
        "",
        "tokens/s",
        "ms per pass",
        "GB/s read",
        "share of measured read bandwidth",
        "GFLOP/s",
        "share of measured peak",
    )
    for x in lines:
        read, flops = x.bytes / x.median, x.flops / x.median
        out.append(
            _row(
                x.name,
                f"{x.rate:,.1f}",
                f"{1e3 * x.median:,.2f}",
                f"{read / 1e9:.1f}",
                f"{read / machine.read:.0%}",
                f"{flops / 1e9:,.0f}",
                f"{flops / peak:.0%}",
            )
        )
    if any(x.bytes / x.median > machine.read for x in lines):
        out += [
            "",
            "More than 100 % of the measured read bandwidth means that repeated reads hit the "
            "last-level cache, or that other programs slowed the probe down.",
        ]
    return "\n".join(out)


def peer_speeds(lines: list[Line]) -> str:
    """Format the median speeds of lamoe and llama.cpp in interleaved runs."""
    out = _head(
        "tokens/s",
        "lamoe",
        "llama.cpp",
        "ratio",
        "measured read GB/s: before lamoe, before llama.cpp, before lamoe again, after",
    )
    for x in lines:
        probes = ", ".join(f"{r / 1e9:.1f}" for r in x.read)
        out.append(
            _row(x.name, f"{x.rate:,.1f}", f"{x.peer_rate:,.1f}", f"{x.ratio:.2f} x", probes)
        )
    return "\n".join(out)


# Units of the figures in bench_json whose names do not end in one.
_UNITS = {
    "peak_rss": "bytes",
    "probe.read": "bytes/s",
    "probe.int8, probe.bf16, probe.fp32": "multiply-adds/s",
    "gb_per_s": "1e9 bytes/s",
    "gflops": "1e9 FLOP/s",
    "ratio": "tokens/s of lamoe / tokens/s of the peer",
}


def bench_json(result: Result) -> dict[str, Any]:
    """Return the JSON object that `lamoe bench` prints last."""
    return {
        "model": result.model,
        "weights": result.weights,
        "head": result.head,
        "cache": result.cache,
        "load_s": result.load_s,
        "weight_bytes": result.weight_bytes,
        "peak_rss": result.peak_rss,
        "probe": vars(result.machine),
        **result.versions,
        "lines": {x.name: _figures(x) for x in result.lines},
        "units": _UNITS,
    }


def _figures(line: Line) -> dict[str, Any]:
    out: dict[str, Any] = {
        "tokens_per_s": line.rate,
        "gb_per_s": line.bytes / line.median / 1e9,
        "gflops": line.flops / line.median / 1e9,
    }
    if line.peer:
        out |= {
            "peer_tokens_per_s": line.peer_rate,
            "ratio": line.ratio,
            "read_gb_per_s": [r / 1e9 for r in line.read],
        }
    return out


# ---- evaluate ------------------------------------------------------------------------------------
def report(r: dict[str, Any], name: str) -> str:
    """Format a report (report.evaluate_run or evaluate_texts) as Markdown."""
    out = [
        f"# {name}",
        "",
        f"{r['parameters']:,} parameters, {r['activated']:,} activated per token.",
        "",
        *_text_section(r),
        *_cache_section(r["cache"]),
        *(_expert_section(r) if r["expert_load"] else []),
        *_speed_section(r),
    ]
    return "\n".join(out) + "\n"


def _text_section(r: dict[str, Any]) -> list[str]:
    out = ["## Held-out text, bits per byte (lower is better)", ""]
    out += _head(
        "source", "bytes", "this model", "xz -9e", "gzip -9", "uniform code over the vocabulary"
    )
    for h in r["heldout"]:
        rates = [f"{h[kind]:.3f}" for kind in ("xz", "gzip", "uniform")]
        out.append(_row(h["source"], f"{h['bytes']:,}", f"**{h['model']:.3f}**", *rates))
    trained = " It was trained on text of this kind; they were not." if r.get("training") else ""
    return [
        *out,
        "",
        f"Context {r['context']} tokens. xz and gzip see the whole held-out text at once, the "
        f"model only its context.{trained}",
        "",
    ]


def _cache_section(cache: dict[str, Any]) -> list[str]:
    mine, others = cache["this model"], [k for k in cache if k not in ("attention", "this model")]
    return [
        "## Cache, bytes per token at 16 bits",
        "",
        *_head(f"this model ({cache['attention']})", *others),
        _row(f"**{mine:,}**", *(f"{cache[k]:,} ({mine / cache[k]:.0%})" for k in others)),
        "",
        "In parentheses: this model's cache as a share of that one.",
        "",
    ]


def _expert_section(r: dict[str, Any]) -> list[str]:
    out = ["## Expert load on held-out text (share of the mean; 1 is even)", ""]
    out += _head("layer", "least used", "most used")
    for layer, load in zip(r["moe_layers"], r["expert_load"]):
        out.append(_row(layer, f"{min(load) * len(load):.2f}", f"{max(load) * len(load):.2f}"))
    return [*out, ""]


def _speed_section(r: dict[str, Any]) -> list[str]:
    g, t = r["generation"], r.get("training")
    threads = f"{g['threads']} thread{'s' * (g['threads'] != 1)}"
    out = [
        "## Speed",
        "",
        f"Generation, one sequence: {g['tokens_per_s']:.0f} tokens/s "
        f"({g['dtype']}, {g['kernels']}, {threads}).",
    ]
    if t:
        out.append(
            f"Training: {t['steps']} steps, {t['tokens']:,} tokens ({t['epochs']:.2f} epochs), "
            f"{t['tokens_per_s']:,.0f} tokens/s, {t['mfu']:.0%} of the GEMM peak measured at the "
            f"start ({t['dtype']}). Medians over the run."
        )
        if t["router"]:
            values = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in t["router"].items()]
            out.append(
                f"Router at the end: {', '.join(values)} (expert and device balance are 1 if "
                "even; communication is 1 if every token reaches as many devices as it may, "
                "less otherwise)."
            )
    return out


def needle(r: dict[str, Any], name: str) -> str:
    """Format the result of a needle test (report.evaluate_needle) as Markdown."""
    out = [
        f"# {name}: needle in a haystack",
        "",
        f"Share of {r['draws']} needles whose number the model repeats exactly; haystack: "
        f"{', '.join(r['haystack'])}.",
        "",
        *_head("depth", *(f"{n:,} tokens" for n in r["lengths"])),
    ]
    for depth, row in zip(r["depths"], r["found"]):
        out.append(_row(f"{depth:.0%}", *(f"{share:.0%}" for share in row)))
    out.append(_row("**all**", *(f"**{share:.0%}**" for share in np.mean(r["found"], 0))))
    return "\n".join(out) + "\n"
