"""Read training text from its sources and choose the held-out part.

A source is one of:
- "stdlib": the Python standard library of this machine;
- "austen": six novels that come with lamoe;
- a text file, a folder (read recursively) or a glob;
- a .jsonl file, with one object per line and the text in its field "text"; write
  `file.jsonl:field` for another field.

Text and .jsonl files may be compressed (.gz, .xz). Documents come in the same order in every call.
Files and documents that cannot be used are counted by reason.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamoe.model.config import did_you_mean

BUILT_IN = ("austen", "stdlib")
AUSTEN = Path(__file__).resolve().parents[1] / "corpus" / "austen.tar.xz"
_JSONL = re.compile(r"(?P<path>.*\.jsonl(?:\.gz|\.xz)?)(?::(?P<field>[^:/\\]+))?", re.DOTALL)
_PACKERS = (".gz", ".xz")
_UNSUPPORTED_PACKERS = (".zst", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".parquet")
_DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, tarfile.TarError)
# Number of bytes that are checked for zeros before the rest of a file is read, because a folder may
# hold a binary file such as a disk image.
_SNIFF_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """One text of a source.

    Attributes:
        name: unique name within the source. In a folder, the path relative to the folder.
        size: size of the text in UTF-8 bytes.
    """

    source: str
    name: str
    text: str
    size: int


@dataclass
class Counts:
    """Counts of the documents that were read from one source.

    Attributes:
        bytes: total size of all documents in UTF-8 bytes.
        skipped: {reason: number of files, folders and documents skipped for it}.
    """

    documents: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        return f"{self.documents:,} documents, {self.bytes / 1e6:.2f} MB" + (
            f" (left out: {skipped})" if skipped else ""
        )


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Attributes:
        read: function that yields (document name, text) of each document in the file.
        field: the field of a .jsonl file that holds the text.
        named: whether the user named this file itself. An unusable file is then an error. An
            unusable file in a folder is skipped.
    """

    path: Path
    name: str
    read: Callable[[Entry], Iterator[tuple[str, str]]]
    field: str = "text"
    named: bool = False


class _NotText(Exception):
    """Raised for a file that cannot be used. The message is the reason in Counts.skipped."""


def read_documents(
    sources: list[str], counts: dict[str, Counts] | None = None
) -> Iterator[Document]:
    """Yield every document of `sources`, in the order given and sorted by name within a source.

    A text that occurs several times is yielded once. The function keeps one document in memory, and
    about 120 bytes per document to recognise duplicates.

    Args:
        sources: the sources, see the module docstring.
        counts: dict that receives one `Counts` per source.

    Raises:
        ValueError: if a source does not exist or has no text, or a line of JSON is invalid.
    """
    counts = {} if counts is None else counts
    seen: set[bytes] = set()
    for source in check_sources(sources):
        count = counts[source] = Counts()
        for entry in list_entries(source, count.skipped):
            try:
                for name, text in entry.read(entry):
                    data = text.encode("utf-8")
                    digest = hashlib.blake2b(data, digest_size=16).digest()
                    if not text.strip():
                        count.skipped["empty"] += 1
                    elif digest in seen:
                        count.skipped["duplicate"] += 1
                    else:
                        seen.add(digest)
                        count.documents += 1
                        count.bytes += len(data)
                        yield Document(source, name, text, len(data))
            except _NotText as reason:
                if entry.named:
                    raise ValueError(
                        f"source {source!r}: {entry.path} is {reason}, not UTF-8 text"
                        f"{_unpack_advice(entry.path)}"
                    ) from None
                count.skipped[str(reason)] += 1
        if not count.documents:
            reasons = (
                ", ".join(f"{n} {reason}" for reason, n in sorted(count.skipped.items()))
                or "it holds no files"
            )
            raise ValueError(
                f"source {source!r} gives no text ({reasons}); name a source with UTF-8 text, "
                "or leave it out of the list"
            )


def check_sources(sources: list[str]) -> list[str]:
    """Return `sources` as a list.

    Raises:
        ValueError: if they are not one or more distinct names.
    """
    if isinstance(sources, (str, bytes)) or not sources:
        raise ValueError(
            f"sources must be a list with at least one of {', '.join(BUILT_IN)}, a file, folder, "
            f"glob or .jsonl; found {sources!r}"
        )
    for source in sources:
        if not isinstance(source, str) or not source:
            raise ValueError(f"a source is a name or path, found {source!r}")
        if sources.count(source) > 1:
            raise ValueError(
                f"source {source!r} is listed {sources.count(source)} times; list it once "
                "(more epochs show it more often)"
            )
    return list(sources)


def stamp(sources: list[str]) -> str:
    """Return a hash of the names, sizes and modification times of all files of the sources."""
    digest = hashlib.sha256(f"python {sys.version}".encode() if "stdlib" in sources else b"")
    for source in check_sources(sources):
        for entry in list_entries(source, Counter()):
            stat = entry.path.stat()
            facts = [source, str(entry.path), entry.name, entry.field]
            digest.update(json.dumps([*facts, stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


# ---- from a source to its files ------------------------------------------------------------------
def list_entries(source: str, skipped: Counter[str]) -> list[Entry]:
    """List the files of one source in a fixed order.

    Files and folders that are not listed are counted in `skipped`, by reason.
    """
    if source == "stdlib":
        return _stdlib_entries(skipped)
    if source == "austen":
        if not AUSTEN.is_file():
            raise ValueError(
                f"source 'austen': {AUSTEN} is missing; this installation of lamoe is incomplete, "
                "install it again"
            )
        return [Entry(AUSTEN, "austen", _read_archive)]
    path = Path(source).expanduser()
    if path.is_file():
        return [_entry(path, path.name, named=True)]
    if path.is_dir():
        return _folder_entries(path, skipped)
    if match := _JSONL.fullmatch(source):
        path = Path(match["path"]).expanduser()
        if match["field"] and path.is_file():
            return [_entry(path, path.name, named=True, field=match["field"])]
    if glob.has_magic(source):
        return _glob_entries(str(Path(source).expanduser()), source, skipped)
    raise ValueError(
        f"source {source!r} does not exist; it is none of {', '.join(BUILT_IN)}, and no file, "
        f"folder or glob of that name is found from {os.getcwd()}{did_you_mean(source, BUILT_IN)}"
    )


def _entry(path: Path, name: str, named: bool = False, field: str = "text") -> Entry:
    read = _read_jsonl if _JSONL.fullmatch(path.name) else _read_text
    return Entry(path, name, read, field, named)


def _folder_entries(
    folder: Path, skipped: Counter[str], prune: frozenset = frozenset()
) -> list[Entry]:
    """List all regular files below `folder`, sorted by path.

    Hidden files, caches and folders whose name is in `prune` are skipped. So are linked folders,
    because links may form a loop.
    """
    prune |= {"__pycache__"}
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        keep = [
            f
            for f in folders
            if not f.startswith(".")
            and f not in prune
            and not os.path.islink(os.path.join(parent, f))
        ]
        skipped["hidden, cached or linked folder"] += len(folders) - len(keep)
        folders[:] = keep
        for file in files:
            path = Path(parent, file)
            if file.startswith("."):
                skipped["hidden file"] += 1
            elif not path.is_file():  # reading a pipe would block; a dangling link has no text
                skipped["no regular file"] += 1
            else:
                found.append(_entry(path, path.relative_to(folder).as_posix()))
    _drop_zeros(skipped)
    return sorted(found, key=lambda e: e.name)


def _glob_entries(pattern: str, source: str, skipped: Counter[str]) -> list[Entry]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = [Path(p) for p in glob.glob(pattern, recursive=True)]
    skipped["no regular file"] += sum(not p.is_file() for p in paths)
    _drop_zeros(skipped)
    entries = [_entry(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]
    if not entries:
        raise ValueError(
            f"source {source!r} matches no file (from {os.getcwd()}); a folder is named without *, "
            "and ** goes into folders"
        )
    return sorted(entries, key=lambda e: e.name)


def _stdlib_entries(skipped: Counter[str]) -> list[Entry]:
    """List the modules of the standard library and pydoc's reference topics.

    Tests, installed packages and the build settings of this Python are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
    entries = []
    for entry in _folder_entries(root, Counter(), leave_out) if root.is_dir() else []:
        if entry.path.suffix == ".py" and not entry.name.startswith("_sysconfigdata"):
            topics = entry.name == "pydoc_data/topics.py"
            entries.append(Entry(entry.path, entry.name, _read_topics if topics else _read_module))
    if not entries:
        raise ValueError(
            f"source 'stdlib': {root} holds no Python sources (a trimmed installation?); "
            "name another source of text"
        )
    if not any(e.read is _read_topics for e in entries):
        skipped["reference topics (not installed)"] += 1
    return entries


# ---- from a file to its documents ----------------------------------------------------------------
def _read_text(entry: Entry) -> Iterator[tuple[str, str]]:
    with _open(entry.path) as file:
        data = _decompressed(entry, lambda: file.read(_SNIFF_BYTES))
        if b"\0" in data:
            raise _NotText("binary")
        data += _decompressed(entry, file.read)
    if b"\0" in data:
        raise _NotText("binary")
    try:
        yield entry.name, data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _NotText(
            f"in another encoding (byte {e.start})" if entry.named else "in another encoding"
        ) from None


def _read_jsonl(entry: Entry) -> Iterator[tuple[str, str]]:
    with _open(entry.path) as file:
        number = 0
        while line := _decompressed(entry, file.readline):
            number += 1
            if line.strip():
                text = _text_field(line, entry.field, f"{entry.path}, line {number}")
                yield f"{entry.name}:{number}", text


def _text_field(line: bytes, field: str, where: str) -> str:
    """Return the text in one line of a .jsonl file. Error messages begin with `where`."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{where}: not valid JSON ({e}); it starts with {line[:40]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected an object with the field {field!r}, found {type(row).__name__}"
        )
    if field not in row:
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise ValueError(
            f"{where}: no field {field!r}{did_you_mean(field, row)}; it has {has}. "
            "To use another field, write file.jsonl:field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where}: field {field!r} holds half a surrogate pair at character {e.start}; "
            "it is not valid text"
        ) from None
    return text


def _read_archive(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield one document per member of the archive of novels."""
    try:
        with tarfile.open(entry.path, "r:xz") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, f"{member.name} is not a file"
                yield member.name, file.read().decode("utf-8")
    except _DAMAGED as e:
        raise ValueError(f"{entry.path} is damaged: {e}; install lamoe again") from None


def _read_module(entry: Entry) -> Iterator[tuple[str, str]]:
    """Read a module of the standard library, except generated character tables.

    The tables are nearly equal to each other. If both splits had some, the held-out loss would be
    too low.
    """
    for name, text in _read_text(entry):
        if name.startswith("encodings/") and "Mapping Codec" in text[:400]:
            raise _NotText("generated character table")
        yield name, text


def _read_topics(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield pydoc's reference texts, one document per topic."""
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield f"{entry.name}#{topic}", text


def _open(path: Path) -> gzip.GzipFile | lzma.LZMAFile | io.BufferedReader:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb")


def _decompressed(entry: Entry, read: Callable[[], bytes]) -> bytes:
    """Return read(). A decompression error becomes a ValueError that names the file."""
    try:
        return read()
    except _DAMAGED as e:
        raise ValueError(
            f"{entry.path} is damaged: cannot be decompressed ({e or type(e).__name__}); "
            "fetch or pack it again"
        ) from None


def _unpack_advice(path: Path) -> str:
    packed = path.suffix in _UNSUPPORTED_PACKERS or (
        path.suffix in _PACKERS and Path(path.stem).suffix == ".tar"
    )
    if not packed:
        return ""
    return (
        f"; unpack {path.suffix} files first "
        f"({', '.join(_PACKERS)} of single texts are read as they are)"
    )


def _drop_zeros(skipped: Counter[str]):
    for reason in [r for r, n in skipped.items() if not n]:
        del skipped[reason]


def _raise(error: OSError):
    raise error


# ---- from documents to a split -------------------------------------------------------------------
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

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Read all text again and yield (number, document).

        Raises:
            ValueError: if the text has changed since the first reading. It is raised at the end.
        """
        text_hash = hashlib.blake2b(digest_size=16)
        for number, doc in enumerate(read_documents(list(self.counts))):
            _feed(text_hash, doc)
            yield number, doc
        if text_hash.hexdigest() != self.digest:
            raise ValueError(
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
    bytes_left, chosen = holdout * sum(sizes), []
    for i in sorted(range(len(sizes)), key=lambda i: (hashes[i], i)):
        if sizes[i] <= bytes_left:
            chosen.append(i)
            bytes_left -= sizes[i]
    return chosen or [min(range(len(sizes)), key=lambda i: (sizes[i], hashes[i], i))]


def _name_hash(seed: int, name: str) -> int:
    data = f"{seed}\n{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _feed(text_hash, doc: Document) -> None:
    text_hash.update(f"{doc.source}\n{doc.name}\n{doc.size}\n".encode("utf-8", "surrogateescape"))
    text_hash.update(doc.text.encode("utf-8"))


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
