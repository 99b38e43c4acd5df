"""Packed text as rows of tokens: open a corpus, sample training rows, iterate held-out rows.

A packed corpus is a folder (packing.py writes it):

    train.bin, heldout.bin              BOS, text, EOS of every document; uint16 or uint32,
                                        little-endian
    train.index.npy, heldout.index.npy  int64 [documents, 3]: first token, UTF-8 bytes of the text,
                                        number of the source
    heldout.jsonl                       name and size of every held-out document
    meta.json                           settings, counts and hashes

A corpus does not depend on a sequence length. Rows consist of ids and segments, where a segment is
the part of a document inside the row. In both splits, position j is a target if and only if
segments[j] == segments[j - 1], and a token attends only to tokens of its own segment. This module
needs neither a model nor torch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamoe import atomic
from lamoe.checkpoints.mapped import report_failed_reads
from lamoe.model.config import did_you_mean
from lamoe.train.packing import FORMAT, Encode, Progress, pack
from lamoe.train.sources import check_sources, stamp

EPOCH_LIMIT = 1 << 32  # limit on seed and epoch, because numpy takes both as 32-bit words


@dataclass(frozen=True)
class Split:
    """The training or held-out part of a corpus.

    Attributes:
        tokens: [N] uint16 or uint32, memory-mapped.
        starts: int64 [documents], position of each document's BOS in `tokens`.
        sizes: int64 [documents], UTF-8 bytes of each text.
        sources: int64 [documents], number of each document's source.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, BOS and EOS included, int64 [documents]."""
        return np.diff(self.starts, append=len(self.tokens))

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, BOS and EOS included, as a view of the file."""
        stop = self.starts[i + 1] if i + 1 < len(self) else len(self.tokens)
        return self.tokens[self.starts[i] : stop]


@dataclass(frozen=True)
class PackedCorpus:
    """An opened packed corpus.

    Attributes:
        meta: the content of meta.json.
    """

    folder: Path
    meta: dict
    train: Split
    heldout: Split

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and the split. Two corpora with equal hashes have equal rows."""
        return self.meta["fingerprint"]

    def heldout_bytes(self, source: str | None = None) -> int:
        """Return the size of the held-out text in UTF-8 bytes, the divisor for bits per byte.

        `source` selects one source. None means all.
        """
        return int(self.heldout.sizes[self._of(source)].sum())

    def heldout_documents(self, source: str | None = None) -> Iterator[np.ndarray]:
        """Yield the tokens of each held-out document without BOS and EOS.

        Decoding them gives the held-out text.
        """
        for i in np.flatnonzero(self._of(source)):
            yield self.heldout.document(int(i))[1:-1]

    def describe(self) -> str:
        """Return a text with the counts of each source: read, packed, held out and skipped."""
        return "\n".join(_describe(s) for s in self.meta["sources"])

    def _of(self, source: str | None) -> np.ndarray:
        """Return bool [documents]: which held-out documents are from `source` (None: all)."""
        names = [s["source"] for s in self.meta["sources"]]
        if source is None:
            return np.ones(len(self.heldout), bool)
        if source not in names:
            raise ValueError(
                f"this corpus has no source {source!r}{did_you_mean(source, names)}; "
                f"it has {', '.join(names)}"
            )
        return self.heldout.sources == names.index(source)


# ---- preparing and opening -----------------------------------------------------------------------
def prepare(
    sources: list[str],
    encode_batch: Encode,
    bos_id: int,
    eos_id: int,
    vocab_size: int,
    tokenizer_hash: str,
    out_dir: str | Path,
    holdout: float = 0.02,
    seed: int = 0,
    progress: Progress | None = None,
) -> PackedCorpus:
    """Tokenise and pack `sources` into the folder `out_dir`.

    If the folder already holds this corpus, the corpus is opened and nothing is written. It counts
    as the same if the names, sizes and modification times of the source files, the tokenizer's hash
    and the settings are the same. Packing needs a few MB of memory, the size of the largest
    document, and about 200 bytes per document.

    Args:
        sources: see train/sources.py.
        encode_batch: function from texts to their token ids without BOS and EOS.
        tokenizer_hash: a text that differs whenever `encode_batch` would return other ids.
        holdout: fraction of every source's bytes to hold out, 0 to 0.5. Whole documents are held
            out, at least one per source, chosen by a hash of seed and name. Of a source with a
            single document the last part is held out, cut between two paragraphs.
        progress: see packing.Progress.

    Raises:
        ValueError: if a setting or a source is invalid, or `out_dir` holds something else.
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
        pack(temporary, key, encode_batch, progress or (lambda done, total, activity: None))
    return open_corpus(folder)


def open_corpus(folder: str | Path) -> PackedCorpus:
    """Open a packed corpus.

    Raises:
        ValueError: if a file is missing or has the wrong size. `verify` hashes the contents too.
    """
    folder = Path(folder)
    meta = _existing(folder)
    if meta is None:
        raise ValueError(f"{folder} holds no packed corpus (no meta.json); make one with prepare()")
    return PackedCorpus(
        folder, meta, *(_open_split(folder, name, meta) for name in ("train", "heldout"))
    )


def verify(folder: str | Path) -> None:
    """Compare the tokens and the index of a packed corpus with the hashes in meta.json.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    corpus = open_corpus(folder)
    for name, split in (("train", corpus.train), ("heldout", corpus.heldout)):
        digest = hashlib.sha256(split.tokens.data)
        digest.update(np.stack([split.starts, split.sizes], 1).tobytes())
        if digest.hexdigest() != corpus.meta[name]["sha256"]:
            raise ValueError(
                f"{corpus.folder}: the tokens of {name} do not match their hash; the packed corpus "
                f"is damaged; remove {corpus.folder} and prepare it again"
            )


def _check_settings(bos_id: int, eos_id: int, vocab_size: int, holdout: float, seed: int):
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(
            f"vocab_size is {vocab_size}; token ids are stored in 16 or 32 bits, "
            "so it must be 1 to 2**32"
        )
    for name, value in (("bos_id", bos_id), ("eos_id", eos_id)):
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ValueError(
                f"{name} is {value}; documents are marked by it, so it must be a token id below "
                f"vocab_size {vocab_size}"
            )
    if not 0 <= holdout <= 0.5:
        raise ValueError(
            f"holdout is {holdout}; it is the share of the text held out for evaluation, "
            "0 to 0.5 (0.02 is usual)"
        )
    _check_seed(seed)


def _check_seed(seed: int):
    if not isinstance(seed, int) or not 0 <= seed < EPOCH_LIMIT:
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to 2**32 - 1")


def _existing(folder: Path) -> dict | None:
    """Return meta.json of a packed corpus, or None if `folder` is missing or empty.

    Raises:
        ValueError: if the folder holds something else, which must not be overwritten.
    """
    path = folder / "meta.json"
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} exists and is not a packed corpus; nothing was written. "
                "Name another folder, or remove it"
            )
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(meta, dict) and meta.get("format") == FORMAT
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{path} is not of the format {FORMAT!r}; nothing was written. Remove {folder}, "
            "or name another folder"
        )
    return meta


def _open_split(folder: Path, name: str, meta: dict) -> Split:
    path, index_path = folder / f"{name}.bin", folder / f"{name}.index.npy"
    dtype, num_tokens = np.dtype(meta["dtype"]), meta[name]["tokens"]
    damaged = f"the packed corpus is damaged; remove {folder} and prepare it again"
    size, expected = path.stat().st_size if path.is_file() else None, num_tokens * dtype.itemsize
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
        raise ValueError(f"{path} {found}: {damaged}")
    try:
        index = np.load(index_path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{index_path} cannot be read ({e}): {damaged}") from None
    shape = (meta[name]["documents"], 3)
    if index.shape != shape or index.dtype != np.int64:
        raise ValueError(
            f"{index_path} is {index.dtype} {index.shape}, expected int64 {shape}: {damaged}"
        )
    tokens = np.zeros(0, dtype)
    if num_tokens:
        tokens = np.memmap(path, dtype, mode="r")
        report_failed_reads(tokens, path)
    return Split(tokens, *np.ascontiguousarray(index.T))


def _describe(tally: dict) -> str:
    ratio = f", {tally['bytes'] / tally['tokens']:.2f} bytes a token" if tally["tokens"] else ""
    skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(tally["skipped"].items()))
    return (
        f"{tally['source']}: {tally['documents']:,} documents, {tally['bytes'] / 1e6:.2f} MB, "
        f"{tally['tokens']:,} tokens{ratio}; "
        f"held out {tally['heldout_documents']:,} ({tally['heldout_bytes'] / 1e6:.2f} MB)"
        + (f"; left out: {skipped}" if skipped else "")
    )


# ---- sampling ------------------------------------------------------------------------------------
class Batches:
    """Endless sampler of training rows of seq_len + 1 tokens, shuffled and resumable.

    The documents of each epoch are shuffled and concatenated. The epochs follow each other in one
    stream, which is cut into rows. Rows are always full, because a document continues in the next
    row, also across epochs. So each epoch uses every token exactly once.

    Rows are then shuffled within windows of about one epoch. Otherwise the rows of a batch would be
    consecutive, often parts of one document.

    Any row can be computed from its index, so the number of rows taken is the whole state. Rank r
    of n takes the rows r, r + n, and so on. Together the ranks take the rows that one process would
    take with a batch n times as large.
    """

    def __init__(
        self, corpus: PackedCorpus, seq_len: int, seed: int = 0, rank: int = 0, world: int = 1
    ):
        _check_seq_len(seq_len)
        _check_seed(seed)
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; it must be from 0 to world - 1")
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.rank, self.world = rank, world
        self.rows = 0  # number of rows taken so far, by all ranks together
        self._lengths = corpus.train.lengths
        self._window_rows = max(1, len(corpus.train.tokens) // (seq_len + 1))
        # epoch -> _epoch_order(epoch); two are kept, because a window may span two epochs
        self._epoch_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._row_order: tuple[int, np.ndarray] | None = None  # (window, permutation)

    @property
    def epoch(self) -> float:
        """Number of passes over the training text so far. It may be fractional."""
        return self.rows * (self.seq_len + 1) / len(self.corpus.train.tokens)

    def next_batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Take the next n rows.

        Returns:
            ids: int64 [n, seq_len + 1].
            segments: int32 [n, seq_len + 1], the documents within each row, numbered from 0.
        """
        if n < 1:
            raise ValueError(f"the batch has {n} rows; it must have at least 1")
        ids = np.empty((n, self.seq_len + 1), np.int64)
        segments = np.empty((n, self.seq_len + 1), np.int32)
        for i in range(n):
            self._fill(self._shuffled(self.rows + i * self.world + self.rank), ids[i], segments[i])
        self.rows += n * self.world
        return ids, segments

    def state_dict(self) -> dict:
        """Return the state for resuming, a dict of numbers and strings, equal on all ranks."""
        return {
            "rows": self.rows,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "corpus": self.corpus.fingerprint,
        }

    def load_state_dict(self, state: dict):
        """Resume from `state`. The number of ranks may differ.

        Raises:
            ValueError: if corpus, seq_len or seed differ, because the rows would differ too.
        """
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(
                f"the data state has the keys {sorted(state)}, expected {sorted(mine)}; "
                "it is not from this version's sampler"
            )
        for name, what in (
            ("corpus", "the packed text"),
            ("seq_len", "seq_len"),
            ("seed", "the data seed"),
        ):
            if state[name] != mine[name]:
                raise ValueError(
                    f"cannot resume: {what} is {mine[name]}, the checkpoint was written with "
                    f"{state[name]}; resume with the same sources, tokenizer, split, seq_len and "
                    "seed, or start a new run"
                )
        if not isinstance(state["rows"], int) or state["rows"] < 0:
            raise ValueError(
                f"the data state says {state['rows']!r} rows were taken; "
                "it must be a whole number >= 0"
            )
        self.rows = state["rows"]

    def _shuffled(self, row: int) -> int:
        """Return the index in the stream of the row that the shuffle puts at position `row`."""
        window, place = divmod(row, self._window_rows)
        if self._row_order is None or self._row_order[0] != window:
            rng = np.random.RandomState([self.seed, 1, window])
            self._row_order = window, rng.permutation(self._window_rows)
        return window * self._window_rows + int(self._row_order[1][place])

    def _fill(self, row: int, ids: np.ndarray, segments: np.ndarray) -> None:
        """Write the row with index `row` of the stream to ids and segments, both [seq_len + 1]."""
        width, filled, segment = self.seq_len + 1, 0, 0
        while filled < width:
            epoch, offset = divmod(row * width + filled, len(self.corpus.train.tokens))
            order, ends = self._epoch_order(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            document = self.corpus.train.document(int(order[place]))
            rest = document[offset - int(ends[place]) :]  # a negative index: counted from the end
            count = min(len(rest), width - filled)
            ids[filled : filled + count] = rest[:count]
            segments[filled : filled + count] = segment
            filled, segment = filled + count, segment + 1

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of an epoch in shuffled order, and where each ends in its stream."""
        if epoch not in self._epoch_orders:
            # RandomState and not Generator: numpy guarantees that its streams never change.
            order = np.random.RandomState([self.seed, 0, epoch]).permutation(len(self._lengths))
            kept = {e: o for e, o in self._epoch_orders.items() if abs(e - epoch) == 1}
            self._epoch_orders = kept | {epoch: (order, np.cumsum(self._lengths[order]))}
        return self._epoch_orders[epoch]


def heldout_rows(
    corpus: PackedCorpus, seq_len: int, source: str | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the held-out text once, in fixed order, as (ids int64, segments int32) [seq_len + 1].

    Rows overlap by one token, so every token except BOS is a target exactly once. No row sees the
    context of the row before. The last row is padded with EOS; each pad has a segment of its own,
    so it is never a target.

    For bits per byte, divide the sum over all targets by `corpus.heldout_bytes(source)`. The EOS
    tokens are targets without bytes, so the result is slightly too high and never too low.
    """
    _check_seq_len(seq_len)
    wanted = np.flatnonzero(corpus._of(source))
    if not len(wanted):
        of_source = f" of {source!r}" if source else ""
        raise ValueError(
            f"{corpus.folder} holds no held-out text{of_source}; prepare it with holdout above 0"
        )
    # The documents of one source are contiguous.
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
            f"seq_len is {seq_len}; a row needs at least one token to predict, "
            "so it must be at least 1"
        )
