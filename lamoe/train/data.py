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
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamoe import atomic
from lamoe.checkpoints import lock
from lamoe.checkpoints.mapped import report_failed_reads
from lamoe.model.config import did_you_mean
from lamoe.train.holdout import SourcesChanged
from lamoe.train.mixing import Mixture
from lamoe.train.packing import FORMAT, Encode, Progress, is_resumable, pack
from lamoe.train.sources import check_sources, stamp
from lamoe.train.streams import Split, Stream

EPOCH_LIMIT = 1 << 32  # limit on seed and epoch, because numpy takes both as 32-bit words


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
    fim_rate: float = 0.0,
    fim_ids: tuple[int, ...] | None = None,
) -> PackedCorpus:
    """Tokenise and pack `sources` into the folder `out_dir`.

    If the folder already holds this corpus, the corpus is opened and nothing is written. It counts
    as the same if the names, sizes and modification times of the source files, the tokenizer's hash
    and the settings are the same. Packing needs some hundred MB of memory, the size of the largest
    document, and about 50 bytes per document.

    A packing that was killed or interrupted is continued by the next call with the same sources,
    tokenizer and settings, and the result is the same. With other ones it starts again.

    Args:
        sources: see train/sources.py.
        encode_batch: function from texts to their token ids without BOS and EOS.
        tokenizer_hash: a text that differs whenever `encode_batch` would return other ids.
        holdout: fraction of every source's bytes to hold out, 0 to 0.5. Whole documents are held
            out, at least one per source, chosen by a hash of seed and name. Of a source with a
            single document the last part is held out, cut between two paragraphs.
        progress: see packing.Progress.
        fim_rate: fraction of the training documents that are reordered for fill-in-the-middle,
            see fill_in.py. Held-out text stays as it is.
        fim_ids: token ids of begin, hole and end, if `fim_rate` is above 0.

    Raises:
        ValueError: if a setting or a source is invalid, `out_dir` holds something else, or another
            process packs into it.
    """
    folder = Path(out_dir)
    _check_settings(bos_id, eos_id, vocab_size, holdout, seed)
    if not 0 <= fim_rate <= 1 or (fim_rate and fim_ids is None):
        raise ValueError(
            f"fim_rate is {fim_rate} and fim_ids {fim_ids}; the rate is a fraction of the "
            "documents, 0 to 1, and above 0 it needs the ids of the three control tokens"
        )
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
    if fim_rate:
        key["fill_in"] = {"rate": fim_rate, "ids": list(fim_ids)}
    work = folder.with_name(f".{folder.name}.partial")
    if (old := _existing(folder)) is not None and old.get("key") == key:
        try:
            corpus = open_corpus(folder)
            if work.exists():  # killed after the last step
                shutil.rmtree(work)
            return corpus
        except ValueError as e:
            warnings.warn(f"{e}; packing it again", stacklevel=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(folder.parent, folder.name)
    with atomic.naming(folder), _locked(work, folder):
        finished = pack(work, key, encode_batch, progress or (lambda *progress: None))
        atomic.move_folder(finished, folder)
    return open_corpus(folder)


@contextmanager
def _locked(work: Path, folder: Path) -> Iterator[None]:
    """Make the work folder of a packing into `folder`, lock it, and remove it at the end.

    If the block raises, a work folder that a later call can use remains.
    """
    keep = False
    try:
        work.mkdir(exist_ok=True)
        with open(work / "lock", "a") as file:
            if not lock.try_lock(file):
                keep = True
                raise ValueError(f"another process packs text into {folder}; wait for it")
            yield
    except BaseException as e:
        keep = keep or (is_resumable(work) and not isinstance(e, SourcesChanged))
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


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
        + (f"; {n:,} for fill-in-the-middle" if (n := tally.get("fill_in_documents")) else "")
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

    With `weights`, every source is a stream of its own with its own epochs, and each row is from
    one source, see mixing.py.

    Any row can be computed from its index, so the number of rows taken is the whole state. Rank r
    of n takes the rows r, r + n, and so on. Together the ranks take the rows that one process would
    take with a batch n times as large.

    Args:
        weights: share of each source of the corpus in the rows. If empty, rows hold the documents
            of all sources, each once per epoch.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: Sequence[float] = (),
    ):
        _check_seq_len(seq_len)
        _check_seed(seed)
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; it must be from 0 to world - 1")
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.rank, self.world = rank, world
        self.rows = 0  # number of rows taken so far, by all ranks together
        self._weights, self._mixture = list(weights), None
        names = [s["source"] for s in corpus.meta["sources"]]
        if not weights:
            self._streams = [Stream(corpus.train, None, seq_len, seed)]
            return
        if len(weights) != len(names):
            raise ValueError(
                f"there are {len(weights)} weights for the {len(names)} sources {', '.join(names)}"
            )
        self._mixture = Mixture(weights, seed)
        self._streams = [
            Stream(corpus.train, np.flatnonzero(corpus.train.sources == n), seq_len, seed, (n,))
            for n in range(len(names))
        ]

    @property
    def epoch(self) -> float:
        """Number of passes over the training text so far. It may be fractional."""
        return self.rows * (self.seq_len + 1) / len(self.corpus.train.tokens)

    def source_epochs(self, rows: int | None = None) -> dict[str, float]:
        """Return {source: passes over its text} of a weighted mixture, else an empty dict.

        Args:
            rows: after that many rows of all ranks. None means so far.
        """
        if self._mixture is None:
            return {}
        counts = self._mixture.counts(self.rows if rows is None else rows)
        names = [s["source"] for s in self.corpus.meta["sources"]]
        return {
            name: float(count) * (self.seq_len + 1) / stream.num_tokens
            for name, count, stream in zip(names, counts, self._streams)
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return the epochs of each source for the metrics of a step, if there are weights."""
        epochs = self.source_epochs()
        return {"source_epochs": {s: round(e, 4) for s, e in epochs.items()}} if epochs else {}

    def describe_mixture(self, rows: int) -> str:
        """Return a text with the share of each source, and its epochs after `rows` rows."""
        return "mixture: " + ", ".join(
            f"{share:.1%} {name} ({epochs:.2f} epochs)"
            for share, (name, epochs) in zip(self._mixture.shares, self.source_epochs(rows).items())
        )

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
            source, row = 0, self.rows + i * self.world + self.rank
            if self._mixture is not None:
                source, row = self._mixture.place(row)
            self._streams[source].fill(row, ids[i], segments[i])
        self.rows += n * self.world
        return ids, segments

    def state_dict(self) -> dict:
        """Return the state for resuming, a dict of numbers and strings, equal on all ranks."""
        return {
            "rows": self.rows,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "corpus": self.corpus.fingerprint,
            **({"weights": self._weights} if self._weights else {}),
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
            ("weights", "data.weights"),
        ):
            if state.get(name) != mine.get(name):
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
