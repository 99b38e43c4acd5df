"""Measure the cache of a YaRN model at 32K and 128K positions against the closed form.

    python benchmarks/long.py [--formats bf16 6bit] [--layers 1] [--threads 2]

One sequence grows to 32,768 and on to 131,072 tokens. Its cache rows are DeepSeek-V2's (512 + 64
elements). The rest of the model is as narrow as possible (one head, random weights), because only
the cache is measured. Columns:

- closed form: tokens x layers x bytes of a row,
- pages owned: pages of the sequence x bytes of a page,
- resident: bytes of the cache that are in physical memory (mincore) after the sequence has reached
  that length; cache pages that were never written take none,
- speed of prefill and of a decode step.

The exit code is 1 if the pages are not within 2 % of the closed form. The last line of standard
output is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator

import torch

from lamoe.backends import cache_codec
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.model.accounting import human_bytes
from lamoe.model.config import ModelConfig, RopeScaling
from lamoe.model.transformer import Transformer

LENGTHS = (32768, 131072)
STEPS = 16  # timed decode steps at each length


def model(layers: int) -> Transformer:
    c = ModelConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        kv_lora_rank=512,
        qk_nope_head_dim=16,
        qk_rope_head_dim=64,
        v_head_dim=16,
        intermediate_size=64,
        max_position_embeddings=163840,
        rope_scaling=RopeScaling(),
        torch_dtype="bfloat16",
    )
    return Transformer(c).init_weights().to(torch.bfloat16).eval()


def resident(t: torch.Tensor) -> int:
    """Return how many bytes of a tensor's storage are in physical memory."""
    size = os.sysconf("SC_PAGE_SIZE")
    first = t.data_ptr() // size * size
    pages = -(-(t.data_ptr() + t.untyped_storage().nbytes() - first) // size)
    seen = (ctypes.c_ubyte * pages)()
    if ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(first), ctypes.c_size_t(pages * size), seen
    ):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(b & 1 for b in bytes(seen)) * size


def measure(m: Transformer, format: str) -> Iterator[dict]:
    c, generator = m.config, torch.Generator().manual_seed(0)
    row = c.num_hidden_layers * cache_codec.row_bytes(format, c.cache_row)
    engine = LLM(m, cache=format, max_num_seqs=1, max_num_batched_tokens=2048, speculate=0)
    tokens = torch.randint(256, (LENGTHS[-1],), generator=generator).tolist()
    for length in LENGTHS:
        begin = time.perf_counter()
        # Tokens of the shorter length are a prefix hit and are not computed again.
        [id] = engine.add(
            tokens[: length - STEPS - 1],
            SamplingParams(temperature=0.0, max_tokens=4 * STEPS, ignore_eos=True),
        )
        computed = 0
        while not computed or engine.scheduler.running[0].todo > 1:
            engine.step()
            computed = engine.scheduler.running[0].computed
        prefill = time.perf_counter() - begin
        [seq] = engine.scheduler.running
        begin = time.perf_counter()
        while seq.computed < length:
            engine.step()
        step = (time.perf_counter() - begin) / (length - computed)
        closed = length * row
        owned = len(seq.pages) * engine.pool.page_size * row
        yield {
            "format": format,
            "tokens": length,
            "closed_form": closed,
            "pages": owned,
            "of_closed_form": owned / closed,
            "resident": resident(engine.cache.rows),
            "reserved": engine.cache.nbytes,
            "prefill_tokens_per_s": (length - STEPS - 1 - seq.cached) / prefill,
            "decode_ms": 1e3 * step,
        }
        engine.cancel(id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--formats", nargs="+", default=["bf16", "6bit"], choices=list(cache_codec.FORMATS)
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    m = model(args.layers)
    print(
        f"{args.layers} layer{'s' * (args.layers != 1)}, one head, rows of 512 + 64, "
        f"YaRN factor 40 over 4,096; {args.threads} threads"
    )
    print(
        "| format | tokens | closed form | pages owned | of the closed form | resident "
        "| of the closed form | reserved for 163,840 | prefill tokens/s | decode step |\n"
        + "|---" * 10
        + "|"
    )
    rows = []
    for format in args.formats:
        for r in measure(m, format):
            rows.append(r)
            print(
                f"| {format} | {r['tokens']:,} | {human_bytes(r['closed_form'])} "
                f"| {human_bytes(r['pages'])} | {r['of_closed_form']:.2%} "
                f"| {human_bytes(r['resident'])} | {r['resident'] / r['closed_form']:.2%} "
                f"| {human_bytes(r['reserved'])} | {r['prefill_tokens_per_s']:,.0f} "
                f"| {r['decode_ms']:.1f} ms |",
                flush=True,
            )
    print(json.dumps({"threads": args.threads, "rows": rows}))
    if any(abs(r["of_closed_form"] - 1) > 0.02 for r in rows):
        sys.exit("the pages are not within 2 % of the closed form")


if __name__ == "__main__":
    main()
