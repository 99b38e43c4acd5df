"""Compare training speed with transformers, same geometry: presets small (24.6M) and medium (117M).

    python benchmarks/train.py [--preset small] [--rounds 5] [--steps 3] [--batch 8] [--seq 512]
        [--dtype bfloat16] [--isa avx2] [--no-compile]

Every candidate is a process that stays warm. The candidates run interleaved, a few steps each, with
a GEMM probe before each of them. Figures are medians over the rounds. Ratios are taken within a
round, so a drift of the machine's speed cancels out. The last line is JSON.

--isa limits lamoe's kernels to an instruction set. It limits the libraries of torch to the same
kind of vectors (oneDNN, MKL and ATen), so that the peer and the GEMM probe run as on such a CPU.

A step of lamoe: bfloat16 weights with float32 masters, three balance losses, fused AdamW, gradient
clipping. A step of transformers' DeepseekV2: float32 weights under bfloat16 autocast, grouped_mm
experts, no balance loss (it has none), fused AdamW, gradient clipping. The compiled candidate is
torch.compile of the whole transformers model. With --dtype float32 all of them compute in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CONTESTANTS = {
    "lamoe": "lamoe",
    "eager": "transformers, grouped_mm",
    "compile": "transformers, grouped_mm, torch.compile",
}
# For --isa: the widest vectors of oneDNN, ATen and MKL.
TORCH_LIMITS = {
    "amx": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def make_lamoe(preset: str, batch: int, seq: int, dtype: str):
    import torch

    from lamoe.model.config import ModelConfig
    from lamoe.model.routing import Balance, Training
    from lamoe.model.transformer import Transformer
    from lamoe.train.allocator import keep_freed_memory
    from lamoe.train.optim import MasterAdamW, Optim

    keep_freed_memory()
    config = ModelConfig.preset(preset)
    model = Transformer(config).init_weights().to(getattr(torch, dtype))
    optimizer = MasterAdamW(model, Optim(warmup_steps=0))
    ids = torch.randint(0, config.vocab_size, (batch, seq + 1))

    def step():
        training = Training(Balance())
        loss = model.loss(ids[:, :-1], ids[:, 1:], routing_hook=training)
        (loss + training.loss()).backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(3e-4)
        return loss.item()

    return step


def make_transformers(preset: str, batch: int, seq: int, dtype: str, compiled: bool):
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    from lamoe.model.config import ModelConfig

    raw = {
        k: v
        for k, v in ModelConfig.preset(preset).to_dict().items()
        if k not in ("architectures", "torch_dtype")
    }
    config = DeepseekV2Config(**raw)
    config._experts_implementation = "grouped_mm"
    model = DeepseekV2ForCausalLM(config).float().train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.randint(0, config.vocab_size, (batch, seq + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(args) -> None:
    """Run as a candidate process: warm up, then run `steps` steps for every line on standard input.

    Every result is one line of JSON on standard output.
    """
    if args.worker == "lamoe":
        import lamoe  # noqa: F401 (before torch, because it bounds the spinning of torch's threads)
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    settings = (args.preset, args.batch, args.seq, args.dtype)
    step = (
        make_lamoe(*settings)
        if args.worker == "lamoe"
        else make_transformers(*settings, args.worker == "compile")
    )
    for _ in range(4):
        step()
    print(json.dumps({"warm_up": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(args.steps):
            begin = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - begin)
        with open("/proc/self/status") as f:
            peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
        print(
            json.dumps({"seconds": statistics.median(times), "loss": loss, "peak_bytes": peak}),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(rounds=5, steps=3, batch=8, seq=512, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--isa", choices=TORCH_LIMITS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)

    if args.isa:  # before torch reads them, here and in the workers
        os.environ.update(TORCH_LIMITS[args.isa], LAMOE_ISA=args.isa)

    import torch

    from lamoe.model import accounting
    from lamoe.model.config import ModelConfig
    from lamoe.train.loop import measure_peak

    torch.set_num_threads(args.threads)
    names = [n for n in CONTESTANTS if not (args.no_compile and n == "compile")]
    shared = ("rounds", "steps", "batch", "seq", "threads", "preset", "dtype")
    flags = [f"--{k}={getattr(args, k)}" for k in shared]
    workers, warm = {}, {}
    # Candidates start one after the other, so that they do not compete while warming up.
    for name in names:
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        line = workers[name].stdout.readline()
        if not line:
            sys.exit(
                f"the contestant {CONTESTANTS[name]!r} died; run it alone to see why: "
                f"python {__file__} --worker={name}"
            )
        warm[name] = json.loads(line)["warm_up"]
        print(f"{CONTESTANTS[name]}: ready after {warm[name]:.0f} s", flush=True)

    tokens, flops = (
        args.batch * args.seq,
        accounting.training_flops(ModelConfig.preset(args.preset), args.seq),
    )
    rounds = {n: [] for n in names}
    for _ in range(args.rounds):
        for name in names:
            peak = measure_peak(getattr(torch, args.dtype))
            workers[name].stdin.write("go\n")
            workers[name].stdin.flush()
            r = json.loads(workers[name].stdout.readline())
            rounds[name].append(
                {
                    **r,
                    "tokens_per_s": tokens / r["seconds"],
                    "gflops": tokens / r["seconds"] * flops / 1e9,
                    "gemm_peak_gflops": peak / 1e9,
                }
            )
    for w in workers.values():
        w.stdin.close()
        w.wait()

    def median(name, key):
        return statistics.median(r[key] for r in rounds[name])

    print(
        f"\npreset {args.preset}, {args.dtype}, {flops / 1e6:.1f} MFLOP per token, "
        f"{args.batch} x {args.seq} tokens per step, "
        f"{args.threads} threads, {args.rounds} rounds of {args.steps} steps"
    )
    print(
        "| | tokens/s | lamoe is faster by (median, range of rounds) | GFLOP/s "
        "| of the GEMM peak | peak memory | warm-up |"
    )
    print("|---|---|---|---|---|---|---|")
    result = {}
    for name in names:
        ratios = sorted(
            a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rounds["lamoe"], rounds[name])
        )
        share = statistics.median(r["gflops"] / r["gemm_peak_gflops"] for r in rounds[name])
        result[name] = {
            "tokens_per_s": median(name, "tokens_per_s"),
            "lamoe_ratio": statistics.median(ratios),
            "gemm_peak_share": share,
            "gemm_peak_gflops": median(name, "gemm_peak_gflops"),
            "peak_bytes": max(r["peak_bytes"] for r in rounds[name]),
            "warm_up": warm[name],
        }
        spread = (
            f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            if name != "lamoe"
            else ""
        )
        print(
            f"| {CONTESTANTS[name]} | {result[name]['tokens_per_s']:,.0f} | {spread} "
            f"| {median(name, 'gflops'):.0f} "
            f"| {share:.0%} of {result[name]['gemm_peak_gflops']:.0f} "
            f"| {result[name]['peak_bytes'] / 1e9:.2f} GB | {warm[name]:.0f} s |"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
