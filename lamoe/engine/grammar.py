"""Structured output: a JSON schema, a regular expression or a Lark grammar decides which tokens may come next. The work is done by `llguidance`.

A grammar comes from a stranger. What the library bounds by itself (work per token, states, items) is set tight below; what it does not (a number of
100,000 states out of one multipleOf, the stack under a chain of thousands of references, a literal of a megabyte) is refused before. Compiling runs
in a thread of its own with a deep stack and a time limit, on behalf of the caller of `prepare`; the engine only copies what is ready.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import threading
import weakref
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from lamoe.text.tokenizer import Tokenizer

MAX_CHARS = {"JSON schema": 64 << 10, "regular expression": 4 << 10, "Lark grammar": 32 << 10}
MAX_DEPTH = 64  # objects and lists inside each other in a schema
MAX_PROPERTIES = 500  # of one object: optional ones may come in any subset, and every one is a branch of the same parser row
MAX_REPEAT = 10_000  # x{n} in regular expressions
MAX_BRANCHES = 2000  # repeats and alternatives of a regular expression or Lark grammar: thousands of a? in a row square the work
MAX_MULTIPLE = 10_000  # multipleOf without its zeros: the states its remainder needs
MAX_SECONDS = 5.0  # of compiling, for who waits; the limits below end the rest
_STACK = 256 << 20  # bytes of address space; only what is used becomes memory
_LIMITS = {
    "max_items_in_row": 2500,
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# One blank, or a line end with its indentation, where JSON allows white space: enough to write it any usual way, and a model cannot write blanks for ever
_JSON = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ ]|\r?\n[ \t]{0,40}",
    "coerce_one_of": False,
    "lenient": False,
}
# Text that a grammar leaves no choice about is sampled like any other: working it out ahead takes seconds and gigabytes for (ab{10000}c){10000}
_TAIL = '\n%llguidance {"no_forcing": true}\n'
_starting = threading.Lock()


@dataclass(frozen=True)
class Grammar:
    """What an output must be, made by one of the four functions, which check it (ValueError). Nothing here depends on a vocabulary; `prepare` adds that
    and keeps it, so one Grammar may serve many requests, of one vocabulary at a time."""

    kind: str
    text: str
    source: str = field(repr=False, compare=False)  # in the library's own terms
    _ready: list = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # at most one (weak reference to a Tokenizer, its compiled LLMatcher)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: dict[str, Any]) -> Grammar:
        """JSON text that is valid under `schema` (draft 2020-12). Properties come in the order of the schema. ValueError for a schema beyond the limits of
        this module, and for what cannot be enforced (for example `not`, most of `oneOf`, a remote `$ref`, an unknown `format`): nothing is ignored."""
        _check_schema(schema)
        try:
            text = json.dumps(schema, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as e:
            raise ValueError(f"the JSON schema is not JSON: {e}") from None
        _check_length("JSON schema", text)
        return cls._checked(
            "JSON schema",
            text,
            lambda lib: "start: %json " + json.dumps({**json.loads(text), "x-guidance": _JSON}),
        )

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches the whole of `pattern`. The syntax has classes, groups, alternatives and repeats, Unicode included; look-around and
        back references are a ValueError. As in Python with re.ASCII, `.` is any character but a line end, and \\d, \\w, \\s are those of ASCII."""
        _check_length("regular expression", pattern)
        _check_repeats("regular expression", pattern)
        if re.search(r"(?<!\\)(\\\\)*\\\Z", pattern):
            raise ValueError(
                "the regular expression ends with a backslash that escapes nothing; for a backslash write two"
            )
        return cls._checked(
            "regular expression",
            pattern,
            lambda lib: f"start: /{lib.regex_to_lark(pattern or '()', 'dws')}/",
        )

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text of the language of `start` in a Lark grammar, in the dialect of llguidance. `<name>` stands for a control token, `%json {...}` for a JSON text
        under a schema. ValueError for one that does not parse or is beyond the limits."""
        _check_length("Lark grammar", text)
        _check_repeats("Lark grammar", text)
        for word, instead in (
            ("%llguidance", "the limits are the server's"),
            ("temperature", "give it with the other sampling options"),
        ):
            if re.search(rf"{word}\s*[={{]", text):
                raise ValueError(f"a Lark grammar cannot set {word}; {instead}")
        for at in (m.end() for m in re.finditer(r"%json\s*", text)):
            try:
                _check_schema(json.JSONDecoder().raw_decode(text, at)[0])
            except (json.JSONDecodeError, RecursionError) as e:
                raise ValueError(
                    f"%json in the Lark grammar is not followed by a JSON schema: {e}"
                ) from None
        return cls._checked("Lark grammar", text, lambda lib: text)

    @classmethod
    def _checked(cls, kind: str, text: str, convert) -> Grammar:
        lib = _library()

        def check() -> str:
            source = lib.LLMatcher.grammar_from_lark(convert(lib) + _TAIL)
            failed, messages = lib.LLMatcher.validate_grammar_with_warnings(
                source, limits=lib.LLParserLimits(**_LIMITS)
            )
            if failed:
                raise ValueError(messages[0])
            return source

        return cls(kind, text, _compiling(kind, check))

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Compile for a vocabulary, in a few milliseconds as a rule, MAX_SECONDS at most. ValueError when the limits end it or no text at all fits the grammar.
        Thread-safe; call it where waiting harms nobody, before a request goes to the engine."""
        if self._prepared(tokenizer) is not None:
            return
        lib, vocabulary = (
            _library(),
            _vocabulary(tokenizer),
        )  # reading a large vocabulary, once, is not the grammar's time

        def compile_():
            matcher = lib.LLMatcher(
                vocabulary, self.source, limits=lib.LLParserLimits(**_LIMITS), log_level=0
            )
            probe = matcher.deep_copy()
            if not matcher.is_error():
                probe.compute_bitmask()
            if probe.is_error() and "NoExtension" in probe.get_error():
                raise ValueError("no text fits it")
            if probe.is_error():
                raise ValueError(probe.get_error())
            return matcher

        self._ready[:] = [(weakref.ref(tokenizer), _compiling(self.kind, compile_))]

    def start(self, tokenizer: Tokenizer | None) -> Matcher:
        """A Matcher at the beginning of an output. Compiles first when `prepare` has not; errors as there, and ValueError without a tokenizer."""
        if tokenizer is None:
            raise ValueError(
                "a grammar needs a tokenizer: it is about text, and this model has only token ids"
            )
        self.prepare(tokenizer)
        return Matcher(self, tokenizer, self._prepared(tokenizer).deep_copy())

    def _prepared(self, tokenizer: Tokenizer):
        return next((matcher for ref, matcher in list(self._ready) if ref() is tokenizer), None)


class Matcher:
    """Where one output stands in its grammar: `mask` before a token is sampled, `accept` after. `complete`: no further token fits, the text is whole."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, inner):
        self._grammar, self._inner, self._vocabulary = grammar, inner, tokenizer.vocab_size
        self._eos = sorted(i for i in tokenizer.stop_ids if i < tokenizer.vocab_size)

    @property
    def complete(self) -> bool:
        return self._inner.is_stopped() and not self._inner.is_error()

    def mask(self, logits: torch.Tensor, ignore_eos: bool = False) -> torch.Tensor:
        """logits [vocabulary] with -inf for every token that does not fit; the input is left alone. EOS fits where the text may end, unless `ignore_eos`;
        a text that can only end does so, whatever min_tokens and ignore_eos say. ValueError when the grammar asks for more work than a token may cost."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        self._check()
        fits = torch.zeros(len(logits), dtype=torch.bool)
        unpacked = torch.from_numpy(
            np.unpackbits(
                bits, bitorder="little", count=min(self._vocabulary, len(logits), 8 * len(bits))
            )
        ).bool()
        fits[: len(unpacked)] = unpacked
        ends = [i for i in self._eos if i < len(fits) and fits[i]]
        if ignore_eos:
            fits[ends] = False
        out = logits.masked_fill(~fits, float("-inf"))
        if out.max() > float("-inf"):
            return out
        if not ends:
            raise ValueError(f"no token of the vocabulary fits the {self._grammar.kind} here")
        out[ends] = 0.0
        return out

    def accept(self, token: int) -> None:
        """Go on by one token, which `mask` must have let through. ValueError as there."""
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            self._grammar._ready.clear()  # copies share the states the lexer has met: the next request shall begin with none
            raise ValueError(_sentence(self._grammar.kind, self._inner.get_error()))


# ---- limits --------------------------------------------------------------------------------------------------------------
def _check_length(kind: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a {kind} must be a str, found {type(text).__name__}")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CHARS[kind]:
        raise ValueError(
            f"the {kind} has {len(text.encode('utf-8', 'surrogatepass'))} bytes; at most {MAX_CHARS[kind]} are taken"
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"the {kind} holds a lone surrogate, which no UTF-8 text can match")


def _check_repeats(kind: str, pattern: str) -> None:
    most = max(
        (
            int(n)
            for m in re.finditer(
                r"\{\s*(\d{0,30})\s*,?\s*(\d{0,30})\s*\}|~\s*(\d{1,30})(?:\s*\.\.\s*(\d{1,30}))?",
                pattern,
            )
            for n in m.groups()
            if n
        ),
        default=0,
    )
    if most > MAX_REPEAT:
        raise ValueError(
            f"the {kind} repeats something {most} times; at most {MAX_REPEAT}. Leave the bound out, or make max_tokens the limit"
        )
    if (branches := len(re.findall(r"[?*+|{~]", pattern))) > MAX_BRANCHES:
        raise ValueError(
            f"the {kind} has {branches} repeats and alternatives; at most {MAX_BRANCHES}"
        )


def _check_schema(schema: Any) -> None:
    """Everything about a schema that can be said without compiling it. Walks without recursion: it may be nested as deep as memory allows."""
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be an object, found {type(schema).__name__}")
    if "x-guidance" in schema:
        raise ValueError(
            "x-guidance in a JSON schema is not taken: white space and separators are not the schema's to choose"
        )
    todo, multiple, seen = [(schema, 1)], 1, 0
    while todo:
        value, depth = todo.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_CHARS["JSON schema"]:
            raise ValueError(
                f"the JSON schema is nested deeper than {MAX_DEPTH} or has more than {MAX_CHARS['JSON schema']} values; make it flatter, "
                "give repeated parts a name in $defs"
            )
        if isinstance(value, dict):
            if not all(isinstance(k, str) for k in value):
                raise ValueError(
                    f"the JSON schema has a key that is not a str: {next(k for k in value if not isinstance(k, str))!r}"
                )
            by_pattern = value.get("patternProperties")
            for pattern in (
                value.get("pattern"),
                *(by_pattern if isinstance(by_pattern, dict) else ()),
            ):
                if isinstance(pattern, str):
                    _check_length("regular expression", pattern)
                    _check_repeats("regular expression", pattern)
            if isinstance(p := value.get("properties"), dict) and len(p) > MAX_PROPERTIES:
                raise ValueError(
                    f"an object of the JSON schema has {len(p)} properties; at most {MAX_PROPERTIES}"
                )
            multiple = math.lcm(
                multiple, _remainders(value.get("multipleOf"))
            )  # an allOf may bring any of them together
            todo += ((v, depth + 1) for v in value.values())
        elif isinstance(value, (list, tuple)):
            todo += ((v, depth + 1) for v in value)
    if multiple > MAX_MULTIPLE:
        raise ValueError(
            f"the values of multipleOf in the JSON schema have a common multiple of {multiple} (zeros at the end not counted); at most {MAX_MULTIPLE}"
        )


def _remainders(multiple_of: Any) -> int:
    if (
        type(multiple_of) not in (int, float)
        or not math.isfinite(multiple_of)
        or not 1e-30 < abs(multiple_of) < 1e30
    ):
        return 1  # nothing the library would take
    digits = "".join(map(str, Decimal(repr(multiple_of)).normalize().as_tuple().digits))
    return int(digits)


# ---- the library ---------------------------------------------------------------------------------------------------------
def _library():
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(
            "structured output needs the package llguidance, which is not installed; it is in the extra: pip install 'lamoe[serve]'"
        )
    import llguidance

    return llguidance


def _compiling(kind: str, work):
    """The result of work() from a thread with a deep stack: the library recurses along references and rules, and would end the process."""
    result: list = [
        None,
        ValueError(
            f"the {kind} takes more than {MAX_SECONDS:g} seconds to compile; make it simpler"
        ),
    ]

    def run() -> None:
        try:
            result[:] = [work(), None]
        except Exception as e:
            result[1] = ValueError(_sentence(kind, str(e)))

    with _starting:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="lamoe-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(MAX_SECONDS)
    value, error = result
    if error is not None:
        raise error
    return value


def _sentence(kind: str, error: str) -> str:
    text = " ".join(error.replace("<non-verbose/>", "").split())
    text = text.replace(
        "Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf"
    )
    text = re.sub(r" \d+ \| %llguidance \{.*", "", text)
    if kind != "Lark grammar":  # the place in a Lark grammar that nobody wrote
        text = re.sub(
            r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text.split(" 1 | start:")[0]
        )
    return f"the {kind} cannot be followed: {text if len(text) <= 300 else text[:297] + '...'}"


class _Words:
    """The vocabulary as llguidance wants to see it: the bytes of each token as our own decoder gives them, control tokens apart."""

    def __init__(self, tokenizer: Tokenizer):
        n = tokenizer.vocab_size
        self.tokens = [tokenizer._bytes(i) for i in range(n)] + [
            b"<end>"
        ]  # the last one: an EOS for vocabularies without
        self.special_token_ids = sorted(
            {
                *tokenizer._control_ids,
                *tokenizer._skipped,
                *(i for i in tokenizer.stop_ids if i < n),
                n,
            }
        )
        self.eos_token_id, self.bos_token_id = n, tokenizer.bos_id
        self._tokenizer = weakref.ref(tokenizer)  # or neither would ever be freed

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer().encode(
            text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        )


_vocabularies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_building = threading.Lock()


def _vocabulary(tokenizer: Tokenizer):
    """The LLTokenizer of a Tokenizer, made once. Rows of a model beyond the vocabulary do not exist for it."""
    with _building:
        if tokenizer not in _vocabularies:
            lib, n = _library(), tokenizer.vocab_size
            eos = sorted(i for i in tokenizer.stop_ids if i < n) or [n]
            made = (
                lib.LLTokenizer(lib.TokenizerWrapper(_Words(tokenizer)), eos_token=eos)
                if tokenizer._byte_level
                else lib.LLTokenizer(tokenizer.inner.to_str(), n_vocab=n + 1, eos_token=eos)
            )
            _vocabularies[tokenizer] = made
        return _vocabularies[tokenizer]
