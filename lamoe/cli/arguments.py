"""An argument parser that suggests names, and the types of option values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from lamoe.model.config import did_you_mean
from lamoe.model.field_checks import parse_int


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors say which option, verb or choice may have been meant.

    Attributes:
        words: the command line, which errors search for unknown options.
        more_help: function that returns the end of the help. It runs only if the help is shown.
        more_options: function from an unknown option to a known one that is not in this parser.
    """

    words: list[str] = []
    more_help: Callable[[], str] | None = None
    more_options: Callable[[str], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (self.more_help() if self.more_help else "")

    def error(self, message: str) -> NoReturn:
        hints = [self._hint(word.partition("=")[0]) for word in self.words if word[:2] == "--"]
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[^\s,']+", choice[2])
            hints.append(did_you_mean(choice[1], known).removeprefix(", "))
        if option := re.search(r"argument (--[\w-]+).*: expected one argument", message):
            hints.append(f"write {option[1]}=VALUE for a value that begins with -")
        super().error("; ".join([message, *(h for h in hints if h)]))

    def _hint(self, option: str) -> str:
        """Return a suggestion for an unknown option, or an empty text."""
        if option == "--" or option in self._option_string_actions or self._subparsers is not None:
            return ""  # the parser of all verbs does not know their options
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        meant = self.more_options(option) if self.more_options else ""
        return f"{option} is unknown{meant or did_you_mean(option[2:], known, prefix='--')}"


def in_words_of_options(message: str) -> str:
    """Replace the keyword arguments that messages of the Python interface name by options."""
    message = message.replace("overwrite=True", "--overwrite")
    message = re.sub(r"\bdevice='(\w+)'", r"--device \1", message)
    return re.sub(r"\bbackend='(\w+)'", r"LAMOE_BACKEND=\1", message)


# ---- option values -------------------------------------------------------------------------------
def whole_number(text: str) -> int:
    """Parse '512' or '1e3'."""
    try:
        return parse_int(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def num_threads(text: str) -> int:
    """Parse a number of threads. 0 means the default."""
    if (number := whole_number(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0; 0 means the default")
    return number


def prompts(text: str) -> list[tuple[int, int]]:
    """Parse '512,512@4096' to [(512, 0), (512, 4096)].

    Each pair is (new tokens, cached tokens before them).
    """
    try:
        found = [
            (parse_int(n), parse_int(d or "0"))
            for n, _, d in (x.partition("@") for x in text.split(",") if x.strip())
        ]
    except ValueError:
        found = [(-1, 0)]
    if any(n < 2 or d < 0 for n, d in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of prompts of at least 2 tokens; "
            "write it like 512,2048,512@4096"
        )
    return found


def counts(text: str) -> list[int]:
    """Parse '16,32' to [16, 32], and an empty text to []."""
    try:
        found = [parse_int(x) for x in text.split(",") if x.strip()]
    except ValueError:
        found = [-1]
    if any(x < 0 for x in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers; write it like 512,2048"
        )
    return found


def lengths(text: str) -> list[int]:
    """Parse '512,1024' to [512, 1024]."""
    try:
        return [parse_int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of lengths; write it like 512,1024,2048"
        ) from None
