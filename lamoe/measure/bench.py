"""`lamoe bench`: how fast a model runs here, each figure beside what the machine could do, and beside llama.cpp in turn when that is at hand.

A preset needs no checkpoint: its packed weights are made of random bytes. Speed does not depend on their values as long as they have no mean in common: routing is then close to uniform. Every
measurement is a median over rounds; the machine is probed too (bytes read per second, multiply-adds per second), because shared machines change their
speed by the minute: compare shares and ratios, not seconds. With a peer each row is measured in turn: ours, the peer, ours again, a probe beside each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lamoe.backends.cpu import native, packed
from lamoe.backends.cpu.packed import PackedModel, Piece
from lamoe.backends.paged_cache import PagedCache
from lamoe.engine.plan import available_memory
from lamoe.model import accounting
from lamoe.model.attention import cheaper_form
from lamoe.model.config import ModelConfig

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
    """One measurement: `new` tokens of each of `sequences`, behind `depth`. bytes: a pass reads (`measure` counts them); flops: of the model, 2 for a multiply-add.
    peer: tokens/s of llama.cpp; read: bytes per second probed before, between and after ours, the peer's and ours again."""

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
        """Computed in one pass."""
        return self.new * self.sequences

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.tokens / self.median

    @property
    def ratio(self) -> float:
        """Ours over the peer's, medians of both."""
        return self.rate / statistics.median(self.peer)


def random_model(
    config: ModelConfig, weights: str, threads: int = 0, head: str | None = None
) -> PackedModel:
    """A packed model of random weights (weights, head: packed.pieces) with a standard deviation of about 0.02. ValueError when memory has no room for it."""
    elem = packed.element(weights)
    size, free = (
        sum(packed.piece_bytes(p, elem) for p in packed.pieces(config, weights, head)),
        available_memory(),
    )
    if free is not None and size > free:
        raise ValueError(
            f"the weights in {weights} take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are left; take a smaller model, fewer layers (num_hidden_layers in a config.json) "
            "or a narrower format"
        )
    noise = torch.randint(
        0, 256, (_FILL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return PackedModel(
        config,
        weights,
        {p.key: _fill(p, elem, noise) for p in packed.pieces(config, weights, head)},
        threads,
        head,
    )


def _fill(piece: Piece, elem: str, noise: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    size = packed.piece_bytes(piece, elem)
    if piece.format is None:
        return torch.ones(piece.n).view(torch.uint8), [1.0]
    kind = elem if piece.format == "raw" else piece.format
    if kind in ("fp32", "bf16"):
        source = (
            (torch.randn(_FILL // 4, generator=torch.Generator().manual_seed(1)) * 0.02)
            .to(torch.float32 if kind == "fp32" else torch.bfloat16)
            .view(torch.uint8)
        )
    else:
        source = noise
    out = native.room(size)
    for at in range(0, size, len(source)):
        out[at : at + len(source)] = source[: size - at]
    if kind in ("int8", "int4"):
        block, rms = (1088, 74.0) if kind == "int8" else (576, 37.0)
        # Scales of 0.5 with signs of their own: the levels of int4 are not zero on average, and a mean that all weights share would drive all tokens
        # in one direction and so to the same experts.
        out.view(-1, block)[:, :64].bitwise_and_(0x80).bitwise_or_(0x70)
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
            rows.copy_(
                torch.randint(0, 64, rows.shape, dtype=torch.uint8)
            )  # as a base at most 1 / 128
        self.pages = torch.arange(self.cache.pages, dtype=torch.int32)

    def run(self, line: Line, experts: bool = False) -> torch.Tensor:
        """One pass of what the line measures; the chosen experts [MoE layers, tokens, K] when asked for. Many sequences have pages of their own while those last."""
        n, depth, need = (
            line.new,
            line.depth,
            (line.depth + line.new - 1) // self.cache.page_size + 1,
        )
        begin = [(i * need) % max(self.cache.pages - need + 1, 1) for i in range(line.sequences)]
        seqs = torch.tensor([[n, depth + n, b] for b in begin], dtype=torch.int32)
        ids = torch.randint(self.config.vocab_size, (line.tokens,)).tolist()
        rows = list(range(n - 1, line.tokens, n))
        return self.model.run(
            ids,
            torch.arange(depth, depth + n).repeat(line.sequences),
            seqs,
            self.pages,
            self.cache,
            rows,
            experts=experts,
        )[1]

    def form(self, new: int, depth: int) -> str | None:
        """Of attention under MLA, as Model::expand (csrc/model.cpp) picks it."""
        if not self.config.is_mla:
            return None
        return "absorb" if new == 1 else cheaper_form(self.config, new, depth + new)

    def bytes(self, line: Line, chosen: torch.Tensor) -> float:
        """Read by a pass that chose these experts (`run`): cache rows, the experts that anybody chose, a row of the embedding for a token, and of W^UK and
        W^UV what the form reads: packed ones (absorb) or the 16-bit copies (expand). All other weights once."""
        c, expand = self.config, self.form(line.new, line.depth) == "expand"
        touched = (
            sum(len(layer.unique()) for layer in chosen) / (len(chosen) * c.n_routed_experts)
            if len(chosen)
            else 0.0
        )
        never = (
            {"uk_rows", "uv_elem"}
            if not expand
            else {"uk", "uv"}
            if self.model.weights in ("int8", "int4")
            else {"uk"}
        )  # else uv is its own copy
        total = (
            line.sequences
            * line.depth
            * self.cache.nbytes
            / (self.cache.pages * self.cache.page_size)
        )  # of all layers
        for key, size in self.model.nbytes.items():
            name = key.rsplit(".", 1)[-1]
            total += (
                touched
                if name in ("e13", "e2")
                else min(line.tokens / c.vocab_size, 1)
                if name == "embed"
                else 0
                if name in never
                else 1
            ) * size
        return total

    def line(self, name: str, new: int, depth: int, sequences: int = 1) -> Line:
        """A measurement that has not been taken."""
        return Line(
            name,
            new,
            depth,
            sequences,
            sequences
            * accounting.forward_flops(
                self.config, new, depth, self.form(new, depth), head_tokens=1
            ).total,
        )

    def lines(
        self, prefills: list[tuple[int, int]], depths: list[int], batches: list[int]
    ) -> list[Line]:
        """Single tokens at depths, prompts (tokens, behind so many), one token for each of many sequences."""
        return (
            [self.line(f"decode at {d:,}", 1, d) for d in depths]
            + [self.line(f"prefill {n:,}" + (f" at {d:,}" if d else ""), n, d) for n, d in prefills]
            + [self.line(f"{b} sequences", 1, 16, b) for b in batches]
        )


def measure(
    bench: Bench, lines: list[Line], rounds: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Time passes of every line, one more ahead of them; short ones more often."""
    for line in lines:
        say(f"lamoe: {line.name}")
        line.bytes = bench.bytes(line, bench.run(line, experts=True))
        for _ in range(rounds * (3 if line.tokens == 1 else 2 if line.new == 1 else 1)):
            begin = time.perf_counter()
            bench.run(line)
            line.seconds.append(time.perf_counter() - begin)


def progress(text: str) -> None:
    """What runs now, for whoever waits, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(lines: list[Line], machine: Machine, weights: str) -> str:
    """A table in Markdown; shares are of the limits probed in the same run."""
    peak = 2 * (
        machine.int8
        if weights in ("int4", "int8")
        else machine.bf16
        if weights == "bf16"
        else machine.fp32
    )
    out = [
        "| | tokens/s | ms a pass | GB/s | of the probed read | GFLOP/s | of the probed peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        out.append(
            f"| {x.name} | {x.rate:,.1f} | {1e3 * x.median:,.2f} | {x.bytes / x.median / 1e9:.1f} | {x.bytes / x.median / machine.read:.0%} | "
            f"{x.flops / x.median / 1e9:,.0f} | {x.flops / x.median / peak:.0%} |"
        )
    if any(x.bytes / x.median > machine.read for x in lines):
        out.append(
            "\nMore than 100 % of the probed read: what is read again lies in the last-level cache, or other programs slowed the probe down."
        )
    return "\n".join(out)


def figures(line: Line) -> dict:
    """Of the JSON."""
    out = {
        "tokens_per_s": line.rate,
        "gb_per_s": line.bytes / line.median / 1e9,
        "gflops": line.flops / line.median / 1e9,
    }
    if line.peer:
        out |= {
            "peer_tokens_per_s": statistics.median(line.peer),
            "ratio": line.ratio,
            "read_gb_per_s": [r / 1e9 for r in line.read],
        }
    return out


def peak_rss() -> int:
    """The most bytes of memory this process had at once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- llama.cpp ---------------------------------------------------------------------------------------------------------
class Peer:
    """llama.cpp's own tools on a GGUF file. ValueError when a tool is not on PATH or there is no such file."""

    def __init__(self, model: str, threads: int):
        self.model, self.threads = model, threads
        for tool in ("llama-bench", "llama-batched-bench"):
            if shutil.which(tool) is None:
                raise ValueError(
                    f"{tool} is not on PATH; build llama.cpp and put its bin folder there, or leave --peer away"
                )
        if not Path(model).is_file():
            raise ValueError(
                f"--peer-model {model!r} is not a file; give the GGUF file that llama.cpp should run"
            )

    def command(self, lines: list[Line]) -> list[str]:
        """For lines of one depth, or of one number of sequences. llama-bench keeps the state of a depth it has filled: one fill serves prompts, decoding and
        repetitions."""
        base = ["-m", self.model, "-t", str(self.threads), "-fa"]
        many, depth, prompts = (
            lines[0].sequences,
            lines[0].depth,
            [str(x.new) for x in lines if x.new > 1],
        )
        if many > 1:  # twice
            return [
                "llama-batched-bench",
                *base,
                "on",
                "-npp",
                str(depth),
                "-ntg",
                "16",
                "-npl",
                f"{many},{many}",
                "-c",
                str((depth + 24) * many),
                "--output-format",
                "jsonl",
            ]
        decode = "32" if len(prompts) < len(lines) else "0"
        return [
            "llama-bench",
            *base,
            "1",
            "-r",
            "2",
            "-d",
            str(depth),
            "-p",
            ",".join(prompts) or "0",
            "-n",
            decode,
            "-o",
            "jsonl",
            "--progress",
        ]

    def measure(self, lines: list[Line], say: Callable[[str], None]) -> None:
        """Add its tokens/s to lines that one command serves. ValueError with its last words when it fails."""
        command = self.command(lines)
        with (
            tempfile.TemporaryFile("w+") as out,
            subprocess.Popen(
                command, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace"
            ) as process,
        ):
            try:
                said = [""]
                for text in process.stderr:
                    said = [*said[-9:], text.strip()]
                    if text.startswith("llama-bench: "):
                        say(f"llama.cpp: {text.removeprefix('llama-bench: ').strip()}")
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            out.seek(0)
            found = parse(out.read())
        for line in lines:
            rates = found.get((line.new, line.depth, line.sequences))
            if code or not rates:
                raise ValueError(
                    f"{' '.join(command)} ended with code {code} and "
                    + ("no figure for " + line.name if not code else "said: " + " ".join(said))
                )
            line.peer += rates


def parse(text: str) -> dict[tuple[int, int, int], list[float]]:
    """Lines of JSON from llama-bench or llama-batched-bench -> {(tokens, depth, sequences): [tokens/s of each repetition]}, one token for decoding."""
    found: dict[tuple[int, int, int], list[float]] = {}
    for row in (json.loads(line) for line in text.splitlines() if line.startswith("{")):
        if "speed_tg" in row:
            found.setdefault((1, row["pp"], row["pl"]), []).append(row["speed_tg"])
        else:
            found.setdefault((row["n_prompt"] or 1, row["n_depth"], 1), []).extend(
                row["samples_ts"]
            )
    return found


def in_turn(
    bench: Bench,
    peer: Peer,
    lines: list[Line],
    rounds: int,
    read: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Each line: ours, the peer, ours again, `read` (a probe) around each. Lines behind one depth go together, because the peer fills it anew each time."""
    groups: dict[object, list[Line]] = {}
    for x in lines:
        groups.setdefault((x.depth,) if x.depth and x.sequences == 1 else x.name, []).append(x)
    for group in groups.values():
        reads = [read()]
        measure(bench, group, rounds, say)
        reads.append(read())
        say(
            "llama.cpp: "
            + ", ".join(x.name for x in group)
            + (
                f" (it fills {group[0].depth:,} tokens first)"
                if group[0].sequences == 1 and group[0].depth
                else ""
            )
        )
        peer.measure(group, say)
        reads.append(read())
        measure(bench, group, rounds, say)
        reads.append(read())
        for x in group:
            x.read = reads
            say(
                f"{x.name}: lamoe {x.rate:,.1f}, llama.cpp {statistics.median(x.peer):,.1f} tokens/s, {x.ratio:.2f} x"
            )


def peer_table(lines: list[Line]) -> str:
    """Medians beside each other, in Markdown."""
    out = [
        "| tokens/s | lamoe | llama.cpp | ratio | GB/s read, probed before ours, the peer, ours again, and after |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(
        out
        + [
            f"| {x.name} | {x.rate:,.1f} | {statistics.median(x.peer):,.1f} | {x.ratio:.2f} x | {', '.join(f'{r / 1e9:.1f}' for r in x.read)} |"
            for x in lines
        ]
    )


def versions(threads: int) -> dict:
    """What a figure must be read with."""
    return {
        "isa": native.lib.isa(),
        "threads": threads,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
