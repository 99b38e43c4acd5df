"""A training run that is small enough for tests: text, recipe and one finished run.

Many tests read the finished run. Copy it before writing to it.
"""

import copy
import functools
import json
import random
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

from lamoe.train import checkpoint, curves, loop
from lamoe.train.recipe import Recipe

MLA = dict(
    model_type="deepseek_v2", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
)
MOE = dict(
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
BODY = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.05,
    torch_dtype="float32",
)
TIMINGS = ("tokens_per_s", "mfu")  # values in metrics.jsonl that are not reproducible


def write_texts(folder: Path, files: int = 40, seed: int = 0) -> Path:
    """Write documents about as long as a row, with few words, so that a tiny model can learn."""
    rng, folder = random.Random(seed), Path(folder)
    folder.mkdir(parents=True)
    for i in range(files):
        body = "".join(
            f"the {rng.choice(('cat', 'dog', 'bird'))} {rng.choice(('sat', 'ran', 'sang'))} on "
            f"the {rng.choice(('mat', 'hill'))} "
            f"of {''.join(rng.choices('abcdefgh', k=3))}.\n"
            for _ in range(1 + i % 7)
        )
        (folder / f"{i:02d}.txt").write_text(f"file {i}\n{body}")
    return folder


def raw_recipe(texts: Path, out: Path, **changes) -> dict:
    """Return the argument of Recipe.from_dict.

    Args:
        changes: sections as dicts, merged into the recipe. A `model` with a model_type replaces the
            whole section.
    """
    raw = {
        "model": {**BODY, **MLA, **MOE},
        "data": {"sources": [str(texts)], "seq_len": 32, "holdout": 0.1},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "batch": {"size": 4, "micro": 2},
        "balance": {"devices": 4, "capacity_factor": 1.0, "keep_share": 0.1},
        "run": {"out": str(out), "steps": 6, "dtype": "float32", "log_every": 1},
    }
    raw = copy.deepcopy(raw)
    for section, values in changes.items():
        if section == "model" and "model_type" in values:
            raw["model"] = dict(BODY)
        raw[section].update(values)
    return raw


def train(raw: dict, resume: bool = False, quiet: bool = True, draw: bool = False) -> Path:
    """Call loop.train without measuring the machine's peak, which takes a second.

    Args:
        draw: whether to plot the curves, which takes another second.
    """
    with (
        mock.patch.object(loop, "measure_peak", return_value=1e10),
        nullcontext() if draw else mock.patch.object(curves, "draw"),
    ):
        return loop.train(Recipe.from_dict(raw), resume=resume, quiet=quiet)


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without values that depend on time."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in TIMINGS} for m in lines]


def state(folder: Path) -> dict:
    """Return a checkpoint's state without random generators, and the bytes of its weights."""
    out = checkpoint.load_tensors(Path(folder) / "state.safetensors")
    del out["rng"]
    return {
        **out,
        "weights": b"".join(
            p.read_bytes() for p in sorted((Path(folder) / "model").glob("*.safetensors"))
        ),
    }


def same(a, b) -> bool:
    """Return whether two nested states are bitwise equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def write_toml(path: Path, raw: dict) -> Path:
    """Write a recipe as TOML. Strings, numbers, lists and booleans have the same form in JSON."""
    path.write_text(
        "".join(
            f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
            for s, keys in raw.items()
        )
    )
    return path


@functools.cache
def _trained(base: Path) -> Path:
    raw = raw_recipe(
        write_texts(base / "texts"),
        base / "run",
        run=dict(steps=40, eval_every=20, eval_tokens=200, save_every=20),
    )
    train(raw, draw=True)
    return base / "run"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a finished run, the same one for all test files.

    pytest sees this fixture once per file that imports it.
    """
    return _trained(tmp_path_factory.getbasetemp() / "trained")
