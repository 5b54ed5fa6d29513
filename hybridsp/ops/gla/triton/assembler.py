"""Which ptxas turns the kernels into machine code.

ptxas 12.8, which Triton 3.4 to 3.7 bring along for Hopper, miscompiles them there: it adds offsets
to the 64-bit descriptors of wgmma's operands with one register in place of both halves, so that a
product reads shared memory at a random address. Kernels in which a descriptor is the very start of
shared memory are hit, some on every launch. ptxas 12.9 is sound, and Triton 3.6 and later bring it
too, for Blackwell. docs/performance.md says how this was found.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

SOUND = (12, 9)
PATH = "TRITON_PTXAS_PATH"
_log = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def why_not(capability: tuple[int, int]) -> str | None:
    """What keeps the kernels from being assembled for a chip, or None.

    Makes Triton use a sound ptxas (by TRITON_PTXAS_PATH, so that processes started from this one
    do too) where its own is not and the user has chosen none.

    Args:
        capability: of the chip; (9, 0) is Hopper.
    """
    from triton import knobs

    if capability[0] != 9 or _version(knobs.nvidia.ptxas.version) >= SOUND:
        return None
    if PATH not in os.environ:
        for tool in _others():
            if _version(tool.version) >= SOUND:
                os.environ[PATH] = tool.path
                _log.info("ptxas %s at %s, for Hopper", tool.version, tool.path)
                return None
    used = knobs.nvidia.ptxas
    return (
        f"ptxas {used.version} at {used.path} miscompiles them for Hopper; set {PATH} to the ptxas "
        "of CUDA 12.9 or later, or install Triton 3.6 or later"
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
