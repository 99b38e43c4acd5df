"""Measure whether torch is faster than the compiled kernels if these have no vector instructions.

Both backends run in alternation on one thread. The kernels use the scalar instruction set. torch is
measured twice: with its own vector code (as on Arm) and limited to SSE (as on an old x86-64 CPU).

    python benchmarks/scalar.py benchmarks/tiny-8.json --rounds 3

The last line of the output is JSON with medians of the time ratio torch / kernels. A ratio above 1
means that the kernels are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SSE_ONLY = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}
WORKLOADS = {  # name: (sequences, prompt tokens, output tokens)
    "decode": (1, 4, 16),
    "8 sequences": (8, 4, 8),
    "prompt of 128": (1, 128, 1),
}


def measure(config_file: str, rounds: int) -> dict[str, float]:
    """Return the median time ratio torch / kernels of each dtype and workload."""
    import torch

    import lamoe
    from lamoe.model.config import ModelConfig

    torch.set_num_threads(1)
    model = lamoe.Transformer(ModelConfig.from_file(config_file)).init_weights(1).eval()
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        engines = {
            name: lamoe.LLM(model.to(dtype), backend=name, max_model_len=256, speculate=0)
            for name in ("torch", "cpu")
        }
        for workload, (sequences, prompt_tokens, output_tokens) in WORKLOADS.items():
            params = lamoe.SamplingParams(
                temperature=0.0, max_tokens=output_tokens, ignore_eos=True
            )
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for round in range(rounds + 1):
                # New tokens in every round, so that no prefix is found in the cache.
                prompts = [
                    [(7 * i + 13 * round + s) % 251 + 1 for i in range(prompt_tokens)]
                    for s in range(sequences)
                ]
                for name, engine in engines.items():
                    begin = time.perf_counter()
                    engine.generate(prompts, params)
                    seconds[name].append(time.perf_counter() - begin)
            pairs = list(zip(seconds["torch"], seconds["cpu"]))[1:]  # the first round only warms up
            key = f"{str(dtype)[6:]}, {workload}"
            ratios[key] = statistics.median(torch_s / cpu_s for torch_s, cpu_s in pairs)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a config.json, for example benchmarks/tiny-8.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.config, args.rounds)))
        return
    results = {}
    for name, limits in (("torch with vectors", {}), ("torch with SSE", SSE_ONLY)):
        words = [sys.executable, __file__, args.config, f"--rounds={args.rounds}", "--worker"]
        env = {**os.environ, **limits, "LAMOE_ISA": "scalar", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    print("| time of torch / time of the scalar kernels | " + " | ".join(results) + " |")
    print("|---|" + "---|" * len(results))
    for key in next(iter(results.values())):
        print(f"| {key} | " + " | ".join(f"{r[key]:.2f}" for r in results.values()) + " |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
