"""Check training on an accelerator: parity with the CPU, speed, peak memory, waits of the host.

    python benchmarks/gpu_check.py [--device cuda] [--minutes 8] [--tiny]

1. A small model on the device, against the CPU: loss and every gradient, in float32 and bfloat16.
   All passes use the same experts, so that no near tie of the router counts as an error.
2. A training step with torch's check for operations that make the host wait (CUDA only).
3. Steps of preset "medium" and of a model with about 1B parameters, as `lamoe train` runs them,
   with and without run.compile: tokens/s, share of the measured GEMM peak, peak memory.

Measurements that do not fit into the time limit are left out by name. --tiny replaces the models by
small ones, so that `--device cpu --tiny` runs the same code in seconds. The last line is JSON. The
exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import torch

from lamoe import kernels
from lamoe.model import accounting
from lamoe.model.config import ModelConfig
from lamoe.model.routing import Chosen, Route
from lamoe.model.transformer import Transformer
from lamoe.train import devices, loop
from lamoe.train.devices import QueuedStep
from lamoe.train.recipe import Recipe

# 16 layers, width 1024, 64 experts of which 6 are chosen, heads as in DeepSeek-V2.
ONE_B: dict[str, Any] = dict(
    model_type="deepseek_v2",
    vocab_size=32768,
    hidden_size=1024,
    num_hidden_layers=16,
    num_attention_heads=8,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=2816,
    moe_intermediate_size=320,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    rope_scaling=None,
    max_position_embeddings=4096,
)
# Name, model, sequences per step, tokens per sequence.
MODELS: list[tuple[str, dict[str, Any], int, int]] = [
    ("medium", {"preset": "medium"}, 32, 2048),
    ("1B", ONE_B, 8, 4096),
]
TINY = [("tiny", {"preset": "tiny", "num_hidden_layers": 2, "vocab_size": 512}, 2, 32)]
# Largest error of a gradient in float32, relative to the CPU. In bfloat16 the limit is a multiple
# of the error that bfloat16 has on the CPU.
FLOAT32_LIMIT, BFLOAT16_FACTOR = 1e-3, 2.0


# ---- parity --------------------------------------------------------------------------------------
class SameExperts:
    """Routing hook that replaces the chosen experts by those of an earlier pass."""

    def __init__(self, layers: list[torch.Tensor]):
        self.layers = list(layers)

    def after_routing(self, route: Route, sequences: int, config: ModelConfig) -> Route:
        expert = self.layers.pop(0).to(route.expert.device)
        weight = route.scores.gather(1, expert) * config.routed_scaling_factor
        return Route(route.scores, expert, weight)


def run_pass(model: Transformer, batch: tuple[torch.Tensor, ...], hook: Any) -> list[torch.Tensor]:
    """Return the loss and all gradients, as float64 on the host."""
    device = model.embed.weight.device
    loss = model.loss(*(x.to(device) for x in batch), hook)
    loss.backward()
    return [t.detach().cpu().double() for t in (loss, *(p.grad for p in model.parameters()))]


def largest_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the largest relative error of a tensor, in the 2-norm."""
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, exact)]
    return max(e if e == e else float("inf") for e in errors)


def check_parity(device: torch.device, tokens: int) -> dict[str, Any]:
    """Compare loss and gradients of a small packed model with those of the CPU."""
    config = ModelConfig.preset("tiny").replace(vocab_size=512, num_hidden_layers=3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, tokens + 1), generator=generator)
    segments = (torch.rand(2, tokens, generator=generator) < 0.02).int().cumsum(1)
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), segments)
    base = Transformer(config).init_weights(0).to(torch.bfloat16)  # both dtypes hold these weights
    experts = Chosen()
    with torch.no_grad():
        copy(base, torch.float32).hidden(batch[0], None, segments, experts)

    def run(dtype: torch.dtype, where: torch.device | str, ops: str) -> list[torch.Tensor]:
        with kernels.using(ops):
            return run_pass(copy(base, dtype).to(where), batch, SameExperts(experts.layers))

    exact = run(torch.float64, "cpu", "ref")
    result: dict[str, Any] = {
        "bfloat16_cpu": largest_error(run(torch.bfloat16, "cpu", "ref"), exact),
        "float32": largest_error(run(torch.float32, device, "device"), exact),
        "bfloat16": largest_error(run(torch.bfloat16, device, "device"), exact),
        "unused_expert_gradient": unused_gradient(device),
    }
    result["ok"] = (
        result["float32"] < FLOAT32_LIMIT
        and result["bfloat16"] < BFLOAT16_FACTOR * result["bfloat16_cpu"]
        and result["unused_expert_gradient"] == 0
    )
    return result


def copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    other = Transformer(model.config).to(dtype)
    other.load_state_dict(model.state_dict())
    return other


def unused_gradient(device: torch.device) -> float:
    """Return the largest gradient of an expert without tokens. It must be 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 64), (8, 128, 64), (8, 64, 64))
    x, w13, w2 = (
        torch.randn(s, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for s in shapes
    )
    expert = torch.tensor([[1, 4]], device=device).expand(256, 2).contiguous()
    weight = torch.rand(256, 2, generator=generator).to(device)
    kernels.experts(x, expert, weight, w13, w2, impl="device").square().sum().backward()
    unused = [0, 2, 3, 5, 6, 7]
    return max(float(w.grad[unused].abs().max()) for w in (w13, w2) if w.grad is not None)


# ---- speed ---------------------------------------------------------------------------------------
class Steps:
    """Training steps on packed random documents, queued as `lamoe train` queues them."""

    def __init__(self, model: dict[str, Any], batch: int, tokens: int, device: torch.device):
        self.recipe = Recipe.from_dict(
            {
                "model": model,
                "data": {"seq_len": tokens},
                "batch": {"size": batch, "micro": batch},
                "run": {"device": device.type, "dtype": "bfloat16"},
            }
        )
        self.device, self.tokens = device, batch * tokens
        self.model = Transformer(self.recipe.model).init_weights().to(device)
        self.optimizer = loop._build_optimizer(self.recipe, self.model)
        generator = torch.Generator().manual_seed(0)
        size = (batch, tokens + 1)
        self.ids = torch.randint(0, self.recipe.model.vocab_size, size, generator=generator)
        self.segments = (torch.rand(size, generator=generator) < 4 / tokens).int().cumsum(1)
        self.number = 0

    def compile(self) -> bool:
        return loop._compile(self.model, self.optimizer, self.recipe, print)

    def step(self) -> QueuedStep:
        micro_batches = loop._accumulate_gradients(
            self.model, self.optimizer, self.recipe, self.number, self.ids, self.segments
        )
        self.number += 1
        norm = self.optimizer.clip()
        queued = QueuedStep(self.number, self.ids, self.segments, micro_batches, norm, {})
        skip = queued.decide(1e9, 1e9)
        self.optimizer.step(1e-4, skip if isinstance(skip, torch.Tensor) else None)
        return queued

    def measure(self, seconds: float) -> dict[str, Any]:
        """Time steps for about this long, after a few to warm up."""
        first = self.step().loss
        for _ in range(2):
            self.step()
        reset_peak(self.device)
        devices.synchronize(self.device)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds or count < 3:
            for _ in range(3):
                queued = self.step()
            count += 3
            devices.synchronize(self.device)
        took = (time.perf_counter() - begin) / count
        return {
            "step_s": took,
            "tokens_per_s": self.tokens / took,
            "peak_bytes": peak_bytes(self.device),
            "first_loss": first,
            "last_loss": queued.loss,
        }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that tensors took since reset_peak, or None if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def find_waits(steps: Steps) -> str | None:
    """Return what made the host wait within a step, "" for nothing, None if torch cannot tell."""
    if steps.device.type != "cuda":
        return None
    steps.step()  # kernels are loaded and compiled in the first step, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.step()
    except RuntimeError as e:
        return " ".join(str(e).split())[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measure(
    name: str,
    model: dict[str, Any],
    batch: int,
    tokens: int,
    compiled: bool,
    device: torch.device,
    peak: float,
    seconds: float,
) -> dict[str, Any]:
    """Measure one row of the table."""
    steps = Steps(model, batch, tokens, device)
    config = steps.recipe.model
    p = accounting.parameters(config)
    row = {"model": name, "batch": batch, "tokens": tokens, "parameters": p.total}
    row |= {"active": p.activated, "compile": compiled}
    try:
        begin = time.perf_counter()
        if compiled:
            row["compiled"] = steps.compile()
            row["compile_s"] = time.perf_counter() - begin
        else:
            row["waits"] = find_waits(steps)
        row |= steps.measure(seconds)
        flops = accounting.training_flops(config, tokens)
        row["peak_share"] = row["tokens_per_s"] * flops / peak
    except torch.OutOfMemoryError as e:
        row["error"] = str(e).split(".")[0]
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | parameters (active) | batch | compile | tokens/s | of the GEMM peak | memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        size = f"{r['parameters'] / 1e6:,.0f}M ({r['active'] / 1e6:,.0f}M)"
        head = f"| {r['model']} | {size} | {r['batch']} x {r['tokens']} "
        how = "no" if not r["compile"] else f"{r.get('compile_s', 0):.0f} s"
        if r.get("compiled") is False:
            how = "failed"
        if "error" in r:
            print(f"{head}| {how} | {r['error']} | | |")
            continue
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f} GB"
        share = f"{r['peak_share']:.1%}"
        print(f"{head}| {how} | {r['tokens_per_s']:,.0f} | {share} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit")
    parser.add_argument("--tiny", action="store_true", help="small models, seconds on a CPU")
    args = parser.parse_args()
    try:
        device = devices.resolve(args.device)
    except ValueError as e:
        sys.exit(f"gpu_check: {str(e).replace('run.device', '--device')}")
    if device.type == "cpu" and not args.tiny:
        sys.exit("gpu_check: there is no accelerator; --device cpu needs --tiny")
    if device.type == "cpu":
        devices.BACKEND = "aot_eager"  # compiling C++ code would take more than a minute
    begin = time.perf_counter()
    result: dict[str, Any] = {"device": devices.describe(device), "torch": torch.__version__}

    result["parity"] = parity = check_parity(device, 128 if args.tiny else 1024)
    print(
        f"largest relative error of loss or a gradient: float32 {parity['float32']:.1e}, bfloat16 "
        f"{parity['bfloat16']:.1e} (on the CPU {parity['bfloat16_cpu']:.1e}); largest gradient of "
        f"an unused expert {parity['unused_expert_gradient']:g}: "
        f"{'ok' if parity['ok'] else 'FAILED'}",
        flush=True,
    )
    size = 256 if args.tiny else 0
    peak = devices.measure_peak(torch.bfloat16, size, repeats=20, device=device)
    result["gemm_peak_flops"] = peak
    print(
        f"measured bfloat16 GEMM peak of {result['device']}: {peak / 1e12:,.3g} TFLOP/s", flush=True
    )

    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for name, model, batch, tokens in TINY if args.tiny else MODELS:
        for compiled in (False, True):
            left = args.minutes * 60 - (time.perf_counter() - begin)
            if left < (0 if args.tiny else 90 if compiled else 30):
                print(f"{name}{', compiled' * compiled}: left out, {left:.0f} s remain")
                continue
            seconds = 0.0 if args.tiny else 10.0
            with kernels.using("device"):  # also on the CPU
                row = measure(name, model, batch, tokens, compiled, device, peak, seconds)
            rows.append(row)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print_table(rows)
    waits = [r["waits"] for r in rows if r.get("waits")]
    for text in waits:
        print(f"the host waited within a step: {text}")
    result["ok"] = parity["ok"] and not waits and all("error" not in r for r in rows)
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
