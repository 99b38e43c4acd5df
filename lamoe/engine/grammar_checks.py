"""Refuse grammars of clients that would cost too much, before they compile.

Every check takes time linear in the text.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

# Longest text of each kind, in bytes of UTF-8.
MAX_CHARS = {"JSON schema": 64 << 10, "regular expression": 4 << 10, "Lark grammar": 32 << 10}
# Deepest nesting of objects and lists in a schema.
MAX_DEPTH = 64
# Largest number of properties of one object. Any subset of the optional properties may occur, so
# each property adds a branch to the same row of the parser.
MAX_PROPERTIES = 500
# Largest n of x{n} in a regular expression.
MAX_REPEAT = 10_000
# Largest number of repeats and alternatives in a regular expression or Lark grammar. For thousands
# of `a?` in a row, the work grows with the square of their number.
MAX_BRANCHES = 2000
# Largest multipleOf, without trailing zeros. The parser needs a state for every remainder.
MAX_MULTIPLE = 10_000


def check_length(kind: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a {kind} must be a str, found {type(text).__name__}")
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_CHARS[kind]:
        raise ValueError(
            f"the {kind} has {size} bytes; at most {MAX_CHARS[kind]} are allowed; shorten it"
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"the {kind} holds a lone surrogate, which no UTF-8 text can match")


def check_repeats(kind: str, pattern: str) -> None:
    """Refuse large repeat counts (x{n}, x{n,m}, Lark's x~n..m) and too many branches."""
    # All quantifiers are possessive, because this text comes from clients: it cannot backtrack.
    bounds = re.finditer(r"\{[\s\d,]*+\}|~\s*+\d++(?:\s*+\.\.\s*+\d++)?", pattern)
    numbers = (n.lstrip("0")[:31] for m in bounds for n in re.findall(r"\d++", m[0]))
    largest = max((int(n) for n in numbers if n), default=0)
    if largest > MAX_REPEAT:
        raise ValueError(
            f"the {kind} repeats something {largest} times; at most {MAX_REPEAT}. Leave the bound "
            "out, or make max_tokens the limit"
        )
    if (branches := len(re.findall(r"[?*+|{~]", pattern))) > MAX_BRANCHES:
        raise ValueError(
            f"the {kind} has {branches} repeats and alternatives; at most {MAX_BRANCHES}; "
            "make it simpler"
        )


def check_schema(schema: Any) -> None:
    """Check everything about a schema that needs no compiler.

    The walk has no recursion, because a schema may be nested as deep as memory allows.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be an object, found {type(schema).__name__}")
    if "x-guidance" in schema:
        raise ValueError(
            "x-guidance in a JSON schema is not supported: a schema cannot choose white space and "
            "separators; remove it"
        )
    stack: list[tuple[Any, int]] = [(schema, 1)]
    multiple, values = 1, 0
    while stack:
        value, depth = stack.pop()
        values += 1
        if depth > MAX_DEPTH or values > MAX_CHARS["JSON schema"]:
            raise ValueError(
                f"the JSON schema is nested deeper than {MAX_DEPTH} or has more than "
                f"{MAX_CHARS['JSON schema']} values; make it flatter, give repeated parts a name "
                "in $defs"
            )
        if isinstance(value, dict):
            _check_object(value)
            # The least common multiple, because an allOf may apply several values to one number.
            multiple = math.lcm(multiple, _remainders(value.get("multipleOf")))
            if multiple > MAX_MULTIPLE:
                raise ValueError(
                    "the values of multipleOf in the JSON schema have a common multiple of "
                    f"{multiple} (trailing zeros not counted); at most {MAX_MULTIPLE}; use "
                    "rounder numbers"
                )
            stack += ((v, depth + 1) for v in value.values())
        elif isinstance(value, (list, tuple)):
            stack += ((v, depth + 1) for v in value)


def _check_object(value: dict) -> None:
    """Check the keys, patterns and properties of one object inside a schema."""
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"the JSON schema has a key that is not a str: {key!r}")
    by_pattern = value.get("patternProperties")
    keys = tuple(by_pattern) if isinstance(by_pattern, dict) else ()
    for pattern in (value.get("pattern"), *keys):
        if isinstance(pattern, str):
            check_length("regular expression", pattern)
            check_repeats("regular expression", pattern)
    properties = value.get("properties")
    if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
        raise ValueError(
            f"an object of the JSON schema has {len(properties)} properties; at most "
            f"{MAX_PROPERTIES}; split it into nested objects"
        )


def _remainders(multiple_of: Any) -> int:
    """Return how many parser states `multipleOf` needs: one for each remainder."""
    if (
        type(multiple_of) not in (int, float)
        or not math.isfinite(multiple_of)
        or not 1e-30 < abs(multiple_of) < 1e30
    ):
        return 1  # the library refuses such a value itself
    digits = "".join(map(str, Decimal(repr(multiple_of)).normalize().as_tuple().digits))
    return int(digits)
