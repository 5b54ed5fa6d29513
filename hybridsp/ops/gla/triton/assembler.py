"""Which ptxas turns the kernels into machine code.

ptxas 12.8, which Triton 3.4 to 3.7 bring along for Hopper, miscompiles them there: it adds offsets
to the 64-bit descriptors of wgmma's operands with one register in place of both halves, so that a
product reads shared memory at a random address. Kernels in which a descriptor is the very start of
shared memory are hit, some on every launch. ptxas 12.9 is sound, and Triton 3.6 and later bring it
too, for Blackwell. docs/performance.md says how this was found.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

SOUND = (12, 9)
_log = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def why_not(capability: tuple[int, int]) -> str | None:
    """What keeps the kernels from being assembled for a chip, or None.

    Makes Triton use a sound ptxas, in this process and those that it starts, where the one that it
    takes is not.

    Args:
        capability: of the chip; (9, 0) is Hopper.
    """
    from triton import knobs

    used = knobs.nvidia.ptxas
    if capability[0] != 9 or _version(used.version) >= SOUND:
        return None
    for tool in _others():
        if _version(tool.version) >= SOUND:
            knobs.nvidia.ptxas = tool.path
            _log.info("ptxas %s at %s in place of %s", tool.version, tool.path, used.version)
            return None
    return (
        f"ptxas {used.version} at {used.path} miscompiles them for Hopper; set TRITON_PTXAS_PATH "
        "to the ptxas of CUDA 12.9 or later, or install Triton 3.6 or later"
    )


def _others() -> Iterator[Any]:
    """Assemblers other than the one that Triton takes for Hopper."""
    from triton import knobs

    # Triton 3.4 and 3.5 have no second one.
    if hasattr(knobs.nvidia, "ptxas_blackwell"):
        yield knobs.nvidia.ptxas_blackwell
    path = shutil.which("ptxas")
    if path is not None and (tool := knobs.NvidiaTool.from_path(path)) is not None:
        yield tool


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))
