"""Read the files of a tokenizer: tokenizer.json and the configs beside it. They are untrusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from lamoe.text import json_file

MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has about 40 MB
_MAX_SIDE_FILE_BYTES = 16 << 20


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ValueError: if the file is invalid or larger than MAX_FILE_BYTES.
    """
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(
            f"{file} has {size} bytes; a tokenizer.json above {MAX_FILE_BYTES} is not read"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as e:  # a Rust panic is a BaseException, but not an Exception
        if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{file} is not a tokenizer.json that the tokenizers library can read: {e}"
        ) from None


def read_text(file: Path) -> str:
    """Read a small UTF-8 file."""
    if (size := file.stat().st_size) > _MAX_SIDE_FILE_BYTES:
        raise ValueError(f"{file} has {size} bytes; more than {_MAX_SIDE_FILE_BYTES} is not read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text: {e}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file does not exist."""
    return json_file.read_json(file, _MAX_SIDE_FILE_BYTES) if file.is_file() else {}


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template of a folder, or None.

    Args:
        config: the content of tokenizer_config.json, used if there is no chat_template.jinja.
    """
    if (file := folder / "chat_template.jinja").is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": ..., "template": ...}]
        for named in template:
            if isinstance(named, dict) and named.get("name") == "default":
                template = named.get("template")
                break
    if template is not None and not isinstance(template, str):
        raise ValueError(
            "chat_template must be a str or a list with one named default, "
            f"found {type(template).__name__}"
        )
    return template


def token_text(value: Any, key: str) -> str | None:
    """Return the text of a token, which is given as text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a str, found {type(value).__name__}")
    return value or None


def id_list(value: Any, key: str) -> list[int]:
    """Return token ids that are given as one id, a list or None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
        raise ValueError(f"{key} must be a token id or a list of them, found {value!r}")
    return values


def first_token(inner: tokenizers.Tokenizer, ids: list[int]) -> str | None:
    """Return the text of the first of `ids`, or None."""
    return inner.id_to_token(ids[0]) if ids else None


def max_length(config: dict[str, Any]) -> int | None:
    """Return model_max_length, or None if there is no limit (transformers writes 1e30 then)."""
    value = config.get("model_max_length")
    is_limit = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
    return value if is_limit else None
