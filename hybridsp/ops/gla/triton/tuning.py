"""How each kernel is launched: block sizes, warps and pipeline stages.

Nothing is tuned while a model trains, so the first step compiles each kernel once and that is
all. Launches were tuned by `hybridsp bench tune` and ship with the package, one JSON file per
chip; a shape or chip that is not there gets the rule of thumb below.

A file maps "kernel/K/V/decay/dtype" to the fields of `Launch`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

import torch

Kernel = Literal["prepare", "states", "scan", "output", "gradient"]
# Found by compiling for sm_80 and sm_90: (K up to, bytes); see tests/test_triton_launches.py.
SHARED_BYTES = {
    torch.bfloat16: ((64, 73_728), (128, 147_456), (256, 196_608)),
    torch.float32: ((64, 114_688), (128, 122_880), (256, 184_320)),
}
# Chips with another's multiprocessors, not tuned apart so far.
ALIKE = {"nvidia-h200": "nvidia-h100"}
KERNELS: tuple[Kernel, ...] = ("prepare", "states", "scan", "output", "gradient")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to launch a kernel.

    Attributes:
        BK, BV: rows and columns of the state that one program holds.
        num_warps, num_stages: Triton's launch options.
        maxnreg: registers of a thread, the fewer the more programs side by side; None for as many
            as the compiler wants.
    """

    BK: int
    BV: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def launch_of(
    kernel: Kernel, key_dim: int, value_dim: int, channels: bool, dtype: torch.dtype, chip: str
) -> Launch:
    """The tuned launch of a kernel, or the rule of thumb.

    Args:
        kernel: one of KERNELS.
        key_dim, value_dim: K and V of a head.
        channels: whether the decay is one per key channel.
        dtype: of q, k and v.
        chip: `torch.cuda.get_device_name()`, or "" where there is none.
    """
    tuned = _tuned(chip).get(entry_name(kernel, key_dim, value_dim, channels, dtype))
    return tuned or rule_of_thumb(kernel, key_dim, value_dim, dtype)


def entry_name(
    kernel: Kernel, key_dim: int, value_dim: int, channels: bool, dtype: torch.dtype
) -> str:
    """The name of a launch in a file."""
    decay = "channel" if channels else "head"
    return f"{kernel}/{key_dim}/{value_dim}/{decay}/{str(dtype).removeprefix('torch.')}"


def rule_of_thumb(kernel: Kernel, key_dim: int, value_dim: int, dtype: torch.dtype) -> Launch:
    """A launch for any shape and chip; `shared_bytes` is what the widest of them takes."""
    rows, columns = power_of_two(key_dim), power_of_two(value_dim)
    wide = dtype == torch.float32  # operands of twice the size: half the block
    if kernel == "scan":
        return Launch(BK=min(rows, 16), BV=min(columns, 64), num_warps=4, num_stages=1)
    if kernel == "states":
        width = min(columns, 64 if wide else 128)
        return Launch(BK=min(rows, 64), BV=width, num_warps=4, num_stages=2)
    if kernel == "prepare":
        return Launch(BK=min(rows, 64), BV=16, num_warps=4, num_stages=1)
    if kernel == "output":  # a program holds all K rows: o sums over them
        area = 4096 if wide else 16384
        width = max(16, min(columns, area // rows))
        return Launch(BK=rows, BV=width, num_warps=8, num_stages=2)
    width = min(columns, 32 if wide else 64)
    return Launch(BK=min(rows, 32), BV=width, num_warps=4, num_stages=2)


def shared_bytes(key_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Shared memory that the widest kernel needs, by its rule of thumb ("output", in reverse).

    Args:
        key_dim: K of a head.
        dtype: of q, k and v.
        capability: of the chip; (9, 0) is Hopper.
    """
    asynchronous = capability[0] in (9, 10)  # the pipeline's buffers hold operands of wgmma
    if dtype == torch.bfloat16 and not asynchronous:
        return 90_112
    needs = SHARED_BYTES[dtype]
    return next(needed for rows, needed in needs if key_dim <= rows)


def name_of(chip: str) -> str:
    """The name up to the model's number: "NVIDIA H100 80GB HBM3" -> "nvidia-h100"."""
    words = chip.lower().split()
    numbered = (i for i, word in enumerate(words) if any(map(str.isdigit, word)))
    return "-".join(words[: next(numbered, len(words)) + 1])


def file_of(chip: str) -> str:
    """The name of a chip's file."""
    return f"{name_of(chip)}.json"


def dump(entries: dict[str, Launch]) -> str:
    """The text of a file."""
    return json.dumps({name: asdict(entries[name]) for name in sorted(entries)}, indent=2) + "\n"


def power_of_two(number: int) -> int:
    """The least power of two that holds `number`, and that tensor cores take."""
    return max(16, 1 << (number - 1).bit_length())


@lru_cache(maxsize=8)
def _tuned(chip: str) -> dict[str, Launch]:
    if not chip:
        return {}
    folder = resources.files(__package__) / "launches"
    own, alike = file_of(chip), file_of(ALIKE.get(name_of(chip), chip))
    path = next((folder / name for name in (own, alike) if (folder / name).is_file()), None)
    if path is None:
        return {}
    return {name: Launch(**entry) for name, entry in json.loads(path.read_text()).items()}
