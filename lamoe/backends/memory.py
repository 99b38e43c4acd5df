"""Measures how much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import torch

# Files with the memory (limit, usage, statistics) of a control group, in versions 2 and 1 of the
# interface, and the statistic that counts cached files.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory(device: torch.device | str = "cpu", root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take on a device, or None if unknown.

    On the host, this is the memory that the system reports as available, or the unused part of the
    control group's limit if that is less. Files that the system caches for the group count as
    unused, because it drops them when a process needs memory.

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
    group = root / "sys/fs/cgroup"
    for limit, usage, statistics, cached in _CGROUP_FILES:
        try:
            free = int((group / limit).read_text()) - int((group / usage).read_text())
        except (OSError, ValueError):  # the limit may be "max", which means none
            continue
        found.append(max(0, free + _statistic(group / statistics, cached)))
    return min(found, default=None)


def _statistic(file: Path, name: str) -> int:
    """Return a number of a file with lines "name number", or 0 if it is not there."""
    try:
        lines = (line.split() for line in file.read_text().splitlines())
        return next((int(line[1]) for line in lines if line[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0
