"""Reads the bodies of requests: their headers, compression, encoding and JSON, within limits.

Every limit is checked before the work that it limits, at a cost that is linear in the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from lamoe.serve.errors import ApiError, from_validation

# Limits of the JSON of a request. Only attacks exceed them.
MAX_DEPTH, MAX_KEYS = 64, 4096
MAX_ELEMENTS = 1 << 18  # commas, which separate the elements of lists and objects
MAX_CONTAINERS = 1 << 16  # lists and objects
MAX_ALL_KEYS = 1 << 16  # of all objects together
UTF8_NAMES = ("utf-8", "utf8", "us-ascii", "ascii")

_HALF_CHARACTER = (
    "; an escape such as \\ud83d is half of a character: the client may have cut a text in the "
    "middle of an emoji"
)

Model = TypeVar("Model", bound=BaseModel)


# ---- headers -------------------------------------------------------------------------------------
def check_content_type(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise a 415 error unless the headers announce JSON in UTF-8.

    This also protects against other web pages: a browser sends this content type to a foreign
    server only after a CORS preflight.
    """
    found = [value for name, value in headers if name == b"content-type"]
    if len(found) > 1:
        raise _unsupported(f"the request has {len(found)} Content-Type headers; send one")
    value = found[0].decode("latin-1") if found else ""
    kind, *parameters = (part.strip().lower() for part in value.split(";"))
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        shown = f"{value[:100]!r}" if found else "none"
        raise _unsupported(
            f"send JSON, with the header Content-Type: application/json; found {shown}"
        )
    for parameter in parameters:
        name, _, charset = parameter.partition("=")
        if name.strip() == "charset" and charset.strip(" \"'") not in UTF8_NAMES:
            raise _unsupported(f"the charset is {charset[:40]!r}; this server reads UTF-8 only")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, "unsupported_media_type")


def inflater(headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> Inflater | None:
    """Return an `Inflater` for the request's Content-Encoding, or None if it has none.

    Raises:
        ApiError: 415 for an encoding that this server does not know.
    """
    values = b",".join(value for name, value in headers if name == b"content-encoding")
    names = [name.strip().lower() for name in values.decode("latin-1").split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > 1 or names[0] not in ("gzip", "x-gzip", "deflate"):
        raise ApiError(
            415,
            f"the Content-Encoding is {', '.join(names)[:100]!r}; this server reads gzip, deflate, "
            "or a body that is not compressed",
            "unsupported_media_type",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    return Inflater(names[0], max_bytes)


class Inflater:
    """Inflates a compressed body piece by piece, to at most `max_bytes` + 1 bytes."""

    def __init__(self, encoding: str, max_bytes: int):
        self.encoding, self._left = encoding, max_bytes + 1
        # For "deflate", clients send either a zlib stream or a bare one; the first byte tells.
        self._stream = None if encoding == "deflate" else zlib.decompressobj(31)

    def feed(self, data: bytes, last: bool) -> bytes:
        """Inflate the next piece of the body.

        Raises:
            ApiError: 400 if the body is not compressed as announced, or is cut off.
        """
        if self._stream is None:
            if not data and not last:
                return b""
            bare = not data or data[0] & 15 != 8
            self._stream = zlib.decompressobj(-15 if bare else 15)
        try:
            out = self._stream.decompress(data, self._left) if data and self._left else b""
        except zlib.error as e:
            raise self._invalid(str(e)) from None
        self._left -= len(out)
        if self._stream.unused_data:
            raise self._invalid("bytes follow its end")
        if last and self._left and not self._stream.eof:
            raise self._invalid("it is cut off")
        return out

    def _invalid(self, why: str) -> ApiError:
        message = f"the body is not valid {self.encoding}, which Content-Encoding announces: {why}"
        return ApiError(400, message, "invalid_json")


# ---- JSON ----------------------------------------------------------------------------------------
def parse(raw: bytes, model: type[Model]) -> Model:
    """Convert a body to a request model.

    Raises:
        ApiError: 400 if the body is not strict UTF-8 JSON, exceeds a limit, or does not fit.
    """
    if not raw:
        raise _invalid_json("the request has no body; send a JSON object")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    _check_encoding(raw[:4])
    _check_counts(raw)
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        advice = _HALF_CHARACTER if "surrogate" in str(e) or "hex escape" in str(e) else ""
        raise _invalid_json(f"the body is not valid JSON: {str(e)[:200]}{advice}") from None
    _check_shape(value)
    try:
        return model.model_validate(value)
    except ValidationError as e:
        raise from_validation(e.errors(include_url=False)) from None


def _invalid_json(message: str) -> ApiError:
    return ApiError(400, message, "invalid_json")


def _check_encoding(first: bytes) -> None:
    """Raise a 400 error that names UTF-16 or UTF-32, by a byte order mark or by zero bytes."""
    name = None
    if first in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or first.count(0) == 3:
        name = "UTF-32"
    elif first[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in first[:2]:
        name = "UTF-16"
    elif first[:2] == b"\x1f\x8b":
        raise _invalid_json("the body is gzip; say so with the header Content-Encoding: gzip")
    if name is not None:
        raise _invalid_json(f"the body is {name}, it seems; send UTF-8")


def _check_counts(raw: bytes) -> None:
    """Raise a 400 error for JSON with too many elements, before it is parsed."""
    limits = {
        "elements": (b",", MAX_ELEMENTS),
        "keys": (b":", MAX_ALL_KEYS),
        "lists and objects": (b"[{", MAX_CONTAINERS),
    }
    outside = None  # the body without its strings, which may hold any number of these characters
    for what, (characters, limit) in limits.items():
        count = sum(raw.count(c) for c in characters)
        if count > limit:
            if outside is None:
                text = np.frombuffer(raw.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
                outside = text[np.cumsum(text == ord('"'), dtype=np.uint8) & 1 == 0]
            count = sum(int(np.count_nonzero(outside == c)) for c in characters)
        if count > limit:
            raise _invalid_json(f"the body has at least {count} {what}; the limit is {limit}")


def _check_shape(value: Any) -> None:
    """Raise a 400 error for JSON that exceeds MAX_DEPTH, or MAX_KEYS in one object."""
    level, depth = [value], 0  # the dicts and lists at one depth
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _invalid_json(f"the body nests deeper than {MAX_DEPTH} levels")
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MAX_KEYS:
                    raise _invalid_json(
                        f"an object of the body has {len(item)} keys; the limit is {MAX_KEYS}"
                    )
                children += [v for v in item.values() if isinstance(v, (dict, list))]
            elif isinstance(item, list):
                children += [v for v in item if isinstance(v, (dict, list))]
        level = children
