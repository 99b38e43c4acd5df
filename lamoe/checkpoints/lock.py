"""Advisory locks on open files, so that two processes do not write the same folder.

POSIX systems use flock. Windows locks one byte far beyond the end of the file, because its locks
also keep other processes from reading the locked bytes. The lock is released when the file is
closed or the process ends.
"""

from __future__ import annotations

import sys
from typing import IO

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 0x7FFF_FFFE  # msvcrt takes 32-bit offsets

    def _lock(file: IO):
        position = file.tell()
        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:  # raised on Windows if another process has the lock
            raise BlockingIOError(*error.args) from None
        finally:
            file.seek(position)

else:
    import fcntl

    def _lock(file: IO):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IO) -> bool:
    """Lock an open, writable file without waiting.

    Returns:
        False if another process holds the lock, else True. On a file system without locks the
        result is True too, although nothing protects the file.
    """
    try:
        _lock(file)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
