"""Checks of dataclass fields and of keys in files, for configs and recipes."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'X'?" when a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key that is not known. `where` names its source."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{did_you_mean(key, known)}")


def check_at_least(name: str, value: int, low: int) -> None:
    """Raise ValueError when the field `name` holds a number below `low`."""
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def is_finite(value: Any) -> bool:
    """Return whether `value` is a finite number that fits in a double. Bools do not count."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond 1e308
        return False


def check_types(obj: Any, where: str = "") -> None:
    """Raise ValueError unless every field of a dataclass holds what its annotation says.

    Understands scalars, dataclasses, tuples of scalars, and unions of these with `|`.

    Args:
        obj: the dataclass instance.
        where: put before field names in the message.
    """
    for f in dataclasses.fields(obj):
        value, kind = getattr(obj, f.name), str(f.type)
        options = [k.strip() for k in kind.split("|")]
        if not any(_is_a(value, option) for option in options):
            raise ValueError(f"{where}{f.name} must be {kind}, found {value!r}")


def _is_a(value: Any, kind: str) -> bool:
    if kind.startswith("tuple["):
        item = kind.removeprefix("tuple[").split(",")[0].rstrip("]")
        return isinstance(value, tuple) and all(_is_a(v, item) for v in value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":  # an int is a fine float
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == {"None": "NoneType"}.get(kind, kind)
