"""Encode much text on few cores: a cache of the token ids of words.

The tokenizers library spends its time on its regular expressions and on the objects that it makes
per text, not on the merges of BPE. A text has few different words, so this module looks the ids of
a word up in a cache, and only new words go through the model. The ids are the same as those of
`Tokenizer.encode_batch` (tested). Splitting and looking up are compiled (csrc/text/); without the
extension, this module does them with regular expressions and dicts, three to five times slower.

Where a text may be cut depends on the pre-tokenizer, so this works only for vocabularies that
`lamoe.text.tokenizer.train` made. Others, and machines with many cores, on which the library's
threads are faster, use the library.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from lamoe.text.tokenizer import BYTE_OF, PRE_TOKENIZER, Tokenizer

try:
    from lamoe import _native
except ImportError:  # not built
    _native = None
native: Any = _native

# A blank belongs to the word after it, and the pre-tokenizer looks only one blank ahead. So it
# splits a text at all borders of these units, and splits a unit alone as in its text.
_ASCII_UNIT = re.compile(r" ?\S+|\s+(?!\S)|\s", re.ASCII)
# Outside of ASCII, Python's \s also matches U+001C to U+001F, which the library counts as text.
_UNIT = re.compile(r" ?[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]")
# The pattern of PRE_TOKENIZER for texts in ASCII.
_ASCII_WORD = re.compile(
    r" ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|[\r\n0-9]|[^\S\r\n]+(?!\S)|[^\S\r\n]+", re.ASCII
)
_SPELLING = {byte: char for char, byte in BYTE_OF.items()}
_BLANK = _SPELLING[ord(" ")]
_MAX_ENTRIES = 1 << 20  # of a cache, about 200 bytes each
_MAX_LENGTH = 64  # characters of a unit that is worth an entry
_LONG_UNIT = 16  # mean characters of the units in languages without blanks, which seldom repeat
# The library on that many cores is as fast as the cache on one.
_MANY_CORES = 24 if hasattr(native, "UnitEncoder") else 8


def fast_encode_batch(tokenizer: Tokenizer) -> Callable[[list[str]], list]:
    """Return a function from texts to the ids of each, like `tokenizer.encode_batch`.

    Its results are lists or numpy arrays.
    """
    one_thread = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if is_supported(tokenizer) and (one_thread or cores < _MANY_CORES):
        return CachedEncoder(tokenizer).encode_batch
    return tokenizer.encode_batch


def is_supported(tokenizer: Tokenizer) -> bool:
    """Return whether `CachedEncoder` gives the ids of this tokenizer."""
    inner = tokenizer.inner
    model, added = inner.model, inner.get_added_tokens_decoder().values()
    return (
        type(model).__name__ == "BPE"
        and not model.dropout
        and not model.byte_fallback
        and not model.ignore_merges
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and inner.normalizer is None
        and inner.pre_tokenizer is not None
        and inner.pre_tokenizer.__getstate__() == PRE_TOKENIZER.__getstate__()
        and all(t.content in tokenizer.control_tokens for t in added)
    )


class CachedEncoder:
    """Encodes texts with caches of units and words. See the module.

    Args:
        tokenizer: a tokenizer for which `is_supported` is true.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._model = tokenizer, tokenizer.inner.model
        self._code = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
        self._dtype = np.dtype(self._code)
        self._words = _Cache(self._encode_word)
        self._units = _Cache(self._encode_unit)
        self._compiled = None
        if hasattr(native, "UnitEncoder"):  # an extension of an earlier version has none
            self._compiled = native.UnitEncoder(_MAX_ENTRIES)

    def encode_batch(self, texts: list[str]) -> list:
        """Return the ids of each text, as uint16 or uint32 arrays."""
        encode = self._encode if self._compiled is None else self._encode_compiled
        rows = [encode(text) for text in texts]
        without_blanks = [n for n, row in enumerate(rows) if row is None]
        encoded = self._tokenizer.encode_batch([texts[n] for n in without_blanks])
        for n, ids in zip(without_blanks, encoded):
            rows[n] = array(self._code, ids).tobytes()
        return [np.frombuffer(row or b"", self._dtype) for row in rows]

    def _encode(self, text: str) -> bytes | None:
        """Return the ids of a text, or None if it has few blanks."""
        units = (_ASCII_UNIT if text.isascii() else _UNIT).findall(text)
        if len(text) > _LONG_UNIT * len(units) and not text.isascii():
            return None
        return b"".join(map(self._units.__getitem__, units))

    def _encode_compiled(self, text: str) -> bytes | None:
        """Do the same as `_encode` in compiled code."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate
            return self._encode(text)
        if not text.isascii() and len(text) > _LONG_UNIT * native.count_units(data):
            return None
        piece = self._compiled.start(data)
        while piece is not None:
            if piece.isascii():
                ids = self._encode_word(piece.decode())
            else:
                ids = array(self._code, self._tokenizer.encode(piece.decode())).tobytes()
            piece = self._compiled.supply(ids)
        return self._compiled.ids()

    def _encode_unit(self, unit: str) -> bytes:
        if not unit.isascii():
            return array(self._code, self._tokenizer.encode(unit)).tobytes()
        return b"".join(map(self._words.__getitem__, _ASCII_WORD.findall(unit)))

    def _encode_word(self, word: str) -> bytes:
        # Printable characters of ASCII are spelt as themselves, and `replace` is faster.
        printable = word.isprintable()
        spelled = word.replace(" ", _BLANK) if printable else word.translate(_SPELLING)
        ids = [token.id for token in self._model.tokenize(spelled)]
        if not self._tokenizer._control_ids.isdisjoint(ids):  # merged from plain text
            ids = self._tokenizer.encode(word)
        return array(self._code, ids).tobytes()


class _Cache(dict):
    """A dict that computes missing values and starts again when it is full."""

    def __init__(self, compute: Callable[[str], bytes]):
        self._compute = compute

    def __missing__(self, key: str) -> bytes:
        value = self._compute(key)
        if len(key) <= _MAX_LENGTH:
            if len(self) >= _MAX_ENTRIES:
                self.clear()
            self[key] = value
        return value
