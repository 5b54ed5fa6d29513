"""Gated linear attention by Triton kernels; `passes.py` says which kernel does what.

tuning.py     how each kernel is launched, from files that ship with the package
assembler.py  which ptxas makes machine code of them
plan.py       how a span is cut in chunks, stretches and parts
blocks.py     what every kernel does with a chunk
prepare.py    what a chunk's gates make of q and k
states.py     the recurrent state along a span
intra.py      pairs of tokens inside a chunk
gradients.py  gradients of q, k and the gates
passes.py     the passes of `contract`, made of these
"""

from __future__ import annotations

import torch

from hybridsp.ops.gla.contract import Backend, Tokens
from hybridsp.ops.gla.triton import assembler
from hybridsp.ops.gla.triton.passes import TritonBackward, TritonForward
from hybridsp.ops.gla.triton.tuning import shared_bytes

LARGEST_KEY_DIM = 256
MOST_HEADS = 65_535
DTYPES = (torch.float32, torch.bfloat16)


def why_not(tokens: Tokens) -> str | None:
    """What keeps these tokens from the kernels, or None."""
    if tokens.q.device.type != "cuda":
        return f"the tensors are on {tokens.q.device.type}, Triton's kernels run on CUDA"
    chip = torch.cuda.get_device_properties(tokens.q.device)
    capability = chip.major, chip.minor
    if capability < (8, 0):
        return "Triton's kernels need an Ampere GPU or a later one"
    batch, _, heads, key_dim = tokens.q.shape
    if key_dim > LARGEST_KEY_DIM:
        return f"K = {key_dim} is above {LARGEST_KEY_DIM}, the kernels' largest key dim"
    if batch * heads > MOST_HEADS:
        return f"B * H = {batch * heads} is above {MOST_HEADS}, the most that a kernel's grid holds"
    if tokens.scale == 0:
        return "scale = 0, by which the kernels divide"
    dtypes = {x.dtype for x in (tokens.q, tokens.k, tokens.v)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"q, k and v are {names}; the kernels take one of {DTYPES} for all three"
    needed = shared_bytes(key_dim, tokens.q.dtype, capability)
    found = chip.shared_memory_per_block_optin  # type: ignore[attr-defined]  # stubs lack it
    if needed > found:
        return (
            f"K = {key_dim} in {tokens.q.dtype} takes {needed:,} bytes of shared memory, and "
            f"{chip.name} has {found:,}"
        )
    return assembler.why_not(capability)


BACKEND = Backend(name="triton", forward=TritonForward, backward=TritonBackward, why_not=why_not)

__all__ = ["BACKEND", "why_not"]
