"""Measures how much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import torch

# Files with the memory (limit, usage) of a control group, in versions 2 and 1 of the interface.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory(device: torch.device | str = "cpu", root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take on a device, or None if unknown.

    On the host, this is the memory that the system reports as available, or the unused part of the
    control group's limit if that is less.

    Args:
        device: the device whose memory is meant.
        root: folder that contains /proc and /sys. Tests replace it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    for names in _CGROUP_FILES:
        try:
            limit, used = ((root / "sys/fs/cgroup" / n).read_text().strip() for n in names)
            found.append(max(0, int(limit) - int(used)))
        except (OSError, ValueError):  # the limit may be "max", which means none
            pass
    return min(found, default=None)
