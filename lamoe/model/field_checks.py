"""Checks of dataclass fields and of the keys in config and recipe files."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6, prefix: str = "") -> str:
    """Return ", did you mean 'X'?" when a known name is close to `name`, else an empty string.

    Args:
        cutoff: the least similarity, from 0 to 1. Upper and lower case are the same.
        prefix: text before the known name, for example the "--" of options.
    """
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=cutoff)
    return f", did you mean {prefix + by_lower[close[0]]!r}?" if close else ""


def parse_int(text: str) -> int:
    """Convert text such as '512', '1_000' or '1e3' to a whole number.

    Raises:
        ValueError: if the text is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer() or abs(value) > 2**53:
        raise ValueError(f"{text!r} is not a whole number; write it like 1000 or 1e3")
    return int(value)


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first of `keys` that is not in `known`.

    `where` names the source of the keys in the message, for example a file.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}{did_you_mean(key, known)}")


def check_at_least(name: str, value: int, low: int) -> None:
    """Raise ValueError if `value`, the value of the field `name`, is below `low`."""
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
    """Raise ValueError unless every field of a dataclass has the type of its annotation.

    Annotations may be scalars, dataclasses, tuples of scalars, and unions of these with `|`.

    Args:
        obj: the dataclass instance.
        where: prefix of field names in the message.
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
    if kind == "float":  # an int is accepted as a float
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == {"None": "NoneType"}.get(kind, kind)
