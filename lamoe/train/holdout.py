"""Choose the held-out part of the text of every source."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamoe.train.sources import Counts, Document, read_documents


class SourcesChanged(ValueError):
    """Raised if a second reading finds other text than the first one."""


@dataclass
class Plan:
    """The split into training and held-out text, decided in a first reading of all text.

    Attributes:
        heldout: indices, in reading order, of the documents that are held out as a whole.
        cuts: {index of a document: index of the character where its held-out part begins}.
        digest: hash of all text, to check that a second reading finds the same text.
    """

    counts: dict[str, Counts]
    heldout: set[int]
    cuts: dict[int, int]
    digest: str

    def parts(self, number: int, doc: Document) -> list[tuple[str, str, str]]:
        """Return the parts (split, name, text) of a document: one part, or two if it is cut."""
        if (cut := self.cuts.get(number)) is not None:
            return [
                ("train", f"{doc.name}#head", doc.text[:cut]),
                ("heldout", f"{doc.name}#tail", doc.text[cut:]),
            ]
        return [("heldout" if number in self.heldout else "train", doc.name, doc.text)]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold. `from_dict` is the inverse."""
        return {
            "counts": {s: [c.documents, c.bytes, dict(c.skipped)] for s, c in self.counts.items()},
            "heldout": sorted(self.heldout),
            "cuts": list(self.cuts.items()),
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        """Build a plan from the result of `to_dict`."""
        counts = {
            source: Counts(documents, size, Counter(skipped))
            for source, (documents, size, skipped) in raw["counts"].items()
        }
        return cls(counts, set(raw["heldout"]), dict(raw["cuts"]), raw["digest"])

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Read all text again and yield (number, document).

        Raises:
            SourcesChanged: if the text has changed since the first reading. It is raised at the
                end.
        """
        text_hash = hashlib.blake2b(digest_size=16)
        for number, doc in enumerate(read_documents(list(self.counts))):
            _feed(text_hash, doc)
            yield number, doc
        if text_hash.hexdigest() != self.digest:
            raise SourcesChanged(
                "the text of the sources changed while it was read; nothing was kept. "
                "Start again when no other program writes to them"
            )


def plan_split(
    sources: list[str], holdout: float, seed: int, progress: Callable[[int, int | None, str], None]
) -> Plan:
    """Read all text once and choose the held-out part of every source.

    Only a hash and a size per document stay in memory.

    Args:
        holdout: fraction of every source's bytes to hold out.
        progress: see packing.Progress.
    """
    counts: dict[str, Counts] = {}
    # source -> number of its first document, name hashes, sizes
    seen: dict[str, tuple[int, array[int], array[int]]] = {}
    cut_of_first: dict[str, int | None] = {}
    text_hash, done, reported = hashlib.blake2b(digest_size=16), 0, 0
    for number, doc in enumerate(read_documents(sources, counts)):
        if doc.source not in seen:
            seen[doc.source] = (number, array("Q"), array("Q"))
            cut_of_first[doc.source] = _cut_point(doc.text, holdout)
        seen[doc.source][1].append(_name_hash(seed, doc.name))
        seen[doc.source][2].append(doc.size)
        _feed(text_hash, doc)
        done += doc.size
        if done - reported >= 1 << 20:
            progress(reported := done, None, "reading")
    heldout: set[int] = set()
    cuts: dict[int, int] = {}
    for source, (first, hashes, sizes) in seen.items() if holdout else ():
        if len(sizes) > 1:
            heldout.update(first + i for i in choose_heldout(hashes, sizes, holdout))
        elif (cut := cut_of_first[source]) is not None:
            cuts[first] = cut
        else:
            raise ValueError(
                f"source {source!r} is a single document without a line end to cut it at, so "
                "nothing can be held out; give it as several files, break its lines, or set "
                "holdout to 0"
            )
    return Plan(counts, heldout, cuts, text_hash.hexdigest())


def choose_heldout(hashes: Sequence[int], sizes: Sequence[int], holdout: float) -> list[int]:
    """Return the indices of the documents to hold out, at least one but never all.

    Documents are tried in the order of their hashes. A document is taken if it still fits into the
    fraction `holdout` of all bytes. If none fits, the smallest document is taken.
    """
    bytes_left, smallest, chosen = holdout * sum(sizes), min(sizes), []
    for i in np.argsort(np.array(hashes, np.uint64), kind="stable"):
        if sizes[i] <= bytes_left:
            chosen.append(int(i))
            bytes_left -= sizes[i]
            if bytes_left < smallest:
                break
    return chosen or [min(range(len(sizes)), key=lambda i: (sizes[i], hashes[i], i))]


def _name_hash(seed: int, name: str) -> int:
    data = f"{seed}\n{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _feed(text_hash, doc: Document) -> None:
    text_hash.update(f"{doc.source}\n{doc.name}\n{doc.size}\n".encode("utf-8", "surrogateescape"))
    text_hash.update(doc.digest)


def _cut_point(text: str, holdout: float) -> int | None:
    """Return the index of the character where the last fraction `holdout` of a text begins.

    The cut is after the blank line nearest to the exact place. Without blank lines, it is after the
    nearest line end. The result is None if no cut leaves text on both sides.
    """
    target, first = int(len(text) * (1 - holdout)), len(text) - len(text.lstrip())
    last = len(text.rstrip())
    for border in ("\n\n", "\n"):
        before, after = text.rfind(border, first, target), text.find(border, target, last)
        found = [place for place in (before, after) if place >= 0]
        if found:
            return min(found, key=lambda place: abs(place - target)) + len(border)
    return None
