"""`lamoe bench`: how fast a model runs here, relative to the machine's limits and to llama.cpp."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamoe import backends
from lamoe.backends.base import Backend, Formats
from lamoe.backends.cpu import native, packed_file
from lamoe.checkpoints import resolve
from lamoe.measure.llama_cpp import Peer, measure_interleaved
from lamoe.measure.random_weights import random_model
from lamoe.measure.timing import Bench, Line, Machine, measure
from lamoe.model.config import ModelConfig

_PROBE_BYTES = 1 << 29  # buffer that is read to measure the memory bandwidth
Make = Callable[[int], Backend]


@dataclass(frozen=True)
class Workload:
    """The prefills and decode steps that a benchmark measures.

    Attributes:
        prefills: pairs (prompt length, cached tokens before the prompt), in tokens.
        depths: context lengths at which one token is decoded.
        batches: numbers of sequences that decode together.
    """

    prefills: list[tuple[int, int]]
    depths: list[int]
    batches: list[int]

    def within(self, limit: int) -> tuple[Workload, list[str]]:
        """Return the part of the workload that fits into `limit` positions.

        Also return the flags of the measurements that were left out.
        """
        depths = [d for d in self.depths if d < limit]
        prefills = [(n, d) for n, d in self.prefills if n + d <= limit]
        left_out = [f"--depth {d}" for d in self.depths if d not in depths]
        left_out += [f"--prefill {n}@{d}" for n, d in self.prefills if (n, d) not in prefills]
        return Workload(prefills, depths, self.batches), left_out

    @property
    def slots(self) -> int:
        """Return the number of tokens that the cache must hold for this workload."""
        prefill = [n + d for n, d in self.prefills]
        decode = [d + 1 for d in self.depths]
        return max([1, *prefill, *decode, *(32 * b for b in self.batches)])


@dataclass
class Result:
    """The measurements, and the model, formats and machine that they belong to."""

    model: str
    weights: str
    head: str
    cache: str
    weight_bytes: int
    load_s: float
    threads: int
    machine: Machine
    lines: list[Line]
    peak_rss: int

    @property
    def versions(self) -> dict[str, Any]:
        """Return instruction set, threads, torch version and number of CPUs."""
        return {
            "isa": native.lib.isa(),
            "threads": self.threads,
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
        }


def random_weights(config: ModelConfig, formats: Formats) -> Make:
    """Return the `make` argument of `run` for a config with random weights."""
    return lambda threads: random_model(config, formats, threads)


def stored_weights(name: str, formats: Formats) -> Make:
    """Return the `make` argument of `run` for a folder or hub id.

    A packed model keeps the format of its weights.
    """

    def make(threads: int) -> Backend:
        folder = resolve(name)
        own = packed_file.is_packed(folder)
        wanted = Formats(None if own else formats.weights, formats.head)
        return backends.load(folder, wanted, backend="cpu", threads=threads)

    return make


def run(
    name: str,
    make: Make,
    work: Workload,
    *,
    cache: str = "bf16",
    threads: int = 0,
    rounds: int = 3,
    peer_model: str | None = None,
) -> Result:
    """Make the model and measure the workload.

    Args:
        name: name of the model in the result.
        make: function that makes the model for a number of threads.
        peer_model: GGUF file for interleaved runs of llama.cpp. None measures lamoe only.

    Raises:
        ValueError: if an option is out of range, the compiled kernels are missing, or llama.cpp
            cannot be run.
    """
    _check(rounds, threads, work.batches)
    if threads:
        torch.set_num_threads(threads)
    threads, begin = torch.get_num_threads(), time.perf_counter()
    peer = None if peer_model is None else Peer(peer_model, threads)
    progress(f"{name}: weights")
    model = make(threads)
    load_s, limit = time.perf_counter() - begin, model.config.max_position_embeddings
    work, left_out = work.within(limit)
    if left_out:
        progress(f"left out, beyond the {limit:,} positions of the model: {', '.join(left_out)}")
    machine, lines = _measure(Bench(model, cache, work.slots), work, threads, rounds, peer)
    return Result(
        name,
        model.weights,
        model.head,
        cache,
        model.weight_bytes(),
        load_s,
        threads,
        machine,
        lines,
        peak_rss(),
    )


def _measure(
    bench: Bench, work: Workload, threads: int, rounds: int, peer: Peer | None
) -> tuple[Machine, list[Line]]:
    """Measure the machine's limits, then the workload."""
    buffer = _probe_buffer(bench.model)

    def probe() -> Machine:
        return Machine.probe(threads, buffer)

    machine, lines = probe(), bench.lines(work.prefills, work.depths, work.batches)
    if peer is None:
        measure(bench, lines, rounds, progress)
    else:
        measure_interleaved(bench, peer, lines, rounds, lambda: probe().read, progress)
    return machine, lines


def _check(rounds: int, threads: int, batches: list[int]) -> None:
    if not native.available():
        raise ValueError(
            "bench measures the compiled kernels, which are missing or disabled (`lamoe doctor` "
            "says why); install lamoe with a C++ compiler"
        )
    if rounds < 1 or threads < 0 or min(batches, default=1) < 1:
        raise ValueError(
            f"--rounds is {rounds}, --threads {threads}, --batch {batches}; rounds and batches "
            "must be at least 1, threads at least 0 (0: all cores)"
        )


def _probe_buffer(model: Backend) -> torch.Tensor:
    """Return a buffer far larger than the CPU caches, either the largest weight or a new one."""
    largest = max(model.tensors().values(), key=lambda t: t.numel())
    if largest.numel() > _PROBE_BYTES // 2:
        return largest
    return torch.zeros(_PROBE_BYTES, dtype=torch.uint8)


def progress(text: str) -> None:
    """Print the name of the current measurement on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def peak_rss() -> int:
    """Return the peak memory of this process in bytes, or 0 if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
