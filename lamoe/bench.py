"""`lamoe bench`: how fast a model runs here, each figure beside what the machine could do, and beside llama.cpp in turn when that is at hand.

A preset needs no checkpoint: its packed weights are made of random bytes. Speed does not depend on their values (routing is close to uniform). Every
measurement is a median over rounds; before each group of them the machine is probed (bytes read per second, multiply-adds per second), because
shared machines change their speed by the minute: compare shares and ratios, not seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lamoe import accounting, packed
from lamoe.cache import PagedCache
from lamoe.config import ModelConfig
from lamoe.kernels import native
from lamoe.packed import PackedModel, Piece

_FILL = 1 << 20  # bytes of randomness that are repeated


@dataclass
class Machine:
    """Probed limits: bytes per second, and multiply-adds per second of int8, bfloat16 and float32 dot products."""

    read: float
    int8: float
    bf16: float
    fp32: float

    @classmethod
    def probe(cls, threads: int, buffer: torch.Tensor) -> Machine:
        """Medians of three. buffer: far larger than the caches."""
        runs = [native.lib.probe(buffer.numpy(), threads) for _ in range(3)]
        return cls(*map(statistics.median, zip(*runs)))


@dataclass
class Line:
    """One measurement. tokens: computed in one pass; bytes: read at least; flops: of the model, 2 for a multiply-add."""

    name: str
    tokens: int
    bytes: float
    flops: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.tokens / self.median


def random_model(config: ModelConfig, weights: str, threads: int = 0) -> PackedModel:
    """A packed model of random weights with a standard deviation of about 0.02."""
    elem = packed.element(weights)
    noise = torch.randint(0, 256, (_FILL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return PackedModel(config, weights, {p.key: _fill(p, elem, noise) for p in packed.pieces(config, weights)}, threads)


def _fill(piece: Piece, elem: str, noise: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    size = packed.piece_bytes(piece, elem)
    if piece.format is None:
        return torch.ones(piece.n).view(torch.uint8), [1.0]
    kind = elem if piece.format == "raw" else piece.format
    if kind in ("fp32", "bf16"):
        source = (torch.randn(_FILL // 4, generator=torch.Generator().manual_seed(1)) * 0.02).to(torch.float32 if kind == "fp32" else torch.bfloat16).view(torch.uint8)
    else:
        source = noise
    out = native.room(size)
    for at in range(0, size, len(source)):
        out[at : at + len(source)] = source[: size - at]
    if kind in ("int8", "int4"):
        block, rms = (1088, 74.0) if kind == "int8" else (576, 37.0)
        # Scales of 0.5 with signs of their own: the levels of int4 are not zero on average, and a mean that all weights share would drive all tokens
        # in one direction and so to the same experts.
        scales = out.view(-1, block)[:, :64]
        torch.randint(0, 2, scales.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2), out=scales)
        scales.mul_(0x80).add_(0x70)
        return out, [0.02 / rms / 0.5] * piece.count
    return out, [1.0] * piece.count


class Bench:
    """Passes over one model with a cache of `slots` rows of `format`, filled with noise so that any depth is there at once."""

    def __init__(self, model: PackedModel, format: str, slots: int, page: int = 16):
        self.model, self.config = model, model.config
        self.cache = PagedCache(model.config, -(-slots // page), page, format, model.dtype)
        rows = self.cache.rows
        if format in ("fp32", "bf16"):
            rows.view(torch.float32 if format == "fp32" else torch.bfloat16).normal_()
        else:
            rows.copy_(torch.randint(0, 64, rows.shape, dtype=torch.uint8))  # as a base at most 1 / 128
        self.pages = torch.arange(self.cache.pages, dtype=torch.int32)

    def run(self, tokens: int, depth: int) -> None:
        """One sequence: `tokens` new ones behind `depth`."""
        self._step(tokens, torch.arange(depth, depth + tokens), torch.tensor([[tokens, depth + tokens, 0]], dtype=torch.int32), [tokens - 1])

    def run_batch(self, sequences: int, depth: int) -> None:
        """One token for each of many sequences, with pages of their own while those last."""
        need = depth // self.cache.page_size + 1
        begin = [(i * need) % max(self.cache.pages - need + 1, 1) for i in range(sequences)]
        self._step(sequences, torch.full((sequences,), depth), torch.tensor([[1, depth + 1, b] for b in begin], dtype=torch.int32), list(range(sequences)))

    def _step(self, n, positions, seqs, rows):
        ids = torch.randint(self.config.vocab_size, (n,)).tolist()
        self.model.run(ids, positions, seqs, self.pages, self.cache, rows)

    def weight_bytes(self, tokens: int) -> float:
        """Bytes of weights that a pass over `tokens` tokens reads at least: routed experts as many as an independent, uniform choice touches."""
        c = self.config
        touched = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens if c.is_moe else 0.0
        never = ("embed", "uk_rows", "uv_elem")
        total = 0.0
        for key, size in self.model.nbytes.items():
            name = key.rsplit(".", 1)[-1]
            total += 0 if name in never else touched * size if name in ("e13", "e2") else size
        return total

    def line(self, name: str, tokens: int, depth: int, sequences: int = 1) -> Line:
        row = self.cache.nbytes / (self.cache.pages * self.cache.page_size)  # all layers
        form = "absorb" if tokens == 1 and self.config.is_mla else None
        flops = accounting.forward_flops(self.config, tokens, depth, form, head_tokens=1).total
        return Line(name, tokens * sequences, self.weight_bytes(tokens * sequences) + sequences * depth * row, sequences * flops)


def measure(bench: Bench, prefills: list[tuple[int, int]], depths: list[int], batches: list[int], rounds: int) -> list[Line]:
    """Medians of passes: prompts (tokens, behind so many), single tokens at depths, one token for each of many sequences."""
    jobs = [(bench.line(f"decode at {d:,}", 1, d), lambda d=d: bench.run(1, d), 3) for d in depths]
    jobs += [(bench.line(f"prefill {n:,}" + (f" at {d:,}" if d else ""), n, d), lambda n=n, d=d: bench.run(n, d), 1) for n, d in prefills]
    jobs += [(bench.line(f"{b} sequences", 1, 16, b), lambda b=b: bench.run_batch(b, 16), 2) for b in batches]
    for line, go, times in jobs:
        go()
        for _ in range(rounds * times):
            begin = time.perf_counter()
            go()
            line.seconds.append(time.perf_counter() - begin)
    return [line for line, _, _ in jobs]


def table(lines: list[Line], machine: Machine, weights: str) -> str:
    """A table in Markdown; shares are of the limits probed in the same run."""
    peak = 2 * (machine.int8 if weights in ("int4", "int8") else machine.bf16 if weights == "bf16" else machine.fp32)
    out = ["| | tokens/s | ms a pass | GB/s | of the probed read | GFLOP/s | of the probed peak |", "|---|---|---|---|---|---|---|"]
    for x in lines:
        out.append(f"| {x.name} | {x.rate:,.1f} | {1e3 * x.median:,.2f} | {x.bytes / x.median / 1e9:.1f} | {x.bytes / x.median / machine.read:.0%} | "
                   f"{x.flops / x.median / 1e9:,.0f} | {x.flops / x.median / peak:.0%} |")
    return "\n".join(out)


def peak_rss() -> int:
    """The most bytes of memory this process had at once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- llama.cpp ---------------------------------------------------------------------------------------------------------
def peer(model: str, threads: int, prompts: list[int], depths: list[int], batches: list[int]) -> dict[str, float]:
    """tokens/s of llama.cpp on a GGUF file: {the name of our line: rate}. ValueError when llama-bench is not on PATH."""
    tool = shutil.which("llama-bench")
    if tool is None:
        raise ValueError("llama-bench is not on PATH; build llama.cpp and put its bin folder there, or leave --peer away")
    if not Path(model).is_file():
        raise ValueError(f"--peer-model {model!r} is not a file; give the GGUF file that llama.cpp should run")
    found: dict[str, float] = {}
    base = [tool, "-m", model, "-t", str(threads), "-fa", "1", "-r", "2", "-o", "md"]
    for name, test in [(f"decode at {d:,}", ["-p", "0", "-n", "16", "-d", str(d)]) for d in depths] + [(f"prefill {n:,}", ["-p", str(n), "-n", "0"]) for n in prompts]:
        text = subprocess.run([*base, *test], capture_output=True, text=True, check=False).stdout
        rates = re.findall(r"\|\s*([\d.]+) ± [\d.]+ \|", text)
        if rates:
            found[name] = float(rates[-1])
    many = shutil.which("llama-batched-bench")
    if many and batches:
        text = subprocess.run([many, "-m", model, "-t", str(threads), "-fa", "on", "-npp", "16", "-ntg", "16", "-npl", ",".join(map(str, batches)), "-c", str(40 * max(batches))],
                              capture_output=True, text=True, check=False).stdout
        for row in re.findall(r"^\|\s*\d+ \|\s*\d+ \|\s*(\d+) \|(.*)$", text, re.M):
            cells = row[1].split("|")
            found[f"{row[0]} sequences"] = float(cells[4])
    return found


def versions(threads: int) -> dict:
    """What a figure must be read with."""
    return {"isa": native.lib.isa(), "threads": threads, "torch": torch.__version__, "cpus": os.cpu_count()}
