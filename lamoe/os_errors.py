"""Errors of the operating system in words: which file, what is wrong, what to do.

`check_output` finds most of them before work is spent on a result that cannot be written.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

# errno -> (what is wrong, what to do). Other errors keep the words of the system.
_WORDS = {
    errno.ENOENT: ("does not exist", "check the name"),
    errno.EEXIST: ("exists already", "choose another name"),
    errno.ENOTDIR: ("lies under a file, not under a folder", "choose another name"),
    errno.EISDIR: ("is a folder", "name a file"),
    errno.EACCES: ("may not be used by this user", "change its permissions, or name another place"),
    errno.EPERM: ("may not be used by this user", "change its permissions, or name another place"),
    errno.EROFS: ("is on a read-only file system", "name a place that is writable"),
    errno.ENAMETOOLONG: ("has a name that is too long for the file system", "use a shorter one"),
    errno.ELOOP: ("is a link that leads back to itself", "remove it, or choose another name"),
    errno.ENOSPC: ("could not be written, the disk is full", "free some space on the disk"),
    errno.EDQUOT: (
        "could not be written, the disk quota is used up",
        "free some space on the disk",
    ),
    errno.EFBIG: (
        "could not be written, it is larger than files may be",
        "raise the limit (ulimit -f), or use another file system",
    ),
    errno.EMFILE: ("could not be opened, too many files are open", "raise the limit (ulimit -n)"),
    errno.EIO: ("could not be read or written, the disk failed", "check the disk"),
}


class FileError(OSError):
    """An error of the operating system with a message of lamoe, FileError(errno, message)."""

    def __str__(self) -> str:
        return self.strerror


def explain(error: OSError) -> str:
    """Return one sentence: the file, what is wrong, and what to do.

    Messages that lamoe wrote itself are returned as they are.
    """
    text, number = error.strerror or str(error), error.errno
    if "No usable temporary directory" in text:
        return (
            "no folder for temporary files is writable; set TMPDIR to a writable folder "
            "(in a container: --tmpfs /tmp)"
        )
    files = (error.filename, error.filename2)
    names = [_shortened(os.fsdecode(n)) for n in files if isinstance(n, (str, bytes, Path))]
    if number is None or text != os.strerror(number):
        missing = [n for n in names if n not in text]
        return f"{text}: {', '.join(missing)}" if missing else text
    if not names:
        return text
    what, advice = _WORDS.get(number, (f"could not be used: {text}", ""))
    shown = names[0] or "a file with an empty name"
    return f"{shown} {what}" + (f"; {advice}" if advice else "")


def _shortened(name: str) -> str:
    return name if len(name) <= 300 else f"{name[:100]}... ({len(name)} characters)"


def current_folder() -> str:
    """Return the current folder for a message. It may have been deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "a folder that was deleted"


def number_of(error: Exception) -> int:
    """Return the errno in the text of an error of safetensors, which has no attribute for it."""
    code = re.search(r"os error (\d+)", str(error))
    return int(code[1]) if code else errno.EIO


def check_output(option: str, path: str | Path, kind: str = "folder") -> Path:
    """Check that a folder or file can be written at `path`, and return the path with ~ expanded.

    Nothing is made. The check cannot see everything (for example quotas).

    Args:
        option: how the user named the output, for example "run.out" or "--out".
        kind: "folder" or "file".

    Raises:
        ValueError: if it cannot be written. The message says what was found and what to do.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"{option} is empty; name a {kind}")
    if "\0" in text:
        raise ValueError(f"{option} {text!r} holds a zero byte; name a {kind} without it")
    path = Path(os.path.expanduser(text))
    for place in (path, *path.parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            if place.is_symlink():
                raise ValueError(
                    f"{option} {path}: {place} is a link to {os.readlink(place)}, which does not "
                    f"exist; make that folder, or choose another {option}"
                ) from None
            if kind == "file" and place != path:
                raise ValueError(
                    f"{option} {path}: the folder {path.parent} does not exist; make it first"
                ) from None
            continue
        except NotADirectoryError:
            continue  # one of the parents is a file
        except OSError as e:
            raise ValueError(f"{option} {path}: {explain(e)}") from None
        if place == path and kind == "file":
            if stat.S_ISDIR(mode):
                raise ValueError(f"{option} {path} is a folder; name a file")
            continue
        if not stat.S_ISDIR(mode):
            where = "is" if place == path else f"lies under {place}, which is"
            raise ValueError(
                f"{option} {path} {where} a file, not a folder; choose another {option}"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY if hasattr(os, "statvfs") else False
            raise ValueError(
                f"{option} {path} cannot be written: {place} "
                + (
                    "is on a read-only file system"
                    if read_only
                    else "may not be written by this user"
                )
                + f"; choose another {option}"
            )
        break
    return path
