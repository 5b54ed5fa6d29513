"""The host: what a job runs out of that is no GPU.

Containers are where it goes wrong: /dev/shm has 64 MiB there by default, and the memory that
`free` shows is the machine's, not what the container's cgroup may use.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from hybridsp.doctor.finding import Finding, amount, failing, ok, warning
from hybridsp.host_memory import HostMemory

GIB = 2**30
# NCCL puts its buffers between GPUs without peer access there, and data loaders their batches.
SHM_WANTED, SHM_NEEDED = GIB, 64 * 2**20
# Libraries, the model's shards and the data of one rank; every peer costs sockets on top, in each
# of the mesh's groups.
FILES_OF_A_RANK, SOCKETS_PER_PEER = 256, 14
DISK_WANTED = 10 * GIB


def shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> Finding:
    """Room for what processes of one host share.

    Args:
        gpus: of this host; without any, little goes through there.
        path: where it is mounted.
    """
    name = "shared memory"
    fix = "start the container with --shm-size 8g (docker) or mount a larger tmpfs at /dev/shm"
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return warning(name, f"{path} cannot be used: {error.strerror}", fix)
    found = f"{amount(usage.free)} of {amount(usage.total)} free at {path}"
    if usage.free < SHM_NEEDED and gpus > 1:
        return failing(name, f"{found}, NCCL and data loaders need more", fix)
    if usage.free < SHM_WANTED:
        return (
            warning(name, f"{found}, which {gpus} GPUs can fill", fix) if gpus else ok(name, found)
        )
    return ok(name, found)


def open_files(world_size: int) -> Finding:
    """The limit on open files, sockets included, against the ranks of the job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_RANK + SOCKETS_PER_PEER * (world_size - 1)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok("open files", f"limit {_limit(soft)}, about {needed} are needed")
    return warning(
        "open files",
        f"limit {soft}, about {needed} are needed for {world_size} ranks",
        f"raise it before the launcher: ulimit -n {max(65536, needed)} (the hard limit is "
        f"{_limit(hard)})",
    )


def locked_memory(infiniband: Path = Path("/sys/class/infiniband")) -> Finding:
    """The limit on locked memory. CUDA's pinned memory is not counted in it, RDMA's is."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    found = f"limit {amount(soft)}"
    if infiniband.is_dir() and any(infiniband.iterdir()):
        return warning(
            "locked memory",
            f"{found}, and InfiniBand registers its buffers in it",
            "lift it: ulimit -l unlimited, or --ulimit memlock=-1 (docker)",
        )
    return ok("locked memory", f"{found}; only InfiniBand needs more, and there is none")


def memory(of_host: HostMemory | None) -> Finding:
    """The host's memory."""
    if of_host is None:
        return ok("host memory", "unknown: this system has no /proc/meminfo")
    return ok(
        "host memory",
        f"{amount(of_host.available)} of {amount(of_host.total)} available to processes",
    )


def disk(folder: Path, needed: float = DISK_WANTED, what: str = "checkpoints") -> Finding:
    """Room and permission to write where a run puts its results.

    Args:
        folder: of the results; need not be there yet.
        needed: bytes that are wanted.
        what: takes them.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    name = "disk"
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return failing(name, f"{folder}: {error.strerror}", "choose another output folder")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return failing(
            name, f"{folder}: {place} cannot be written", "choose a folder that you may write to"
        )
    found = f"{amount(free)} free at {place}"
    if free < needed:
        return warning(
            name,
            f"{found}, {what} take {amount(needed)}",
            "free some space, choose another output folder, or keep fewer checkpoints",
        )
    return ok(name, found)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


__all__ = [
    "disk",
    "locked_memory",
    "memory",
    "open_files",
    "shared_memory",
]
