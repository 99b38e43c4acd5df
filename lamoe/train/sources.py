"""Read training text from its sources.

A source is one of:
- "stdlib": the Python standard library of this machine;
- "austen": six novels that come with lamoe;
- a file, a folder (read recursively) or a glob.

text_files.py says which files hold plain text and which hold records with the text in a field. The
field is "text"; write `SOURCE:field` for another one. Documents come in the same order in every
call. Files and documents that cannot be used are counted by reason.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import re
import sys
import sysconfig
import tarfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lamoe.model.config import did_you_mean
from lamoe.os_errors import current_folder, explain
from lamoe.train.text_files import DAMAGED, NotText, read_texts, remark

BUILT_IN = ("austen", "stdlib")
AUSTEN = Path(__file__).resolve().parents[1] / "corpus" / "austen.tar.xz"
_WITH_FIELD = re.compile(r"(?P<path>.+):(?P<field>[^:/\\]+)", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One text of a source.

    Attributes:
        name: unique name within the source. In a folder, the path relative to the folder.
        size: size of the text in UTF-8 bytes.
        digest: hash of the text.
    """

    source: str
    name: str
    text: str
    size: int
    digest: bytes


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
        field: the field of records that holds the text.
        as_records: whether the user named the field, so that the file must hold records.
        named: whether the user named this file itself. An unusable file is then an error. An
            unusable file in a folder is skipped.
    """

    path: Path
    name: str
    read: Callable[[Entry], Iterator[tuple[str, str]]]
    field: str = "text"
    as_records: bool = False
    named: bool = False


def read_documents(
    sources: list[str], counts: dict[str, Counts] | None = None
) -> Iterator[Document]:
    """Yield every document of `sources`, in the order given and sorted by name within a source.

    A text that occurs several times is yielded once. The function keeps one document in memory, and
    16 to 32 bytes per document to recognise duplicates.

    Args:
        sources: the sources, see the module docstring.
        counts: dict that receives one `Counts` per source.

    Raises:
        ValueError: if a source does not exist or has no text, or a record is invalid.
    """
    counts = {} if counts is None else counts
    seen = _HashSet()
    for source in check_sources(sources):
        count = counts[source] = Counts()
        remarks: dict[str, list[Path]] = {}
        for entry in list_entries(source, count.skipped):
            try:
                for name, text in entry.read(entry):
                    if entry.read is _read_file and name == entry.name:
                        remarks.setdefault(remark(entry.path, text), []).append(entry.path)
                    data = text.encode("utf-8")
                    digest = hashlib.blake2b(data, digest_size=16).digest()
                    if not text.strip():
                        count.skipped["empty"] += 1
                    elif not seen.add(int.from_bytes(digest[:8], "little")):
                        count.skipped["duplicate"] += 1
                    else:
                        count.documents += 1
                        count.bytes += len(data)
                        yield Document(source, name, text, len(data), digest)
            except NotText as e:
                if entry.named:
                    raise ValueError(f"source {source!r}: {entry.path} is {e}{e.details}") from None
                count.skipped[str(e)] += 1
        remarks.pop("", None)
        for what, paths in remarks.items():
            warnings.warn(
                f"source {source!r}: {len(paths)} file(s) {what} (first: {paths[0]})", stacklevel=2
            )
        if not count.documents:
            reasons = (
                ", ".join(f"{n} {reason}" for reason, n in sorted(count.skipped.items()))
                or "it holds no files"
            )
            raise ValueError(
                f"source {source!r} gives no text ({reasons}); name a source with UTF-8 text, "
                "or leave it out of the list"
            )


class _HashSet:
    """A set of 64-bit hashes. Python's set needs several times the memory.

    Among 100 million different texts, two with the same hash have a probability of 0.03 %.
    """

    def __init__(self):
        self._table, self._count = array("Q", bytes(8 << 10)), 0  # 0: a free place

    def add(self, value: int) -> bool:
        """Add a hash. Return False if it is there already."""
        value, mask = value or 1, len(self._table) - 1
        place = value & mask
        while found := self._table[place]:
            if found == value:
                return False
            place = (place + 1) & mask
        self._table[place] = value
        self._count += 1
        if 2 * self._count > len(self._table):
            old, self._count = self._table, 0
            self._table = array("Q", bytes(16 * len(old)))
            for other in filter(None, old):
                self.add(other)
        return True


def check_sources(sources: list[str]) -> list[str]:
    """Return `sources` as a list.

    Raises:
        ValueError: if they are not one or more distinct names.
    """
    if isinstance(sources, (str, bytes)) or not sources:
        raise ValueError(
            f"sources must be a list with at least one of {', '.join(BUILT_IN)}, a file, folder or "
            f"glob; found {sources!r}"
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
            try:
                stat = entry.path.stat()
            except OSError as e:
                raise ValueError(f"source {source!r}: {explain(e)}") from None
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
    if (entries := _entries_of(source, skipped)) is not None:
        return entries
    if (match := _WITH_FIELD.fullmatch(source)) and match["path"] not in BUILT_IN:
        entries = _entries_of(match["path"], skipped)
        if entries is not None:
            is_folder = Path(match["path"]).expanduser().is_dir()  # may hold plain text too
            return [replace(e, field=match["field"], as_records=not is_folder) for e in entries]
    if glob.has_magic(source):
        raise ValueError(
            f"source {source!r} matches no file (from {current_folder()}); a folder is named "
            "without *, and ** goes into folders"
        )
    if "://" in source:
        raise ValueError(
            f"source {source!r} is an address; lamoe reads files of this machine, so download it"
        )
    raise ValueError(
        f"source {source!r} does not exist; it is none of {', '.join(BUILT_IN)}, and no file, "
        f"folder or glob of that name is found from {current_folder()}"
        f"{did_you_mean(source, BUILT_IN)}"
    )


def _entries_of(source: str, skipped: Counter[str]) -> list[Entry] | None:
    """List the files of a file, folder or glob. The result is None if there is nothing."""
    path = Path(source).expanduser()
    if path.is_file():
        return [Entry(path, path.name, _read_file, named=True)]
    if path.is_dir():
        return _folder_entries(path, skipped)
    if source == "-" or path.exists():
        what = "standard input" if source == "-" else "a pipe or device"
        raise ValueError(
            f"source {source!r} is {what}, and text is read more than once; write it to a file "
            "and name that"
        )
    return _glob_entries(str(path), skipped) if glob.has_magic(source) else None


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
                found.append(Entry(path, path.relative_to(folder).as_posix(), _read_file))
    _drop_zeros(skipped)
    return sorted(found, key=lambda e: e.name)


def _glob_entries(pattern: str, skipped: Counter[str]) -> list[Entry] | None:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = [Path(p) for p in glob.glob(pattern, recursive=True)]
    skipped["no regular file"] += sum(not p.is_file() for p in paths)
    _drop_zeros(skipped)
    entries = [Entry(p, p.relative_to(root).as_posix(), _read_file) for p in paths if p.is_file()]
    return sorted(entries, key=lambda e: e.name) or None


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
def _read_file(entry: Entry) -> Iterator[tuple[str, str]]:
    return read_texts(entry.path, entry.name, entry.field, entry.as_records, entry.named)


def _read_archive(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield one document per member of the archive of novels."""
    try:
        with tarfile.open(entry.path, "r:xz") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, f"{member.name} is not a file"
                yield member.name, file.read().decode("utf-8")
    except DAMAGED as e:
        raise ValueError(f"{entry.path} is damaged: {e}; install lamoe again") from None


def _read_module(entry: Entry) -> Iterator[tuple[str, str]]:
    """Read a module of the standard library, except generated character tables.

    The tables are nearly equal to each other. If both splits had some, the held-out loss would be
    too low.
    """
    for name, text in _read_file(entry):
        if name.startswith("encodings/") and "Mapping Codec" in text[:400]:
            raise NotText("generated character table")
        yield name, text


def _read_topics(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield pydoc's reference texts, one document per topic."""
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield f"{entry.name}#{topic}", text


def _drop_zeros(skipped: Counter[str]):
    for reason in [r for r, n in skipped.items() if not n]:
        del skipped[reason]


def _raise(error: OSError):
    raise error
