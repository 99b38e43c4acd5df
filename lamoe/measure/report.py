"""What a model is worth, measured: held-out bits per byte beside gzip, xz and the uniform code, expert load, cache bytes beside MHA /
GQA / MQA, speed. `lamoe evaluate` writes it as report.md, report.json and report.png. A needle test (`--needle`) has a report and a picture of its own.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from lamoe.backends.cpu.packed import PackedModel
from lamoe.engine import score
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.text_loss import text_loss
from lamoe.measure import needle
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train.data import heldout_rows, open_corpus
from lamoe.train.sources import read_documents


def evaluate_run(model: Transformer | PackedModel, tok: Tokenizer, run: Path) -> dict:
    """The report of a training run: its held-out text per source, its metrics, and the model's speed now."""
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    corpus, seq_len = open_corpus(run / "data"), recipe["data"]["seq_len"]
    if corpus.meta["key"]["vocab_size"] > model.config.vocab_size:
        raise ValueError(
            f"{run / 'data'} was packed with {corpus.meta['key']['vocab_size']} tokens, the model has {model.config.vocab_size}"
        )
    texts = {}
    for source in (s["source"] for s in corpus.meta["sources"]):
        raw = "".join(tok.decode(ids) for ids in corpus.heldout_documents(source))
        texts[source] = (raw, heldout_rows(corpus, seq_len, source))
    report = _measure(model, tok, texts, seq_len, recipe["data"]["document_mask"])
    report["training"] = _training(run, recipe)
    return report


def evaluate_texts(
    model: Transformer | PackedModel, tok: Tokenizer, sources: list[str], seq_len: int | None = None
) -> dict:
    """The report of any model on any texts (train/sources.py says what a source is)."""
    limit = model.config.max_position_embeddings
    seq_len = min(1024, limit) if seq_len is None else seq_len
    if not 1 <= seq_len <= limit:
        raise ValueError(
            f"the context is {seq_len} tokens; it must be from 1 to the model's {limit}"
        )
    docs: dict[str, list[str]] = {}
    for doc in read_documents(sources):
        docs.setdefault(doc.source, []).append(doc.text)
    texts = {s: ("".join(ts), _rows(tok, ts, seq_len)) for s, ts in docs.items()}
    return _measure(model, tok, texts, seq_len, True)


def _rows(
    tok: Tokenizer, texts: Iterable[str], seq_len: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of text_loss: each text on its own behind BOS (if the model has one), windows overlapping by one token."""
    for ids in tok.encode_batch(list(texts), bos=tok.bos_id is not None):
        for at in range(0, len(ids) - 1, seq_len):
            part = ids[at : at + seq_len + 1]
            pad = seq_len + 1 - len(part)
            yield (
                np.array(part + [part[-1]] * pad),
                np.array([0] * len(part) + list(range(1, pad + 1)), np.int32),
            )


def _measure(
    model: Transformer | PackedModel, tok: Tokenizer, texts: dict, seq_len: int, document_mask: bool
) -> dict:
    rows, load, weight = [], 0, 0
    for source, (raw, windows) in texts.items():
        data = raw.encode("utf-8")
        if not data:
            continue
        packed = isinstance(model, PackedModel)
        result = (
            score.text_loss(model, windows, document_mask)
            if packed
            else text_loss(model, windows, 16, document_mask=document_mask)
        )
        load, weight = load + result.load * result.targets, weight + result.targets
        rows.append(
            {
                "source": source,
                "bytes": len(data),
                "tokens": result.targets,
                "model": result.bits_per_byte(len(data)),
                "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
                "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
                "uniform": math.log2(model.config.vocab_size) * result.targets / len(data),
                "perplexity": result.perplexity,
            }
        )
    if not rows:
        raise ValueError("there is no text to evaluate on; every source is empty")
    config = model.config
    return {
        "parameters": accounting.parameters(config).total,
        "activated": accounting.parameters(config).activated,
        "context": seq_len,
        "heldout": rows,
        "moe_layers": list(config.moe_layers),
        "expert_load": (load / weight).tolist() if np.size(load) else [],
        "cache": {
            "attention": _attention(config),
            "this model": 2 * accounting.cache_elements(config),
            **{name: 2 * n for name, n in accounting.cache_twins(config).items()},
        },
        "generation": _speed(model, tok),
    }


def _attention(config: ModelConfig) -> str:
    if config.is_mla:
        return "MLA"
    return {config.num_attention_heads: "MHA", 1: "MQA"}.get(config.n_kv_heads, "GQA")


def _speed(model: Transformer | PackedModel, tok: Tokenizer, tokens: int = 96) -> dict:
    start = [tok.bos_id if tok.bos_id is not None else 0]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=min(tokens, model.config.max_position_embeddings - 1),
        ignore_eos=True,
    )
    llm = LLM(
        model, max_model_len=1 + params.max_tokens, max_num_seqs=1, speculate=0
    )  # as `lamoe generate` runs it
    times = [time.perf_counter()]
    for _ in llm.stream(start, params):
        times.append(time.perf_counter())
    steps = np.diff(times)
    steps = steps[min(8, len(steps) // 2) :]  # the prompt and the warming up
    return {
        "tokens_per_s": 1 / statistics.median(steps),
        "threads": torch.get_num_threads(),
        "dtype": model.weights
        if isinstance(model, PackedModel)
        else str(model.embed.weight.dtype)[6:],
        "kernels": "compiled kernels" if isinstance(llm.runs, PackedModel) else "torch ops",
    }


def _training(run: Path, recipe: dict) -> dict:
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [m for m in lines if "loss" in m]
    if not steps:
        return {}
    return {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "epochs": steps[-1]["epoch"],
        "dtype": recipe["run"]["dtype"],
        "tokens_per_s": statistics.median(m["tokens_per_s"] for m in steps),
        "mfu": statistics.median(m["mfu"] for m in steps),
        "curve": [[m["step"], m["loss"], m["lr"]] for m in steps],
        "heldout_curve": [
            [m["step"], m["heldout_bits_per_token"] * math.log(2)]
            for m in lines
            if "heldout_bits_per_token" in m
        ],
        "router": {
            k: steps[-1][k]
            for k in (
                "balance_expert",
                "balance_device",
                "balance_communication",
                "load_max_over_mean",
                "router_entropy",
                "drop_rate",
            )
            if k in steps[-1]
        },
    }


def evaluate_needle(
    model: Transformer,
    tok: Tokenizer,
    lengths: list[int],
    sources: list[str],
    depths: int = 5,
    draws: int = 8,
    seed: int = 0,
    note=lambda text: None,
) -> dict:
    """Needles in haystacks of `sources` (train/sources.py says what a source is), at `depths` even depths of each length in tokens."""
    if depths < 2:
        raise ValueError(
            f"{depths} depths were asked for; at least 2 are needed, the beginning and the end"
        )
    if isinstance(model, PackedModel):
        raise ValueError(
            "the needle test runs on the torch model only; use the model that the packed one was made from, without --weights"
        )
    make = needle.text_needle(tok, (doc.text for doc in read_documents(sources)))
    at = [i / (depths - 1) for i in range(depths)]
    found = needle.needle(model, make, lengths, at, draws, seed, note)
    return {
        "lengths": lengths,
        "depths": at,
        "draws": draws,
        "seed": seed,
        "haystack": sources,
        "max_position_embeddings": model.config.max_position_embeddings,
        "found": found.tolist(),
    }


# ---- showing it ------------------------------------------------------------------------------------------------------------
def markdown(r: dict, name: str) -> str:
    """The report as Markdown, every figure from the measurement `r`."""
    out = [
        f"# {name}",
        "",
        f"{r['parameters']:,} parameters, {r['activated']:,} activated per token.",
        "",
    ]
    out += [
        "## Held-out text, bits per byte (less is better)",
        "",
        "| source | bytes | this model | xz -9e | gzip -9 | uniform code over the vocabulary |",
        "|---|---|---|---|---|---|",
    ]
    out += [
        f"| {h['source']} | {h['bytes']:,} | **{h['model']:.3f}** | {h['xz']:.3f} | {h['gzip']:.3f} | {h['uniform']:.3f} |"
        for h in r["heldout"]
    ]
    kind = "; it was trained on text of the kind, they were not." if r.get("training") else "."
    out += [
        "",
        f"Context {r['context']} tokens. xz and gzip see the whole held-out text at once, the model only its context{kind}",
        "",
    ]
    out += [
        "## Cache, bytes per token at 16 bits",
        "",
        "| this model | MHA | GQA | MQA |",
        "|---|---|---|---|",
    ]
    c = r["cache"]
    twins = [k for k in c if k not in ("attention", "this model")]
    out[-2] = "| this model (" + c["attention"] + ") | " + " | ".join(twins) + " |"
    out[-1] = "|---" * (1 + len(twins)) + "|"
    out += [
        "| "
        + " | ".join(
            [
                f"**{c['this model']:,}**",
                *(f"{c[k]:,} ({c['this model'] / c[k]:.0%})" for k in twins),
            ]
        )
        + " |",
        "",
    ]
    out += ["In brackets: this model's cache as a share of that one.", ""]
    if r["expert_load"]:
        out += [
            "## Expert load on held-out text (share of the mean; 1 is even)",
            "",
            "| layer | least used | most used |",
            "|---|---|---|",
        ]
        out += [
            f"| {i} | {min(row) * len(row):.2f} | {max(row) * len(row):.2f} |"
            for i, row in zip(r["moe_layers"], r["expert_load"])
        ]
        out += [""]
    g, t = r["generation"], r.get("training")
    out += [
        "## Speed",
        "",
        f"Generation, one sequence: {g['tokens_per_s']:.0f} tokens/s ({g['dtype']}, {g['kernels']}, {g['threads']} thread{'s' * (g['threads'] != 1)}).",
    ]
    if t:
        out += [
            f"Training: {t['steps']} steps, {t['tokens']:,} tokens ({t['epochs']:.2f} epochs), {t['tokens_per_s']:,.0f} tokens/s, "
            f"{t['mfu']:.0%} of the GEMM peak measured at the start ({t['dtype']}). Medians over the run."
        ]
        if t["router"]:
            out += [
                "Router at the end: "
                + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in t["router"].items())
                + " (expert and device balance are 1 when even; communication is 1 when every token also reaches all the devices it may, less otherwise)."
            ]
    return "\n".join(out) + "\n"


def plot(r: dict, name: str, file: Path) -> None:
    """Loss curve, bits per byte, cache bytes and expert load as one PNG. Needs matplotlib (the `train` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    fig.suptitle(name)
    t = r.get("training")
    if t:
        step, loss, lr = zip(*t["curve"])
        a.plot(step, loss, lw=1, label="training")
        a.set(
            title=f"Loss ({t['tokens']:,} tokens, {t['tokens_per_s']:,.0f} tokens/s)",
            xlabel="step",
            ylabel="nats per token",
        )
        if t["heldout_curve"]:
            a.plot(*zip(*t["heldout_curve"]), "o", color="tab:green", label="held out")
        a.legend(loc="lower left")
        rate = a.twinx()
        rate.plot(step, lr, color="tab:orange", lw=0.8, alpha=0.7)
        rate.set_ylim(0)
        rate.set_ylabel("learning rate", color="tab:orange")
    else:
        a.axis("off")
    kinds = ("model", "xz", "gzip", "uniform")
    for i, h in enumerate(r["heldout"]):
        bars = b.bar(
            np.arange(4) + i * 0.8 / len(r["heldout"]),
            [h[k] for k in kinds],
            0.8 / len(r["heldout"]),
            label=_short(h["source"]),
        )
        b.bar_label(bars, fmt="%.2f", fontsize=8)
    b.set_xticks(
        np.arange(4) + 0.4 - 0.4 / len(r["heldout"]), ("this model", "xz -9e", "gzip -9", "uniform")
    )
    b.set(title="Held-out text", ylabel="bits per byte")
    b.legend()
    cache = {
        k if k != "this model" else f"this model ({r['cache']['attention']})": v
        for k, v in r["cache"].items()
        if k != "attention"
    }
    c.bar_label(
        c.barh(
            list(cache)[::-1],
            list(cache.values())[::-1],
            color=["tab:gray"] * (len(cache) - 1) + ["tab:blue"],
        ),
        fmt="{:,.0f}",
        padding=3,
    )
    c.margins(x=0.15)
    c.set(title="Cache at 16 bits", xlabel="bytes per token")
    if r["expert_load"]:
        load = np.array(r["expert_load"])
        load *= load.shape[1]
        image = d.imshow(
            load, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, max(2, load.max()))
        )
        fig.colorbar(image, ax=d, label="load / mean (white: even)")
        d.set(title="Expert load on held-out text", xlabel="expert", ylabel="layer")
        d.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown = range(0, len(load), -(-len(load) // 20))
        d.set_yticks(shown, [r["moe_layers"][i] for i in shown])
    else:
        d.axis("off")
    fig.savefig(file, dpi=110)
    plt.close(fig)


def _short(source: str, width: int = 28) -> str:
    return source if len(source) <= width else "..." + source[3 - width :]


def needle_markdown(r: dict, name: str) -> str:
    """The table of a needle test."""
    out = [
        f"# {name}: needle in a haystack",
        "",
        f"Share of {r['draws']} needles whose number the model repeats exactly; haystack: {', '.join(r['haystack'])}.",
        "",
    ]
    out += [
        "| depth | " + " | ".join(f"{n:,} tokens" for n in r["lengths"]) + " |",
        "|---" * (1 + len(r["lengths"])) + "|",
    ]
    out += [
        f"| {d:.0%} | " + " | ".join(f"{share:.0%}" for share in row) + " |"
        for d, row in zip(r["depths"], r["found"])
    ]
    return (
        "\n".join(
            [
                *out,
                "| **all** | "
                + " | ".join(f"**{share:.0%}**" for share in np.mean(r["found"], 0))
                + " |",
            ]
        )
        + "\n"
    )


def plot_needle(panels: dict[str, dict], file: Path) -> None:
    """Heat maps over depth x length side by side, one per {title: needle test}; a test with "trained" gets a line behind that length. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
            axis.axvline(sum(n <= r["trained"] for n in r["lengths"]) - 0.5, color="black", lw=2)
    axes[0, 0].set_ylabel("depth of the needle")
    fig.colorbar(image, ax=axes, label="needles found")
    fig.savefig(file, dpi=110)
    plt.close(fig)
