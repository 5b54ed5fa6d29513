"""What DeepSpeed would write, caught before it is written.

DeepSpeed decides what goes into which file; when it is written, and from where, is decided here.
With everything in hand before the first byte goes out, the space it needs is known, and a copy in
the host's memory can be written while training goes on.
"""

from __future__ import annotations

import copy
import shutil
import socket
from collections import OrderedDict
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


def copied_to_host(files: list[File]) -> list[File]:
    """The same files with tensors of their own, in the host's memory."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        # A tied weight stays one tensor under two names.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return [File(file.path, _copy_tree(file.content, copied)) for file in files]


def measure(files: list[File]) -> Room:
    """What a save of these files on every rank needs. Collective over the world."""
    num_bytes = sum(
        sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )
        for tensors in (list(_tensors(file.content)) for file in files)
    )
    memory = host_memory()
    report = (socket.gethostname(), num_bytes, None if memory is None else memory.available)
    reports = gather_objects(report)
    short = []
    for host in sorted({host for host, _, _ in reports}):
        needed = sum(size for name, size, _ in reports if name == host)
        available = [free for name, _, free in reports if name == host and free is not None]
        if available and needed > MEMORY_SHARE * min(available):
            short.append(host)
    return Room(sum(size for _, size, _ in reports), tuple(short))


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
            f"{free / 2**20:.0f} MiB free: free some, lower keep_checkpoints, or choose another "
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


def _copy_tree(tree: Any, copied: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return copied(tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, _copy_tree(value, copied)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(_copy_tree(value, copied) for value in tree)
    return copy.deepcopy(tree)


__all__ = [
    "File",
    "NotEnoughSpaceError",
    "Room",
    "capture",
    "check_disk",
    "copied_to_host",
    "measure",
    "writer_of",
]
