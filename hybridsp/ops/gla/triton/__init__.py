"""Gated linear attention by Triton kernels; `passes.py` says which kernel does what.

tuning.py     how each kernel is launched, from files that ship with the package
plan.py       how a span is cut in chunks, stretches and groups of heads
blocks.py     what every kernel does with a chunk
states.py     the recurrent state along a span
intra.py      pairs of tokens inside a chunk
gradients.py  gradients of q, k and the gates
passes.py     the passes of `contract`, made of these
"""

from __future__ import annotations

import torch

from hybridsp.ops.gla.contract import Backend, Tokens
from hybridsp.ops.gla.triton.passes import TritonBackward, TritonForward

LARGEST_KEY_DIM = 256
DTYPES = (torch.float32, torch.bfloat16)


def why_not(tokens: Tokens) -> str | None:
    """What keeps these tokens from the kernels, or None."""
    if tokens.q.device.type != "cuda":
        return f"the tensors are on {tokens.q.device.type}, Triton's kernels run on CUDA"
    if torch.cuda.get_device_capability(tokens.q.device) < (8, 0):
        return "Triton's kernels need an Ampere GPU or a later one"
    if tokens.q.shape[-1] > LARGEST_KEY_DIM:
        return f"K = {tokens.q.shape[-1]} is above {LARGEST_KEY_DIM}, the kernels' largest key dim"
    if tokens.scale == 0:
        return "scale = 0, by which the kernels divide"
    dtypes = {x.dtype for x in (tokens.q, tokens.k, tokens.v)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"q, k and v are {names}; the kernels take one of {DTYPES} for all three"
    return None


BACKEND = Backend(name="triton", forward=TritonForward, backward=TritonBackward, why_not=why_not)

__all__ = ["BACKEND", "why_not"]
