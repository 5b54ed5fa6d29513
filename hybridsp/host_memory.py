"""How much memory the processes of this host may use, and how much of it is free.

What `free` shows is the machine's. In a container, or under a batch system, the kernel ends
processes at the limit of a control group (cgroup) long before the machine is full, and a group is
bounded by those around it: the least of all limits counts. What was read from files stays counted
as used until somebody needs the room, so it is free memory here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes that processes here may use at all, and that nobody uses now."""

    total: int
    available: int


def host_memory(
    meminfo: Path = MEMINFO, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> HostMemory | None:
    """The host's memory, or its container's where that is less.

    Args:
        meminfo: what the kernel says of the machine.
        cgroups: where the control groups are mounted, of version 2 or 1.
        membership: the groups that this process is in.

    Returns:
        None where the system does not say, as only Linux does.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (
            int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")
        )
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in _cgroup_limits(cgroups, membership):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return HostMemory(total=total, available=available)


def _cgroup_limits(cgroups: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, used) of every memory cgroup around this process.

    Used is what cannot be had back: files that were read stay counted until somebody needs room.
    """
    inside = ""
    try:
        for line in membership.read_text().splitlines():
            if line.startswith("0::"):
                inside = line.removeprefix("0::").strip("/")
    except OSError:
        inside = ""  # not Linux; the root, which is looked at anyway, is not there either
    folder = cgroups / inside
    around = [folder, *(parent for parent in folder.parents if parent.is_relative_to(cgroups))]
    files = [(place / "memory.max", place / "memory.current", "") for place in around]
    old = cgroups / "memory"
    files.append((old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", "total_"))
    found = []
    for limit, used, prefix in files:
        try:
            there = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):
            continue  # no such cgroup, or "max": no limit
        found.append((there[0], max(there[1] - _page_cache(used.parent, prefix), 0)))
    return found


def _page_cache(cgroup: Path, prefix: str) -> int:
    """Bytes of files in memory, which the kernel drops before a process goes without."""
    try:
        lines = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return sum(int(lines.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return 0


__all__ = ["HostMemory", "host_memory"]
