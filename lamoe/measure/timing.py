"""Timed forward passes at chosen context lengths and batch sizes, and the limits of the machine.

Every figure is a median over several passes. The limits are measured in the same run, because the
speed of a shared machine changes by the minute. Compare shares and ratios, not seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lamoe.backends.base import Backend, Batch
from lamoe.backends.cpu import native
from lamoe.backends.cpu.backend import expands
from lamoe.model import accounting


@dataclass
class Machine:
    """Measured limits of the machine.

    Attributes:
        read: bytes read from memory per second.
        int8, bf16, fp32: multiply-adds per second in dot products of this type.
    """

    read: float
    int8: float
    bf16: float
    fp32: float

    @classmethod
    def probe(cls, threads: int, buffer: torch.Tensor) -> Machine:
        """Measure the limits (medians of three). `buffer` must be far larger than the caches."""
        probes = [native.lib.probe(buffer.numpy(), threads) for _ in range(3)]
        return cls(*map(statistics.median, zip(*probes)))

    def peak(self, weights: str) -> float:
        """Return the peak operations per second of the arithmetic that a weight format uses."""
        kind = "int8" if weights in ("int4", "int8") else weights
        return 2 * getattr(self, kind)


@dataclass
class Line:
    """One measurement: passes that compute `new` tokens of each sequence at context length `depth`.

    Attributes:
        flops: FLOPs that one pass needs. A multiply-add counts as 2.
        bytes: bytes that one pass reads. `measure` sets this number.
        seconds: duration of each pass.
        peer: tokens/s of llama.cpp in each of its runs.
        read: bytes read per second, probed before, between and after the interleaved runs.
    """

    name: str
    new: int
    depth: int
    sequences: int
    flops: float
    bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens that one pass computes."""
        return self.new * self.sequences

    @property
    def median(self) -> float:
        """Median duration of a pass in seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Speed in tokens per second, from the median duration."""
        return self.tokens / self.median

    @property
    def peer_rate(self) -> float:
        """Median speed of the peer in tokens per second."""
        return statistics.median(self.peer)

    @property
    def ratio(self) -> float:
        """Our tokens per second divided by the peer's."""
        return self.rate / self.peer_rate


class Bench:
    """Forward passes of one model over a cache of `slots` tokens.

    The cache is filled with noise, so passes can start at any context length at once.
    """

    def __init__(self, model: Backend, format: str, slots: int, page: int = 16):
        self.model, self.config = model, model.config
        self.cache = model.new_cache(-(-slots // page), page, format)
        rows = self.cache.rows
        if format in ("fp32", "bf16"):
            rows.view(torch.float32 if format == "fp32" else torch.bfloat16).normal_()
        else:
            # Use bytes below 64. Some of them are scales, and cached values must stay moderate.
            rows.copy_(torch.randint(0, 64, rows.shape, dtype=torch.uint8))
        self.pages = torch.arange(self.cache.pages, dtype=torch.int32)

    def run(self, line: Line, experts: bool = False) -> torch.Tensor | None:
        """Run one pass of a measurement.

        Sequences use separate pages as long as the cache has enough of them.

        Returns:
            The chosen experts [MoE layers, tokens, K] if `experts` is set.
        """
        n, depth, size = line.new, line.depth, self.cache.page_size
        need = (depth + n - 1) // size + 1
        starts = max(self.cache.pages - need + 1, 1)
        begin = [(i * need) % starts for i in range(line.sequences)]
        seqs = torch.tensor([[n, depth + n, b] for b in begin], dtype=torch.int32)
        batch = Batch(
            torch.randint(self.config.vocab_size, (line.tokens,)).tolist(),
            torch.arange(depth, depth + n).repeat(line.sequences),
            seqs,
            self.pages,
            list(range(n - 1, line.tokens, n)),
        )
        return self.model.forward(batch, self.cache, experts=experts).experts

    def form(self, new: int, depth: int) -> str | None:
        """Return the form of MLA that a pass uses ("absorb", "expand"), or None without MLA."""
        if not self.config.is_mla:
            return None
        return "expand" if expands(self.config, new, depth + new) else "absorb"

    def bytes(self, line: Line, chosen: torch.Tensor | None) -> float:
        """Count the bytes that a pass with the chosen experts reads.

        A pass reads the cached rows, the chosen experts, one embedding row per token, one of the
        two copies of W^UK and W^UV, and each other weight once.
        """
        chosen = torch.empty(0) if chosen is None else chosen
        experts = len(chosen) * (self.config.n_routed_experts or 0)
        touched = sum(len(layer.unique()) for layer in chosen) / max(experts, 1)
        shares = {
            "e13": touched,
            "e2": touched,
            "embed": min(line.tokens / self.config.vocab_size, 1),
            **dict.fromkeys(self._unread(line), 0),
        }
        row = self.cache.nbytes / (self.cache.pages * self.cache.page_size)  # all layers together
        total = line.sequences * line.depth * row
        for key, size in self.model.tensor_bytes().items():
            total += shares.get(key.rsplit(".", 1)[-1], 1) * size
        return total

    def _unread(self, line: Line) -> tuple[str, ...]:
        """Return the copies of W^UK and W^UV that this form of attention does not read."""
        if self.form(line.new, line.depth) != "expand":
            return ("uk_rows", "uv_elem")
        # Without quantisation W^UV has one copy, which both forms read.
        return ("uk", "uv") if self.model.weights in ("int8", "int4") else ("uk",)

    def line(self, name: str, new: int, depth: int, sequences: int = 1) -> Line:
        """Make a measurement that has no results yet."""
        form = self.form(new, depth)
        one = accounting.forward_flops(self.config, new, depth, form, head_tokens=1).total
        return Line(name, new, depth, sequences, sequences * one)

    def lines(
        self, prefills: list[tuple[int, int]], depths: list[int], batches: list[int]
    ) -> list[Line]:
        """Make all measurements of a workload (bench.Workload), without results yet."""
        return (
            [self.line(f"decode at {d:,}", 1, d) for d in depths]
            + [self.line(f"prefill {n:,}" + (f" at {d:,}" if d else ""), n, d) for n, d in prefills]
            + [self.line(f"{b} sequences", 1, 16, b) for b in batches]
        )


def measure(
    bench: Bench, lines: list[Line], rounds: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Time passes of every line after one warm-up pass. Short passes are repeated more often."""
    for line in lines:
        say(f"lamoe: {line.name}")
        line.bytes = bench.bytes(line, bench.run(line, experts=True))
        for _ in range(rounds * (3 if line.tokens == 1 else 2 if line.new == 1 else 1)):
            begin = time.perf_counter()
            bench.run(line)
            line.seconds.append(time.perf_counter() - begin)
