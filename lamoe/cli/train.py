"""`lamoe train`."""

from __future__ import annotations

import argparse
import sys

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
