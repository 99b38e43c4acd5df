"""Write-then-rename: a file or folder appears under its name complete, or not at all.

The content is written under a temporary name in the same folder, flushed to the disk and then
renamed. If the process is killed at any moment, either the old or the new content remains. A hidden
temporary file may remain too, whose name identifies its process (see `remove_leftovers`).
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_counter = itertools.count()
# Errors of systems that cannot flush folders. All other fsync errors are real write errors.
_FOLDER_SYNC_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
}


@contextmanager
def replace_file(path: str | Path, mode: str = "wb", temporary: Path | None = None) -> Iterator[IO]:
    """Open a temporary file for writing that replaces `path` when the block ends.

    If the block raises, the temporary file is removed and `path` stays as it was.

    Args:
        path: the final name. A symbolic link of this name is replaced, not followed.
        mode: "wb", or "w" for UTF-8 text.
        temporary: a fixed temporary name in the same folder, overwritten if it exists.
            By default, the name is new in every call.

    Raises:
        OSError: if the file could not be written. The message names `path`.
    """
    path = Path(path)
    if temporary is None:
        temporary = path.with_name(temporary_name(path.name))
        mode = mode.replace("w", "x")  # never follow a link that somebody else placed there
    try:
        file = open(temporary, mode, encoding=None if "b" in mode else "utf-8")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        if e.filename is None or str(e.filename) == str(temporary):
            _name_file(e, path)
        raise


def _name_file(error: OSError, path: Path) -> None:
    """Add `path` to the message of an OSError.

    Errors without an errno keep their own message, which a file name would replace.
    """
    if error.errno is not None:
        error.filename = str(path)


def write_text(path: str | Path, text: str, temporary: Path | None = None) -> None:
    """Replace the file `path` by UTF-8 text. Arguments and errors: see `replace_file`."""
    with replace_file(path, "w", temporary) as file:
        file.write(text)


@contextmanager
def replace_folder(
    target: str | Path, label: str | None = None, aside: Path | None = None
) -> Iterator[Path]:
    """Make a temporary folder that replaces the folder `target` when the block ends.

    If the block raises, the temporary folder is removed and `target` stays as it was.

    Args:
        target: the final name. Its parent folder must exist.
        label: the beginning of the temporary name. By default, the name of `target`.
        aside: the name of the old folder during the replacement. By default, a temporary name.

    Raises:
        OSError: if the folder could not be written. The message names the file or folder.
    """
    target = Path(target)
    label = label or target.name
    temporary = target.with_name(temporary_name(label))
    try:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _swap(temporary, target, label, aside or target.with_name(temporary_name(f"{label}.old")))
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError) and e.filename is None:
            _name_file(e, target)
        raise


def _swap(new: Path, target: Path, label: str, aside: Path) -> None:
    """Rename `new` to `target`.

    A rename cannot replace a folder that holds files. The old folder is therefore renamed to
    `aside` first, and deleted when the new one is in place. If the second rename fails, the old
    folder gets its name back.
    """
    replaces = target.exists()
    if replaces:
        if aside.exists():
            remove_folder(aside, label)
        os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        if replaces:
            os.rename(aside, target)
        raise
    sync(target.parent)
    if aside.exists():
        remove_folder(aside, label)


def remove_folder(folder: Path, label: str) -> None:
    """Delete a folder, after a rename to a temporary name so that it never looks half deleted."""
    doomed = folder.with_name(temporary_name(f"{label}.old"))
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


# ---- temporary names -----------------------------------------------------------------------------
def temporary_name(label: str) -> str:
    """Return a hidden file name that is new in every call and names the machine and process."""
    return f".{label}.tmp-{socket.gethostname()}-{os.getpid()}.{next(_counter)}"


def remove_leftovers(folder: Path, label: str) -> None:
    """Remove temporaries of `label` that processes on this machine left when they were killed.

    Temporaries with the id of this process are removed too, because an earlier process may have had
    this id. So call this function only while this process writes nothing under `label`.
    """
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(label)}(?:\.old)?\.tmp-{host}-(\d+)(?:\.\d+)?")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or (int(match[1]) != os.getpid() and _is_alive(int(match[1]))):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would interrupt the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process exists and belongs to another user
        return True
    return True


# ---- flushing to the disk ------------------------------------------------------------------------
def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Folders are skipped on systems that cannot flush them.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as e:
        if not (is_folder and e.errno in _FOLDER_SYNC_UNSUPPORTED):
            raise


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
