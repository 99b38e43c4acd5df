"""Text to rows of tokens: held-out split, packing into memory-mapped files, shuffled resumable sampling. No model, no torch.

A packed corpus is a folder: train.bin and heldout.bin (BOS text EOS of every document, uint16 or uint32, little-endian), for each
an index (int64 [documents, 3]: first token, UTF-8 bytes of text, number of the source), heldout.jsonl (what was held out) and
meta.json. It does not depend on a sequence length. Both splits obey one rule: position j of a row is a target exactly when
segments[j] == segments[j - 1], and attention stays inside equal segments.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamoe.checkpoints import atomic
from lamoe.model.config import did_you_mean
from lamoe.train.sources import Document, Plan, check_sources, plan_split, stamp

FORMAT = "lamoe packed corpus 1"
PIECE = (
    1 << 18
)  # characters handed to the tokenizer at once: a novel or a dump of a forum is cut after a line end near this
BATCH = (
    1 << 22
)  # characters per call of encode_batch: bounds memory, and keeps the tokenizer's threads busy
EPOCH_LIMIT = 1 << 32  # seeds and epochs are 32-bit words of the shuffle's seed

Progress = Callable[
    [int, int | None, str], None
]  # bytes done, bytes in all (None when not known yet), what is being done


@dataclass(frozen=True)
class Split:
    """One side of the corpus. tokens [N] (memory-mapped), starts, sizes (UTF-8 bytes) and sources: int64 [documents]."""

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    sources: np.ndarray

    def __len__(self):
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document with BOS and EOS, int64 [documents]."""
        return np.diff(self.starts, append=len(self.tokens))

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, BOS and EOS included: a view of the file."""
        stop = self.starts[i + 1] if i + 1 < len(self) else len(self.tokens)
        return self.tokens[self.starts[i] : stop]


@dataclass(frozen=True)
class PackedCorpus:
    """An opened folder of packed text. `fingerprint` is a hash of the tokens and the split, equal wherever they are equal."""

    folder: Path
    meta: dict
    train: Split
    heldout: Split

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    def heldout_bytes(self, source: str | None = None) -> int:
        """UTF-8 bytes of the held-out text, of one source or of all: the divisor of bits per byte."""
        return int(self.heldout.sizes[self._of(source)].sum())

    def heldout_documents(self, source: str | None = None) -> Iterator[np.ndarray]:
        """The tokens of each held-out document between BOS and EOS; decoding them gives the held-out text back."""
        for i in np.flatnonzero(self._of(source)):
            yield self.heldout.document(int(i))[1:-1]

    def describe(self) -> str:
        """One line per source: what was read, packed, held out and left out."""
        return "\n".join(_describe(s) for s in self.meta["sources"])

    def _of(self, source: str | None) -> np.ndarray:
        names = [s["source"] for s in self.meta["sources"]]
        if source is None:
            return np.ones(len(self.heldout), bool)
        if source not in names:
            raise ValueError(
                f"this corpus has no source {source!r}{did_you_mean(source, names)}; it has {', '.join(names)}"
            )
        return self.heldout.sources == names.index(source)


# ---- packing ---------------------------------------------------------------------------------------------------------------
def prepare(
    sources: list[str],
    encode_batch: Callable[[list[str]], list[list[int]]],
    bos_id: int,
    eos_id: int,
    vocab_size: int,
    tokenizer_hash: str,
    out_dir: str | Path,
    holdout: float = 0.02,
    seed: int = 0,
    progress: Progress | None = None,
) -> PackedCorpus:
    """Tokenise `sources` into the folder `out_dir`, or open it when it already holds exactly that.

    `encode_batch` gives ids without BOS and EOS. About `holdout` (0 to 0.5) of every source's bytes are held out: whole documents,
    chosen by a hash of seed and name, at least one (the smallest, when all are larger than the share); of a source that is a single
    document, the last part, cut off between two paragraphs. A corpus counts as the same when the names, sizes and times of
    change of its files, the tokenizer's hash and the split are. Packing goes to a temporary folder that replaces `out_dir` when
    complete. Memory: a few MB plus the largest document, and some 200 bytes per document.
    """
    folder = Path(out_dir)
    _check_settings(bos_id, eos_id, vocab_size, holdout, seed)
    key = {
        "sources": check_sources(sources),
        "stamp": stamp(sources),
        "tokenizer": tokenizer_hash,
        "bos_id": bos_id,
        "eos_id": eos_id,
        "vocab_size": vocab_size,
        "holdout": holdout,
        "seed": seed,
    }
    if (old := _existing(folder)) is not None and old.get("key") == key:
        try:
            return open_corpus(folder)
        except ValueError as e:
            warnings.warn(f"{e}; packing it again", stacklevel=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(folder.parent, folder.name)
    with atomic.replace_folder(folder) as temporary:
        _pack(temporary, key, encode_batch, progress or (lambda done, total, what: None))
    return open_corpus(folder)


def open_corpus(folder: str | Path) -> PackedCorpus:
    """Open a packed corpus. A missing or shortened file raises ValueError (contents are not hashed again)."""
    folder = Path(folder)
    meta = _existing(folder)
    if meta is None:
        raise ValueError(f"{folder} holds no packed corpus (no meta.json); make one with prepare()")
    return PackedCorpus(
        folder, meta, *(_open_split(folder, name, meta) for name in ("train", "heldout"))
    )


def _check_settings(bos_id: int, eos_id: int, vocab_size: int, holdout: float, seed: int):
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(
            f"vocab_size is {vocab_size}; token ids are stored in 16 or 32 bits, so it must be 1 to 2**32"
        )
    for name, value in (("bos_id", bos_id), ("eos_id", eos_id)):
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ValueError(
                f"{name} is {value}; documents are marked by it, so it must be a token id below vocab_size {vocab_size}"
            )
    if not 0 <= holdout <= 0.5:
        raise ValueError(
            f"holdout is {holdout}; it is the share of the text kept for evaluation, 0 to 0.5 (0.02 is usual)"
        )
    _check_seed(seed)


def _check_seed(seed: int):
    if not isinstance(seed, int) or not 0 <= seed < EPOCH_LIMIT:
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2**32 - 1")


def _existing(folder: Path) -> dict | None:
    """meta.json of a packed corpus, None where there is nothing; a folder that is something else is an error, never overwritten."""
    path = folder / "meta.json"
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} exists and is not a packed corpus; nothing was written. Name another folder, or remove it"
            )
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(meta, dict) and meta.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{path} is not of the format {FORMAT!r}; nothing was written. Remove {folder}, or name another folder"
        )
    return meta


def _open_split(folder: Path, name: str, meta: dict) -> Split:
    path, index_path, dtype = (
        folder / f"{name}.bin",
        folder / f"{name}.index.npy",
        np.dtype(meta["dtype"]),
    )
    count, documents = meta[name]["tokens"], meta[name]["documents"]
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        found = (
            "is missing" if size is None else f"has {size} bytes, expected {count * dtype.itemsize}"
        )
        raise ValueError(
            f"{path} {found}: the packed corpus is damaged; remove {folder} and prepare it again"
        )
    try:
        index = np.load(index_path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(
            f"{index_path} cannot be read ({e}): the packed corpus is damaged; remove {folder} and prepare it again"
        ) from None
    if index.shape != (documents, 3) or index.dtype != np.int64:
        raise ValueError(
            f"{index_path} is {index.dtype} {index.shape}, expected int64 {(documents, 3)}: the packed corpus is damaged; "
            f"remove {folder} and prepare it again"
        )
    tokens = np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype)
    return Split(tokens, *np.ascontiguousarray(index.T))


@dataclass
class _Piece:
    """A stretch of one document. The tokens of a document are those of its pieces, between one BOS and one EOS."""

    text: str
    split: str
    source: int
    name: str
    first: bool
    last: bool
    size: int


def _pieces(doc: Document, number: int, source: int, plan: Plan) -> Iterator[_Piece]:
    for split, name, text in plan.parts(number, doc):
        start, size = 0, len(text.encode("utf-8"))
        while start < len(text):
            stop = min(start + PIECE, len(text))
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield _Piece(text[start:stop], split, source, name, start == 0, stop == len(text), size)
            start = stop


class _SplitWriter:
    """Appends tokens to one split's file and keeps its index; memory is the index alone."""

    def __init__(self, folder: Path, name: str, dtype, bos_id: int, eos_id: int):
        self.folder, self.name, self.dtype, self.bos_id, self.eos_id = (
            folder,
            name,
            dtype,
            bos_id,
            eos_id,
        )
        self.file = open(folder / f"{name}.bin", "wb")
        self.index, self.tokens, self.hash = array("q"), 0, hashlib.sha256()

    def write(self, ids: np.ndarray, piece: _Piece):
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


def _pack(folder: Path, key: dict, encode_batch, progress: Progress):
    """Read everything a second time, now tokenising, and write all files of the corpus; meta.json comes last."""
    plan = plan_split(key["sources"], key["holdout"], key["seed"], progress)
    dtype = np.dtype("<u2" if key["vocab_size"] <= 1 << 16 else "<u4")
    writers = {
        name: _SplitWriter(folder, name, dtype, key["bos_id"], key["eos_id"])
        for name in ("train", "heldout")
    }
    tallies = [
        {
            "source": s,
            "documents": c.documents,
            "bytes": c.bytes,
            "skipped": dict(c.skipped),
            "tokens": 0,
            "heldout_documents": 0,
            "heldout_bytes": 0,
            "heldout_tokens": 0,
        }
        for s, c in plan.counts.items()
    ]
    total, done = sum(c.bytes for c in plan.counts.values()), 0
    with open(folder / "heldout.jsonl", "w", encoding="ascii") as names:
        for batch in _batches(plan):
            for piece, ids in zip(batch, _encode(encode_batch, batch, key)):
                writers[piece.split].write(ids, piece)
                tally, extra = tallies[piece.source], 2 * piece.last  # BOS and EOS
                tally["tokens"] += len(ids) + extra
                if piece.split == "heldout":
                    tally["heldout_tokens"] += len(ids) + extra
                    tally["heldout_documents"] += piece.last
                    tally["heldout_bytes"] += piece.size * piece.last
                    if piece.last:
                        names.write(
                            json.dumps(
                                {"source": tally["source"], "name": piece.name, "bytes": piece.size}
                            )
                            + "\n"
                        )
            done += sum(len(piece.text.encode("utf-8")) for piece in batch)
            progress(done, total, "tokenizing")
    splits = {name: writer.close() for name, writer in writers.items()}
    fingerprint = hashlib.sha256(
        (splits["train"]["sha256"] + splits["heldout"]["sha256"]).encode()
    ).hexdigest()
    meta = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype.str,
        "fingerprint": fingerprint,
        **splits,
        "sources": tallies,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _batches(plan: Plan) -> Iterator[list[_Piece]]:
    """The pieces of all documents in order, some MB at a time."""
    batch, characters, order = [], 0, list(plan.counts)
    for number, doc in plan.documents():
        for piece in _pieces(doc, number, order.index(doc.source), plan):
            batch.append(piece)
            characters += len(piece.text)
            if characters >= BATCH:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(encode_batch, batch: list[_Piece], key: dict) -> Iterator[np.ndarray]:
    """Checked ids of each piece: a wrong id would be cut to 16 bits, and a BOS inside a text would split it, both unseen."""
    rows = encode_batch([piece.text for piece in batch])
    if len(rows) != len(batch):
        raise ValueError(f"encode_batch gave {len(rows)} results for {len(batch)} texts")
    for piece, row in zip(batch, rows):
        ids = np.asarray(row, np.int64)
        where = f"document {piece.name!r} of source {key['sources'][piece.source]!r}"
        if len(ids) and (ids.min() < 0 or ids.max() >= key["vocab_size"]):
            raise ValueError(
                f"{where} encodes to ids {ids.min()} to {ids.max()}, outside vocab_size {key['vocab_size']}; "
                "the tokenizer and its vocab_size do not belong together"
            )
        if np.any((ids == key["bos_id"]) | (ids == key["eos_id"])):
            raise ValueError(
                f"{where} encodes to BOS {key['bos_id']} or EOS {key['eos_id']} inside the text; those mark where documents "
                "begin and end, so encode_batch must neither add them nor read them out of plain text"
            )
        yield ids


def _describe(tally: dict) -> str:
    ratio = f", {tally['bytes'] / tally['tokens']:.2f} bytes a token" if tally["tokens"] else ""
    left_out = ", ".join(f"{n} {why}" for why, n in sorted(tally["skipped"].items()))
    return (
        f"{tally['source']}: {tally['documents']:,} documents, {tally['bytes'] / 1e6:.2f} MB, {tally['tokens']:,} tokens{ratio}; "
        f"held out {tally['heldout_documents']:,} ({tally['heldout_bytes'] / 1e6:.2f} MB)"
        + (f"; left out: {left_out}" if left_out else "")
    )


# ---- sampling --------------------------------------------------------------------------------------------------------------
class Batches:
    """Rows of seq_len + 1 consecutive tokens out of an endless stream: epoch after epoch, each in its own shuffled order of documents.

    Every row of the stream is full; what is left of a document goes on in the next row, also over the border of an epoch, so an epoch
    has every token exactly once. Rows are dealt out shuffled too, within windows of as many rows as fit in an epoch: else the rows
    of a batch would be neighbours, often out of a single document. Rows are numbered, and any row is found from its number alone: that
    number is the whole state. Rank r of n takes rows r, r + n, ...; together the ranks take what one process would with batches n
    times as large.
    """

    def __init__(
        self, corpus: PackedCorpus, seq_len: int, seed: int = 0, rank: int = 0, world: int = 1
    ):
        _check_seq_len(seq_len)
        _check_seed(seed)
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; it must be from 0 to world - 1")
        self.corpus, self.seq_len, self.seed, self.rank, self.world = (
            corpus,
            seq_len,
            seed,
            rank,
            world,
        )
        self.rows = 0  # rows taken so far by all ranks together
        self._lengths = corpus.train.lengths
        self._window = max(1, len(corpus.train.tokens) // (seq_len + 1))  # rows
        self._orders: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # of the epochs in use: a window may touch two
        self._deal: tuple[int, np.ndarray] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the training text so far, with its fraction."""
        return self.rows * (self.seq_len + 1) / len(self.corpus.train.tokens)

    def next_batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 [n, seq_len + 1] and segments int32 [n, seq_len + 1]: documents within a row numbered from 0, in order."""
        if n < 1:
            raise ValueError(f"a batch of {n} rows was asked for; it must be at least 1")
        ids, segments = (
            np.empty((n, self.seq_len + 1), np.int64),
            np.empty((n, self.seq_len + 1), np.int32),
        )
        for i in range(n):
            self._fill(self._shuffled(self.rows + i * self.world + self.rank), ids[i], segments[i])
        self.rows += n * self.world
        return ids, segments

    def state_dict(self) -> dict:
        """All that is needed to go on: plain numbers and strings, the same on every rank."""
        return {
            "rows": self.rows,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "corpus": self.corpus.fingerprint,
        }

    def load_state_dict(self, state: dict):
        """Go on from `state`. Another corpus, seq_len or seed would give other rows, so it is refused; another world is fine."""
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(
                f"the data state has the keys {sorted(state)}, expected {sorted(mine)}; it is not from this version's sampler"
            )
        for name, what in (
            ("corpus", "the packed text"),
            ("seq_len", "seq_len"),
            ("seed", "the data seed"),
        ):
            if state[name] != mine[name]:
                raise ValueError(
                    f"cannot resume: {what} is {mine[name]}, the checkpoint was written with {state[name]}; resume with the "
                    "same sources, tokenizer, split, seq_len and seed, or start a new run"
                )
        if not isinstance(state["rows"], int) or state["rows"] < 0:
            raise ValueError(
                f"the data state says {state['rows']!r} rows were taken; it must be a whole number >= 0"
            )
        self.rows = state["rows"]

    def _shuffled(self, row: int) -> int:
        """Which row of the stream is dealt out as number `row`."""
        window, place = divmod(row, self._window)
        if self._deal is None or self._deal[0] != window:
            self._deal = (
                window,
                np.random.RandomState([self.seed, 1, window]).permutation(self._window),
            )
        return window * self._window + int(self._deal[1][place])

    def _fill(self, row: int, ids: np.ndarray, segments: np.ndarray):
        width, filled, segment = self.seq_len + 1, 0, 0
        while filled < width:
            epoch, offset = divmod(row * width + filled, len(self.corpus.train.tokens))
            order, ends = self._epoch_order(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            left = self.corpus.train.document(int(order[place]))[
                offset - int(ends[place]) :
            ]  # counted from the document's end
            take = min(len(left), width - filled)
            ids[filled : filled + take] = left[:take]
            segments[filled : filled + take] = segment
            filled, segment = filled + take, segment + 1

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of documents and where each ends in its stream. RandomState: numpy promises its streams never change."""
        if epoch not in self._orders:
            order = np.random.RandomState([self.seed, 0, epoch]).permutation(len(self._lengths))
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {
                epoch: (order, np.cumsum(self._lengths[order]))
            }
        return self._orders[epoch]


def heldout_rows(
    corpus: PackedCorpus, seq_len: int, source: str | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The held-out text once: rows of ids int64 [seq_len + 1] and segments int32 [seq_len + 1], in fixed order.

    Rows overlap by one token, so each token but BOS is a target (segments[j] == segments[j - 1]) exactly once; context starts anew with
    every row. The last row is filled up with EOS, each in a segment of its own, hence never a target. Bits per byte is the sum of
    all targets' bits over `corpus.heldout_bytes(source)`; EOS is among the targets, so it is stated slightly too high, never too low.
    """
    _check_seq_len(seq_len)
    wanted = np.flatnonzero(corpus._of(source))
    if not len(wanted):
        raise ValueError(
            f"{corpus.folder} holds no held-out text{f' of {source!r}' if source else ''}; prepare it with holdout above 0"
        )
    # the documents of a source lie side by side, as they were read
    lengths, start = corpus.heldout.lengths[wanted], int(corpus.heldout.starts[wanted[0]])
    tokens, ends = corpus.heldout.tokens[start : start + int(lengths.sum())], np.cumsum(lengths)
    for at in range(0, len(tokens) - 1, seq_len):
        real = tokens[at : at + seq_len + 1]
        ids = np.full(seq_len + 1, corpus.meta["key"]["eos_id"], np.int64)
        ids[: len(real)] = real
        segments = np.searchsorted(ends, np.arange(at, at + len(real)), side="right")
        segments = np.concatenate((segments, segments[-1] + 1 + np.arange(seq_len + 1 - len(real))))
        yield ids, (segments - segments[0]).astype(np.int32)


def _check_seq_len(seq_len: int):
    if seq_len < 1:
        raise ValueError(
            f"seq_len is {seq_len}; a row needs at least one token to predict, so it must be at least 1"
        )
