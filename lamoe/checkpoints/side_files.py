"""Carries the files beside the weights from one model folder to another, and names the rest.

What belongs to the tokenizer, to the meaning of the model or to its licence is copied unread.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from lamoe import atomic
from lamoe.checkpoints.foreign import PICKLES, few
from lamoe.text.tokenizer_files import TEMPLATES, conversion_advice

log = logging.getLogger("lamoe.checkpoints")

_CARRIED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|(tokenizer|spiece|sentencepiece(\.bpe)?)\.model(\.v\d+)?|tekken\.json|.*\.tiktoken"
    r"|vocab\.json|vocab\.txt|merges\.txt|chat_template\.(jinja|json)|generation_config\.json"
    r"|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY|ACCEPTABLE_USE)([._-].*)?",
    re.IGNORECASE,
)
# Files that `save` writes itself, or that hold the weights in another form.
_MODEL = re.compile(
    r"(config|checksums)\.json|.*\.(safetensors|index\.json|gguf|h5|msgpack|onnx|lamoe)|\..*"
)


def is_carried(path: Path) -> bool:
    """Return whether a file or folder is copied with a model."""
    if path.name == TEMPLATES and path.is_dir():
        return all(p.suffix == ".jinja" and p.is_file() for p in path.iterdir())
    return _CARRIED.fullmatch(path.name) is not None and path.is_file()


def copy(source: Path, target: Path) -> list[Path]:
    """Copy the side files of a model folder, and log the names of those that are not copied.

    Returns the new files.
    """
    copied, left = [], []
    for path in sorted(source.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            (target / TEMPLATES).mkdir(exist_ok=True)
            templates = sorted(p for p in path.glob("*.jinja") if p.is_file())
            copied += [_copy(p, target / TEMPLATES / p.name) for p in templates]
        elif is_carried(path):
            copied.append(_copy(path, target / path.name))
        elif not _MODEL.fullmatch(path.name) and path.suffix not in PICKLES:
            left.append(path)
    log_left(source, left)
    if advice := conversion_advice(source):
        log.warning(advice)
    return copied


def log_left(folder: Path, left: Iterable[Path]) -> None:
    """Log the names of files and folders that are not copied."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in left)
    if names:
        log.warning("%s: not copied: %s", folder, few(names, 20))


def _copy(source: Path, target: Path) -> Path:
    atomic.copy(source, target)
    return target
