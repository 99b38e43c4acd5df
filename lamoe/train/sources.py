"""Where training text comes from and which of it is held out: names of sources in, documents out, always in the same order.

A source is one of: "stdlib" (the Python standard library of this machine), "austen" (six novels that come with lamoe), a text
file, a folder (read recursively), a glob, a .jsonl file (one object per line, text in the field "text", or `file.jsonl:field`).
Text and .jsonl files may be compressed (.gz, .xz). What cannot be used is counted by reason, never dropped in silence.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lamoe.model.config import did_you_mean

BUILT_IN = ("austen", "stdlib")
AUSTEN = Path(__file__).resolve().parents[1] / "corpus" / "austen.tar.xz"
_JSONL = re.compile(r"(?P<path>.*\.jsonl(?:\.gz|\.xz)?)(?::(?P<field>[^:/\\]+))?", re.DOTALL)
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_OTHER_PACKERS = (".zst", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".parquet")
_DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, tarfile.TarError)
_SNIFF = (
    1 << 16
)  # bytes looked at before a whole file is read, so that a folder with a disk image in it stays cheap


@dataclass(frozen=True)
class Document:
    """One text. `name` is unique within `source` and does not depend on where a folder lies; `size` is in UTF-8 bytes."""

    source: str
    name: str
    text: str
    size: int


@dataclass
class Counts:
    """What reading one source came to: documents and UTF-8 bytes delivered, and how much was left out and why."""

    documents: int = 0
    bytes: int = 0
    skipped: Counter = field(default_factory=Counter)

    def __str__(self):
        left_out = ", ".join(f"{n} {why}" for why, n in sorted(self.skipped.items()))
        return f"{self.documents:,} documents, {self.bytes / 1e6:.2f} MB" + (
            f" (left out: {left_out})" if left_out else ""
        )


@dataclass(frozen=True)
class Entry:
    """One file of a source. `asked`: the user named this very file, so what is wrong with it is an error and not a skip."""

    path: Path
    name: str
    read: Callable[[Entry], Iterator[tuple[str, str]]]  # -> (document name, text)
    field: str = "text"
    asked: bool = False


class _NotText(Exception):
    """Internal: the reason why a file met in a folder was passed over."""


def read_documents(
    sources: list[str], counts: dict[str, Counts] | None = None
) -> Iterator[Document]:
    """Every document of `sources`, in the order given and sorted by name within a source; identical texts only once.

    `counts`, when given, is filled with one `Counts` per source. Memory: the largest single document, and about 120 bytes per
    document to recognise duplicates. A source that does not exist or gives no text, and a broken line of JSON, raise ValueError.
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
                if entry.asked:
                    raise ValueError(
                        f"source {source!r}: {entry.path} is {reason}, not UTF-8 text{_advice(entry.path)}"
                    ) from None
                count.skipped[str(reason)] += 1
        if not count.documents:
            why = (
                ", ".join(f"{n} {reason}" for reason, n in sorted(count.skipped.items()))
                or "it holds no files"
            )
            raise ValueError(
                f"source {source!r} gives no text ({why}); name a source with UTF-8 text, or leave it out of the list"
            )


def check_sources(sources: list[str]) -> list[str]:
    """`sources` itself, when it is a list of distinct names and at least one."""
    if isinstance(sources, (str, bytes)) or not sources:
        raise ValueError(
            f"sources must be a list with at least one of {', '.join(BUILT_IN)}, a file, folder, glob or .jsonl; "
            f"found {sources!r}"
        )
    for source in sources:
        if not isinstance(source, str) or not source:
            raise ValueError(f"a source is a name or path, found {source!r}")
        if sources.count(source) > 1:
            raise ValueError(
                f"source {source!r} is listed {sources.count(source)} times; list it once (more epochs show it more often)"
            )
    return list(sources)


def stamp(sources: list[str]) -> str:
    """A hash of what the sources are made of, without reading them: names, sizes and times of change of all their files."""
    digest = hashlib.sha256(f"python {sys.version}".encode() if "stdlib" in sources else b"")
    for source in check_sources(sources):
        for entry in list_entries(source, Counter()):
            stat = entry.path.stat()
            digest.update(
                json.dumps(
                    [
                        source,
                        str(entry.path),
                        entry.name,
                        entry.field,
                        stat.st_size,
                        stat.st_mtime_ns,
                    ]
                ).encode()
            )
    return digest.hexdigest()


# ---- from a source to its files --------------------------------------------------------------------------------------------
def list_entries(source: str, skipped: Counter) -> list[Entry]:
    """The files of one source in a fixed order. What is passed over without opening it is added to `skipped`."""
    if source == "stdlib":
        return _stdlib_entries(skipped)
    if source == "austen":
        if not AUSTEN.is_file():
            raise ValueError(
                f"source 'austen': {AUSTEN} is missing; this installation of lamoe is incomplete, install it again"
            )
        return [Entry(AUSTEN, "austen", _read_archive)]
    path = Path(source).expanduser()
    if path.is_file():
        return [_entry(path, path.name, asked=True)]
    if path.is_dir():
        return _folder_entries(path, skipped)
    if match := _JSONL.fullmatch(source):
        path = Path(match["path"]).expanduser()
        if match["field"] and path.is_file():
            return [_entry(path, path.name, asked=True, field=match["field"])]
    if glob.has_magic(source):
        return _glob_entries(str(Path(source).expanduser()), source, skipped)
    raise ValueError(
        f"source {source!r} does not exist; it is none of {', '.join(BUILT_IN)}, and no file, folder or glob of that name "
        f"is found from {os.getcwd()}{did_you_mean(source, BUILT_IN)}"
    )


def _entry(path: Path, name: str, asked=False, field="text") -> Entry:
    return Entry(
        path, name, _read_jsonl if _JSONL.fullmatch(path.name) else _read_text, field, asked
    )


def _folder_entries(folder: Path, skipped: Counter, prune: frozenset = frozenset()) -> list[Entry]:
    """All regular files below, sorted by path. Linked folders are not followed (loops); hidden things and caches are passed over."""
    prune |= {"__pycache__"}
    found = []
    for at, folders, files in os.walk(folder, onerror=_raise):
        keep = [
            f
            for f in folders
            if not f.startswith(".") and f not in prune and not os.path.islink(os.path.join(at, f))
        ]
        skipped["hidden, cached or linked folder"] += len(folders) - len(keep)
        folders[:] = keep
        for file in files:
            path = Path(at, file)
            if file.startswith("."):
                skipped["hidden file"] += 1
            elif not path.is_file():  # a pipe would block for ever; a dangling link has no text
                skipped["no regular file"] += 1
            else:
                found.append(_entry(path, path.relative_to(folder).as_posix()))
    _drop_zeros(skipped)
    return sorted(found, key=lambda e: e.name)


def _glob_entries(pattern: str, source: str, skipped: Counter) -> list[Entry]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    paths = [Path(p) for p in glob.glob(pattern, recursive=True)]
    skipped["no regular file"] += sum(not p.is_file() for p in paths)
    _drop_zeros(skipped)
    entries = [_entry(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]
    if not entries:
        raise ValueError(
            f"source {source!r} matches no file (from {os.getcwd()}); a folder is named without *, and ** goes into folders"
        )
    return sorted(entries, key=lambda e: e.name)


def _stdlib_entries(skipped: Counter) -> list[Entry]:
    """The library's own modules, without tests, installed packages and this build's settings, and the reference topics as prose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
    entries = []
    for entry in _folder_entries(root, Counter(), leave_out) if root.is_dir() else []:
        if entry.path.suffix == ".py" and not entry.name.startswith("_sysconfigdata"):
            topics = entry.name == "pydoc_data/topics.py"
            entries.append(Entry(entry.path, entry.name, _read_topics if topics else _read_module))
    if not entries:
        raise ValueError(
            f"source 'stdlib': {root} holds no Python sources (a trimmed installation?); name another source of text"
        )
    if not any(e.read is _read_topics for e in entries):
        skipped["reference topics (not installed)"] += 1
    return entries


# ---- from a file to its documents ------------------------------------------------------------------------------------------
def _read_text(entry: Entry) -> Iterator[tuple[str, str]]:
    with _open(entry.path) as file:
        data = _guarded(entry, lambda: file.read(_SNIFF))
        if b"\0" in data:
            raise _NotText("binary")
        data += _guarded(entry, file.read)
    if b"\0" in data:
        raise _NotText("binary")
    try:
        yield entry.name, data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _NotText(
            f"in another encoding (byte {e.start})" if entry.asked else "in another encoding"
        ) from None


def _read_jsonl(entry: Entry) -> Iterator[tuple[str, str]]:
    with _open(entry.path) as file:
        number = 0
        while line := _guarded(entry, file.readline):
            number += 1
            if line.strip():
                yield (
                    f"{entry.name}:{number}",
                    _field_of(line, entry.field, f"{entry.path}, line {number}"),
                )


def _field_of(line: bytes, field: str, where: str) -> str:
    """The text of one line of JSON; every complaint says file and line."""
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
            f"{where}: no field {field!r}{did_you_mean(field, row)}; it has {has}. Another field is named as file.jsonl:field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be text, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where}: field {field!r} holds half a surrogate pair at character {e.start}; it is no valid text"
        ) from None
    return text


def _read_archive(entry: Entry) -> Iterator[tuple[str, str]]:
    """The novels: one document per member."""
    try:
        with tarfile.open(entry.path, "r:xz") as tar:
            for member in tar:
                yield member.name, tar.extractfile(member).read().decode("utf-8")
    except _DAMAGED as e:
        raise ValueError(f"{entry.path} is damaged: {e}; install lamoe again") from None


def _read_module(entry: Entry) -> Iterator[tuple[str, str]]:
    """A module of the standard library, but none of its hundred generated character tables: nearly equal to each other, they
    would fall on both sides of the held-out split and make the model look better than it is."""
    for name, text in _read_text(entry):
        if name.startswith("encodings/") and "Mapping Codec" in text[:400]:
            raise _NotText("generated character table")
        yield name, text


def _read_topics(entry: Entry) -> Iterator[tuple[str, str]]:
    """pydoc's reference texts: one dictionary in a module, one document per topic."""
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield f"{entry.name}#{topic}", text


def _open(path: Path):
    return _OPENERS.get(path.suffix, open)(path, "rb")


def _guarded(entry: Entry, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _DAMAGED as e:
        raise ValueError(
            f"{entry.path} is damaged: cannot be decompressed ({e or type(e).__name__}); fetch or pack it again"
        ) from None


def _advice(path: Path) -> str:
    packed = path.suffix in _OTHER_PACKERS or (
        path.suffix in _OPENERS and Path(path.stem).suffix == ".tar"
    )
    return (
        f"; unpack {path.suffix} files first ({', '.join(_OPENERS)} of single texts are read as they are)"
        if packed
        else ""
    )


def _drop_zeros(skipped: Counter):
    for reason in [r for r, n in skipped.items() if not n]:
        del skipped[reason]


def _raise(error: OSError):
    raise error


# ---- from documents to a split ---------------------------------------------------------------------------------------------
@dataclass
class Plan:
    """What a first reading of all text decided. Documents are known by their number in reading order."""

    counts: dict[str, Counts]
    heldout: set[int]
    cuts: dict[int, int]  # document -> character where its held-out part begins
    digest: str  # of all text: a second reading must meet the same

    def parts(self, number: int, doc: Document) -> list[tuple[str, str, str]]:
        """(split, name, text) of one document: a single one, or two where it is cut."""
        if (cut := self.cuts.get(number)) is not None:
            return [
                ("train", f"{doc.name}#head", doc.text[:cut]),
                ("heldout", f"{doc.name}#tail", doc.text[cut:]),
            ]
        return [("heldout" if number in self.heldout else "train", doc.name, doc.text)]

    def documents(self) -> Iterator[tuple[int, Document]]:
        """The second reading: (number, document). ValueError at its end when the text is not what was planned with."""
        text_hash = hashlib.blake2b(digest_size=16)
        for number, doc in enumerate(read_documents(list(self.counts))):
            _feed(text_hash, doc)
            yield number, doc
        if text_hash.hexdigest() != self.digest:
            raise ValueError(
                "the text of the sources changed while it was read; nothing was kept. Start again when nobody writes to it"
            )


def plan_split(
    sources: list[str], holdout: float, seed: int, progress: Callable[[int, int | None, str], None]
) -> Plan:
    """Read everything once and decide what is held out, per source. Per document only a hash and a size stay in memory."""
    counts: dict[str, Counts] = {}
    seen: dict[
        str, tuple[int, array, array]
    ] = {}  # source -> number of its first document, name hashes, sizes
    cut_of_first: dict[str, int | None] = {}
    text_hash, done, told = hashlib.blake2b(digest_size=16), 0, 0
    for number, doc in enumerate(read_documents(sources, counts)):
        if doc.source not in seen:
            seen[doc.source] = (number, array("Q"), array("Q"))
            cut_of_first[doc.source] = _cut_point(doc.text, holdout)
        seen[doc.source][1].append(_name_hash(seed, doc.name))
        seen[doc.source][2].append(doc.size)
        _feed(text_hash, doc)
        done += doc.size
        if done - told >= 1 << 20:
            progress(told := done, None, "reading")
    heldout, cuts = set(), {}
    for source, (first, hashes, sizes) in seen.items() if holdout else ():
        if len(sizes) > 1:
            heldout.update(first + i for i in choose_heldout(hashes, sizes, holdout))
        elif cut_of_first[source] is None:
            raise ValueError(
                f"source {source!r} is a single document without a line end to cut it at, so nothing can be held out; "
                "give it as several files, break its lines, or set holdout to 0"
            )
        else:
            cuts[first] = cut_of_first[source]
    return Plan(counts, heldout, cuts, text_hash.hexdigest())


def choose_heldout(hashes, sizes, holdout: float) -> list[int]:
    """Numbers of the documents to hold out, at least one and never all: in the order of their hash, each that still fits the share."""
    room, chosen = holdout * sum(sizes), []
    for i in sorted(range(len(sizes)), key=lambda i: (hashes[i], i)):
        if sizes[i] <= room:
            chosen.append(i)
            room -= sizes[i]
    return chosen or [min(range(len(sizes)), key=lambda i: (sizes[i], hashes[i], i))]


def _name_hash(seed: int, name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(
            f"{seed}\n{name}".encode("utf-8", "surrogateescape"), digest_size=8
        ).digest(),
        "big",
    )


def _feed(text_hash, doc: Document):
    text_hash.update(f"{doc.source}\n{doc.name}\n{doc.size}\n".encode("utf-8", "surrogateescape"))
    text_hash.update(doc.text.encode("utf-8"))


def _cut_point(text: str, holdout: float) -> int | None:
    """Where the last `holdout` of a text begins: after the blank line (else the line end) nearest to it, with text on both sides."""
    aim, first = int(len(text) * (1 - holdout)), len(text) - len(text.lstrip())
    last = len(text.rstrip())
    for border in ("\n\n", "\n"):
        before, after = text.rfind(border, first, aim), text.find(border, aim, last)
        found = [at for at in (before, after) if at >= 0]
        if found:
            return min(found, key=lambda at: abs(at - aim)) + len(border)
    return None
