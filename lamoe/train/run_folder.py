"""The folder of a training run: its lock, its recipe, its tokenizer and its packed text.

recipe.json        the recipe, checked when the run is resumed
tokenizer/         tokenizer.json and tokenizer_config.json
data/              packed text (data.py)
metrics.jsonl      one JSON object per logged step (metrics.py)
curves.png         a plot of them (curves.py), if matplotlib is installed
tensorboard/       the same for TensorBoard, if it is installed
step-00000480/     a checkpoint (checkpoint.py): model/ is a Hugging Face folder,
                   state.safetensors holds everything else
latest             the name of the last checkpoint
bad-batch-...      the last batch of skipped steps that stopped or restarted the run
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lamoe import atomic
from lamoe.checkpoints import hf, lock
from lamoe.checkpoints.runs import RECIPE, model_folder
from lamoe.model.accounting import human_bytes, parameters
from lamoe.model.config import CARRIED
from lamoe.os_errors import check_output, current_folder
from lamoe.text import tokenizer as tokenizers
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint, curves, data
from lamoe.train.fast_encode import fast_encode_batch
from lamoe.train.holdout import plan_split
from lamoe.train.packing import PIECE
from lamoe.train.recipe import SECTIONS, Recipe
from lamoe.train.sources import BUILT_IN, stamp

Note = Callable[[str], None]  # shows one line to the user

METRICS = "metrics.jsonl"
# A new tokenizer is trained on a sample of about this many bytes of the training text.
TOKENIZER_BYTES = 24 << 20
REPORT_EVERY_S = 20.0  # between two lines about packing

# Keys that may change on resume.
_FREE = (
    "run.out",
    "run.threads",
    "run.device",
    "run.compile",
    "run.log_every",
    "run.eval_every",
    "run.eval_tokens",
    "run.save_every",
    "run.keep",
    "run.recompute",
    "run.memory_gb",
)
# Keys that may change on resume, with a note to the user. Changing them may rescue a run whose loss
# has diverged, or that ran out of memory.
_NOTED = (
    "optim.lr",
    "optim.warmup_steps",
    "optim.clip",
    "batch.micro",
    "spikes.skip",
    "spikes.sigmas",
    "spikes.window",
    "spikes.max_in_a_row",
    "spikes.restarts",
)


def check_place(recipe: Recipe) -> Path:
    """Return the folder `run.out`, after a check that a run can be written there.

    Raises:
        ValueError: if the place cannot be written, belongs to other things, or is read as text.
    """
    run = check_output("run.out", recipe.run.out)
    place = Path(os.path.realpath(run))
    if place.parent == place or place == Path(os.path.realpath(os.path.expanduser("~"))):
        raise ValueError(
            f"run.out {run} is the root or your home folder, and a run needs a folder of its own; "
            f"name a new folder in it, for example {run / 'model'}"
        )
    if run.is_dir() and not (run / RECIPE).exists():
        inner = sorted(file.parent.name for file in run.glob(f"*/{RECIPE}"))
        if inner:
            raise ValueError(
                f"run.out {run} holds the runs {', '.join(inner[:5])}, so it is not the folder of "
                f"one run; name one of them, or a new folder such as {run / 'model'}"
            )
    for source in recipe.data.sources:
        folder = Path(source).expanduser()
        if source not in BUILT_IN and folder.is_dir() and place.is_relative_to(folder.resolve()):
            raise ValueError(
                f"run.out {run} lies in the source folder {source}, so the files of the run would "
                "be read as text; name a folder outside it"
            )
    return run


def _check_space(run: Path, recipe: Recipe, last: Path | None, note: Note) -> None:
    """Check that the checkpoints of a run fit on the disk. Packed text needs some more.

    Raises:
        ValueError: if there is no room for one more checkpoint.
    """
    steps, every, keep = recipe.run.steps, recipe.run.save_every, recipe.run.keep
    remaining = steps - (checkpoint.step_of(last) if last else 0)
    if remaining <= 0:
        return
    # At most `keep` checkpoints remain, but a new one is written before an old one is removed.
    num_saves = math.ceil(remaining / every) if every else 1
    num_kept = len(checkpoint.folders(run))
    num_new = min(num_saves, max(1, keep + 1 - num_kept)) if keep else num_saves
    weight_bytes = 2 if recipe.run.dtype == "bfloat16" else 4
    size = parameters(recipe.model).total * (weight_bytes + 12)  # 12: masters and two moments
    free = shutil.disk_usage(run).free
    if free >= size * num_new:
        return
    found = (
        f"a checkpoint needs about {human_bytes(size)}, and the file system of run.out {run} has "
        f"{human_bytes(free)} free"
    )
    if free < size:
        raise ValueError(f"{found}; free some space, or choose another --run.out")
    note(
        f"warning: {found}, but the run adds up to {num_new} checkpoints; free space, or lower "
        "--run.keep"
    )


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run folder and lock it, so that only one process at a time trains in it.

    If the block raises ValueError because it refuses the folder, everything that this call has made
    is removed.
    """
    made_folder, made_lock = not run.exists(), not (run / ".lock").exists()
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as file:
        if not lock.try_lock(file):
            raise ValueError(
                f"another process trains in {run}; wait for it, or choose another --run.out"
            )
        try:
            yield
        except ValueError:
            if made_lock and not checkpoint.folders(run):
                (run / ".lock").unlink()
            if made_folder and not any(run.iterdir()):
                run.rmdir()
            raise


def claim(run: Path, recipe: Recipe, resume: bool, note: Note = print) -> Path | None:
    """Check that `recipe` may train in the folder `run`, then write recipe.json.

    Returns:
        The checkpoint to resume from, or None for a fresh start.

    Raises:
        ValueError: if the folder holds another run or other files, or no checkpoint to resume.
    """
    saved = run / RECIPE
    previous = _read_recipe(saved) if saved.exists() else None
    last = checkpoint.latest(run) if run.is_dir() else None
    if last is not None and not resume:
        raise ValueError(
            f"{run} holds a run already ({last.name}); add --resume to resume it, "
            "or choose another --run.out"
        )
    if resume and last is None and previous is None:
        if (run / "config.json").exists():
            raise ValueError(
                f"nothing to resume: {run} is a model folder, not a run. To train on from its "
                f"weights: --run.init_from {run} --run.out NEW, without --resume"
            )
        raise ValueError(
            f"nothing to resume: {run} holds no checkpoint; leave --resume out to start"
        )
    if last is not None or (resume and previous is not None):
        _check_changes(run, previous or {}, recipe.to_dict(), note)
    if last is None:
        if previous is None:
            _refuse_foreign_files(run)
        stamp(list(recipe.data.sources))  # reports a missing source before anything is written
        if recipe.run.init_from:
            start_folder(recipe)
        if not resume and previous is not None and (run / "tokenizer").exists():
            # Remove the tokenizer of an earlier attempt without checkpoint: its recipe may differ.
            atomic.remove_folder(run / "tokenizer", "tokenizer")
    _check_space(run, recipe, last, note)
    for name in (RECIPE, METRICS, curves.NAME, "tokenizer"):
        atomic.remove_leftovers(run, name)
    text = json.dumps(recipe.to_dict(), indent=1, ensure_ascii=False) + "\n"
    atomic.write_text(saved, text)
    return last


def _read_recipe(file: Path) -> dict[str, dict[str, Any]]:
    """Read the recipe.json of a run.

    Raises:
        ValueError: if the file is not the recipe of a run.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name for f in dataclasses.fields(Recipe)}
        if (
            isinstance(raw, dict)
            and set(raw) <= known
            and {"model", "run"} <= set(raw)
            and all(isinstance(v, dict) for v in raw.values())
        ):
            return raw
    except ValueError:
        pass
    raise ValueError(
        f"{file} is not the recipe of a lamoe run, so {file.parent} is left alone; "
        "choose another --run.out"
    )


def _check_changes(run: Path, before: dict, now: dict, note: Note) -> None:
    """Compare the recipe of a run with the recipe to resume it with.

    Each change is allowed, allowed with a note to the user, or refused with ValueError.
    """
    noted, refused = [], []
    for section in now:
        # Keys that are newer than the run had their default then.
        kind = SECTIONS.get(section)
        defaults = dataclasses.asdict(kind()) if kind and section in before else {}
        old = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
        old, new = {**old, **before.get(section, {})}, now[section]
        for key in {**old, **new}:
            name = f"{section}.{key}"
            if old.get(key) == new.get(key) or name in _FREE:
                continue
            change = f"{name} was {_shown(old, key)}, now {_shown(new, key)}"
            if name not in _NOTED:
                refused.append(change)
            elif key in old:
                noted.append(change)
    if noted:
        note(f"from here on {'; '.join(noted)}")
    if refused:
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        schedule = (
            " (the learning rate of every step depends on it)"
            if any(change.startswith("run.steps ") for change in refused)
            else ""
        )
        raise ValueError(
            f"cannot resume {run} with another recipe: {'; '.join(refused[:5])}{more}{schedule}. "
            "Use the same recipe; or start a new run from these weights, without --resume: "
            f"--run.init_from {run} --run.out NEW"
        )


def _shown(section: dict, key: str) -> str:
    return repr(section[key]) if key in section else "not there"


def _refuse_foreign_files(run: Path) -> None:
    """Raise ValueError if a folder without recipe.json holds files named like those of a run."""
    names = ("tokenizer", "data", METRICS, "config.json", "tokenizer.json")
    found = [name for name in names if (run / name).exists()]
    if found:
        raise ValueError(
            f"{run} holds {', '.join(found)} but no {RECIPE}, so it is not a run folder; "
            "choose another --run.out"
        )


# ---- the weights to start from -------------------------------------------------------------------
# Fields of the config that may differ from those of run.init_from, because the shapes of the
# weights do not depend on them. For example, context extension with YaRN changes rope_scaling.
_NOT_IN_WEIGHTS = CARRIED | {"rope_scaling", "rope_theta", "torch_dtype", "initializer_range"}


def start_folder(recipe: Recipe) -> Path:
    """Return the model folder of run.init_from.

    Raises:
        ValueError: if the config of this model does not fit the recipe.
    """
    folder = hf.resolve(recipe.run.init_from)
    stored, wanted = dataclasses.asdict(hf.read_config(folder)), dataclasses.asdict(recipe.model)
    differences = [
        f"model.{k} is {wanted[k]!r}, there {stored[k]!r}"
        for k in wanted
        if wanted[k] != stored[k] and k not in _NOT_IN_WEIGHTS
    ]
    if differences:
        raise ValueError(
            f"the weights of run.init_from {folder} do not fit this recipe: "
            f"{'; '.join(differences[:5])}. Describe the same model, or start from another"
        )
    return folder


# ---- tokenizer and packed text -------------------------------------------------------------------
def prepare_tokenizer(recipe: Recipe, folder: Path, note: Note = print) -> Tokenizer:
    """Return the tokenizer of a run. The first call loads or trains it and saves it in `folder`.

    It is the one of data.tokenizer if set, else the one of run.init_from if set. Otherwise a new
    tokenizer of model.vocab_size tokens is trained on a sample of the training text.

    Raises:
        ValueError: if the vocabulary is larger than model.vocab_size, or lacks BOS or EOS.
    """
    exists = (folder / "tokenizer.json").exists()
    if exists:
        tokenizer = Tokenizer.load(folder)
    elif recipe.data.tokenizer or recipe.run.init_from:
        tokenizer = Tokenizer.load(_tokenizer_folder(recipe))
    else:
        note(f"learning a vocabulary of {recipe.model.vocab_size} tokens")
        tokenizer = tokenizers.train(_sample_training_text(recipe), recipe.model.vocab_size)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size "
            f"{recipe.model.vocab_size}; raise model.vocab_size"
        )
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            f"the tokenizer of {recipe.data.tokenizer} has no BOS or EOS token; both are needed "
            "to mark where documents begin and end"
        )
    if recipe.data.fim_rate and tokenizer.fill_in_ids is None:
        raise ValueError(
            f"data.fim_rate is {recipe.data.fim_rate}, but the tokenizer lacks the control tokens "
            f"{' '.join(tokenizers.FILL_IN_TOKENS)}; name one that has them, let lamoe train a new "
            "one (data.tokenizer and run.init_from empty), or set data.fim_rate to 0"
        )
    if not exists:
        tokenizer.save(folder)
    return tokenizer


def _tokenizer_folder(recipe: Recipe) -> Path:
    if not recipe.data.tokenizer:
        return hf.resolve(recipe.run.init_from)
    path = Path(recipe.data.tokenizer).expanduser()
    if not path.exists():
        raise ValueError(
            f"data.tokenizer {path} does not exist (from {current_folder()}); name a folder with "
            "tokenizer.json, or that file"
        )
    return model_folder(path)


def _sample_training_text(recipe: Recipe) -> Iterator[str]:
    """Yield a random sample of the training split, TOKENIZER_BYTES in all.

    The sample consists of pieces of documents, because a source may be one large file.
    """
    plan = plan_split(
        list(recipe.data.sources),
        recipe.data.holdout,
        recipe.run.seed,
        lambda done, total, activity: None,
    )
    share = TOKENIZER_BYTES / max(1, sum(c.bytes for c in plan.counts.values()))
    rng = random.Random(recipe.run.seed)
    for number, document in plan.documents():
        for split, _, text in plan.parts(number, document):
            for start in range(0, len(text) if split == "train" else 0, PIECE):
                if rng.random() < share:
                    yield text[start : start + PIECE]


def prepare_corpus(
    recipe: Recipe, tokenizer: Tokenizer, folder: Path, note: Note = print
) -> data.PackedCorpus:
    """Tokenise and pack the recipe's sources into `folder`, and open the corpus.

    If `folder` already holds exactly this corpus, it is only opened.
    """
    note(f"packing {', '.join(recipe.data.sources)}")
    digest = hashlib.sha256(tokenizer.inner.to_str().encode()).hexdigest()
    last_s = time.monotonic()

    def progress(done: int, total: int | None, activity: str) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= REPORT_EVERY_S:
            last_s = time.monotonic()
            note(f"{activity}: {done / 1e6:,.0f}{f' of {total / 1e6:,.0f}' if total else ''} MB")

    return data.prepare(
        list(recipe.data.sources),
        fast_encode_batch(tokenizer),
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
        digest,
        folder,
        recipe.data.holdout,
        recipe.run.seed,
        progress,
        fim_rate=recipe.data.fim_rate,
        fim_ids=tokenizer.fill_in_ids,
    )


def save_bad_batch(
    run: Path, step: int, ids: torch.Tensor, segments: torch.Tensor, loss: float, norm: float
) -> Path:
    """Save the batch of a skipped step, and return the path of the file."""
    file = run / f"bad-batch-{step}.safetensors"
    content = {"ids": ids, "segments": segments, "loss": loss, "grad_norm": norm}
    with atomic.replace_path(file) as temporary:
        checkpoint.save_tensors(temporary, content)
    return file
