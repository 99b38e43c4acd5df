"""Fill-in-the-middle: reorder training documents so that a model learns to fill gaps.

A document becomes prefix, suffix, middle, each after a control token (PSM order):

    BOS <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle EOS

Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", and the
DeepSeek-Coder report, which uses PSM at rate 0.5.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class FillIn:
    """The rule that reorders documents.

    Attributes:
        rate: fraction of the documents that are reordered.
        ids: token ids of begin, hole and end.
    """

    rate: float
    ids: tuple[int, ...]
    seed: int

    def parts(self, name: str, text: str) -> list[tuple[tuple[int, ...], str]]:
        """Return the document as parts (token ids before the text, text).

        The choice and the two places, between any two characters, depend only on seed and name. So
        they do not depend on other documents or on an interruption.
        """
        data = f"fill in\n{self.seed}\n{name}".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(data, digest_size=24).digest()
        draw, *places = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
        if draw >= self.rate * 2**64:
            return [((), text)]
        start, stop = sorted(place % (len(text) + 1) for place in places)
        begin, hole, end = self.ids
        return [((begin,), text[:start]), ((hole,), text[stop:]), ((end,), text[start:stop])]
