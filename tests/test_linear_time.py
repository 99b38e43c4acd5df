"""Work on untrusted text takes time linear in its length.

Clients choose these texts, and much of this work holds the interpreter lock. So anything slower
could freeze a server. Each case has texts of growing length that are as bad as we know.
"""

import contextlib
import json
import time
from collections.abc import Callable

import pytest

from lamoe.engine.grammar import MAX_CHARS, Grammar, _check_repeats, _check_schema, _sentence

REGEX, SCHEMA, LARK = (
    MAX_CHARS[kind] for kind in ("regular expression", "JSON schema", "Lark grammar")
)


def seconds(work: Callable, text) -> float:
    """Return the CPU time of all threads for one call. A refusal counts as an answer."""
    start = time.process_time()
    with contextlib.suppress(ValueError):
        work(text)
    return time.process_time() - start


def check_linear(work: Callable, make: Callable[[int], object], largest: int) -> None:
    """Check that 8 times the length takes at most about 8 times as long.

    Quadratic work takes 64 times as long. A machine with other work makes single measurements too
    long, so the shortest of several counts, and a suspicious step is measured again. The lengths
    double from small ones, so bad code fails before it takes hours.
    """
    sizes = [largest >> k for k in range(largest.bit_length()) if largest >> k >= 4][::-1]
    for small, large in zip(sizes, sizes[3:]):
        for _ in range(5):
            one = min(seconds(work, make(small)) for _ in range(3))
            eight = min(seconds(work, make(large)) for _ in range(2))
            if eight < 24 * one + 2e-3:
                break
        else:
            raise AssertionError(f"{small}: {one:.6f} s, {large}: {eight:.6f} s")


def repeats(text: str) -> None:
    _check_repeats("regular expression", text)


def pattern_properties(text: str) -> None:
    _check_schema({"patternProperties": {text: {}}})


# {name: (function, text of about a given length, largest length)}
CASES = {
    "repeats: a brace, then blanks": (repeats, lambda n: "{" + " " * n, LARK),
    "repeats: blanks and digits": (repeats, lambda n: "{" + " 1" * (n // 2), LARK),
    "repeats: braces and blanks": (repeats, lambda n: "{ " * (n // 2), LARK),
    "repeats: digits": (repeats, lambda n: "{" + "1" * n, LARK),
    "repeats: a tilde, then blanks": (repeats, lambda n: "~" + " " * n, LARK),
    "repeats: a range, then blanks": (repeats, lambda n: "~1" + " " * n, LARK),
    "repeats: tildes": (repeats, lambda n: "~1 .. " * (n // 6), LARK),
    "regex: a brace, then blanks": (Grammar.regex, lambda n: "{" + " " * n, REGEX),
    "regex: backslashes": (Grammar.regex, lambda n: "\\" * n, REGEX),
    "Lark: a brace, then blanks": (Grammar.lark, lambda n: "{" + " " * n, LARK),
    "Lark: %json, then blanks": (Grammar.lark, lambda n: "%json" + " " * n, LARK),
    "Lark: temperature, then blanks": (Grammar.lark, lambda n: "temperature" + " " * n, LARK),
    "Lark: temperatures": (Grammar.lark, lambda n: "temperature " * (n // 12), LARK),
    "Lark: schemas in texts": (
        Grammar.lark,
        lambda n: 'start: %json {"":"' + "%json {}" * (n // 8) + '"}',
        LARK,
    ),
    "schema: pattern": (
        lambda text: Grammar.json_schema({"type": "string", "pattern": text}),
        lambda n: "{" + " " * n,
        REGEX,
    ),
    "schema: patternProperties": (pattern_properties, lambda n: "{" + " " * n, REGEX),
    "schema: multiples": (
        _check_schema,
        lambda n: {"allOf": [{"multipleOf": 10**25 + 2 * i + 1} for i in range(n // 40)]},
        SCHEMA,
    ),
    "schema: values": (_check_schema, lambda n: {"enum": [0] * n}, SCHEMA),
    "an error: digits": (lambda t: _sentence("Lark grammar", t), lambda n: " 1" * n, LARK),
    "an error: a position": (
        lambda t: _sentence("JSON schema", t),
        lambda n: "at " + "1" * n + "(",
        LARK,
    ),
    "JSON in Lark": (
        Grammar.lark,
        lambda n: "start: %json " + json.dumps({"enum": ["{ " * n]}),
        LARK // 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_work_is_linear(name):
    check_linear(*CASES[name])
