"""`lamoe evaluate`, `lamoe curves`, `lamoe info`, `lamoe bench` and `lamoe doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lamoe.cli import models, train
from lamoe.os_errors import check_output


def evaluate(args: argparse.Namespace) -> int:
    """Measure the quality of a model, print the report and write it to a folder."""
    from lamoe.measure import report, tables

    if args.seq_len is not None and not args.data:
        raise ValueError(
            "--seq-len needs --data; a run is measured at the length it was trained with"
        )
    if args.needle and args.seq_len is not None:
        raise ValueError(
            "--seq-len has no effect on the needle test, which takes its lengths from --needle; "
            "omit --seq-len"
        )
    run = Path(args.model).expanduser()
    if args.out is not None:
        args.out = check_output("--out", args.out)  # before the minutes of measuring
    result = _evaluate(args, run)
    name, kind = f"lamoe: {run.name or args.model}", "needle" if args.needle else "report"
    text = tables.needle(result, name) if args.needle else tables.report(result, name)
    print(text)
    unchanged = not args.data and not args.weights and not args.head
    if args.out or (unchanged and (run / "recipe.json").exists()):
        print(report.write(kind, result, name, text, args.out or run))
    return 0


def _evaluate(args: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Run the needle test, or evaluate on --data, or evaluate on the held-out text of a run."""
    from lamoe.measure import report

    model, tok, speed_model = _load(args)
    if args.needle:
        return report.evaluate_needle(
            model,
            tok,
            args.needle,
            args.data or ["austen"],
            args.needle_depths,
            args.needle_draws,
            note=_note,
        )
    if args.data:
        return report.evaluate_texts(
            model, tok, args.data, args.seq_len or report.trained_at(run), speed_model, _note
        )
    return report.evaluate_run(model, tok, run, speed_model, _note)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(args: argparse.Namespace):
    """Load a model to evaluate.

    Quality is measured with the torch backend, unless the model is packed or --weights or --head is
    given. Speed is measured with the backend that `lamoe generate` uses.

    Returns:
        (backend for quality, tokenizer, model for the speed test).
    """
    import torch

    from lamoe import backends
    from lamoe.backends.base import Formats
    from lamoe.backends.cpu import packed_file
    from lamoe.backends.load import resolve_device
    from lamoe.checkpoints import load, resolve
    from lamoe.text.tokenizer import Tokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    folder, run = resolve(args.model), Path(args.model).expanduser()
    is_run = (run / "recipe.json").exists() and (run / "data").is_dir()
    if not (args.needle or args.data or is_run):
        raise ValueError(
            f"{args.model} is not a run folder, so it has no held-out text; name a text with --data"
        )
    tokenizer = Tokenizer.load(folder)
    if args.weights is None and args.head is None and not packed_file.is_packed(folder):
        device = resolve_device(args.device)  # before the weights are read
        model = load(folder)  # read once: the speed test packs the same tensors
        backend = backends.load(model, backend="torch", device=device)
        return backend, tokenizer, model if backend.device.type == "cpu" else backend
    formats = Formats(args.weights, args.head)
    backend = backends.load(folder, formats, device=args.device, threads=args.threads)
    return backend, tokenizer, backend


def curves(args: argparse.Namespace) -> int:
    """Plot the training curves of a run."""
    from lamoe.train import curves

    run = Path(args.run_folder).expanduser()
    file = None if args.out is None else check_output("--out", args.out)
    try:
        print(f"wrote {curves.draw(run, file)}")
    except ImportError:
        raise ValueError(
            "plots need matplotlib, which is not installed (pip install 'lamoe[train]'); "
            f"the numbers are in {run / 'metrics.jsonl'}"
        ) from None
    return 0


def info(args: argparse.Namespace) -> int:
    """Show sizes and FLOPs from a model's config. Presets and config files need no torch."""
    if args.train:
        return train.show_plan(args)
    if args.model is None or args.overrides:
        missing = "name a model" if args.model is None else f"{args.overrides[0]} needs a recipe"
        raise ValueError(f"{missing}; the memory plan of a recipe: lamoe info --train RECIPE")
    from lamoe.model import accounting

    config, name, bits = models.read_config(args.model)
    options = dict(
        name=name,
        context=args.context,
        weight_bits=bits if args.weight_bits is None else args.weight_bits,
        cache_bits=args.cache_bits,
        memory_bytes=args.memory,
    )
    if args.json:
        print(json.dumps(accounting.report(config, **options), indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.width = max(100, console.width)  # narrower tables would lose columns
        console.print(accounting.render(config, **options))
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure speed. The last line of the output is JSON."""
    from lamoe.backends.base import Formats
    from lamoe.measure import bench, tables

    formats = Formats(args.weights, args.head)
    if models.is_config(args.model):
        make = bench.random_weights(models.read_config(args.model)[0], formats)
    else:
        make = bench.stored_weights(args.model, formats)
    result = bench.run(
        args.model,
        make,
        bench.Workload(args.prefill, args.depth, args.batch),
        cache=args.cache,
        threads=args.threads,
        rounds=args.rounds,
        peer_model=(args.peer_model or "") if args.peer else None,
    )
    print(tables.bench(result))
    print(json.dumps(tables.bench_json(result)))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Check the machine, or with an argument every byte of a model.

    The exit code is 1 if something is wrong.
    """
    from lamoe.measure import doctor, model_check

    if args.model is None:
        found = doctor.examine()
        text = doctor.render(found)
    else:
        found = model_check.examine(args.model)
        text = model_check.render(found)
    print(json.dumps(found, indent=1) if args.json else text)
    return doctor.exit_code(found)
