"""Structured output: a JSON schema, a regular expression or a Lark grammar restricts the tokens.

The package `llguidance` does the parsing. Grammars come from untrusted clients, so their cost is
bounded in three ways:

- The library's own limits (work per token, states, items) are set tight in `_LIMITS`.
- What the library does not bound is refused before it compiles, for example a `multipleOf` that
  needs 100,000 parser states, or a literal of a megabyte.
- Every grammar compiles first in a child process with limits on time and memory, for a small
  vocabulary. Then a thread with a deep stack compiles it for the model's vocabulary, because long
  chains of references recurse deeply. The caller of `prepare` waits at most `MAX_SECONDS`. The
  engine never compiles: it only copies grammars that are ready.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lamoe.engine.grammar_checks import check_length, check_repeats, check_schema
from lamoe.engine.schema_dialect import simplified
from lamoe.text.child_process import Child, ChildLimit
from lamoe.text.tokenizer import Tokenizer

# Number of seconds that `prepare` waits. The limits below end a compiler that runs longer.
MAX_SECONDS = 5.0
# Number of seconds that a grammar waits for those of other requests.
WAIT_SECONDS = 30.0
# Largest number of compilations that still run after their caller has stopped waiting. Nothing can
# end such a thread, so while there are this many, no other grammar compiles.
MAX_LEFT_BEHIND = 2
# Bytes of address space for the compiler's stack. Only the used part becomes memory.
_STACK = 256 << 20
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
# Between JSON tokens one space is allowed, or a line end with its indentation. This permits all
# usual layouts, but a model cannot write spaces without end.
_JSON = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ ]|\r?\n[ \t]{0,40}",
    "coerce_one_of": False,
    "lenient": False,
}
# As json.dumps writes it, and chat templates too.
_ONE_LINE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
# Disables fast-forwarding of text that the grammar forces. For a pattern like (ab{10000}c){10000}
# fast-forwarding takes seconds and gigabytes.
_TAIL = '\n%llguidance {"no_forcing": true}\n'
_WORKER = str(Path(__file__).with_name("grammar_worker.py"))
_starting = threading.Lock()
_left_behind: list[threading.Thread] = []
# The last one that was used comes first, so the second starts only when both are needed.
_children: queue.LifoQueue[Child] = queue.LifoQueue()
for _ in range(2):
    _children.put(Child(_WORKER, ("llguidance",), "compiling grammars"))
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Grammar:
    """The language that an output must belong to.

    Make a Grammar with `json_object`, `json_schema`, `regex` or `lark`, which check the text. A
    Grammar does not depend on a vocabulary. `prepare` compiles it for a vocabulary and keeps the
    result. So one Grammar may serve many requests, with one tokenizer at a time.

    kind: "JSON schema", "regular expression" or "Lark grammar".
    text: the grammar as the caller gave it.
    source: the grammar in llguidance's own notation.
    begun: the beginning of the text that the prompt already holds.
    """

    kind: str
    text: str
    source: str = field(repr=False, compare=False)
    begun: str = ""
    # Empty, or one pair: weak reference to a Tokenizer, the LLMatcher compiled for it.
    _ready: list = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def json_object(cls) -> Grammar:
        """Make the grammar of any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: dict[str, Any]) -> Grammar:
        """Make the grammar of JSON text that is valid under a schema (draft 2020-12).

        Properties come in the order of the schema.

        Raises:
            ValueError: for a schema beyond the limits of this module, or with a keyword that cannot
                be enforced (for example `not`, most of `oneOf`, a remote `$ref`, the `format`
                json-pointer). No keyword is silently ignored; formats that JSON Schema does not
                define are notes.
        """
        check_schema(schema)
        schema = simplified(schema)
        try:
            text = json.dumps(schema, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as e:
            raise ValueError(f"the JSON schema is not JSON: {e}") from None
        check_length("JSON schema", text)
        return cls._checked(
            "JSON schema",
            text,
            lark="start: %json " + json.dumps({**json.loads(text), "x-guidance": _JSON}),
        )

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""Make the grammar of text that matches the whole of `pattern`.

        The syntax has classes, groups, alternatives and repeats, Unicode included. As in Python
        with re.ASCII, `.` is any character except a line end, and \d, \w, \s match ASCII only.

        Raises:
            ValueError: if the pattern is invalid, uses look-around or back references, or exceeds
                the limits of this module.
        """
        check_length("regular expression", pattern)
        check_repeats("regular expression", pattern)
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise ValueError(
                "the regular expression ends with a backslash that escapes nothing; for a "
                "backslash write two"
            )
        return cls._checked("regular expression", pattern, lark="", regex=pattern or "()")

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Make a grammar from Lark text, in llguidance's dialect. Outputs match its `start` rule.

        `<name>` stands for a control token, `%json {...}` for JSON text that is valid under a
        schema.

        Raises:
            ValueError: if the grammar does not parse or exceeds the limits of this module.
        """
        check_length("Lark grammar", text)
        check_repeats("Lark grammar", text)
        for word, instead in (
            ("%llguidance", "the limits are the server's"),
            ("temperature", "give it with the other sampling options"),
        ):
            if re.search(rf"{word}\s*+[={{]", text):
                raise ValueError(f"a Lark grammar cannot set {word}; {instead}")
        for at in (m.end() for m in re.finditer(r"%json\s*+", text)):
            try:
                check_schema(json.JSONDecoder().raw_decode(text, at)[0])
            except (json.JSONDecodeError, RecursionError) as e:
                raise ValueError(
                    f"%json in the Lark grammar is not followed by a JSON schema: {e}"
                ) from None
        return cls._checked("Lark grammar", text, lark=text)

    @classmethod
    def with_schemas(
        cls, rules: str, schemas: dict[str, dict[str, Any]], begun: str = ""
    ) -> Grammar:
        """Make a grammar from trusted Lark rules, which use JSON schemas of a client.

        JSON is written on one line, with a space after commas and colons.

        Args:
            rules: Lark text. Outputs match its `start` rule.
            schemas: {name of a rule: schema of the JSON text that it matches}.
            begun: the beginning of the text that the prompt already holds.

        Raises:
            ValueError: see `json_schema`.
        """
        for schema in schemas.values():
            check_schema(schema)
        schemas = {name: simplified(schema) for name, schema in schemas.items()}
        text = json.dumps(schemas, allow_nan=False, separators=(",", ":"))
        check_length("JSON schema", text)
        lines = (
            f"{name}: %json {json.dumps({**schema, 'x-guidance': _ONE_LINE})}"
            for name, schema in schemas.items()
        )
        grammar = cls._checked("JSON schema", text, lark="\n".join([rules, *lines]))
        return replace(grammar, begun=begun)

    @classmethod
    def _checked(cls, kind: str, text: str, **source: str) -> Grammar:
        """Make a Grammar from a source (see grammar_worker), after compiling it in a child."""
        _library()
        source["lark"] += _TAIL
        try:
            child = _children.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            raise ValueError(
                f"other grammars kept the compiler busy for {WAIT_SECONDS:g} seconds; send fewer "
                "at a time"
            ) from None
        try:
            reply = child.ask({**source, "limits": _LIMITS}, MAX_SECONDS)
        except ChildLimit as e:
            raise ValueError(
                f"the {kind} takes too much time or memory to compile; make it simpler ({e})"
            ) from None
        finally:
            _children.put(child)
        if "error" in reply:
            raise ValueError(_sentence(kind, reply["error"]))
        return cls(kind, text, reply["source"])

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Compile the grammar for a vocabulary, usually in a few milliseconds.

        Thread-safe. Call it before the request goes to the engine, in a thread that may wait.

        Raises:
            ValueError: if compiling exceeds a limit or MAX_SECONDS, or if no text fits the grammar.
        """
        if self._prepared(tokenizer) is not None:
            return
        lib = _library()
        # Reading a large vocabulary, once per tokenizer, does not count towards MAX_SECONDS.
        vocabulary = _vocabulary(tokenizer)

        def compile_grammar():
            matcher = lib.LLMatcher(
                vocabulary, self.source, limits=lib.LLParserLimits(**_LIMITS), log_level=0
            )
            if self.begun and not matcher.is_error():
                matcher.consume_tokens(tokenizer.encode(self.begun))
            probe = matcher.deep_copy()
            if not matcher.is_error():
                probe.compute_bitmask()
            if probe.is_error() and "NoExtension" in probe.get_error():
                raise ValueError("no text fits it")
            if probe.is_error():
                raise ValueError(probe.get_error())
            return matcher

        self._ready[:] = [(weakref.ref(tokenizer), _compiling(self.kind, compile_grammar))]

    def start(self, tokenizer: Tokenizer | None) -> Matcher:
        """Return a Matcher for a new output. Compiles the grammar if `prepare` has not.

        Raises:
            ValueError: without a tokenizer, or for the reasons that `prepare` names.
        """
        if tokenizer is None:
            raise ValueError(
                "a grammar needs a tokenizer: it is about text, and this model has only token ids"
            )
        self.prepare(tokenizer)
        return Matcher(self, tokenizer, self._prepared(tokenizer).deep_copy())

    def _prepared(self, tokenizer: Tokenizer):
        return next((matcher for ref, matcher in list(self._ready) if ref() is tokenizer), None)


class Matcher:
    """The state of one output in its grammar.

    Call `mask` before a token is sampled and `accept` after.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, inner):
        self._grammar, self._inner, self._vocabulary = grammar, inner, tokenizer.vocab_size
        self._eos = sorted(i for i in tokenizer.stop_ids if i < tokenizer.vocab_size)

    @property
    def complete(self) -> bool:
        """Whether the output is a whole text of the grammar and no further token fits."""
        return self._inner.is_stopped() and not self._inner.is_error()

    def mask(self, logits: torch.Tensor, ignore_eos: bool = False) -> torch.Tensor:
        """Return a copy of logits [vocabulary] with -inf for every token that does not fit.

        EOS fits where the text may end, unless `ignore_eos` is set. If nothing but EOS fits, EOS
        is allowed in spite of `ignore_eos` and min_tokens.

        Raises:
            ValueError: if no token fits, or if the grammar exceeds the limit of work per token.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        self._check()
        fits = torch.zeros(len(logits), dtype=torch.bool)
        count = min(self._vocabulary, len(logits), 8 * len(bits))
        unpacked = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=count)).bool()
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
        """Advance the state by one token, which `mask` must have allowed.

        Raises:
            ValueError: if the grammar exceeds the limit of work per token.
        """
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            # Copies of a matcher share lexer states. Drop it, so that the next request compiles a
            # new one.
            self._grammar._ready.clear()
            raise ValueError(_sentence(self._grammar.kind, self._inner.get_error()))


def can_begin(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a grammar can have begun with the tokens of a text.

    They must be exactly this text. Many tokenizers that are not byte-level put a space before it.
    """
    ids = tokenizer.encode(text)
    return tokenizer._byte_level and b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Return the texts of tokens that a grammar matches as `<name>` only, not as text."""
    ids = tokenizer._control_ids if tokenizer._byte_level else tokenizer._skipped
    return frozenset(tokenizer._added[i] for i in ids if i in tokenizer._added)


# ---- the library ---------------------------------------------------------------------------------
def _library():
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(
            "structured output needs the package llguidance, which is not installed; it is in the "
            "extra: pip install 'lamoe[serve]'"
        )
    import llguidance

    return llguidance


def _compiling(kind: str, work: Callable[[], _Result]) -> _Result:
    """Return the result of work() from a thread with a deep stack.

    The library recurses along references and rules. On a normal stack a long chain of them would
    overflow, which ends the process.
    """
    results: list[_Result] = []
    error: Exception | None = ValueError(
        f"the {kind} takes more than {MAX_SECONDS:g} seconds to compile; make it simpler"
    )

    def run() -> None:
        nonlocal error
        try:
            results.append(work())
            error = None
        except Exception as e:
            error = ValueError(_sentence(kind, str(e)))

    # The stack size is a setting of the whole process, so only one thread may change it at a time.
    with _starting:
        _left_behind[:] = [thread for thread in _left_behind if thread.is_alive()]
        if len(_left_behind) >= MAX_LEFT_BEHIND:
            raise ValueError(
                f"the {kind} cannot be compiled now: grammars of {len(_left_behind)} earlier "
                "requests still compile, which were too complex; try again later"
            )
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="lamoe-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(MAX_SECONDS)
    if thread.is_alive():
        _left_behind.append(thread)
    found = error
    if found is not None:
        raise found
    return results[0]


def _sentence(kind: str, error: str) -> str:
    """Turn an error of the library into one short sentence about the caller's grammar."""
    text = " ".join(error.replace("<non-verbose/>", "").split())
    text = text.replace(
        "Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf"
    )
    text = re.sub(r" \d+ \| %llguidance \{.*", "", text)
    if kind != "Lark grammar":
        # Remove the position: it refers to a Lark grammar that the caller did not write.
        text = re.sub(
            r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text.split(" 1 | start:")[0]
        )
    return f"the {kind} cannot be followed: {text if len(text) <= 300 else text[:297] + '...'}"


class _Words:
    """A vocabulary in the form that llguidance reads: the bytes of each token, by our decoder.

    Control tokens are listed in `special_token_ids`. One EOS token is added at the end, for
    vocabularies that have none.
    """

    def __init__(self, tokenizer: Tokenizer):
        n = tokenizer.vocab_size
        self.tokens = [tokenizer._bytes(i) for i in range(n)] + [b"<end>"]
        stop_ids = {i for i in tokenizer.stop_ids if i < n}
        self.special_token_ids = sorted(
            {*tokenizer._control_ids, *tokenizer._skipped, *stop_ids, n}
        )
        self.eos_token_id, self.bos_token_id = n, tokenizer.bos_id
        # A weak reference, because the values of _vocabularies must not keep their key alive.
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer().encode(
            text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        )


_vocabularies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_building = threading.Lock()


def _vocabulary(tokenizer: Tokenizer):
    """Return the LLTokenizer of a Tokenizer, made once.

    It has only the tokenizer's tokens, even if the model has more logits (padded vocabulary).
    """
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
