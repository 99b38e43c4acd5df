"""Files that stay mapped into memory while a model runs.

The content of a mapped file changes with the file. If it is overwritten, the model computes
garbage. If it is truncated, the system ends the process by SIGBUS. `MappedFiles.check` notices both
before a result is used, and the extension reports a SIGBUS that comes first
(csrc/model/mapped.cpp).
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamoe.checkpoints import checksums, shards

try:
    from lamoe import _native
except ImportError:
    _native = None

_CHUNK = 1 << 20  # bytes that are read and hashed at a time


class FileChanged(RuntimeError):
    """A mapped file has changed or is damaged, so what was computed from it cannot be trusted."""


@dataclass
class _Mapped:
    """A mapped safetensors file, its header, and its state when it was mapped or verified last."""

    path: Path
    found: dict[str, shards.Found]
    data: np.memmap
    descriptor: int
    state: tuple[int, int]

    def verify(self) -> None:
        verify(self.path, self.found, self.data)


class MappedFiles:
    """The mapped files of a model."""

    def __init__(self) -> None:
        self._files: list[_Mapped] = []
        self._damage: str | None = None

    def open(self, path: Path, found: dict[str, shards.Found]) -> np.memmap:
        """Map a safetensors file, with the header `found`, as uint8. Nothing may be written to it.

        The map is private and writable, because torch expects writable memory.
        """
        with open(path, "rb") as file:
            mapped = np.memmap(file, dtype=np.uint8, mode="c")
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        report_failed_reads(mapped, path)
        self._files.append(_Mapped(path, found, mapped, descriptor, _state(descriptor)))
        return mapped

    def check(self) -> None:
        """Check that no file has changed since it was mapped.

        A file that was only touched is verified and then accepted.

        Raises:
            FileChanged: if a file has another size or content, or `verify_in_background` has found
                damage.
        """
        if self._damage is not None:
            raise FileChanged(self._damage)
        for file in self._files:
            state = _state(file.descriptor)
            if state == file.state:
                continue
            changed = f"{file.path} was changed while it was in use; load the model again"
            can_verify = checksums.enabled() and all(f.checksum for f in file.found.values())
            if state[0] != file.state[0] or not can_verify:
                raise FileChanged(changed)
            try:
                file.verify()
            except ValueError as e:
                raise FileChanged(f"{changed} ({e})") from None
            file.state = state

    def verify(self) -> None:
        """Raise ValueError if a tensor does not match its checksum. Reads all files."""
        for file in self._files:
            file.verify()

    def verify_in_background(self) -> None:
        """Run `verify` in a thread. If it finds damage, `check` raises from then on."""

        def run() -> None:
            try:
                self.verify()
            except ValueError as e:
                self._damage = str(e)

        threading.Thread(target=run, name="lamoe-verify", daemon=True).start()


def _state(descriptor: int) -> tuple[int, int]:
    """Return what changes when a file is written: its size, and the time of the last change."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def report_failed_reads(mapped: np.memmap, path: Path) -> None:
    """If a read of `mapped` ever fails, end the process with a message that names the file.

    Without this, SIGBUS ends the process and says nothing. Needs the extension.
    """
    if not hasattr(_native, "watch_mapping"):  # no extension, or one of an earlier version
        return
    message = (
        f"lamoe: the mapped file {path} could not be read (SIGBUS): it was truncated while in use, "
        "or its disk failed. The process ends with exit code 74; restore the file and start again\n"
    )
    id = _native.watch_mapping(mapped.view(np.ndarray).view(np.uint8), message)
    memory = mapped._mmap  # type: ignore[attr-defined]
    closing = weakref.finalize(memory, _native.unwatch_mapping, id)
    closing.atexit = False


def verify(path: Path, found: dict[str, shards.Found], data: np.ndarray | None = None) -> None:
    """Compare the tensors of one safetensors file with their checksums, if it has any.

    Args:
        path: the file.
        found: its header.
        data: the mapped file. If None, the file is read.

    Raises:
        ValueError: if a tensor does not match its checksum, or the file ends early.
    """
    if not checksums.enabled() or not all(f.checksum for f in found.values()):
        return
    with open(path, "rb", buffering=0) if data is None else contextlib.nullcontext() as file:
        start = 8 + int.from_bytes(file.read(8) if file else data[:8].tobytes(), "little")
        buffer = memoryview(bytearray(_CHUNK))
        for name, tensor in sorted(found.items(), key=lambda item: item[1].begin):
            digest = checksums.hasher(name, tensor.dtype, tensor.shape)
            at = start + tensor.begin
            end = at + shards.num_bytes(tensor)
            while at < end:
                if file is None:
                    part = data[at : min(at + _CHUNK, end)].data
                else:
                    file.seek(at)
                    part = buffer[: file.readinto(buffer[: end - at])]
                if not part:
                    raise ValueError(f"{path} ends in the middle of {name!r}; it was truncated")
                digest.update(part)
                at += len(part)
            if digest.hexdigest() != tensor.checksum:
                raise checksums.damaged(path, name)
