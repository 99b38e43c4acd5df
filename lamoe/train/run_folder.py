"""The folder of a training run: its lock, its recipe, its tokenizer and its packed text.

recipe.json        the recipe, checked when the run is resumed
tokenizer/         tokenizer.json and tokenizer_config.json
data/              packed text (data.py)
metrics.jsonl      one JSON object per logged step (metrics.py)
tensorboard/       the same for TensorBoard, if it is installed
step-00000480/     a checkpoint (checkpoint.py): model/ is a Hugging Face folder,
                   state.safetensors holds everything else
latest             the name of the last checkpoint
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lamoe.checkpoints import atomic, hf, lock
from lamoe.model.config import CARRIED
from lamoe.text import tokenizer as tokenizers
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint, data
from lamoe.train.holdout import plan_split
from lamoe.train.packing import PIECE
from lamoe.train.recipe import Recipe
from lamoe.train.sources import stamp

Note = Callable[[str], None]  # shows one line to the user

RECIPE, METRICS = "recipe.json", "metrics.jsonl"
# A new tokenizer is trained on a sample of about this many bytes of the training text.
TOKENIZER_BYTES = 24 << 20

# Keys that may change on resume.
_FREE = (
    "run.out",
    "run.threads",
    "run.log_every",
    "run.eval_every",
    "run.eval_tokens",
    "run.save_every",
    "run.keep",
)
# Keys that may change on resume, with a note to the user. Changing them may rescue a run whose loss
# has diverged.
_NOTED = ("optim.lr", "optim.warmup_steps", "optim.clip")


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
        if not resume and previous is not None:
            # Remove the tokenizer of an earlier attempt without checkpoint: its recipe may differ.
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (run / "tokenizer" / name).unlink(missing_ok=True)
    for name in (RECIPE, METRICS):
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
        old, new = before.get(section, {}), now[section]
        for key in {**old, **new}:
            name = f"{section}.{key}"
            if old.get(key) == new.get(key) or name in _FREE:
                continue
            change = f"{name} was {old.get(key)!r}, now {new.get(key)!r}"
            if name not in _NOTED:
                refused.append(change)
            elif key in old:
                noted.append(change)
    if noted:
        note(f"from here on {'; '.join(noted)}")
    if refused:
        raise ValueError(
            f"cannot resume {run} with another recipe: {'; '.join(refused[:5])}. "
            "Use the same recipe, or another --run.out"
        )


def _refuse_foreign_files(run: Path) -> None:
    """Raise ValueError if a folder without recipe.json holds files named like those of a run."""
    found = [name for name in ("tokenizer", "data", METRICS) if (run / name).exists()]
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
    folder = _model_folder(recipe.run.init_from)
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


def _model_folder(name: str) -> Path:
    is_run = (Path(name) / RECIPE).exists()
    return checkpoint.model_of_run(name) if is_run else hf.resolve(name)


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
        tokenizer = Tokenizer.load(recipe.data.tokenizer or _model_folder(recipe.run.init_from))
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
    if not exists:
        tokenizer.save(folder)
    return tokenizer


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
    return data.prepare(
        list(recipe.data.sources),
        tokenizer.encode_batch,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
        digest,
        folder,
        recipe.data.holdout,
        recipe.run.seed,
    )


def save_bad_batch(
    run: Path, step: int, ids: torch.Tensor, segments: torch.Tensor, loss: float, norm: float
) -> Path:
    """Save a batch whose loss or gradient norm is not finite, and return the path of the file."""
    file = run / f"bad-batch-{step}.safetensors"
    content = {"ids": ids, "segments": segments, "loss": loss, "grad_norm": norm}
    checkpoint.save_tensors(file, content)
    return file
