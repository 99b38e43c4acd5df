"""Reports about a model: bits per byte of text, expert load, cache size, speed, needle tests.

Results are dictionaries. tables.py and plots.py show them, and `write` stores them in a folder.
Bits per byte are compared with gzip, xz and a uniform code. The cache size is compared with that of
MHA, GQA and MQA.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamoe import atomic
from lamoe.backends.base import Backend
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.engine.text_loss import TextLoss, text_loss
from lamoe.measure import needle, plots
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.os_errors import check_output
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import curves
from lamoe.train.data import heldout_rows, open_corpus
from lamoe.train.sources import read_documents

Row = tuple[np.ndarray, np.ndarray]  # token ids and document numbers, each [T + 1]
Texts = dict[str, tuple[str, Iterable[Row]]]  # {source: (text, its rows)}
Note = Callable[[str], None]  # shows one line to the user
_BATCH = 16  # rows per forward pass
_PROGRESS_S = 5.0  # seconds between lines of progress
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # how a report names unquantised weights
_ROUTER = (
    "balance_expert",
    "balance_device",
    "balance_communication",
    "load_max_over_mean",
    "router_entropy",
    "drop_rate",
)


# ---- reports -------------------------------------------------------------------------------------
def evaluate_run(
    backend: Backend,
    tok: Tokenizer,
    run: Path,
    speed_model: Backend | Transformer | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a model on the held-out text of a training run, and add the run's metrics.

    Args:
        speed_model: the model of the speed test; None means `backend`.
        note: called with lines of progress.
    """
    recipe = _recipe(run)
    corpus, seq_len = open_corpus(run / "data"), recipe["data"]["seq_len"]
    if corpus.meta["key"]["vocab_size"] > backend.config.vocab_size:
        raise ValueError(
            f"{run / 'data'} was packed with {corpus.meta['key']['vocab_size']} tokens, the model "
            f"has {backend.config.vocab_size}"
        )
    texts: Texts = {}
    for source in (s["source"] for s in corpus.meta["sources"]):
        raw = "".join(tok.decode(ids) for ids in corpus.heldout_documents(source))
        texts[source] = (raw, heldout_rows(corpus, seq_len, source))
    mask = recipe["data"]["document_mask"]
    result = _measure(backend, tok, texts, seq_len, mask, speed_model, note)
    return result | {"training": _training(run, recipe)}


def evaluate_texts(
    backend: Backend,
    tok: Tokenizer,
    sources: list[str],
    seq_len: int | None = None,
    speed_model: Backend | Transformer | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a model on texts (train/sources.py defines the sources).

    Args:
        seq_len: context length in tokens. The default is 1024, or the model's limit if it is less.
        speed_model: the model of the speed test; None means `backend`.
        note: called with lines of progress.
    """
    limit = backend.config.max_position_embeddings
    seq_len = min(1024, limit) if seq_len is None else seq_len
    if not 1 <= seq_len <= limit:
        raise ValueError(
            f"the context is {seq_len} tokens; it must be from 1 to the model's {limit}"
        )
    documents: dict[str, list[str]] = {}
    for document in read_documents(sources):
        documents.setdefault(document.source, []).append(document.text)
    texts: Texts = {s: ("".join(ts), _rows(tok, ts, seq_len)) for s, ts in documents.items()}
    return _measure(backend, tok, texts, seq_len, True, speed_model, note)


def trained_at(run: Path) -> int | None:
    """Return the context length of a training run in tokens, or None if `run` is not its folder."""
    return _recipe(run)["data"]["seq_len"] if (run / "recipe.json").exists() else None


def _recipe(run: Path) -> dict[str, Any]:
    return json.loads((run / "recipe.json").read_text(encoding="utf-8"))


def _rows(tok: Tokenizer, texts: Iterable[str], seq_len: int) -> Iterator[Row]:
    """Split each text into rows that overlap by one token, with BOS first if the model has one.

    The last row of a text is padded. Each padding token counts as a document of its own, so it is
    not a target.
    """
    for ids in tok.encode_batch(list(texts), bos=tok.bos_id is not None):
        for at in range(0, len(ids) - 1, seq_len):
            part = ids[at : at + seq_len + 1]
            pad = seq_len + 1 - len(part)
            documents = [0] * len(part) + list(range(1, pad + 1))
            yield np.array(part + [part[-1]] * pad), np.array(documents, np.int32)


def _measure(
    backend: Backend,
    tok: Tokenizer,
    texts: Texts,
    seq_len: int,
    document_mask: bool,
    speed_model: Backend | Transformer | None,
    note: Note,
) -> dict[str, Any]:
    rows, targets = [], 0
    load: np.ndarray | float = 0.0  # sum over sources, weighted by their targets
    for source, (text, windows) in texts.items():
        data = text.encode("utf-8")
        if not data:
            continue
        note(f"measuring the loss on {source}, {len(data) / 1e6:.2f} MB")
        windows = _with_progress(windows, source, note)
        loss = text_loss(backend, windows, _BATCH, document_mask=document_mask)
        load = load + loss.load * loss.targets
        targets += loss.targets
        rows.append({"source": source, **_compression(data, loss, backend.config.vocab_size)})
    if not rows:
        raise ValueError("there is no text to evaluate on; every source is empty")
    note("measuring the speed of generation")
    config = backend.config
    return {
        "parameters": accounting.parameters(config).total,
        "activated": accounting.parameters(config).activated,
        "context": seq_len,
        "heldout": rows,
        "moe_layers": list(config.moe_layers),
        "expert_load": np.divide(load, targets).tolist() if np.size(load) else [],
        "cache": {
            "attention": _attention(config),
            "this model": 2 * accounting.cache_elements(config),
            **{name: 2 * n for name, n in accounting.cache_twins(config).items()},
        },
        "generation": _speed(
            backend if speed_model is None else speed_model, tok, config.max_position_embeddings
        ),
    }


def _with_progress(rows: Iterable[Row], source: str, note: Note) -> Iterator[Row]:
    """Yield `rows`, and note the number of tokens every few seconds."""
    tokens, last = 0, time.monotonic()
    for ids, documents in rows:
        yield ids, documents
        tokens += len(ids) - 1
        if time.monotonic() - last >= _PROGRESS_S:
            last = time.monotonic()
            note(f"{source}: {tokens:,} tokens")


def _compression(data: bytes, loss: TextLoss, vocab_size: int) -> dict[str, Any]:
    """Return the bits per byte of the model, xz, gzip and a uniform code over the vocabulary."""
    return {
        "bytes": len(data),
        "tokens": loss.targets,
        "model": loss.bits_per_byte(len(data)),
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "uniform": math.log2(vocab_size) * loss.targets / len(data),
        "perplexity": loss.perplexity,
    }


def _attention(config: ModelConfig) -> str:
    if config.is_mla:
        return "MLA"
    return {config.num_attention_heads: "MHA", 1: "MQA"}.get(config.n_kv_heads, "GQA")


def _speed(
    model: Backend | Transformer, tok: Tokenizer, limit: int, tokens: int = 96
) -> dict[str, Any]:
    """Measure the generation speed of one sequence, with the settings of `lamoe generate`.

    Args:
        limit: the model's longest context, in tokens.
    """
    start = [tok.bos_id if tok.bos_id is not None else 0]
    tokens = min(tokens, limit - 1)
    llm = LLM(model, max_model_len=1 + tokens, max_num_seqs=1, speculate=0)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    times = [time.perf_counter()]
    for _ in llm.stream(start, params):
        times.append(time.perf_counter())
    steps = np.diff(times)
    steps = steps[min(8, len(steps) // 2) :]  # without the prompt and the warm-up
    return {
        "tokens_per_s": 1 / statistics.median(steps),
        "threads": torch.get_num_threads(),
        "dtype": _DTYPES.get(llm.backend.weights, llm.backend.weights),
        "kernels": {"cpu": "compiled kernels", "torch": "torch ops"}[llm.backend.name],
    }


def _training(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the loss curves of a run and the medians of its metrics.

    The result is empty if no step was logged.
    """
    lines, _ = curves.read(run)
    steps = [m for m in lines if "loss" in m and "skipped" not in m]
    if not steps:
        return {}
    last = steps[-1]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "epochs": last["epoch"],
        "dtype": recipe["run"]["dtype"],
        "tokens_per_s": statistics.median(m["tokens_per_s"] for m in steps),
        "mfu": statistics.median(m["mfu"] for m in steps),
        "curve": [[m["step"], m["loss"], m["lr"]] for m in steps],
        "heldout_curve": [
            [m["step"], m["heldout_bits_per_token"] * math.log(2)]
            for m in lines
            if "heldout_bits_per_token" in m
        ],
        "router": {k: last[k] for k in _ROUTER if k in last},
    }


# ---- needle tests --------------------------------------------------------------------------------
def evaluate_needle(
    backend: Backend,
    tok: Tokenizer,
    lengths: list[int],
    sources: list[str],
    depths: int = 5,
    draws: int = 8,
    seed: int = 0,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Run the needle-in-a-haystack test.

    Args:
        lengths: haystack lengths in tokens.
        sources: texts that the haystacks are made of (train/sources.py defines the sources).
        depths: number of needle positions, evenly spaced from the start to the end.
        draws: needles per position and length.
        note: called with a line of progress after each length.
    """
    if depths < 2:
        raise ValueError(
            f"the number of depths is {depths}; it must be at least 2, the beginning and the end"
        )
    make = needle.text_needle(tok, (document.text for document in read_documents(sources)))
    at = [i / (depths - 1) for i in range(depths)]
    found = needle.needle(backend, make, lengths, at, draws, seed, note)
    return {
        "lengths": lengths,
        "depths": at,
        "draws": draws,
        "seed": seed,
        "haystack": sources,
        "max_position_embeddings": backend.config.max_position_embeddings,
        "found": found.tolist(),
    }


# ---- files ---------------------------------------------------------------------------------------
def write(kind: str, result: dict[str, Any], name: str, markdown: str, folder: Path) -> str:
    """Write KIND.md, KIND.json and, if matplotlib is installed, KIND.png into a folder.

    Args:
        kind: "report" or "needle".

    Returns:
        A line that says what was written.
    """
    folder = check_output("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / f"{kind}.md", markdown)
    atomic.write_text(folder / f"{kind}.json", json.dumps(result, indent=1) + "\n")
    wrote = f"wrote {folder / kind}.md, {kind}.json"
    try:
        if kind == "needle":
            plots.needle({name: result}, folder / "needle.png")
        else:
            plots.report(result, name, folder / "report.png")
    except ImportError:
        return (
            f"{wrote}; no {kind}.png, because matplotlib is not installed "
            "(pip install 'lamoe[train]')"
        )
    return f"{wrote}, {kind}.png"
