"""Save the cache rows of a prompt prefix to a file, so that a long document is prefilled only once.

The file is a safetensors file with two tensors:

    tokens   int64 [n]
    rows     uint8 [layers, n, row bytes], in the cache's storage format

The file does not depend on the page size. It can be loaded only with the same cache format, row
widths, dtype and model digest. Checksums find damage. But nothing checks that the rows belong to
the tokens (that would mean to compute them again), and every later prompt with this prefix uses
them. So load only files from people whose models you would also run.

Rows are copied between file and cache without an intermediate copy, so neither direction needs
extra memory. They are read with plain reads, because a process that maps a file is killed if the
file is truncated meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from lamoe import atomic
from lamoe.backends.base import Backend
from lamoe.backends.paged_cache import PagedCache
from lamoe.checkpoints import checksums, mapped, shards
from lamoe.engine.pages import PagePool, content_hash

KIND = "lamoe cache"
# Must increase if this layout changes, or the layout of a storage format in cache_codec.py.
VERSION = "1"


def save(
    file: str | Path,
    tokens: list[int],
    backend: Backend,
    cache: PagedCache,
    pool: PagePool,
) -> int:
    """Write the rows of the longest prefix of `tokens` whose full pages are in the cache.

    Only pages of sequences without a cache salt, or of another saved prefix, are found.

    The write is atomic: an existing file stays until the new one is complete on the disk.

    Returns:
        The number of tokens that were saved.

    Raises:
        ValueError: if no full page of the prefix is cached, or if `file` exists and is not a saved
            cache.
    """
    file = Path(file)
    if file.exists() and not is_cache(file):
        raise ValueError(f"{file} exists and is not a saved cache; name another file")
    pages: list[int] = []
    try:  # owning the pages keeps them from being evicted
        for content in _page_hashes(tokens, pool.page_size):
            page = pool.share(content)
            if page is None:
                break
            pages.append(page)
        if not pages:
            raise ValueError(
                f"nothing of these {len(tokens)} tokens is in the cache, so nothing can be saved; "
                f"the cache keeps full pages of {pool.page_size} tokens of earlier prompts until "
                "it needs the space: run a prompt with these tokens first"
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
    """Load a saved prefix into kept pages, so that later prompts with this prefix reuse its rows.

    Prompts of every cache salt reuse them, because the file belongs to the owner of the engine.

    The least recently used kept pages are evicted if necessary. An incomplete last page of the
    file is not loaded.

    Args:
        max_tokens: length of the longest sequence that the engine accepts, in tokens.

    Returns:
        The number of tokens of the file that are in the cache now.

    Raises:
        ValueError: if the file is damaged, is not a saved cache, or was saved with another model
            or cache format; if it has more than `max_tokens` tokens; or if running sequences own
            too many pages.
    """
    file = Path(file)
    tokens, rows_offset = _check(file, backend, cache, max_tokens)
    contents = list(_page_hashes(tokens, pool.page_size))
    shared: list[int] = []
    new: list[int] = []
    try:
        for content in contents:
            page = pool.share(content)
            if page is None:
                break
            shared.append(page)
        missing = len(contents) - len(shared)
        if missing > pool.available:
            raise ValueError(
                f"{file} needs {missing} more pages of {pool.page_size} tokens, and "
                f"{pool.available} of {pool.total} are not in use; wait until running requests "
                "end, or give more cache_memory"
            )
        new = [pool.take() for _ in range(missing)]
        _read(file, rows_offset, len(tokens), cache, new, first=len(shared) * pool.page_size)
        for page, content in zip(new, contents[len(shared) :]):
            pool.publish(page, content)
        pool.public.update(contents)
    finally:
        pool.give_back(shared + new)  # published pages are kept, others become free
    return len(contents) * pool.page_size


def is_cache(file: str | Path) -> bool:
    """Return whether the header of a file says that `save` wrote it."""
    try:
        shards.read_header(Path(file))
        return _metadata(Path(file)).get("kind") == KIND
    except ValueError:
        return False


# ---- the file ------------------------------------------------------------------------------------
def _write(
    file: Path,
    tokens: list[int],
    pages: list[int],
    backend: Backend,
    cache: PagedCache,
) -> None:
    """Write a safetensors file without the library, which would need a second copy of all rows."""
    layers, _, row = cache.rows.shape
    n, ids = len(tokens), torch.tensor(tokens, dtype=torch.int64).numpy()
    tensors = {
        "tokens": {"dtype": "I64", "shape": [n], "data_offsets": [0, ids.nbytes]},
        "rows": {
            "dtype": "U8",
            "shape": [layers, n, row],
            "data_offsets": [ids.nbytes, ids.nbytes + layers * n * row],
        },
    }
    metadata = _expected(backend, cache)
    digest = checksums.hasher("rows", "U8", (layers, n, row))
    start = shards.header_bytes(tensors, metadata, checksums.blank(tensors))
    size = len(start) + ids.nbytes + layers * n * row
    with atomic.replace_file(file, size=size) as f:
        f.write(start)
        f.write(ids)
        for rows in cache.rows:
            for _, slot, count in _runs(pages, cache.page_size):
                part = rows[slot : slot + count].cpu().numpy()
                f.write(part)
                digest.update(part.data)
        hashes = {"tokens": checksums.of_tensor("tokens", torch.from_numpy(ids))}
        hashes["rows"] = digest.hexdigest()
        f.seek(0)
        f.write(shards.header_bytes(tensors, metadata, checksums.join(hashes)))


def _read(
    file: Path, rows_offset: int, n: int, cache: PagedCache, pages: list[int], first: int
) -> None:
    """Copy rows from a file into cache pages.

    Args:
        rows_offset: offset in the file where the rows begin, in bytes.
        n: number of tokens in the file.
        pages: the pages to fill, in order.
        first: index of the token whose row is copied first.
    """
    row = cache.rows.shape[2]
    with open(file, "rb", buffering=0) as f:
        for layer, rows in enumerate(cache.rows):
            for token, slot, count in _runs(pages, cache.page_size):
                f.seek(rows_offset + (layer * n + first + token) * row)
                part = rows[slot : slot + count]
                on_host = part.cpu()  # no copy if the cache is on the host
                _read_into(f, memoryview(on_host.numpy()).cast("B"), file)
                if on_host.data_ptr() != part.data_ptr():
                    part.copy_(on_host)


def _read_into(f: IO[bytes], into: memoryview, file: Path) -> None:
    """Fill `into` from a file. Several reads are needed, because one returns at most 2 GiB."""
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
    """Check that a file fits this model and cache.

    Returns:
        The tokens of the file, and the offset in bytes where its rows begin.
    """
    found, metadata = shards.read_header(file), _metadata(file)
    if metadata.get("kind") != KIND or set(found) != {"tokens", "rows"}:
        raise ValueError(
            f"{file} is not a saved cache (tensors {shards.few(found) or 'none'}); give a file "
            "that save_cache wrote"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{file} is a saved cache of version {metadata.get('version')!r}; this lamoe reads "
            f"version {VERSION}: save it again"
        )
    _check_origin(file, metadata, _expected(backend, cache))
    tokens, rows = found["tokens"], found["rows"]
    layers, _, row = cache.rows.shape
    n = tokens.shape[0] if len(tokens.shape) == 1 else -1
    if (tokens.dtype, rows.dtype) != ("I64", "U8") or n < 1 or rows.shape != (layers, n, row):
        raise ValueError(
            f"{file} holds tokens {tokens.dtype} {list(tokens.shape)} and rows {rows.dtype} "
            f"{list(rows.shape)}; this model and cache format need I64 [n] and U8 "
            f"[{layers}, n, {row}] with n at least 1"
        )
    if n > max_tokens:
        raise ValueError(
            f"{file} holds {n} tokens, more than max_model_len {max_tokens}; raise max_model_len "
            "or save a shorter text"
        )
    ids, vocab = _tokens(file), backend.config.vocab_size
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(
            f"{file} has token ids from {min(ids)} to {max(ids)}; the vocabulary has {vocab}"
        )
    mapped.verify(file, found)
    with open(file, "rb") as f:
        return ids, 8 + int.from_bytes(f.read(8), "little") + rows.begin


def _check_origin(file: Path, metadata: dict[str, str], expected: dict[str, str]) -> None:
    """Raise ValueError if a file was saved with another model, dtype or cache format."""
    for key, name, fix in (
        ("format", "cache format", "load the model with cache={!r}, or save it again in this one"),
        (
            "widths",
            "row widths",
            "its model has another attention; use the model it was saved with",
        ),
        ("dtype", "dtype", "load the model in that dtype, or save it again in this one"),
        ("model", "model digest", "use the model it was saved with, or save it again"),
    ):
        if metadata.get(key) != expected[key]:
            found = str(metadata.get(key))
            raise ValueError(
                f"{file} has the {name} {found[:80]!r}, but this engine uses {expected[key]!r}; "
                f"{fix.format(found[:20])}"
            )


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


def _page_hashes(tokens: list[int], page_size: int) -> Iterator[bytes]:
    """Yield the content hash of each full page of a list of token ids, in order."""
    content = b""
    for end in range(page_size, len(tokens) + 1, page_size):
        content = content_hash(content, tokens[end - page_size : end])
        yield content


def _runs(pages: list[int], page_size: int) -> Iterator[tuple[int, int, int]]:
    """Group consecutive pages, so that their rows can be copied at once.

    Yields:
        (index of the first token, cache slot of this token, number of tokens) of each group.
    """
    at = 0
    while at < len(pages):
        end = at + 1
        while end < len(pages) and pages[end] == pages[end - 1] + 1:
            end += 1
        yield at * page_size, pages[at] * page_size, (end - at) * page_size
        at = end
