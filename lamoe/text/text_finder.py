"""Find the first of several texts in a stream, in time linear in the stream."""

from __future__ import annotations

import functools
from collections.abc import Iterable


class TextFinder:
    """Looks for several texts in a stream that arrives in chunks (Knuth, Morris and Pratt).

    A search in the text held back so far would start again with every chunk.
    """

    def __init__(self, texts: Iterable[str]):
        self._texts = [(text, _fallbacks(text)) for text in texts]
        # for each text: the number of its first characters with which the stream ends
        self._matched = [0] * len(self._texts)

    def add(self, chunk: str) -> tuple[int | None, int]:
        """Add a chunk, until the first text is found.

        Returns:
            begin: where the first of the found texts begins, counted from the beginning of this
                chunk, so it may be negative. None if no text is complete.
            held: number of characters at the end of the stream that may begin a text.
        """
        begins = []
        for n, (text, fallbacks) in enumerate(self._texts):
            matched = self._matched[n]
            if not matched and text[0] not in chunk:
                continue
            for i, char in enumerate(chunk):
                while matched and char != text[matched]:
                    matched = fallbacks[matched]
                matched += char == text[matched]
                if matched == len(text):
                    begins.append(i + 1 - matched)
                    break
            self._matched[n] = matched
        return min(begins, default=None), max(self._matched, default=0)


@functools.lru_cache(maxsize=256)
def _fallbacks(text: str) -> list[int]:
    """Return, for each n, the length of the longest beginning of `text` that ends text[:n].

    The beginning is shorter than n.
    """
    lengths = [0, 0]
    for char in text[1:]:
        length = lengths[-1]
        while length and char != text[length]:
            length = lengths[length]
        lengths.append(length + (char == text[length]))
    return lengths
