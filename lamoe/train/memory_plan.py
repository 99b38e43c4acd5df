"""The memory plan of a training run: what it needs, what the machine has, and what would fit.

It is computed from the recipe alone, before anything is allocated or written. activations.py has
the formulas of the single ops.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lamoe import kernels
from lamoe.backends.memory import available_memory
from lamoe.model.accounting import (
    human_bytes,
    human_count,
    human_flops,
    parameters,
    training_flops,
)
from lamoe.model.config import ModelConfig
from lamoe.train import activations, checkpoint
from lamoe.train.activations import F32, MicroBatch, Stage
from lamoe.train.recipe import Recipe

# Predictions are right within this share (tested). So recomputation starts before less than this is
# free, and settings that leave it free are recommended first.
ERROR = 0.15
# A process takes more than its tensors: libraries generate code and keep buffers, and the allocator
# keeps part of the memory that is freed. It returns blocks of 32 MiB and more at once, so what it
# keeps has a limit. Fitted to benchmarks/train_memory.py.
_LIBRARIES = 240_000_000
_KEPT, _KEPT_AT_MOST = 0.6, 2_000_000_000  # share of gradients, activations and temporary tensors
_SHORTEST = 64  # tokens; shorter rows are not recommended
Changes = dict[str, Any]  # {"section.key": value} of a recipe


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run at the moment when it needs most.

    weights: in the dtype of the run.
    masters: float32 master weights. 0 in a float32 run, whose weights are their own masters.
    moments: the two moments of AdamW, in float32.
    gradients: those of this micro-batch, and the sums over earlier ones.
    activations: tensors that wait for the backward pass.
    temporary: tensors inside an op; in the loss also the logits that exist at once.
    buffers: those of the compiled kernels, outside torch.
    process: libraries, and freed memory that the allocator keeps. An estimate.
    when: the moment.
    loss_chunk: bytes of the logits that exist at once. They do not grow with the batch.
    recomputed: number of blocks that recompute their activations in the backward pass.
    blocks: number of all blocks.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    temporary: int
    buffers: int
    process: int
    when: str
    loss_chunk: int
    recomputed: int
    blocks: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by class. They add up to `total`."""
        names = ("weights", "masters", "moments", "gradients", "activations", "temporary")
        return {name: getattr(self, name) for name in (*names, "buffers", "process")}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.total - self.buffers - self.process

    def fits(self, available: int | None, free: float = 0.0) -> bool:
        """Return whether `available` bytes are enough, with `free` times the plan left over.

        True if `available` is None, which means unknown.
        """
        return available is None or self.total * (1 + free) <= available

    def describe(self, available: int | None) -> str:
        """Describe the plan in one line, with the memory that is available."""
        has = "" if available is None else f", {human_bytes(available)} available"
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.parts.items())
        again = ""
        if self.recomputed:
            again = f"; {self.recomputed} of {self.blocks} blocks recompute their activations"
        return f"{human_bytes(self.total)}{has}: {parts}; in the {self.when}{again}"


# ---- what a run needs ----------------------------------------------------------------------------
class Moment(NamedTuple):
    """Bytes at one moment of a step, beside weights and optimizer state."""

    name: str
    gradients: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.temporary


def compute(recipe: Recipe, recomputed: int = 0) -> MemoryPlan:
    """Compute the plan of a run whose first `recomputed` blocks recompute their activations."""
    config, element = recipe.model, 2 if recipe.run.dtype == "bfloat16" else F32
    drops = recipe.balance.capacity_factor > 0
    native = _runs_native(recipe)
    batch = MicroBatch(recipe.batch.micro, recipe.data.seq_len, element, drops, native)
    p, micro_batches = parameters(config), recipe.batch.size // recipe.batch.micro
    merged = native and element != F32  # the compiled update reads bfloat16 gradients
    # Bytes of a summed gradient before the last micro-batch
    summed = 0 if micro_batches == 1 else 2 if merged and micro_batches == 2 else F32
    found = list(_pass(config, batch, recomputed, summed * p.total))
    if element != F32 and not (merged and micro_batches == 1):
        # The gradients of a micro-batch become float32 sums, one tensor after the other.
        gate_and_up = 2 * p.routed_expert // 3 * (config.n_routed_experts or 0)
        largest = max(p.head_active, gate_and_up)
        copies = largest * element if micro_batches == 1 else element * p.total + largest * F32
        found.append(Moment("sum of the gradients", F32 * p.total + copies, 0, 0))
    if recipe.spikes.restarts:  # masters and moments of the checkpoint, beside those of the run
        found.append(Moment("restart from a checkpoint", 0, 0, 3 * F32 * p.total))
    most = max(found, key=lambda moment: moment.total)
    return MemoryPlan(
        weights=p.total * element,
        masters=p.total * F32 * (element != F32),
        moments=2 * p.total * F32,
        gradients=int(most.gradients),
        activations=int(most.activations),
        temporary=int(most.temporary),
        buffers=int(activations.buffers(config, batch)),
        process=_LIBRARIES + int(min(_KEPT * most.total, _KEPT_AT_MOST)),
        when=most.name,
        loss_chunk=int(activations.loss_chunk(config, batch)),
        recomputed=recomputed,
        blocks=config.num_hidden_layers,
    )


def _runs_native(recipe: Recipe) -> bool:
    """Return whether the compiled training ops would run here."""
    accelerated = torch.accelerator.is_available() and recipe.run.device == "auto"
    on_host = recipe.run.device == "cpu" or (recipe.run.device == "auto" and not accelerated)
    return on_host and kernels.trains_native()


def _pass(
    config: ModelConfig, batch: MicroBatch, recomputed: int, summed: float
) -> Iterator[Moment]:
    """Yield the moments of the forward and backward pass of one micro-batch.

    Args:
        summed: bytes of the summed gradients of earlier micro-batches.
    """
    attention = activations.attention(config, batch)
    dense = activations.dense_feed_forward(config, batch)
    moe = activations.moe_feed_forward(config, batch) if config.is_moe else dense
    ends = (activations.final_norm(config, batch), activations.loss(config, batch))
    parts: list[tuple[str, tuple[Stage, ...], bool]] = [
        ("the embedding", (activations.embedding(config, batch),), False)
    ]
    for i in range(config.num_hidden_layers):
        halves = (attention, moe if config.is_moe_layer(i) else dense)
        parts.append((f"block {i + 1}", halves, i < recomputed))
    parts.append(("the loss", ends, False))
    live, gradients, kept = 0.0, summed, []
    for name, stages, again in parts:
        inside = 0.0
        for stage in stages:
            inside += stage.saved_bytes
            yield Moment(f"forward pass of {name}", gradients, live + inside, stage.forward)
        if again:
            inside = stages[0].saved["block input"] + sum(stage.pinned for stage in stages)
        kept.append(inside)
        live += inside
    for name, stages, again in reversed(parts):
        live -= kept.pop()
        inside = sum(stage.saved_bytes + again * stage.pinned for stage in stages)
        for stage in reversed(stages):
            gradients += stage.gradients
            yield Moment(f"backward pass of {name}", gradients, live + inside, stage.backward)
            inside -= stage.saved_bytes


# ---- what fits -----------------------------------------------------------------------------------
def available(recipe: Recipe, device: torch.device | str = "cpu") -> int | None:
    """Return the bytes that a run may take: run.memory_gb, or else what the device has free.

    None means unknown.
    """
    limit = recipe.run.memory_gb
    return int(limit * 1e9) if limit else available_memory(device)


def check(recipe: Recipe, memory: int | None) -> MemoryPlan:
    """Return the plan of a run in `memory` available bytes. None means unknown.

    Raises:
        ValueError: if the run does not fit. The message says what would fit.
    """
    plan = choose(recipe, memory)
    if memory is not None and not plan.fits(memory):
        raise ValueError(
            f"the run does not fit in memory: it needs {plan.describe(memory)}. "
            f"{_advice(settings_that_fit(recipe, memory))}. If the machine has more, say so with "
            "--run.memory_gb"
        )
    return plan


def choose(recipe: Recipe, memory: int | None) -> MemoryPlan:
    """Return the plan of a run. With run.recompute = "auto", recompute as few blocks as needed."""
    plan, wish = compute(recipe), recipe.run.recompute
    if wish is True:
        return compute(recipe, plan.blocks)
    if wish is False or plan.fits(memory, ERROR):
        return plan
    counts = range(1, plan.blocks + 1)
    enough = bisect_left(counts, True, key=lambda n: compute(recipe, n).fits(memory, ERROR))
    # Recomputing the last block, too, helps the loss only: its own backward pass comes first.
    candidates = counts[enough : enough + 1] or counts[-2:]
    return min((compute(recipe, n) for n in candidates), key=lambda plan: plan.total)


def _advice(settings: list[Changes]) -> str:
    """Say which settings would fit, in the form of options. Their "total" is what they need."""
    if not settings:
        return "No size of batch.micro or data.seq_len fits: take a smaller model, or free memory"
    words = [f"{options(changes)} (needs {human_bytes(changes['total'])})" for changes in settings]
    return f"These settings fit: {', or '.join(words)}"


def settings_that_fit(recipe: Recipe, memory: int) -> list[Changes]:
    """Return changes of the recipe that fit.

    Recomputation and a smaller micro-batch are tried alone, then together, then with shorter rows.
    Of each kind, the largest micro-batch or the longest rows are returned, with the bytes that the
    run then needs under "total".
    """
    auto: Changes = {} if recipe.run.recompute else {"run.recompute": "auto"}
    sizes = [m for m in range(recipe.batch.micro - 1, 0, -1) if recipe.batch.size % m == 0]
    micros: list[Changes] = [{"batch.micro": size} for size in sizes]
    length, smallest = recipe.data.seq_len, micros[-1] if micros else {}
    lengths = [length >> n for n in range(1, length.bit_length()) if length >> n >= _SHORTEST]
    alone = [[auto] if auto else [], micros]
    together = [[{**micro, **auto} for micro in micros]]
    shorter = [[{"data.seq_len": n, **smallest, **auto} for n in lengths]]
    for free, kinds in product((ERROR, 0.0), (alone, together, shorter)):
        fit = partial(_fits_with, recipe, memory, free)
        first = [next(filter(fit, kind), None) for kind in kinds]
        if found := [changes for changes in first if changes is not None]:
            return [
                {**changes, "total": choose(changed(recipe, changes), memory).total}
                for changes in found
            ]
    return []


def _fits_with(recipe: Recipe, memory: int, free: float, changes: Changes) -> bool:
    return choose(changed(recipe, changes), memory).fits(memory, free)


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """Return a recipe with other values of some keys."""
    for name, value in changes.items():
        section, key = name.split(".")
        new = dataclasses.replace(getattr(recipe, section), **{key: value})
        recipe = dataclasses.replace(recipe, **{section: new})
    return recipe


def options(changes: Changes) -> str:
    """Write changes as options of `lamoe train`."""
    named = ((name, value) for name, value in changes.items() if "." in name)
    return " ".join(f"--{name} {str(value).lower()}" for name, value in named)


# ---- lamoe info --train --------------------------------------------------------------------------
def report(recipe: Recipe, memory: int | None) -> dict[str, Any]:
    """Return the size and the memory plan of a run, as a dict that json.dumps accepts.

    Args:
        memory: bytes that are available. None means unknown.
    """
    config, plan = recipe.model, choose(recipe, memory)
    p, batch, row = parameters(config), recipe.batch, recipe.data.seq_len
    fits = plan.fits(memory)
    found = settings_that_fit(recipe, memory) if memory is not None and not fits else []
    return {
        "parameters": p.total,
        "activated_parameters": p.activated,
        "flops_per_token": training_flops(config, row),
        "dtype": recipe.run.dtype,
        "tokens_per_step": batch.size * row,
        "micro_batches_per_step": batch.size // batch.micro,
        "steps": recipe.run.steps,
        "tokens": batch.before(recipe.run.steps) * row,
        "memory": {**dataclasses.asdict(plan), "total": plan.total}
        | {"available": memory, "fits": fits},
        "settings_that_fit": found,
    }


_LABELS = {
    "weights": "weights, {dtype}",
    "masters": "master weights, float32",
    "moments": "moments of AdamW, float32",
    "gradients": "gradients",
    "activations": "activations; {recomputed} of {blocks} blocks recompute theirs",
    "temporary": "temporary tensors",
    "buffers": "buffers of the compiled kernels",
    "process": "libraries, and memory that the allocator keeps",
    "total": "all",
    "available": "available",
}


def render(report: dict[str, Any]) -> str:
    """Format the result of `report` for a terminal."""
    memory, count = report["memory"], report["micro_batches_per_step"]
    micro_batches = f"{count} micro-batch{'es' * (count > 1)}"
    lines = [
        f"{human_count(report['parameters'])} parameters, "
        f"{human_count(report['activated_parameters'])} activated per token, "
        f"{human_flops(report['flops_per_token'])} per token of training",
        f"{report['tokens_per_step']:,} tokens per step in {micro_batches}, "
        f"{report['steps']:,} steps, {human_count(report['tokens'])} tokens",
        "",
        f"Memory in the {memory['when']}, when the run needs most",
    ]
    for name, label in _LABELS.items():
        size = "unknown" if memory[name] is None else human_bytes(memory[name])
        lines.append(f"  {label.format(dtype=report['dtype'], **memory):<56}{size:>10}")
    chunk = human_bytes(memory["loss_chunk"])
    lines += [f"The loss holds at most {chunk} of logits at once, whatever the batch.", ""]
    if memory["fits"]:
        lines.append("The run fits." if memory["available"] else "")
    else:
        lines.append(f"The run does not fit. {_advice(report['settings_that_fit'])}.")
    return "\n".join(lines).rstrip()


# ---- memory that runs out nevertheless -----------------------------------------------------------
class OutOfMemory(RuntimeError):
    """Raised if an allocation failed during a run. The message says how to go on."""


# In the errors of torch's allocators and of the C++ library
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


@contextmanager
def explain_exhaustion(recipe: Recipe, plan: MemoryPlan, run: Path) -> Iterator[None]:
    """Turn a failed allocation in the block into OutOfMemory. The run's files stay as they are.

    Args:
        run: the run folder.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not any(word in str(e).lower() for word in _WORDS):
            raise
        error = " ".join(str(e).split())[:200] or type(e).__name__
        needs = plan.describe(available(recipe))
        raise OutOfMemory(
            f"memory ran out ({error}). Planned were {needs}. {_way_on(recipe, plan, run)}"
        ) from e


def _way_on(recipe: Recipe, plan: MemoryPlan, run: Path) -> str:
    """Say how to start again or resume with less memory."""
    changes = _lighter(recipe, plan)
    fix = options(changes) or "a smaller model"
    last = checkpoint.latest(run)
    if last is None:
        return f"No checkpoint was saved yet: start again with {fix}"
    if changes and "data.seq_len" not in changes:
        return f"{last} is complete: resume from it with --resume {fix}"
    if changes:
        return f"{last} is complete: start from it with --run.init_from {run} --run.out NEW {fix}"
    return f"{last} is complete: free memory, and resume from it with --resume"


def _lighter(recipe: Recipe, plan: MemoryPlan) -> Changes:
    """Return the mildest change that needs less memory than `plan`, or an empty dict."""
    if plan.recomputed < plan.blocks:
        return {"run.recompute": True}
    for micro in range(recipe.batch.micro - 1, 0, -1):
        if recipe.batch.size % micro == 0:
            return {"batch.micro": micro}
    shorter = recipe.data.seq_len // 2
    return {"data.seq_len": shorter} if shorter >= _SHORTEST else {}
