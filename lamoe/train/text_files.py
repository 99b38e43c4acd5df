"""Read the documents of one file, and decide what kind of file it is.

The first bytes decide about compression, archives and encodings; the name and the first character
decide about records. A file is one of:

- text: one document;
- records: JSON objects with the text in a field, one per line (.jsonl, .ndjson) or as an array, a
  sequence or a single object (.json); or the rows of a Parquet file with the text in a column;
- unusable: another table, an archive, an office document, another encoding, binary. `NotText` says
  which and how to convert it.

Files compressed with gzip, xz or zstd are unpacked while they are read. Lines and rows are read a
few at a time, so such files may be larger than memory; other files are read as a whole. zstd and
Parquet need the extra `data`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lamoe.model.config import did_you_mean
from lamoe.os_errors import explain

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None
DAMAGED: tuple[type[Exception], ...] = (
    EOFError,
    lzma.LZMAError,
    gzip.BadGzipFile,
    zlib.error,
    tarfile.TarError,
)
if zstd is not None:
    DAMAGED += (zstd.ZstdError,)
_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
_PACKERS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_ROWS = 256  # rows of a Parquet file that are decoded at a time
_TO_JSONL = 'write one object {"text": "..."} per line to a .jsonl file'
_AS_TEXT = "convert it to plain text first"
_TABLE = (
    "its separators and quotes would be trained on. Take the column with the text: python -c "
    "\"import csv, json, sys; [print(json.dumps({'text': row['COLUMN']})) "
    'for row in csv.DictReader(sys.stdin%s)]" < FILE > FILE.jsonl'
)
_BINARY_TABLE = ("a table", f"{_TO_JSONL} with the text of each row")
_OFFICE = ("an office document", _AS_TEXT)
_PDF = ("a PDF", f"{_AS_TEXT} (pdftotext)")
# Kinds that the end of the name decides: (what the file is, what to do).
_BY_NAME = {
    ".csv": ("a table", _TABLE % ""),
    ".tsv": ("a table", _TABLE % ", delimiter='\\t'"),
    ".ipynb": ("a notebook", "convert it: jupyter nbconvert --to markdown FILE"),
    ".epub": ("an e-book", _AS_TEXT),
    ".pdf": _PDF,
}
_BY_NAME |= dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pptx", ".ppt", ".odp"), _OFFICE)
_BY_NAME |= dict.fromkeys((".xlsx", ".xls", ".ods", ".arrow", ".feather"), _BINARY_TABLE)
_UNPACK = (
    "an archive, or in a compression that is not read",
    f"unpack it first ({', '.join(_PACKERS)} of single texts are read as they are)",
)
_BY_NAME |= dict.fromkeys((".bz2", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".rar"), _UNPACK)
# Kinds that the first bytes decide, whatever the name says.
_BY_CONTENT = (
    (b"%PDF-", _PDF),
    (b"{\\rtf", _OFFICE),
    (b"PAR1", ("a compressed Parquet file", "unpack it first")),
    (b"ARROW1", _BINARY_TABLE),
    (b"FEA1", _BINARY_TABLE),
    (b"PK\3\4", _UNPACK),
    (b"\x28\xb5\x2f\xfd", _UNPACK),
    (b"BZh", _UNPACK),
    (b"7z\xbc\xaf", _UNPACK),
    (b"Rar!", _UNPACK),
)
_UTF = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Number of bytes that are checked before the rest of a file is read, because a folder may hold a
# binary file such as a disk image.
_SNIFF_BYTES = 1 << 16
_BLANKS = re.compile(r"[ \t\r\n]*")
_MARKUP = (".html", ".htm", ".xhtml", ".xml", ".svg", ".rss")
_MARKUP_START = re.compile(r"<!doctype html|<html[ >]|<\?xml ", re.IGNORECASE)


class NotText(Exception):
    """Raised for a file that cannot be used. The message is the reason in Counts.skipped.

    Attributes:
        details: where the problem is and what to do about it, the end of an error message.
    """

    def __init__(self, reason: str, details: str = ""):
        super().__init__(reason)
        self.details = details


def read_texts(
    path: Path, name: str, field: str, as_records: bool, named: bool
) -> Iterator[tuple[str, str]]:
    """Yield (document name, text) of every document in a file.

    Args:
        name: the name of the file, the beginning of the documents' names.
        field: the field of records that holds the text.
        as_records: whether the file holds records whatever its name is.
        named: whether the user named this file. In a folder, JSON without records is skipped.

    Raises:
        NotText: if the file cannot be used.
        ValueError: if a record is invalid, or the file is damaged or cannot be read. The message
            names the file.
    """
    try:
        with _open(path) as file:
            head = _decompressed(
                path, lambda: file.read(_SNIFF_BYTES), f" in its first {_SNIFF_BYTES:,} bytes"
            )
            suffix = _suffix(path.name)
            is_packed = not isinstance(file, io.BufferedReader)
            if head.startswith(b"PAR1") and not is_packed and suffix not in _BY_NAME:
                yield from _rows(path, name, field, named)
                return
            _refuse(head, suffix)
            if suffix in _LINES:
                yield from _lines(path, name, head, file, field)
                return
            rest = _decompressed(path, file.read, f" after byte {len(head):,}")
            text = _decoded(head + rest)
        if suffix == ".json" or as_records:
            yield from _values(path, name, text, field, named)
        else:
            yield name, text
    except FileNotFoundError:
        raise NotText("gone since the files were listed", "; start again") from None
    except OSError as e:
        raise ValueError(explain(e)) from None


def remark(path: Path, text: str) -> str:
    """Return what a plain text seems to hold besides prose or code, or an empty text."""
    start = _skip(text, 0)
    if _suffix(path.name) in _MARKUP or _MARKUP_START.match(text, start):
        return "hold markup, which is read as it stands; to leave the tags out, convert it first"
    if text.startswith("[", start):
        start = _skip(text, start + 1)
    if text.startswith("{", start):
        try:
            if json.JSONDecoder().raw_decode(text, start)[0]:
                return (
                    "begin with a JSON object and are read as plain text; if that is a record, "
                    "use the name .jsonl (one per line) or .json"
                )
        except (ValueError, RecursionError):
            pass
    return ""


# ---- kinds of files ------------------------------------------------------------------------------
def _suffix(name: str) -> str:
    """Return the last suffix of a file name in lower case, without that of a compression."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in _PACKERS else path.suffix


def _refuse(head: bytes, suffix: str) -> None:
    """Raise NotText for files without text, from their first bytes and the suffix."""
    if not head:
        return
    by_content = next((kind for start, kind in _BY_CONTENT if head.startswith(start)), None)
    if kind := _BY_NAME.get(suffix, by_content):
        raise NotText(kind[0], f"; {kind[1]}")
    for mark, encoding in _UTF:
        if head.startswith(mark):
            raise _other_encoding(encoding, encoding)
    # ASCII letters in UTF-16 without a byte order mark: every second byte is zero.
    half = len(head[:4096]) // 2
    for start, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = head[start:4096:2].count(0), head[1 - start : 4096 : 2].count(0)
        if half > 3 and zeros > 0.4 * half and others < 0.1 * half:
            raise _other_encoding(f"perhaps {encoding}", encoding)
    if b"\0" in head:
        raise _binary(head.index(0))


def _binary(position: int) -> NotText:
    return NotText("binary", f", not UTF-8 text (byte 00 at position {position})")


def _other_encoding(found: str, encoding: str) -> NotText:
    return NotText(
        "in another encoding",
        f", not UTF-8 text ({found}); convert it: iconv -f {encoding} -t UTF-8 FILE > FILE.utf8",
    )


def _decoded(data: bytes) -> str:
    if b"\0" in data:
        raise _binary(data.index(0))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        place = f"byte {e.object[e.start]:02X} at position {e.start}"
        raise _other_encoding(place, "ISO-8859-1") from None


# ---- records -------------------------------------------------------------------------------------
def _rows(path: Path, name: str, field: str, named: bool) -> Iterator[tuple[str, str]]:
    """Yield the rows of a Parquet file. Only the column `field` is read, `_ROWS` rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, which needs the package pyarrow; install it: "
            "pip install 'lamoe[data]'"
        ) from None
    number = 0
    try:
        # Without a buffer size, pyarrow reads the column of a whole row group at once.
        with parquet.ParquetFile(
            path, buffer_size=1 << 20, page_checksum_verification=True
        ) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise NotText(
                    f"a table without a column {field!r}",
                    f"{did_you_mean(field, names)}; it has {_keys(names)}. To use another column, "
                    "write file.parquet:column",
                )
            for batch in file.iter_batches(_ROWS, columns=[field], use_threads=False):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield (
                        f"{name}:{number}",
                        _text_of({field: value}, field, f"{path}, row {number}"),
                    )
    except (ArrowException, OSError, UnicodeDecodeError) as e:
        reason = str(e).split("\n")[0]
        raise ValueError(
            f"{path} is damaged after row {number:,}: {reason}; fetch or write it again"
        ) from None
    if not number:
        yield name, ""  # counted as an empty document


def _lines(path: Path, name: str, head: bytes, file: Any, field: str) -> Iterator[tuple[str, str]]:
    """Yield the records of a file with one JSON value per line. Blank lines are skipped."""
    # `start` ends with a whole line.
    start = io.BytesIO(head + _decompressed(path, file.readline, f" after byte {len(head):,}"))
    number = 0
    for part in (start, file):
        while line := _decompressed(path, part.readline, f" after line {number:,}"):
            number += 1
            if line.strip():
                where = f"{path}, line {number}"
                yield f"{name}:{number}", _text_of(_parsed(line, where), field, where)
    if not number:
        yield name, ""  # counted as an empty document


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{where}: not UTF-8 (byte {line[e.start]:02X} at position {e.start} of the line); "
            "convert the file: iconv -f ENCODING -t UTF-8"
        ) from None
    except (ValueError, RecursionError) as e:
        raise ValueError(
            f"{where}: not valid JSON ({e}); it starts with {line[:40]!r}. Each line must be one "
            "whole value; if values follow one another or span lines, name the file .json"
        ) from None


def _values(path: Path, name: str, text: str, field: str, named: bool) -> Iterator[tuple[str, str]]:
    """Yield the records of a .json file: an array, several values one after another, or one object.

    Only one value at a time is parsed, because Python's objects need several times the memory.
    """
    decoder, at, number = json.JSONDecoder(), _skip(text, 0), 0
    is_array = text.startswith("[", at)
    at = _skip(text, at + is_array)
    while at < len(text) and not (is_array and text.startswith("]", at)):
        number += 1
        where = f"{path}, record {number}"
        begin = at
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            if is_array and not text.startswith("]", at):
                at = _skip(text, _after_comma(text, at))
        except (ValueError, RecursionError) as e:
            if not named and number == 1:
                raise NotText("JSON without records") from None
            raise ValueError(
                f"{where}: not valid JSON ({e}); it starts with {text[begin : begin + 40]!r}"
            ) from None
        if number == 1 and not (isinstance(value, dict) and (field in value or _kind(value))):
            _refuse_settings(path, value, field, at == len(text) and not is_array, named)
        yield f"{name}:{number}", _text_of(value, field, where)
    if (is_array and _skip(text, at + 1) < len(text)) or (is_array and at == len(text)):
        raise ValueError(
            f"{path}: not valid JSON, the array of records must end with ] at the end of the file"
        )
    if not number:
        yield name, ""  # counted as an empty document


def _skip(text: str, at: int) -> int:
    """Return the position of the next character at or after `at` that is not blank."""
    return _BLANKS.match(text, at).end()


def _after_comma(text: str, at: int) -> int:
    if not text.startswith(",", at):
        raise ValueError(f"expected , or ] at character {at}")
    return at + 1


def _refuse_settings(path: Path, value: Any, field: str, alone: bool, named: bool) -> None:
    """Refuse JSON that holds no records, such as settings or a list of records below a key."""
    if not named:
        raise NotText("JSON without records")
    if alone and isinstance(value, dict):
        lists = [k for k, v in value.items() if isinstance(v, list)]
        advice = (
            f"if its records are under {lists[0]!r}: jq -c '.{lists[0]}[]' FILE > FILE.jsonl"
            if lists
            else _TO_JSONL
        )
        raise ValueError(
            f"{path} is one JSON object without the field {field!r}, not a list of records; it has "
            f"{_keys(value)}; {advice}, or name it .txt to train on the JSON itself"
        )


def _text_of(record: Any, field: str, where: str) -> str:
    """Return the text of one record. Error messages begin with `where`."""
    if not isinstance(record, dict):
        hint = "; an array of records belongs in a .json file" if isinstance(record, list) else ""
        raise ValueError(
            f"{where}: expected an object with the field {field!r}, found "
            f"{type(record).__name__}{hint}"
        )
    if field not in record:
        if kind := _kind(record):
            raise ValueError(
                f"{where}: no field {field!r}; it is {kind}, and lamoe trains on plain text. Join "
                "its parts with the template that you want: "
                f"{_TO_JSONL}, or name one field: file.jsonl:field"
            )
        raise ValueError(
            f"{where}: no field {field!r}{did_you_mean(field, record)}; it has {_keys(record)}. "
            "To use another field, write file.jsonl:field"
        )
    text = record[field]
    if text is None:
        return ""  # counted as an empty document
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


def _kind(record: dict[str, Any]) -> str:
    """Return what a record of instructions or a conversation is, or an empty text for others."""
    for keys, kind in (
        (("messages",), "a conversation ('messages')"),
        (("conversations",), "in the ShareGPT format ('conversations')"),
        (
            ("instruction", "output"),
            "in the Alpaca format ('instruction', 'output')",
        ),
        (("prompt", "completion"), "a prompt with its completion ('prompt', 'completion')"),
        (("prompt", "chosen", "rejected"), "a pair of preferences ('chosen', 'rejected')"),
        (("question", "answer"), "a question with its answer ('question', 'answer')"),
    ):
        if all(key in record for key in keys):
            return kind
    return ""


def _keys(record: Iterable[str]) -> str:
    return ", ".join(repr(str(k)[:40]) for k in list(record)[:8]) or "nothing"


# ---- bytes ---------------------------------------------------------------------------------------
def _open(path: Path) -> Any:
    """Open a file for reading. Its first bytes tell whether it is compressed.

    Raises:
        ValueError: if the name says that it is compressed, but it is not.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if start == b"\xfd7zXZ\0":
        return lzma.open(path, "rb")
    if start[:4] == b"\x28\xb5\x2f\xfd" or (start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        if zstd is None:
            raise ValueError(
                f"{path} is compressed with zstd, which needs the package backports.zstd; "
                "install it: pip install 'lamoe[data]'"
            )
        return zstd.open(path, "rb")
    if start and (packer := _PACKERS.get(path.suffix.lower())):
        raise ValueError(
            f"{path} is damaged: its name ends in {path.suffix}, but it is not compressed with "
            f"{packer}; fetch it again, or rename it"
        )
    return open(path, "rb")


def _decompressed(path: Path, read: Callable[[], bytes], place: str) -> bytes:
    """Return read(). A decompression error becomes a ValueError with the file and the place."""
    try:
        return read()
    except DAMAGED as e:
        raise ValueError(
            f"{path} is damaged{place}: cannot be decompressed ({e or type(e).__name__}); "
            "fetch or pack it again"
        ) from None
