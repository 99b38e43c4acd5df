"""Measure what each storage format of the cache does to a model's predictions, in one run.

    python benchmarks/cache.py runs/tiny [--tokens 20480] [--seq 256] [--threads 2]

The model predicts held-out rows of `seq` tokens with teacher forcing. Each row lies inside one
document. Attention reads all keys and values after they have been encoded and decoded by the
format, including those of the current token. Weights and arithmetic are float32. Columns:

- bytes of a cache row (one token, one layer) and bits per element,
- held-out bits per byte and their change against the bf16 cache,
- share of positions with the same top-1 token,
- mean KL(bf16 || format) of the next token, in nats,
- on Gaussian rows of 512 + 64 elements: relative RMS error of each part, and milliseconds to
  encode and to decode 4,096 rows.

A second table repeats the predictions on the compiled kernels, token by token, with weights and
attention in bfloat16. The kernels attend to latents of 512 elements in 6bit and 4bit as integers,
so the second table includes that loss. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import lamoe
from lamoe.backends import cache_codec
from lamoe.backends.base import Batch, Formats
from lamoe.backends.cpu import native
from lamoe.backends.cpu.backend import CpuBackend
from lamoe.model.cache import View
from lamoe.train import checkpoint
from lamoe.train.data import heldout_rows, open_corpus


class ThroughFormat:
    """A cache for one pass over whole texts. It encodes and decodes rows, and stores nothing."""

    length = 0

    def __init__(self, name: str):
        self.name = name

    def views(self, layer: int, *parts: torch.Tensor) -> list[View]:
        rows = cache_codec.encode(self.name, tuple(p.flatten(0, 1) for p in parts))
        decoded = cache_codec.decode(
            self.name, rows, tuple(p.shape[-1] for p in parts), parts[0].dtype
        )
        return [View(None, [d.view(p.shape) for d, p in zip(decoded, parts)], None)]

    def positions(self, tokens: int) -> torch.Tensor:
        return torch.arange(tokens)[None]

    def advance(self, tokens: int) -> None:
        pass


def single_document_rows(folder: Path, seq: int, tokens: int) -> torch.Tensor:
    """Return about `tokens` held-out tokens as ids [rows, seq + 1], spread evenly over the text.

    Rows that cross a document boundary are left out, because a cache has no document mask.
    """
    rows = [ids for ids, segments in heldout_rows(open_corpus(folder), seq) if segments[-1] == 0]
    wanted = -(-tokens // seq)
    if len(rows) < wanted:
        raise ValueError(
            f"the held-out text has {len(rows)} rows of {seq} tokens inside one document, "
            f"but {wanted} are needed; lower --tokens or --seq"
        )
    return torch.from_numpy(np.stack([rows[i * len(rows) // wanted] for i in range(wanted)]))


@torch.no_grad()
def compare(ids: torch.Tensor, formats: list, predict, batch: int = 8) -> list[dict]:
    """Compare the predictions with each cache format to those with bf16.

    Args:
        ids: [rows, T + 1] token ids.
        predict: (ids, format) -> log-probabilities [rows, T, vocabulary].

    Returns:
        One dict of sums over all positions per format: nats, same (equal top-1 tokens), kl.
    """
    sums = [dict(nats=0.0, same=0, kl=0.0) for _ in formats]
    for part in ids.split(batch):
        goal = part[:, 1:, None]
        true = predict(part, "bf16")
        p, top = true.exp(), true.argmax(-1)
        for name, s in zip(formats, sums):
            found = predict(part, name)
            s["nats"] -= found.gather(-1, goal).double().sum().item()
            s["same"] += int((found.argmax(-1) == top).sum())
            s["kl"] += float((p * (true - found)).sum(-1).double().sum())
    return sums


def by_kernels(backend: CpuBackend, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Return log-probabilities [rows, T, vocabulary] of the kernels.

    Each step adds a token to all rows.
    """
    rows, length = ids.shape[0], ids.shape[1] - 1
    each = -(-length // 16)
    cache = backend.new_cache(rows * each, 16, name)
    pages = torch.arange(rows * each, dtype=torch.int32)
    out = []
    for at in range(length):
        seqs = torch.tensor([[1, at + 1, i * each] for i in range(rows)], dtype=torch.int32)
        positions, output_rows = torch.full((rows,), at), list(range(rows))
        batch = Batch(ids[:, at].tolist(), positions, seqs, pages, output_rows)
        out.append(backend.forward(batch, cache).output.float().log_softmax(-1))
    return torch.stack(out, 1)


def on_gaussian(name: str, widths=(512, 64), rows: int = 4096, rounds: int = 9) -> dict:
    generator = torch.Generator().manual_seed(0)
    parts = tuple(torch.randn(rows, w, generator=generator) for w in widths)
    stored = cache_codec.encode(name, parts)
    decoded = cache_codec.decode(name, stored, widths, torch.float32)
    return {
        "encode_ms": median_ms(lambda: cache_codec.encode(name, parts), rounds),
        "decode_ms": median_ms(
            lambda: cache_codec.decode(name, stored, widths, torch.float32), rounds
        ),
        "relative_rms": [((d - p).norm() / p.norm()).item() for d, p in zip(decoded, parts)],
    }


def median_ms(run, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "run",
        type=Path,
        help="run folder of `lamoe train`: uses its latest checkpoint and its corpus",
    )
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = checkpoint.latest(args.run)
    if step is None:
        parser.error(f"{args.run} holds no checkpoint; train one with `lamoe train`")
    model = lamoe.load(step / "model", dtype=torch.float32)
    ids = single_document_rows(args.run / "data", args.seq, args.tokens)
    tokenizer = lamoe.Tokenizer.load(step / "model")
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in ids)
    targets, widths = ids.shape[0] * args.seq, model.config.cache_row
    sums = dict(
        zip(
            cache_codec.FORMATS,
            compare(
                ids,
                list(cache_codec.FORMATS),
                lambda part, name: model(part[:, :-1], ThroughFormat(name)).log_softmax(-1),
            ),
        )
    )

    print(
        f"{step}: {targets} held-out tokens, {text_bytes} bytes, rows of {args.seq}; "
        f"a cache row is {widths[0]} + {widths[1]} elements"
    )
    print(
        "| format | bytes of a row | bits an element | bits/byte | change | top-1 same | KL "
        "| bytes of 512 + 64 | bits an element | rel. rms error, Gaussian 512 / 64 "
        "| encode | decode 4,096 rows |\n" + "|---" * 12 + "|"
    )
    out = {
        "model": step.parent.name,
        "targets": targets,
        "text_bytes": text_bytes,
        "widths": widths,
        "formats": {},
    }
    for name, s in sums.items():
        bpb = s["nats"] / math.log(2) / text_bytes
        r = {
            "row_bytes": cache_codec.row_bytes(name, widths),
            "bits_per_element": cache_codec.bits_per_element(name, widths),
            "bits_per_byte": bpb,
            "change_percent": 100 * (s["nats"] / sums["bf16"]["nats"] - 1),
            "top1_percent": 100 * s["same"] / targets,
            "kl": s["kl"] / targets,
            "v2_row_bytes": cache_codec.row_bytes(name, (512, 64)),
            "v2_bits_per_element": cache_codec.bits_per_element(name, (512, 64)),
            **on_gaussian(name),
        }
        out["formats"][name] = r
        print(
            f"| {name} | {r['row_bytes']} | {r['bits_per_element']:.2f} | {bpb:.4f} "
            f"| {r['change_percent']:+.4f} % | {r['top1_percent']:.2f} % | {r['kl']:.1e} "
            f"| {r['v2_row_bytes']} | {r['v2_bits_per_element']:.2f} "
            f"| {r['relative_rms'][0]:.4f} / {r['relative_rms'][1]:.4f} "
            f"| {r['encode_ms']:.2f} ms | {r['decode_ms']:.2f} ms |"
        )
    if native.available():
        backend = CpuBackend.from_transformer(
            lamoe.load(step / "model", dtype=torch.bfloat16), Formats("bf16"), args.threads
        )
        formats = ["bf16", "int8", "6bit", "4bit"]
        print("\n| by the kernels | change of bits/byte | top-1 same | KL |\n|---|---|---|---|")
        for name, s in (
            found := dict(
                zip(
                    formats,
                    compare(ids, formats, lambda part, name: by_kernels(backend, part, name)),
                )
            )
        ).items():
            out["formats"][name]["kernels"] = r = {
                "change_percent": 100 * (s["nats"] / found["bf16"]["nats"] - 1),
                "top1_percent": 100 * s["same"] / targets,
                "kl": s["kl"] / targets,
            }
            print(
                f"| {name} | {r['change_percent']:+.4f} % | {r['top1_percent']:.2f} % "
                f"| {r['kl']:.1e} |"
            )
    print(json.dumps(out))


if __name__ == "__main__":
    main()
