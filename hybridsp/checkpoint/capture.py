"""What DeepSpeed would write, caught before it is written.

DeepSpeed decides what goes into which file; when it is written, and from where, is decided here.
With everything in hand before the first byte goes out, the space it needs is known, and a copy in
the host's memory can be written while training goes on.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridsp.host_memory import host_memory
from hybridsp.mesh import SPMesh, gather_objects

# What a file has beside its tensors, and what a file system needs beside its files.
OVERHEAD = 1.01
OVERHEAD_BYTES = 2**20
# Of the host's free memory, so that the data loaders and the file cache keep some.
MEMORY_SHARE = 0.9


class NotEnoughSpaceError(ValueError):
    """A checkpoint does not fit on the disk. Nothing was written, and every rank raises it."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint, and what is to be in it."""

    path: Path
    content: Any


@dataclass(frozen=True)
class Room:
    """Bytes that a save needs of all ranks together, and whether hosts have memory for a copy."""

    num_bytes: int
    hosts_without_memory: tuple[str, ...]


def capture(engine: Any, root: Path, tag: str) -> list[File]:
    """The files that `engine.save_checkpoint` would write on this rank. Collective.

    Their tensors are the engine's own: write them, or copy them, before the next step.
    """
    files: list[File] = []

    def keep(state_dict: Any, path: str) -> None:
        files.append(File(Path(path), state_dict))

    engine.checkpoint_engine.save = keep  # the instance's, in front of its class's
    try:
        engine.save_checkpoint(str(root), tag=tag, client_state={}, save_latest=False)
    finally:
        del engine.checkpoint_engine.save
    return files


def writer_of(engine: Any) -> Callable[[Any, str], None]:
    """How the engine's configuration says that files are written."""
    return engine.checkpoint_engine.save


def storages_of(files: list[File]) -> set[tuple[int, int]]:
    """Address and bytes of each storage that tensors of the files lie in."""
    storages = (t.untyped_storage() for file in files for t in _tensors(file.content))
    return {(storage.data_ptr(), storage.nbytes()) for storage in storages}


def measure(files: list[File], copy_bytes: int) -> Room:
    """What a save of these files on every rank needs. Collective over the world.

    Args:
        files: this rank's.
        copy_bytes: host memory that a copy of them would take.
    """
    memory = host_memory()
    num_bytes = sum(size for _, size in storages_of(files))
    available = None if memory is None else memory.available
    reports = gather_objects((socket.gethostname(), num_bytes, copy_bytes, available))
    short = []
    for host in sorted({host for host, *_ in reports}):
        needed = sum(copied for name, _, copied, _ in reports if name == host)
        found = [free for name, *_, free in reports if name == host and free is not None]
        if found and needed > MEMORY_SHARE * min(found):
            short.append(host)
    return Room(sum(size for _, size, _, _ in reports), tuple(short))


def check_disk(mesh: SPMesh, folder: Path, room: Room) -> None:
    """Refuse a save that the disk has no room for. Collective over the world.

    Raises:
        NotEnoughSpaceError: there is less free space than the files will take; on every rank.
    """
    free = mesh.on_rank_zero(lambda: shutil.disk_usage(folder).free)
    needed = int(room.num_bytes * OVERHEAD) + OVERHEAD_BYTES
    if needed > free:
        mesh.on_rank_zero(shutil.rmtree, folder)
        raise NotEnoughSpaceError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB, but {folder.parent} has "
            f"{free / 2**20:.0f} MiB free: free some, keep fewer checkpoints, or choose another "
            "output_dir"
        )


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


__all__ = [
    "File",
    "NotEnoughSpaceError",
    "Room",
    "capture",
    "check_disk",
    "measure",
    "storages_of",
    "writer_of",
]
