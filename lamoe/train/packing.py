"""Write a packed corpus: tokenise documents and append them to one file per split.

data.py describes the files and opens them. Packing happens in a work folder:

    plan.json     the settings (`key`) and the split into training and held-out text
    state.json    how much is packed, and the sizes of all files at that time
    *.index       the index of each split, before it becomes an .npy file
    corpus/       the files of the corpus

If the process is killed, the next call with the same settings truncates the files to the sizes in
state.json and continues there. The result is the same as without the interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamoe import atomic
from lamoe.train.fill_in import FillIn
from lamoe.train.holdout import Plan, plan_split
from lamoe.train.sources import Document

FORMAT = "lamoe packed corpus 1"
SPLITS = ("train", "heldout")
# Long documents (a novel, a forum dump) are tokenised in pieces of at most this many characters,
# which end after a line end.
PIECE = 1 << 18
# Number of characters per call of encode_batch. It bounds memory and keeps the tokenizer's threads
# busy.
BATCH = 1 << 22
# Number of characters between two states. A killed packing repeats at most the work between them.
COMMIT = 1 << 25
_PLAN, _STATE = "plan.json", "state.json"
_INDEX_ROW = 24  # bytes of one row of an index: three int64
# What a work folder must agree on to be continued, besides the settings. The state counts pieces.
_WORK = ["lamoe packing 1", PIECE]

# Callback with the arguments bytes done, bytes in all (None while unknown), name of the activity.
Progress = Callable[[int, int | None, str], None]
Encode = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


def pack(work: Path, key: dict, encode_batch: Encode, progress: Progress) -> Path:
    """Tokenise the sources, or go on with that, and write all files of a corpus.

    The sources are read twice, first to plan the split and then to tokenise. To go on, they are
    read once from the beginning, but text that is packed already is not tokenised again.

    Args:
        work: the work folder, see the module. It is emptied if it belongs to another `key`.
        key: the settings that determine the corpus, see data.prepare.
        encode_batch: function from texts to their token ids without BOS and EOS.
        progress: callback for progress, see Progress.

    Returns:
        The folder of the finished corpus, inside `work`.

    Raises:
        SourcesChanged: if the text is not the text of the first reading. Discard `work` then.
        ValueError: if the text or its token ids are invalid.
    """
    plan = _load_plan(work, key)
    if plan is None:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        plan = plan_split(key["sources"], key["holdout"], key["seed"], progress)
        saved = {"work": _WORK, "key": key, "plan": plan.to_dict()}
        atomic.write_text(work / _PLAN, json.dumps(saved))
    fill_in = None
    if "fill_in" in key:
        fill_in = FillIn(key["fill_in"]["rate"], tuple(key["fill_in"]["ids"]), key["seed"])
    total = sum(c.bytes for c in plan.counts.values())
    with _open_output(work, key, plan) as output:
        for batch in _batches(plan, key, fill_in, skip=output.num_pieces):
            output.write(batch, _encode(encode_batch, batch, key, output.dtype))
            progress(output.num_bytes, total, "tokenizing")
        output.finish()
    return work / "corpus"


def is_resumable(work: Path) -> bool:
    """Return whether tokens were stored in a work folder that a later call can go on from."""
    return (work / _STATE).exists()


def _load_plan(work: Path, key: dict) -> Plan | None:
    """Return the plan of an earlier call with the same settings, or None."""
    saved = _read_json(work / _PLAN)
    if saved is None or saved.get("work") != _WORK:
        return None
    if saved["key"] == key:
        return Plan.from_dict(saved["plan"])
    if saved["key"] == {**key, "stamp": saved["key"]["stamp"]}:
        warnings.warn(
            "the source files have changed since a packing of them was interrupted; it starts "
            "again from the beginning",
            stacklevel=4,
        )
    return None


def _read_json(path: Path) -> dict | None:
    """Return the content of a file, or None if it does not exist or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


# ---- documents in pieces -------------------------------------------------------------------------
@dataclass
class _Piece:
    """A part of one document.

    Attributes:
        source: index of the source.
        name: name of the whole document.
        size: size of the whole document in UTF-8 bytes.
        before: token ids before the text, for example BOS.
        after: token ids after the text.
        first: whether the document begins with this piece.
        last: whether the document ends with this piece.
        filled_in: whether the parts of the document are in another order.
    """

    text: str
    split: str
    source: int
    name: str
    size: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    first: bool
    last: bool
    filled_in: bool


def _pieces(
    document: Document, number: int, plan: Plan, key: dict, fill_in: FillIn | None
) -> Iterator[_Piece]:
    source, bos, eos = key["sources"].index(document.source), (key["bos_id"],), (key["eos_id"],)
    for split, name, text in plan.parts(number, document):
        size = document.size if text is document.text else len(text.encode("utf-8"))
        parts: list[tuple[tuple[int, ...], str]] = [((), text)]
        if fill_in is not None and split == "train":
            parts = fill_in.parts(name, text)
        for n, (before, part) in enumerate(parts):
            start = 0
            while start < len(part) or not start:
                stop = min(start + PIECE, len(part))
                if stop < len(part):
                    stop = part.rfind("\n", start, stop) + 1 or stop
                first, last = n == start == 0, n == len(parts) - 1 and stop == len(part)
                yield _Piece(
                    part[start:stop],
                    split,
                    source,
                    name,
                    size,
                    bos * first + before * (not start),
                    eos * last,
                    first,
                    last,
                    len(parts) > 1,
                )
                start = max(stop, 1)


def _batches(plan: Plan, key: dict, fill_in: FillIn | None, skip: int) -> Iterator[list[_Piece]]:
    """Yield the pieces of all documents in order but the first `skip`, about BATCH characters."""
    batch, characters, seen = [], 0, 0
    for number, document in plan.documents():
        for piece in _pieces(document, number, plan, key, fill_in):
            seen += 1
            if seen <= skip:
                continue
            batch.append(piece)
            characters += len(piece.text)
            if characters >= BATCH:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    encode_batch: Encode, batch: list[_Piece], key: dict, dtype: np.dtype
) -> list[np.ndarray]:
    """Return the token ids of each piece, in the dtype of the corpus, after checking them.

    Without the checks, an id beyond the vocabulary would be truncated to 16 bits, and a BOS inside
    a text would split the document. Neither would raise an error.
    """
    rows = encode_batch([piece.text for piece in batch])
    if len(rows) != len(batch):
        raise ValueError(f"encode_batch gave {len(rows)} results for {len(batch)} texts")
    arrays = [r if isinstance(r, np.ndarray) else np.asarray(r, np.int64) for r in rows]
    ends, ids = np.cumsum([len(a) for a in arrays]), np.concatenate(arrays)
    outside = (ids < 0) | (ids >= key["vocab_size"])
    marks = [key["bos_id"], key["eos_id"], *key.get("fill_in", {}).get("ids", ())]
    wrong = outside | np.isin(ids, marks)
    if wrong.any():
        i = int(np.searchsorted(ends, np.argmax(wrong), side="right"))
        piece, row = batch[i], arrays[i]
        where = f"document {piece.name!r} of source {key['sources'][piece.source]!r}"
        if row.min() < 0 or row.max() >= key["vocab_size"]:
            raise ValueError(
                f"{where} encodes to ids {row.min()} to {row.max()}, outside vocab_size "
                f"{key['vocab_size']}; the tokenizer and its vocab_size do not belong together"
            )
        raise ValueError(
            f"{where} encodes to BOS {key['bos_id']} or EOS {key['eos_id']} or another control "
            "token inside the text; those mark where documents and their parts begin and end, so "
            "encode_batch must neither add them nor read them out of plain text"
        )
    return np.split(ids.astype(dtype, copy=False), ends[:-1])


# ---- files and counts ----------------------------------------------------------------------------
class _Damaged(Exception):
    """Raised if the files of a work folder do not fit its state."""


def _open_output(work: Path, key: dict, plan: Plan) -> _Output:
    """Open the files where state.json says that they end, or new ones."""
    state = _read_json(work / _STATE)
    tallies = [_new_tally(s, c, "fill_in" in key) for s, c in plan.counts.items()]
    try:
        return _Output(work, key, tallies, state)
    except (_Damaged, FileNotFoundError):
        (work / _STATE).unlink(missing_ok=True)
        return _Output(work, key, tallies, None)


class _Output:
    """The files of a corpus while they grow. Only counts stay in memory."""

    def __init__(self, work: Path, key: dict, tallies: list[dict[str, Any]], state: dict | None):
        self.work, self.key, self.folder = work, key, work / "corpus"
        self.folder.mkdir(exist_ok=True)
        self.dtype = np.dtype("<u2" if key["vocab_size"] <= 1 << 16 else "<u4")
        self.num_pieces = state["num_pieces"] if state else 0
        self.num_bytes = state["num_bytes"] if state else 0
        self.tallies = state["tallies"] if state else tallies
        self.uncommitted = 0  # characters since the last state
        with ExitStack() as stack:
            self.splits = {
                name: stack.enter_context(
                    _SplitWriter(work, name, self.dtype, state["splits"][name] if state else None)
                )
                for name in SPLITS
            }
            size = state["names_size"] if state else 0
            self.names = stack.enter_context(_open_at(self.folder / "heldout.jsonl", size))
            self._stack = stack.pop_all()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def write(self, batch: list[_Piece], rows: list[np.ndarray]) -> None:
        """Append pieces and their token ids. Now and then, store the state."""
        for name, writer in self.splits.items():
            writer.write([(p, ids) for p, ids in zip(batch, rows) if p.split == name])
        for piece, ids in zip(batch, rows):
            tally = self.tallies[piece.source]
            _count(tally, piece, len(ids))
            if piece.split == "heldout" and piece.last:
                line = {"source": tally["source"], "name": piece.name, "bytes": piece.size}
                self.names.write(json.dumps(line).encode() + b"\n")
            self.num_bytes += piece.size * piece.last
            self.uncommitted += len(piece.text)
        self.num_pieces += len(batch)
        if self.uncommitted >= COMMIT:
            self._commit()

    def _commit(self) -> None:
        for file in (self.names, *(f for w in self.splits.values() for f in w.files)):
            file.flush()
            os.fsync(file.fileno())
        state = {
            "num_pieces": self.num_pieces,
            "num_bytes": self.num_bytes,
            "tallies": self.tallies,
            "splits": {name: writer.state() for name, writer in self.splits.items()},
            "names_size": self.names.tell(),
        }
        atomic.write_text(self.work / _STATE, json.dumps(state))
        self.uncommitted = 0

    def finish(self) -> None:
        """Write the index files and meta.json."""
        splits = {name: writer.finish(self.folder) for name, writer in self.splits.items()}
        hashes = splits["train"]["sha256"] + splits["heldout"]["sha256"]
        meta = {
            "format": FORMAT,
            "key": self.key,
            "dtype": self.dtype.str,
            "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
            **splits,
            "sources": self.tallies,
        }
        self.names.flush()
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _SplitWriter:
    """Appends tokens to the file of one split, and index rows to another.

    Args:
        state: the state to go on from, or None for new files.
    """

    def __init__(self, work: Path, name: str, dtype: np.dtype, state: dict | None):
        self.name, self.dtype = name, dtype
        self.tokens = state["tokens"] if state else 0
        self.documents = state["documents"] if state else 0
        path = work / "corpus" / f"{name}.bin"
        self.files = []
        try:
            self.files.append(_open_at(path, self.tokens * dtype.itemsize))
            self.files.append(_open_at(work / f"{name}.index", self.documents * _INDEX_ROW))
            with open(path, "rb") as file:
                self.hash = hashlib.file_digest(file, "sha256")
            if state and self.hash.hexdigest() != state["sha256"]:
                raise _Damaged
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *exception):
        for file in self.files:
            file.close()

    def state(self) -> dict:
        """Return what a new writer needs to go on here."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.hash.hexdigest(),
        }

    def write(self, pieces: list[tuple[_Piece, np.ndarray]]) -> None:
        """Append pieces with their token ids."""
        parts: list[Any] = []
        index: list[tuple[int, int, int]] = []
        for piece, ids in pieces:
            if piece.first:
                index.append((self.tokens, piece.size, piece.source))
            for part in (piece.before, ids, piece.after):
                parts.append(np.asarray(part, self.dtype))
                self.tokens += len(part)
        data = b"".join(parts)
        tokens_file, index_file = self.files
        tokens_file.write(data)
        self.hash.update(data)
        index_file.write(np.array(index, "<i8").tobytes())
        self.documents += len(index)

    def finish(self, folder: Path) -> dict:
        """Write the index file and return the entry of the split in meta.json."""
        for file in self.files:
            file.flush()
        index, size = np.zeros((0, 3), np.int64), 0
        if self.documents:
            index = np.memmap(self.files[1].name, "<i8", mode="r").reshape(-1, 3)
        np.save(folder / f"{self.name}.index.npy", np.asarray(index))
        for start in range(0, self.documents, 1 << 16):
            rows = np.array(index[start : start + (1 << 16), :2])
            self.hash.update(rows.tobytes())
            size += int(rows[:, 1].sum())
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": size,
            "sha256": self.hash.hexdigest(),
        }


def _open_at(path: Path, size: int):
    """Open a file for appending after its first `size` bytes. The rest is cut off."""
    if not size:
        return open(path, "wb")
    if path.stat().st_size < size:
        raise _Damaged
    os.truncate(path, size)
    return open(path, "ab")


def _new_tally(source: str, counts, has_fill_in: bool) -> dict[str, Any]:
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
        **({"fill_in_documents": 0} if has_fill_in else {}),
    }


def _count(tally: dict[str, Any], piece: _Piece, num_ids: int) -> None:
    tokens = len(piece.before) + num_ids + len(piece.after)
    tally["tokens"] += tokens
    if piece.split == "heldout":
        tally["heldout_tokens"] += tokens
        tally["heldout_documents"] += piece.last
        tally["heldout_bytes"] += piece.size * piece.last
    elif piece.filled_in:
        tally["fill_in_documents"] += piece.last
