"""Room for what a run will write and hold, looked at before it is needed.

A disk that is full ends a run hours after it was started, in the middle of its first checkpoint;
a host without memory ends it with a signal and no message. The size of a checkpoint is known from
the model, and the memory that is left can be read at any time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hybridsp.host_memory import host_memory

GIB = 2**30
# AdamW in fp32: the weights it works on and two moments, beside the model's own weights.
OPTIMIZER_BYTES = 12
LOW_MEMORY = 0.03


def check_room(
    directory: str | Path,
    *,
    trained: int,
    parameters: int,
    bytes_per_weight: int,
    checkpoints: int,
    limit: str = "keep_checkpoints",
) -> None:
    """Refuse to begin a run whose checkpoints its disk cannot hold.

    Args:
        directory: where they are to be; parents that are there are enough.
        trained: parameters with an optimizer state.
        parameters: of the model.
        bytes_per_weight: of the model's dtype.
        checkpoints: that will be there at once; one more than are kept, while one is written.
        limit: the setting that says how many are kept.

    Raises:
        ValueError: there is less room than one checkpoint and the exported model take, beyond
            what the directory holds already.
    """
    model = parameters * bytes_per_weight
    checkpoint = trained * OPTIMIZER_BYTES + model
    needed = model + checkpoint * checkpoints
    place = Path(directory).absolute()
    there = next(path for path in (place, *place.parents) if path.is_dir())
    held = sum(file.stat().st_size for file in _files(place))
    free = shutil.disk_usage(there).free
    if free + held < needed:
        raise ValueError(
            f"output_dir = {str(directory)!r} has room for {(free + held) / GIB:.1f} GiB, but "
            f"{checkpoints} checkpoints of {checkpoint / GIB:.1f} GiB at once and the model of "
            f"{model / GIB:.1f} GiB need {needed / GIB:.1f}: make room, keep fewer ({limit}), or "
            "choose another disk"
        )


def memory_warning() -> str | None:
    """What to say if this host is about to run out of memory."""
    memory = host_memory()
    if memory is None or memory.available > LOW_MEMORY * memory.total:
        return None
    return (
        f"the host has {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory left "
        "and may end processes: offload less, or shorten sequences"
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


__all__ = ["check_room", "memory_warning"]
