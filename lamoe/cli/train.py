"""`lamoe train` and `lamoe info --train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from typing import Any

STOPPED_BY_GUARD, STOPPED_BY_SIGNAL = 3, 130


def train(args: argparse.Namespace) -> int:
    """Train from a recipe. The exit code is 0 only if the last step was reached."""
    from lamoe.train import checkpoint, loop
    from lamoe.train.recipe import Recipe

    threads = ["--run.threads", str(args.threads)] if args.threads else []
    recipe = Recipe.load(args.recipe, args.overrides + threads)
    try:
        last = loop.train(recipe, resume=args.resume, quiet=args.quiet)
    except loop.Stopped as e:
        print(f"lamoe train: {e}", file=sys.stderr)
        return STOPPED_BY_GUARD
    finished = checkpoint.step_of(last) == recipe.run.steps
    return 0 if finished else STOPPED_BY_SIGNAL


def show_plan(args: argparse.Namespace) -> int:
    """Show the memory plan of a recipe. The exit code is 1 if it does not fit."""
    from lamoe.train import devices, memory_plan
    from lamoe.train.recipe import Recipe

    if args.model is not None or args.context is not None or args.weight_bits is not None:
        raise ValueError(
            "--train shows the plan of a recipe, which names its model itself; leave the model, "
            "--context and --weight-bits out"
        )
    recipe = Recipe.load(args.train, args.overrides)
    memory = args.memory
    if memory is None:
        memory = memory_plan.available(recipe, devices.resolve(recipe.run.device))
    report = memory_plan.report(recipe, memory)
    print(json.dumps(report, indent=1) if args.json else memory_plan.render(report))
    return 0 if report["memory"]["fits"] else 1


def recipe_help() -> str:
    """Return the part of the help that lists all keys of a recipe with their defaults."""
    lines = ["", "keys of a recipe with their defaults (--section.key VALUE):"]
    for section, keys in _recipe_keys().items():
        words = [f"{key}={_shown(default)}" for key, default in keys.items()]
        text = f"  [{section}] {' '.join(word.replace(' ', chr(160)) for word in words)}"
        lines += textwrap.wrap(text, 100, subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines).replace(chr(160), " ") + "\n"


def recipe_option(option: str) -> str:
    """Return a hint which key of the recipe an unknown option may mean, or an empty text."""
    name = option[2:].replace("-", "_")
    found = [section for section, keys in _recipe_keys().items() if name in keys]
    return f", did you mean --{found[0]}.{name}?" if found else ""


def _recipe_keys() -> dict[str, dict[str, Any]]:
    """Return {section: {key: default}} of a recipe."""
    from lamoe.model.config import ModelConfig
    from lamoe.train.recipe import SECTIONS

    model = {"preset": "", **_defaults(ModelConfig)}
    return {"model": model} | {name: _defaults(kind) for name, kind in SECTIONS.items()}


def _defaults(kind) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(kind)}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
