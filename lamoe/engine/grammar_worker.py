"""The work of the child process that compiles grammars of clients for the first time.

The library bounds most of its work, but not whether the intersection of several expressions is
empty, for example: that takes any time and memory. Nothing can end it in a thread of the server.
So every grammar is compiled here first, for a small vocabulary, and discarded. Then it is known to
compile in the server.

A request has the grammar as Lark text `lark`, or as a regular expression `regex`, and `limits`. The
answer has the `source` in the library's own notation, or an `error`.
"""

from __future__ import annotations

import threading
from typing import Any

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY_BYTES = 1 << 30
# The library recurses along references and rules.
_STACK = 256 << 20


class _Bytes:
    """A vocabulary of the 256 bytes and EOS."""

    tokens = [bytes([b]) for b in range(256)] + [b"<end>"]
    eos_token_id, bos_token_id = 256, None
    special_token_ids = [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_VOCABULARY = LLTokenizer(TokenizerWrapper(_Bytes()))


def prepare() -> None:
    threading.stack_size(_STACK)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a grammar in a thread with a deep stack."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result.update(_compile(request))
        except MemoryError:
            result.update(error="it needs too much memory", ends=True)
        except Exception as e:
            result.update(error=str(e))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    lark = request["lark"]
    if "regex" in request:
        lark = f"start: /{llguidance.regex_to_lark(request['regex'], 'dws')}/{lark}"
    source, limits = LLMatcher.grammar_from_lark(lark), LLParserLimits(**request["limits"])
    failed, messages = LLMatcher.validate_grammar_with_warnings(source, limits=limits)
    if failed:
        return {"error": messages[0]}
    matcher = LLMatcher(_VOCABULARY, source, limits=limits, log_level=0)
    if not matcher.is_error():  # an error here may be due to the small vocabulary
        matcher.compute_bitmask()
    return {"source": source}
