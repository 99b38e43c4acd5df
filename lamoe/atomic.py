"""Write-then-rename: a file or folder appears under its name complete, or not at all.

The content is written under a temporary name in the same folder, flushed to the disk and then
renamed. If the process is killed at any moment, either the old or the new content remains. A hidden
temporary file may remain too, whose name identifies its process (see `remove_leftovers`).

A state of several files is a folder that is replaced as a whole (`replace_folder`).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lamoe.os_errors import FileError

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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def replace_path(
    path: str | Path, temporary: Path | None = None, size: int | None = None
) -> Iterator[Path]:
    """Yield a temporary name. The file that the block writes there replaces `path` at its end.

    If the block raises, the temporary file is removed and `path` stays as it was.

    Args:
        path: the final name. A symbolic link of this name is replaced, not followed.
        temporary: a fixed temporary name in the same folder, overwritten if it exists.
            By default, the name is new in every call.
        size: the bytes of the whole file, if known, for messages about a full disk.

    Raises:
        OSError: if the file could not be written. The message names `path`.
    """
    path = Path(path)
    temporary = temporary or path.with_name(temporary_name(path.name))
    try:
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except OSError as e:
            # Before the temporary file is removed, because its size is part of the message.
            if e.filename is None or str(e.filename) == str(temporary):
                raise _named(e, path, size, temporary) from e.__cause__
            raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_file(
    path: str | Path, mode: str = "wb", temporary: Path | None = None, size: int | None = None
) -> Iterator[IO]:
    """Open a temporary file for writing that replaces `path` when the block ends.

    Args:
        mode: "wb", or "w" for UTF-8 text.
        path, temporary, size: see `replace_path`, also for the errors.
    """
    if temporary is None:
        mode = mode.replace("w", "x")  # never follow a link that somebody else placed there
    with (
        replace_path(path, temporary, size) as name,
        open(name, mode, encoding=None if "b" in mode else "utf-8") as file,
    ):
        yield file


def write_text(path: str | Path, text: str, temporary: Path | None = None) -> None:
    """Replace the file `path` by UTF-8 text. Arguments and errors: see `replace_path`."""
    data = text.encode("utf-8")
    with replace_file(path, "wb", temporary, len(data)) as file:
        file.write(data)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder that has other files too.

    The last one is the first to go and the last to come. If the process is killed in between, that
    file is missing; the files are never there in different versions. To replace them in one step,
    use a folder of their own (`replace_folder`).

    Raises:
        OSError: if a file could not be written. The old ones are still there then.
    """
    new = {name: folder / temporary_name(name) for name in contents}
    try:
        for name, data in contents.items():
            with naming(folder / name, len(data)):
                new[name].write_bytes(data)
                sync(new[name])
        (folder / name).unlink(missing_ok=True)
        for name, temporary in new.items():
            os.replace(temporary, folder / name)
        with naming(folder, sum(map(len, contents.values()))):
            sync(folder)
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)


def copy(source: str | Path, path: str | Path) -> None:
    """Replace the file `path` by a copy of `source`. Errors: see `replace_path`."""
    with replace_path(path, size=Path(source).stat().st_size) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def naming(path: Path, size: int | None = None) -> Iterator[None]:
    """Put `path` into errors of the block that name no file, or one beside it."""
    try:
        yield
    except OSError as e:
        if e.filename is not None and Path(os.fsdecode(e.filename)).parent != path.parent:
            raise
        raise _named(e, path, size, path) from e.__cause__


def _named(error: OSError, path: Path, needed: int | None, written: Path) -> OSError:
    """Return an OSError that names `path` and, if the disk is full, says how much was needed.

    Errors without an errno keep their own message, as do errors that lamoe has put into words.

    Args:
        needed: bytes of the whole, or None if this is not known.
        written: the temporary file or folder.
    """
    if error.errno is None or isinstance(error, FileError):
        return error
    text = error.strerror or str(error)
    if error.errno in _FULL and text == os.strerror(error.errno):
        if needed is None:
            files = [p for p in (written, *written.rglob("*")) if p.is_file()]
            need = f"more than the {sum(p.stat().st_size for p in files):,} bytes written so far"
        else:
            need = f"{needed:,} bytes"
        free, advice = "", "raise the limit of file sizes (ulimit -f)"
        if error.errno != errno.EFBIG:
            with suppress(OSError):
                free = f" and {shutil.disk_usage(path.parent).free:,} are free"
            advice = "free some space"
        return FileError(
            error.errno,
            f"{path} could not be written: {text}; {need} are needed{free}; "
            f"{advice}, or name another place",
            str(path),
        )
    return OSError(error.errno, text, str(path))


# ---- folders -------------------------------------------------------------------------------------
@contextmanager
def replace_folder(
    target: str | Path,
    label: str | None = None,
    aside: Path | None = None,
    size: int | None = None,
) -> Iterator[Path]:
    """Make a temporary folder that replaces the folder `target` when the block ends.

    If the block raises, the temporary folder is removed and `target` stays as it was.

    Args:
        target: the final name. Its parent folder must exist.
        label: the beginning of the temporary name. By default, the name of `target`.
        aside: the name of the old folder during the replacement, on systems that cannot exchange
            two folders. By default, a temporary name.
        size: the bytes of all files, if known, for messages about a full disk.

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
        if isinstance(e, OSError):
            in_it = str(e.filename).startswith(f"{temporary}{os.sep}")
            if e.filename is None or (in_it and e.errno in _FULL):
                name = target / os.path.relpath(e.filename, temporary) if in_it else target
                e = _named(e, name, size, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        raise e from e.__cause__


def move_folder(new: Path, target: Path) -> None:
    """Flush the finished folder `new` to the disk and rename it to `target`, replacing that.

    Both must be on one file system. `target` is replaced as by `replace_folder`.
    """
    _sync_tree(new)
    aside = target.with_name(temporary_name(f"{target.name}.old"))
    _swap(new, target, target.name, aside)


def _swap(new: Path, target: Path, label: str, aside: Path) -> None:
    """Rename `new` to `target`.

    A rename cannot replace a folder that holds files, so the two folders exchange their names in
    one step. Where the system cannot do that, the old folder is renamed to `aside` first, and gets
    its name back if the second rename fails. The old folder is deleted when the new one is in
    place.
    """
    if target.exists() and aside.exists():
        remove_folder(aside, label)
    if not target.exists():
        os.rename(new, target)
        sync(target.parent)
        return
    shutil.copymode(target, new)
    if _exchange(new, target):
        aside = new
    else:
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside, target)
            raise
    sync(target.parent)
    remove_folder(aside, label)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step. Return False if the system cannot do that."""
    call = _exchange_call()
    return call is not None and call(os.fsencode(a), os.fsencode(b)) == 0


@functools.cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = libc.renamex_np
            return lambda a, b: swap(a, b, 2)  # RENAME_SWAP
        rename, here = libc.renameat2, -100  # AT_FDCWD
        return lambda a, b: rename(here, a, here, b, 2)  # RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return None


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
