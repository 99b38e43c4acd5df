"""Measure the engine on the 24.6M-parameter preset "small" with random weights.

    python benchmarks/engine.py [--rounds 5] [--steps 32] [--depth 4096] [--shared 2000]
                                [--cache bf16] [--threads 2]

Four tables:

- Batched decoding in bfloat16 and float32. Prompts have 16 tokens, so the context grows during the
  measurement. The other tables use the dtype that is faster at batch 16.
- Decoding one sequence at context length --depth, compared with transformers' DeepseekV2 of the
  same geometry. transformers is measured in both dtypes, and the faster one counts.
- Time to first token of a request with --shared tokens and 16 of its own. It is measured with an
  empty cache, and after another request with the same shared tokens.
- Bytes of a cache of 32,768 tokens: allocated, in resident memory, and by the closed form tokens x
  layers x (latent + rope key) x bytes per element (low-bit formats: the documented row bytes).

All candidates run interleaved in one process and stay warm. Figures are medians over the rounds.
Ratios are taken within a round, so a drift of the machine's speed cancels out. Drafts are off, so
every token is one pass of the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers

from lamoe.backends import cache_codec
from lamoe.engine.llm import LLM
from lamoe.engine.sampler import SamplingParams
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer

BATCHES = (1, 4, 16, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONG = 8192  # max_position_embeddings of all models here, more than in the preset


def config(positions: int) -> ModelConfig:
    return ModelConfig.preset("small").replace(max_position_embeddings=positions)


def lamoe_model(dtype: str, positions: int = LONG) -> Transformer:
    return Transformer(config(positions)).init_weights().to(DTYPES[dtype]).eval()


def random_ids(n: int) -> list[int]:
    return torch.randint(8192, (n,)).tolist()


def endless(n: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)


def decoding(model: Transformer, batch: int, depth: int, steps: int, cache: str):
    """Return a function that measures the mean seconds of a decode step.

    It decodes `batch` sequences for `steps` steps, from context length `depth` on.
    """
    engine = LLM(
        model,
        cache=cache,
        max_model_len=LONG,
        max_num_seqs=batch,
        cache_memory=None if batch * depth < LONG else 1 << 29,
        speculate=0,
    )

    def measure() -> float:
        ids = [
            i
            for _ in range(batch)
            for i in engine.add(random_ids(depth), endless(steps + batch + depth))
        ]
        while any(s.todo > 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        begin = time.perf_counter()
        for _ in range(steps):
            assert len(engine.step()) == batch
        seconds = (time.perf_counter() - begin) / steps
        for i in ids:
            engine.cancel(i)
        return seconds

    return measure


def decoding_transformers(dtype: str, depth: int, steps: int):
    """Return a function that measures a decode step of one sequence of transformers' DeepseekV2."""
    raw = {
        k: v for k, v in config(LONG).to_dict().items() if k not in ("architectures", "torch_dtype")
    }
    c = transformers.DeepseekV2Config(**raw)
    c._experts_implementation = "grouped_mm"
    model = transformers.DeepseekV2ForCausalLM(c).to(DTYPES[dtype]).eval()

    @torch.inference_mode()
    def measure() -> float:
        out = model(input_ids=torch.randint(8192, (1, depth)), use_cache=True, logits_to_keep=1)
        for step in range(steps + 1):
            if step == 1:
                # the first step converts the cache from its prefill form
                begin = time.perf_counter()
            out = model(
                input_ids=out.logits[:, -1:].argmax(-1),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        return (time.perf_counter() - begin) / steps

    return measure


def interleaved(contestants: dict, rounds: int) -> dict:
    """Run functions in alternation.

    Return {name: a figure per round}, without the warm-up round.
    """
    found = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, measure in contestants.items():
            found[name].append(measure())
    return {name: figures[1:] for name, figures in found.items()}


def ratio(slow: list[float], fast: list[float]) -> dict:
    """Return the ratio of two lists of seconds, taken round by round: median, low, high."""
    each = sorted(a / b for a, b in zip(slow, fast))
    return {"median": statistics.median(each), "low": each[0], "high": each[-1]}


def spread(r: dict) -> str:
    return f"{r['median']:.2f} x ({r['low']:.2f} to {r['high']:.2f})"


def batched(args) -> tuple[dict, str]:
    """Measure tokens per second by batch and dtype.

    Also return the dtype that is faster at batch 16.
    """
    models = {dtype: lamoe_model(dtype) for dtype in DTYPES}
    seconds = interleaved(
        {
            (dtype, b): decoding(models[dtype], b, 16, args.steps, args.cache)
            for dtype in DTYPES
            for b in BATCHES
        },
        args.rounds,
    )
    best = min(DTYPES, key=lambda d: statistics.median(seconds[d, 16]))
    print(
        f"\nDecoding, prompts of 16 tokens, {args.cache} cache, {args.steps} steps per round\n"
        "| weights | batch | ms per step | tokens/s | times batch 1 (range of rounds) |\n"
        "|---|---|---|---|---|"
    )
    result = {"dtype": best}
    for (dtype, b), s in seconds.items():
        # Gain in tokens per second: a step of batch b yields b tokens, a step of batch 1 yields
        # one.
        gain = {k: b * v for k, v in ratio(seconds[dtype, 1], s).items()}
        result[f"{dtype}_batch_{b}"] = {"tokens_per_s": b / statistics.median(s), "gain": gain}
        print(
            f"| {dtype} | {b} | {1e3 * statistics.median(s):.2f} "
            f"| {b / statistics.median(s):,.0f} | {spread(gain) if b > 1 else ''} |"
        )
    return result, best


def deep(args, dtype: str) -> dict:
    """Measure a decode step at context length --depth: lamoe and transformers, interleaved."""
    contestants = {
        f"lamoe {dtype}": decoding(lamoe_model(dtype), 1, args.depth, args.steps, args.cache)
    }
    contestants |= {
        f"transformers {d}": decoding_transformers(d, args.depth, args.steps) for d in DTYPES
    }
    seconds = interleaved(contestants, args.rounds)
    print(
        f"\nDecoding one sequence with {args.depth:,} cached tokens\n"
        "| | ms per step | tokens/s | lamoe is faster by (range of rounds) |\n|---|---|---|---|"
    )
    result = {}
    for name, s in seconds.items():
        gain = ratio(s, seconds[f"lamoe {dtype}"])
        result[name] = {"tokens_per_s": 1 / statistics.median(s), "lamoe_ratio": gain}
        print(
            f"| {name} | {1e3 * statistics.median(s):.2f} | {1 / statistics.median(s):.1f} "
            f"| {'' if name.startswith('lamoe') else spread(gain)} |"
        )
    result["ratio"] = min(
        result[n]["lamoe_ratio"]["median"] for n in contestants if n.startswith("transformers")
    )
    return result


def first_token(args, dtype: str) -> dict:
    """Measure the time to first token, without and with a cached prefix."""
    engine = LLM(lamoe_model(dtype), cache=args.cache, max_model_len=LONG, speculate=0)

    def ask(shared: list[int]) -> tuple[float, int]:
        begin = time.perf_counter()
        deltas = engine.stream(shared + random_ids(16), endless(2))
        next(deltas)
        seconds = time.perf_counter() - begin
        (last,) = deltas
        return seconds, last.output.cached_tokens

    cold, hit = [], []
    for _ in range(args.rounds + 1):
        shared = random_ids(args.shared)
        (a, none), (b, cached) = ask(shared), ask(shared)
        assert none == 0 and cached == args.shared // 16 * 16, (
            f"{none} and {cached} tokens were found in the cache"
        )
        cold.append(a)
        hit.append(b)
    cold, hit = cold[1:], hit[1:]
    gain = ratio(cold, hit)
    print(
        f"\nTime to first token, {args.shared:,} shared tokens and 16 more ({dtype} weights)\n"
        "| | ms | shorter by (range of rounds) |\n|---|---|---|"
    )
    print(
        f"| cold | {1e3 * statistics.median(cold):.1f} | |\n"
        f"| prefix hit | {1e3 * statistics.median(hit):.1f} | {spread(gain)} |"
    )
    return {"cold_s": statistics.median(cold), "hit_s": statistics.median(hit), "gain": gain}


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cache_bytes(tokens: int = 32768) -> dict:
    """Measure what a cache of `tokens` tokens allocates and what it adds to resident memory."""
    model, c, result = lamoe_model("bf16", tokens), config(tokens), {}
    elements = tokens * accounting.cache_elements(c)
    print(
        f"\nThe cache of {tokens:,} tokens, {accounting.cache_elements(c):,} elements per token"
        "\n| format | allocated | of the closed form | resident | bits per element "
        "| expanded keys and values at 16 bits are larger by |\n|---|---|---|---|---|---|"
    )
    for name, bits in {
        "fp32": 32,
        "bf16": 16,
        **{
            f: 8 * cache_codec.row_bytes(f, c.cache_row) / sum(c.cache_row)
            for f in ("int8", "6bit", "4bit")
        },
    }.items():
        closed = elements * bits / 8
        before = resident()
        engine = LLM(model, cache=name, max_model_len=tokens, cache_memory=int(closed))
        assert engine.pool.total * engine.pool.page_size == tokens
        allocated = engine.cache.rows.untyped_storage().nbytes()
        engine.cache.rows.fill_(1)
        grown = resident() - before
        del engine
        expanded = 2 * tokens * accounting.expanded_elements(c) / allocated
        result[name] = {
            "allocated": allocated,
            "closed_form": closed,
            "of_closed_form": allocated / closed,
            "resident": grown,
            "expanded_ratio": expanded,
        }
        print(
            f"| {name} | {accounting.human_bytes(allocated)} | {allocated / closed:.2%} "
            f"| {accounting.human_bytes(grown)} | {bits:.2f} | {expanded:.1f} x |"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(rounds=5, steps=32, depth=4096, shared=2000, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache", default="bf16", choices=list(cache_codec.FORMATS))
    args = parser.parse_args()
    if (
        min(args.rounds, args.steps, args.depth, args.shared) < 1
        or max(args.depth, args.shared) + args.steps + 64 > LONG
    ):
        parser.error(
            "rounds, steps, depth and shared must be at least 1, "
            f"and depth or shared plus steps plus 64 at most {LONG} tokens"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {"threads": args.threads, "rounds": args.rounds, "cache": args.cache}
    result["decode"], dtype = batched(args)
    result["depth"] = deep(args, dtype)
    result["first_token"] = first_token(args, dtype)
    result["bytes"] = cache_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
