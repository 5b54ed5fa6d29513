"""Gated linear attention on one device: what a backend does, the backends, and the op on top.

contract   the stages of a layer, which backend does them, and what is refused
plain      PyTorch, any device: chunks of matrix products
triton     the same as kernels
local      the whole sequence on one device, as one autograd Function
"""

from hybridsp.ops.gla.contract import (
    Backend,
    Tokens,
    check_tokens,
    choose_backend,
    segment_ids,
    without_autocast,
)
from hybridsp.ops.gla.local import gated_linear_attention

__all__ = [
    "Backend",
    "Tokens",
    "check_tokens",
    "choose_backend",
    "gated_linear_attention",
    "segment_ids",
    "without_autocast",
]
