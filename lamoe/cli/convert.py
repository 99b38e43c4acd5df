"""`lamoe quantize` and `lamoe convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamoe.os_errors import check_output


def quantize(args: argparse.Namespace) -> int:
    """Pack a model into a folder and print the size of each class of weights."""
    import torch

    from lamoe.backends.base import Formats
    from lamoe.backends.cpu import packed, packed_file
    from lamoe.checkpoints import read_config, resolve

    if args.threads:
        torch.set_num_threads(args.threads)
    source, target = resolve(args.source), check_output("TARGET", args.target)
    config = read_config(source)
    formats = Formats(args.weights, args.head)
    element = packed.element_format(formats)
    planned = packed.packed_tensors(config, formats)
    total = sum(packed.packed_bytes(tensor, element) for tensor in planned)
    packing, done = f"packing as {args.weights}", []
    with _progress_bar() as bar:
        task = bar.add_task(packing, total=total)

        def show_layer(layer: int) -> None:
            bar.update(task, description=f"calibrating, layer {layer}")

        options = _calibration(args, source, config, show_layer) if args.calibrate else {}
        for tensor, size in packed_file.write(source, target, formats, **options):
            bar.update(task, advance=size, description=packing)
            done.append(tensor)
    print(_class_table(packed.weight_classes(config, formats, done)))
    print(_summary(str(target), sum(packed.packed_bytes(tensor, element) for tensor in done)))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write a model, or a GGUF file, as a Hugging Face folder."""
    from lamoe.checkpoints import foreign, gguf, load, resolve, save, side_files

    args.target = str(check_output("TARGET", args.target))
    if args.tokenizer and not Path(args.tokenizer).expanduser().is_dir():
        raise ValueError(
            f"--tokenizer is {args.tokenizer!r}, which is not a folder; name a folder that holds "
            "a tokenizer.json"
        )
    if args.tokenizer:
        given = Path(args.tokenizer).expanduser()
        if not any(side_files.is_carried(p) for p in given.iterdir()):
            raise ValueError(f"--tokenizer is {args.tokenizer!r}, which holds no tokenizer.json")
    if foreign.is_gguf(Path(args.source).expanduser()):
        gguf.to_folder(
            args.source,
            args.target,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
        )
    else:
        folder = resolve(args.source)
        if args.tokenizer:  # the files of the two folders are not mixed
            side_files.log_left(folder, [p for p in folder.iterdir() if side_files.is_carried(p)])
        save(
            load(folder, args.dtype),
            args.target,
            max_shard_bytes=args.max_shard_size,
            extras_from=args.tokenizer or folder,
            overwrite=args.overwrite,
        )
    print(f"wrote {args.target}")
    return 0


def _progress_bar():
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _calibration(
    args: argparse.Namespace, source, config, show_layer: Callable[[int], None]
) -> dict[str, Any]:
    """Return the keyword arguments of packed_file.write that --calibrate adds."""
    from lamoe.backends.cpu import calibrate
    from lamoe.text.tokenizer import Tokenizer
    from lamoe.train.sources import read_documents

    if "int4" not in (args.weights, args.head):
        raise ValueError(
            f"--calibrate concerns int4; {args.weights} rounds every weight to the nearest value "
            "and needs no calibration text, so omit --calibrate"
        )
    texts = [document.text for document in read_documents([args.calibrate])]
    rows = calibrate.rows_of(Tokenizer.load(source), texts, config, args.calibrate_tokens)
    return calibrate.options(source, config, rows, show_layer)


def _class_table(classes) -> str:
    lines = [f"{'class':<20} {'weights':>16} {'bytes':>16} {'bits per weight':>16}  format"]
    for name, c in classes.items():
        bits = f"{8 * c.num_bytes / c.num_weights:.2f}" if c.num_weights else "-"
        formats = ", ".join(c.formats)
        lines.append(f"{name:<20} {c.num_weights:>16,} {c.num_bytes:>16,} {bits:>16}  {formats}")
    return "\n".join(lines)


def _summary(target: str, total: int) -> str:
    from lamoe.backends.cpu import packed_file
    from lamoe.model.accounting import human_bytes

    bits = packed_file.bits_per_weight(target)
    return f"{target} is complete: {human_bytes(total)}, {bits:.2f} bits per weight in total"
