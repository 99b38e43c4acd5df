"""Settings of the C library's allocator for training."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses larger values


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next allocation.

    By default, glibc returns large blocks to the system when they are freed. The next step then
    allocates the same activations again, and the system must clear every page first. The peak of
    memory stays the same.

    Returns:
        Whether the setting was made. Only glibc has it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    )
