"""Compare the memory plan of training runs with the memory that their processes really take.

    python benchmarks/train_memory.py [RECIPE --section.key VALUE ...]

Every row is a fresh process that trains three steps on random tokens. "taken" is its peak resident
memory (VmHWM) beyond that of a process that has imported torch and built nothing. Without a recipe,
preset "small" runs at several sizes. The last line is JSON. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = {"model": {"preset": "small"}, "balance": {"devices": 4, "capacity_factor": 1.0}}
RUNS = [  # overrides of SMALL
    [f"--batch.size={size}", f"--batch.micro={micro}", f"--data.seq_len={t}", *options]
    for size, micro, t in ((8, 8, 512), (8, 2, 512), (2, 2, 2048))
    for options in (["--run.recompute=false"], ["--run.recompute=true"])
] + [["--batch.size=4", "--batch.micro=4", "--run.dtype=float32", "--run.recompute=false"]]


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def work(path: str, overrides: list[str]) -> None:
    """Train three steps, and print predicted and taken bytes as JSON."""
    import torch

    from lamoe import kernels
    from lamoe.train import loop, memory_plan, recompute
    from lamoe.train.recipe import Recipe

    recipe = Recipe.load(path, overrides)
    plan = memory_plan.choose(recipe, None)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # starts the threads
    before = resident("VmRSS")
    model = loop._build_model(recipe, recipe.model, fresh=True, note=print)
    recompute.apply(model, plan.recomputed)
    optimizer = loop._build_optimizer(recipe, model)
    shape = recipe.batch.size, recipe.data.seq_len + 1
    segments = (torch.arange(shape[1]) // 300).expand(shape)
    for step in range(3):
        ids = torch.randint(0, recipe.model.vocab_size, shape)
        loop._accumulate_gradients(model, optimizer, recipe, step, ids, segments)
        optimizer.clip()
        optimizer.step(1e-4)
    kept = kernels.native.lib.train_kept_bytes() if plan.buffers else 0
    print(
        json.dumps(
            {"kept": kept, "planned": plan.total, "taken": resident("VmHWM") - before, **plan.parts}
        )
    )


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--work"]:
        return work(words[1], words[2:])
    recipe, runs = words[:1], [words[1:]]
    if not words:
        folder = tempfile.TemporaryDirectory()
        recipe, runs = [f"{folder.name}/small.json"], RUNS
        Path(recipe[0]).write_text(json.dumps(SMALL))
    results = {}
    print("| run | planned | taken | planned / taken |\n|---|---|---|---|")
    for run in runs:
        command = [sys.executable, __file__, "--work", *recipe, *run]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        name = " ".join(word.removeprefix("--") for word in run)
        results[name] = found
        planned, taken = found["planned"], found["taken"]
        print(
            f"| {name} | {planned / 1e6:.0f} MB | {taken / 1e6:.0f} MB | {planned / taken:.2f} |",
            flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
