"""Read the JSON files of a model folder. They come from strangers, so size and form are checked.

Editors and tools write more than plain UTF-8: a byte order mark, UTF-16. Both are read. Everything
else that is not JSON is named: a web page, a git-lfs pointer, a comma too many.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
# Values are counted before parsing: a small file of millions of empty lists needs gigabytes.
MAX_VALUES = 2_000_000
_MAGIC = {
    b"PK\3\4": "a zip archive (or a pickle of PyTorch) and not the file itself; unpack it first",
    b"\x1f\x8b": "a gzip archive and not the file itself; unpack it first",
    b"GGUF": "a GGUF file; convert it with `lamoe convert FILE.gguf FOLDER`",
    b"\x89HDF": "an HDF5 file (TensorFlow or Keras); save the model as safetensors",
    b"\x80\2": "a pickle, which can run any code when opened; get the safetensors file",
    b"\x80\4": "a pickle, which can run any code when opened; get the safetensors file",
}


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file is too large, is not JSON, or holds something other than an object.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes; a file of more than {max_bytes:,} bytes is refused"
        )
    if not path.is_file():  # opening a pipe would block
        raise ValueError(f"{path} is not a regular file")
    return parse_object(path.read_bytes(), str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that hold a JSON object. `where` names their source in messages.

    Raises:
        ValueError: if they do not hold one, or if a name occurs twice with different values.
    """
    text = decode(raw, where)
    if sum(map(text.count, "[{,")) > MAX_VALUES:
        raise ValueError(f"{where} has more than {MAX_VALUES:,} values, which is refused")
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{where} is not valid JSON: {_explain(text, e)}") from None
    except ValueError as e:  # a name twice, or a number with too many digits
        raise ValueError(f"{where} is not valid JSON: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, found {type(found).__name__}")
    return found


def decode(raw: bytes, where: str) -> str:
    """Decode the text of a JSON file, which is UTF-8 or, from some editors, UTF-16 or UTF-32.

    Raises:
        ValueError: if the bytes are not text, or are another kind of file (see `foreign_content`).
    """
    if what := foreign_content(raw[:200]):
        raise ValueError(f"{where} is {what}")
    encoding = json.detect_encoding(raw)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{where} is not valid JSON: byte {e.start:,} is not {encoding.removesuffix('-sig')} "
            "text; the file is binary or damaged, download it again or save it as UTF-8"
        ) from None


def foreign_content(head: bytes) -> str | None:
    """Say what a file is, if its first bytes show that it is not the file that was meant.

    Returns a phrase for "FILE is ...", with the fix, or None.
    """
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "a web page (HTML) and not the file itself; a download was answered with an error or "
            "login page, so download it again"
        )
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out and out[name] != value:
            raise ValueError(f"the name {name[:100]!r} occurs twice with different values")
        out[name] = value
    return out


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """Return the place of a syntax error and, for frequent mistakes, the fix."""
    if not text.strip():
        return "the file is empty; download or save it again"
    before, after = text[: error.pos].rstrip()[-1:], text[error.pos :].lstrip()[:2]
    fix = ""
    if (before == "," and after[:1] in ("}", "]")) or (after[:1] == "," and before in "{[,"):
        fix = "; remove the comma that no value follows"
    elif re.match(r",\s*[}\]]", text[error.pos :]):
        fix = "; remove the comma before the closing bracket"
    elif after in ("//", "/*") or after[:1] == "#":
        fix = "; remove the comment, because JSON has none"
    elif after[:1] == "'":
        fix = "; write names and texts in double quotes"
    elif error.pos >= len(text.rstrip()):
        fix = "; the file ends too early, download or save it again"
    return f"{error.msg} at line {error.lineno}, column {error.colno}{fix}"
