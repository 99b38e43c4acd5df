"""Measure how much speed training and decoding lose when other programs keep all cores busy.

    python benchmarks/busy.py [--rounds 5] [--seconds 3] [--spins 300000] [--before CHECKOUT]

Training is a loop of whole steps of preset "tiny" (16 x 256 tokens, bfloat16). Decoding is one
sequence on the compiled kernels: preset "small", random int4 weights, 256 tokens in the cache.
Both use all cores. The machine is made busy by one endless loop per core, which this program starts
and ends.

Every candidate is a process of its own, because OpenMP reads its variables when it is loaded:

- lamoe: this checkout without any variable. lamoe bounds the spinning (lamoe/spinning.py).
- N spins: this checkout with GOMP_SPINCOUNT=N. 300,000 is the runtime's own default.
- before: another checkout of lamoe (--before), to compare the kernels' own threads.

The candidates stay warm and run interleaved: idle, then busy, every candidate for some seconds.
Speeds are medians over the rounds. Ratios are taken within a round, so a drift of the machine's
speed cancels out. The last line is JSON. Leave the machine alone during the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Variables that change how OpenMP waits. Each candidate sets its own.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# The loop ends by itself if this program is killed.
ENDLESS_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


# ---- a candidate process -------------------------------------------------------------------------
def make_training(threads: int, batch: int = 16) -> tuple[Callable[[], object], int]:
    """Return a function that runs one training step, and the tokens of a step."""
    import torch

    from lamoe.model.config import ModelConfig
    from lamoe.model.routing import Balance, Training
    from lamoe.model.transformer import Transformer
    from lamoe.train.optim import MasterAdamW, Optim

    torch.set_num_threads(threads)
    config = ModelConfig.preset("tiny")
    model = Transformer(config).init_weights().to(torch.bfloat16)
    optimizer = MasterAdamW(model, Optim(warmup_steps=0))
    ids = torch.randint(0, config.vocab_size, (batch, 257))

    def step() -> None:
        hook = Training(Balance())
        loss = model.loss(ids[:, :-1], ids[:, 1:], routing_hook=hook)
        (loss + hook.loss()).backward()
        optimizer.collect()
        optimizer.clip()
        optimizer.step(3e-4)

    return step, batch * 256


def make_decoding(threads: int) -> tuple[Callable[[], object], int]:
    """Return a function that decodes one token, and 1."""
    import torch

    from lamoe.backends.base import Formats
    from lamoe.measure.random_weights import random_model
    from lamoe.measure.timing import Bench
    from lamoe.model.config import ModelConfig

    torch.set_num_threads(threads)
    model = random_model(ModelConfig.preset("small"), Formats("int4", "int4"), threads)
    bench = Bench(model, "bf16", 257)
    line = bench.line("decode", 1, 256)
    return lambda: bench.run(line), 1


TASKS = {"train": make_training, "decode": make_decoding}


def work(task: str, threads: int) -> None:
    """Run as a candidate process.

    For every number of seconds on standard input, repeat the task for that long and write the
    speed in tokens/s to standard output.
    """
    import lamoe  # noqa: F401  before torch, as every program that uses lamoe does

    run, tokens = TASKS[task](threads)
    for _ in range(3):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        count, begin = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < float(line):
            run()
            count += 1
        print(count * tokens / (time.perf_counter() - begin), flush=True)


class Candidate:
    """A warm process that repeats one task."""

    def __init__(self, task: str, threads: int, checkout: Path, variables: dict[str, str]):
        env = {k: v for k, v in os.environ.items() if k not in WAITING}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", task, "--threads", str(threads)],
            env={**env, "PYTHONPATH": str(checkout), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def measure(self, seconds: float) -> float:
        """Repeat the task for `seconds` and return the speed in tokens/s."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a candidate process died; its error is above")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# ---- the measurement -----------------------------------------------------------------------------
@contextmanager
def busy_machine(loops: int) -> Iterator[None]:
    """Keep `loops` cores busy."""
    running = [subprocess.Popen([sys.executable, "-c", ENDLESS_LOOP]) for _ in range(loops)]
    try:
        time.sleep(0.5)  # the interpreters start
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def candidates_of(args: argparse.Namespace) -> dict[str, tuple[Path, dict[str, str]]]:
    """Return {name: (checkout, environment variables)}."""
    out: dict[str, tuple[Path, dict[str, str]]] = {"lamoe": (ROOT, {})}
    for spins in args.spins:
        out[f"{spins:,} spins"] = (ROOT, {"GOMP_SPINCOUNT": str(spins)})
    if args.before:
        out["before"] = (args.before.resolve(), {})
    return out


Rounds = dict[tuple[str, str, bool], list[float]]  # (task, candidate, is busy) -> tokens/s


def measure(args: argparse.Namespace) -> Rounds:
    """Measure all candidates, idle and busy, interleaved."""
    settings = candidates_of(args)
    rounds: Rounds = {(t, n, b): [] for t in args.task for n in settings for b in (False, True)}
    with ExitStack() as stack:
        workers = {}
        for task in args.task:
            for name, (checkout, variables) in settings.items():
                workers[task, name] = Candidate(task, args.threads, checkout, variables)
                stack.callback(workers[task, name].close)
        for _ in range(args.rounds):
            for is_busy in (False, True):
                with busy_machine(args.loops if is_busy else 0):
                    for (task, name), worker in workers.items():
                        rounds[task, name, is_busy].append(worker.measure(args.seconds))
    return rounds


def summarise(args: argparse.Namespace, rounds: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """Return {task: {candidate: medians}} and print them as a table."""
    print(
        f"{args.threads} threads, {args.loops} busy loops, {args.rounds} rounds of "
        f"{args.seconds:g} s\n\n"
        "| task | candidate | idle, tokens/s | busy, tokens/s | busy / idle (range of rounds) "
        "| idle / idle of lamoe |\n|---|---|---|---|---|---|"
    )
    result: dict[str, dict[str, dict[str, float]]] = {task: {} for task in args.task}
    for task, name in [(t, n) for t, n, is_busy in rounds if not is_busy]:
        idle, busy = rounds[task, name, False], rounds[task, name, True]
        kept = sorted(b / i for b, i in zip(busy, idle))
        against = statistics.median(i / own for i, own in zip(idle, rounds[task, "lamoe", False]))
        result[task][name] = found = {
            "idle": statistics.median(idle),
            "busy": statistics.median(busy),
            "kept": statistics.median(kept),
            "idle_over_lamoe": against,
        }
        print(
            f"| {task} | {name} | {found['idle']:,.0f} | {found['busy']:,.0f} "
            f"| {found['kept']:.0%} ({kept[0]:.0%} to {kept[-1]:.0%}) | {against:.3f} |"
        )
    return result


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of one measurement")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--loops", type=int, default=cores, help="endless loops that run beside")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--spins", nargs="*", type=int, default=[300_000])
    parser.add_argument("--before", type=Path, help="another checkout of lamoe, with its kernels")
    parser.add_argument("--worker", choices=TASKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.threads)
    print(json.dumps(summarise(args, measure(args))))


if __name__ == "__main__":
    main()
