"""Resolves model names on the command line to folders, configs and presets."""

from __future__ import annotations

from pathlib import Path

from lamoe.model.config import PRESETS, ModelConfig, did_you_mean


def newest_run(folder: str = "runs") -> str:
    """Return the run under `folder` that has the newest checkpoint."""
    from lamoe.train import checkpoint

    runs = {}
    for recipe in Path(folder).glob("*/recipe.json"):
        configs = [f / "model/config.json" for f in checkpoint.folders(recipe.parent)]
        times = [c.stat().st_mtime for c in configs if c.is_file()]
        runs[recipe.parent] = max(times, default=0.0)
    newest = max(runs, key=lambda run: runs[run], default=None)
    if newest is None or not runs[newest]:
        raise ValueError(
            f"there is no trained model under {folder}/; name a run folder, a model folder or a "
            "hub id, or train a model with `make demo`"
        )
    return str(newest)


def is_config(name: str) -> bool:
    """Return whether `name` is a preset or a config.json, which are models without weights."""
    return name in PRESETS or name.endswith(".json")


def read_config(name: str) -> tuple[ModelConfig, str, float]:
    """Return (config, name to show, bits per stored weight) of a preset, file, folder or hub id."""
    if name in PRESETS:
        return ModelConfig.preset(name), name, 16.0
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            from lamoe.checkpoints import foreign

            raise ValueError(foreign.file_problem(path))
        return ModelConfig.from_file(path), str(path), 16.0
    if not path.is_dir() and name.count("/") != 1:
        raise ValueError(
            f"{name!r} is neither a preset{did_you_mean(name, PRESETS)} nor a folder, a "
            f"config.json or a hub id; presets: {', '.join(PRESETS)}"
        )
    from lamoe import checkpoints
    from lamoe.backends.cpu import packed_file

    folder = checkpoints.resolve(name)
    shown = str(folder) if path.is_dir() else name
    if packed_file.is_packed(folder):
        return packed_file.any_config(folder), shown, packed_file.bits_per_weight(folder)
    return checkpoints.read_config(folder), shown, 16.0
