"""The cached beginning of a text as a file, so that a long document is read by the model once: safetensors with `tokens` int64 [n] and
`rows` uint8 [layers, n, row bytes], the rows exactly as the cache stores them. Pages are not in the file: any page size reads it.

A file is bound to what made it: cache format, row widths, dtype and `digest` of the model. What it cannot be checked for is whether the rows
belong to the tokens (short of computing them again), and loaded rows are used for every later prompt with that beginning: load only files
of people you would also take a model from.

Rows go between file and cache without a copy in between, so neither direction needs memory and both run at the speed of the disk. They are
read with plain reads rather than mapped: a mapped file that is cut short meanwhile would kill the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from lamoe.backends.base import Backend
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import atomic, shards
from lamoe.engine.pages import PagePool, content_hash

KIND = "lamoe cache"
VERSION = "1"  # goes up with this layout, and with the layout of any storage format of codec.py


def save(
    file: str | Path,
    tokens: list[int],
    backend: Backend,
    cache: PagedCache,
    pool: PagePool,
) -> int:
    """Write the rows of the longest beginning of `tokens` (ids) whose full pages are in the cache; how many tokens that is. All or nothing: an
    existing file stays until the new one is on the disk. ValueError when nothing of it is cached, or `file` exists and is something else."""
    file = Path(file)
    if file.exists() and not is_cache(file):
        raise ValueError(f"{file} exists and is not a saved cache; name another file")
    pages = []
    try:  # an owned page is not given to others
        for content in _contents(tokens, pool.page_size):
            page = pool.share(content)
            if page is None:
                break
            pages.append(page)
        if not pages:
            raise ValueError(
                f"nothing of these {len(tokens)} tokens is in the cache to be saved: it holds full pages of {pool.page_size} tokens of prompts "
                "that ran, until the space is needed; run a prompt with them first"
            )
        _write(file, tokens[: len(pages) * pool.page_size], pages, backend, cache)
    finally:
        pool.give_back(pages)
    return len(pages) * pool.page_size


def load(
    file: str | Path,
    backend: Backend,
    cache: PagedCache,
    pool: PagePool,
    max_tokens: int,
) -> int:
    """Put a saved beginning among the kept pages, so that the next prompts that begin with it need not compute it; how many tokens of it are there
    (full pages of this cache). Less recently used pages make room. ValueError for a file that is damaged, is not a saved cache, is of another
    model or format, or does not fit in `max_tokens` (the longest text) or the pages that no running sequence holds."""
    file = Path(file)
    tokens, start = _check(file, backend, cache, max_tokens)
    pages, new, contents = [], [], list(_contents(tokens, pool.page_size))
    try:
        for content in contents:
            page = pool.share(content)
            if page is None:
                break
            pages.append(page)
        missing = len(contents) - len(pages)
        if missing > pool.available:
            raise ValueError(
                f"{file} needs {missing} more pages of {pool.page_size} tokens, and {pool.available} of {pool.total} are not in use; "
                "wait until running requests end, or give more cache_memory"
            )
        new = [pool.take() for _ in range(missing)]
        _read(file, start, len(tokens), cache, pages=new, first=len(pages) * pool.page_size)
        for page, content in zip(new, contents[len(pages) :]):
            pool.publish(page, content)
    finally:
        pool.give_back(pages + new)  # published ones are kept, others are free again
    return len(contents) * pool.page_size


def is_cache(file: str | Path) -> bool:
    """Whether a file is a cache that `save` wrote, from its header."""
    try:
        shards.read_header(Path(file))
        return _metadata(Path(file)).get("kind") == KIND
    except ValueError:
        return False


# ---- the file ------------------------------------------------------------------------------------------------------------
def _write(
    file: Path,
    tokens: list[int],
    pages: list[int],
    backend: Backend,
    cache: PagedCache,
) -> None:
    """The format by hand, because the library would want all rows once more in memory, gathered."""
    layers, _, row = cache.rows.shape
    n, ids = len(tokens), torch.tensor(tokens, dtype=torch.int64).numpy()
    header = {
        "__metadata__": _expected(backend, cache),
        "tokens": {"dtype": "I64", "shape": [n], "data_offsets": [0, ids.nbytes]},
        "rows": {
            "dtype": "U8",
            "shape": [layers, n, row],
            "data_offsets": [ids.nbytes, ids.nbytes + layers * n * row],
        },
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic.replace_file(file) as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.write(ids)
        for rows in cache.rows:
            for _, slot, count in _runs(pages, cache.page_size):
                f.write(rows[slot : slot + count].cpu().numpy())


def _read(file: Path, start: int, n: int, cache: PagedCache, pages: list[int], first: int) -> None:
    """Fill pages with the rows of the tokens from `first` on, of n in the file, whose rows start at byte `start`."""
    row = cache.rows.shape[2]
    with open(file, "rb", buffering=0) as f:
        for layer, rows in enumerate(cache.rows):
            for token, slot, count in _runs(pages, cache.page_size):
                f.seek(start + (layer * n + first + token) * row)
                part = rows[slot : slot + count]
                on_host = part.cpu()  # the rows themselves if the cache is on the host
                _read_into(f, memoryview(on_host.numpy()).cast("B"), file)
                if on_host.data_ptr() != part.data_ptr():
                    part.copy_(on_host)


def _read_into(f: IO[bytes], into: memoryview, file: Path) -> None:
    """Fill `into` from a file: one read returns at most 2 GiB."""
    while into:
        count = f.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(
                f"{file} ends in the middle of its rows; it was changed while it was read, "
                "save it again"
            )
        into = into[count:]


def _check(
    file: Path, backend: Backend, cache: PagedCache, max_tokens: int
) -> tuple[list[int], int]:
    """The tokens of a file that belongs to this model and cache, and where its rows start. ValueError when it does not."""
    found = shards.read_header(file)
    meta, want, n_layers, row = (
        _metadata(file),
        _expected(backend, cache),
        cache.rows.shape[0],
        cache.rows.shape[2],
    )
    if meta.get("kind") != KIND or set(found) != {"tokens", "rows"}:
        raise ValueError(
            f"{file} is not a saved cache (tensors {shards.few(found) or 'none'}); give a file that save_cache wrote"
        )
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{file} is a saved cache of version {meta.get('version')!r}; this lamoe reads version {VERSION}: save it again"
        )
    for key, hint in (
        ("format", "load the model with cache={0!r}, or save it again in this one"),
        ("widths", "it is of another kind of model"),
        ("dtype", "load the model in that dtype, or save it again in this one"),
        ("model", "use the model it was saved with, or save it again"),
    ):
        if meta.get(key) != want[key]:
            raise ValueError(
                f"{file} has the {_NAMES[key]} {str(meta.get(key))[:80]!r}, this one has {want[key]!r}; {hint.format(str(meta.get(key))[:20])}"
            )
    tokens, rows = found["tokens"], found["rows"]
    n = tokens.shape[0] if len(tokens.shape) == 1 else -1
    if (tokens.dtype, rows.dtype) != ("I64", "U8") or n < 1 or rows.shape != (n_layers, n, row):
        raise ValueError(
            f"{file} holds tokens {tokens.dtype} {list(tokens.shape)} and rows {rows.dtype} {list(rows.shape)}; this model and cache format need "
            f"I64 [n] and U8 [{n_layers}, n, {row}] with n at least 1"
        )
    if n > max_tokens:
        raise ValueError(
            f"{file} holds {n} tokens, more than max_model_len {max_tokens}; raise max_model_len or save a shorter text"
        )
    ids, vocab = _tokens(file), backend.config.vocab_size
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(
            f"{file} has token ids from {min(ids)} to {max(ids)}; the vocabulary has {vocab}"
        )
    with open(file, "rb") as f:
        return ids, 8 + int.from_bytes(f.read(8), "little") + rows.begin


_NAMES = {
    "format": "cache format",
    "widths": "row widths",
    "dtype": "dtype",
    "model": "model digest",
}


def _expected(backend: Backend, cache: PagedCache) -> dict[str, str]:
    return {
        "kind": KIND,
        "version": VERSION,
        "format": cache.format,
        "widths": " ".join(map(str, cache.widths)),
        "dtype": str(cache.dtype).removeprefix("torch."),
        "model": backend.digest(),
    }


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt", backend="pread") as f:
            return f.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"{file} could not be read: {e}") from None


def _tokens(file: Path) -> list[int]:
    try:
        with safe_open(file, framework="pt", backend="pread") as f:
            return f.get_tensor("tokens").tolist()
    except SafetensorError as e:
        raise ValueError(f"{file} could not be read: {e}") from None


def _contents(tokens: list[int], page_size: int) -> Iterator[bytes]:
    """The hashes of the full pages of a text."""
    content = b""
    for end in range(page_size, len(tokens) + 1, page_size):
        content = content_hash(content, tokens[end - page_size : end])
        yield content


def _runs(pages: list[int], page_size: int) -> Iterator[tuple[int, int, int]]:
    """Rows that lie side by side in the cache, as (number of the first token, its slot, rows): pages of a fresh cache come in order."""
    at = 0
    while at < len(pages):
        end = at + 1
        while end < len(pages) and pages[end] == pages[end - 1] + 1:
            end += 1
        yield at * page_size, pages[at] * page_size, (end - at) * page_size
        at = end
