"""Write a packed corpus: tokenise documents and append them to one file per split.

data.py describes the files and opens them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamoe.train.holdout import Plan, plan_split
from lamoe.train.sources import Document

FORMAT = "lamoe packed corpus 1"
# Long documents (a novel, a forum dump) are tokenised in pieces of at most this many characters,
# which end after a line end.
PIECE = 1 << 18
# Number of characters per call of encode_batch. It bounds memory and keeps the tokenizer's threads
# busy.
BATCH = 1 << 22

# Callback with the arguments bytes done, bytes in all (None while unknown), name of the activity.
Progress = Callable[[int, int | None, str], None]
Encode = Callable[[list[str]], list[list[int]]]


def pack(folder: Path, key: dict, encode_batch: Encode, progress: Progress) -> None:
    """Tokenise the sources and write all files of a corpus into the empty `folder`.

    The sources are read twice, first to plan the split and then to tokenise.

    Args:
        folder: the folder to fill.
        key: the settings that determine the corpus, see data.prepare.
        encode_batch: function from texts to their token ids without BOS and EOS.
        progress: callback for progress, see Progress.
    """
    plan = plan_split(key["sources"], key["holdout"], key["seed"], progress)
    dtype = np.dtype("<u2" if key["vocab_size"] <= 1 << 16 else "<u4")
    writers = {
        name: _SplitWriter(folder, name, dtype, key["bos_id"], key["eos_id"])
        for name in ("train", "heldout")
    }
    tallies = [_new_tally(source, counts) for source, counts in plan.counts.items()]
    total, done = sum(c.bytes for c in plan.counts.values()), 0
    with open(folder / "heldout.jsonl", "w", encoding="ascii") as heldout_names:
        for batch in _batches(plan):
            for piece, ids in zip(batch, _encode(encode_batch, batch, key)):
                writers[piece.split].write(ids, piece)
                tally = tallies[piece.source]
                _count(tally, piece, len(ids))
                if piece.split == "heldout" and piece.last:
                    line = {"source": tally["source"], "name": piece.name, "bytes": piece.size}
                    heldout_names.write(json.dumps(line) + "\n")
            done += sum(len(piece.text.encode("utf-8")) for piece in batch)
            progress(done, total, "tokenizing")
    splits = {name: writer.close() for name, writer in writers.items()}
    hashes = splits["train"]["sha256"] + splits["heldout"]["sha256"]
    meta = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype.str,
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
        **splits,
        "sources": tallies,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


# ---- documents in pieces -------------------------------------------------------------------------
@dataclass
class _Piece:
    """A part of one document.

    Attributes:
        source: index of the source.
        name: name of the whole document.
        size: size of the whole document in UTF-8 bytes.
        first: whether the document begins with this piece.
        last: whether the document ends with this piece.
    """

    text: str
    split: str
    source: int
    name: str
    first: bool
    last: bool
    size: int


def _pieces(document: Document, number: int, source: int, plan: Plan) -> Iterator[_Piece]:
    for split, name, text in plan.parts(number, document):
        start, size = 0, len(text.encode("utf-8"))
        while start < len(text):
            stop = min(start + PIECE, len(text))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield _Piece(text[start:stop], split, source, name, start == 0, stop == len(text), size)
            start = stop


def _batches(plan: Plan) -> Iterator[list[_Piece]]:
    """Yield the pieces of all documents in order, about BATCH characters at a time."""
    batch, characters, order = [], 0, list(plan.counts)
    for number, document in plan.documents():
        for piece in _pieces(document, number, order.index(document.source), plan):
            batch.append(piece)
            characters += len(piece.text)
            if characters >= BATCH:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(encode_batch: Encode, batch: list[_Piece], key: dict) -> Iterator[np.ndarray]:
    """Yield the token ids of each piece after checking them.

    Without the checks, an id beyond the vocabulary would be truncated to 16 bits, and a BOS inside
    a text would split the document. Neither would raise an error.
    """
    rows = encode_batch([piece.text for piece in batch])
    if len(rows) != len(batch):
        raise ValueError(f"encode_batch gave {len(rows)} results for {len(batch)} texts")
    for piece, row in zip(batch, rows):
        ids = np.asarray(row, np.int64)
        where = f"document {piece.name!r} of source {key['sources'][piece.source]!r}"
        if len(ids) and (ids.min() < 0 or ids.max() >= key["vocab_size"]):
            raise ValueError(
                f"{where} encodes to ids {ids.min()} to {ids.max()}, outside vocab_size "
                f"{key['vocab_size']}; the tokenizer and its vocab_size do not belong together"
            )
        if np.any((ids == key["bos_id"]) | (ids == key["eos_id"])):
            raise ValueError(
                f"{where} encodes to BOS {key['bos_id']} or EOS {key['eos_id']} inside the text; "
                "those mark where documents begin and end, so encode_batch must neither add them "
                "nor read them out of plain text"
            )
        yield ids


# ---- files and counts ----------------------------------------------------------------------------
class _SplitWriter:
    """Appends tokens to the file of one split. Only the index stays in memory."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, bos_id: int, eos_id: int):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.bos_id, self.eos_id = bos_id, eos_id
        self.file = open(folder / f"{name}.bin", "wb")
        self.index, self.tokens, self.hash = array("q"), 0, hashlib.sha256()

    def write(self, ids: np.ndarray, piece: _Piece) -> None:
        if piece.first:
            self.index.extend((self.tokens, piece.size, piece.source))
            ids = np.concatenate(([self.bos_id], ids))
        if piece.last:
            ids = np.concatenate((ids, [self.eos_id]))
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(ids)

    def close(self) -> dict:
        """Write the index file and return the entry of the split in meta.json."""
        self.file.close()
        index = np.array(self.index, np.int64).reshape(-1, 3)
        np.save(self.folder / f"{self.name}.index.npy", index)
        self.hash.update(index[:, :2].tobytes())
        return {
            "documents": len(index),
            "tokens": self.tokens,
            "bytes": int(index[:, 1].sum()),
            "sha256": self.hash.hexdigest(),
        }


def _new_tally(source: str, counts) -> dict[str, Any]:
    """Make the entry of a source in meta.json, with the counts of the first reading."""
    return {
        "source": source,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "skipped": dict(counts.skipped),
        "tokens": 0,
        "heldout_documents": 0,
        "heldout_bytes": 0,
        "heldout_tokens": 0,
    }


def _count(tally: dict[str, Any], piece: _Piece, num_ids: int) -> None:
    tokens = num_ids + 2 * piece.last  # BOS and EOS
    tally["tokens"] += tokens
    if piece.split == "heldout":
        tally["heldout_tokens"] += tokens
        tally["heldout_documents"] += piece.last
        tally["heldout_bytes"] += piece.size * piece.last
