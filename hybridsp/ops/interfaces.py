"""How a model layer finds its implementation: registries in the shape of transformers' own.

Softmax layers already ask `transformers.AttentionInterface` for a function by name. Linear
attention and the short convolution have no such registry upstream, so they get one here, of the
same kind. A layer calls `REGISTRY[self.implementation](self, ...)`; `"local"` is one device, and
`hybridsp.parallelize` registers `"hybridsp"` and selects it on the layers of one model instance.
A function reads what it needs of its layer (a mesh, say) from its first argument, the module, so
nothing is bound globally.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.utils.generic import GeneralInterface

from hybridsp.ops.conv import causal_conv, document_offsets
from hybridsp.ops.gla import gated_linear_attention, segment_ids


class LinearAttentionInterface(GeneralInterface):
    """Name -> function(module, q, k, v, g, *, scale, cu_seqlens, initial_state, ...)."""

    _global_mapping: dict = {}  # noqa: RUF012 - the base class keeps its entries here


class ShortConvolutionInterface(GeneralInterface):
    """Name -> function(module, x, weight, bias, *, activation, cu_seqlens, left_context)."""

    _global_mapping: dict = {}  # noqa: RUF012 - the base class keeps its entries here


def local_linear_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention of a whole sequence on one device; see `gated_linear_attention`."""
    segments = None
    if cu_seqlens is not None:
        require_one_packed_row(q, cu_seqlens)
        segments = segment_ids(cu_seqlens.tolist(), 0, q.shape[1], q.device)
    out, state = gated_linear_attention(
        q, k, v, g, scale=scale, segments=segments, initial_state=initial_state
    )
    return out, state if output_final_state else None


def local_short_convolution(
    module: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    left_context: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution of a whole sequence on one device; see `causal_conv`."""
    offsets = None
    if cu_seqlens is not None:
        require_one_packed_row(x, cu_seqlens)
        offsets = document_offsets(cu_seqlens.tolist(), 0, x.shape[1], x.device)
    return causal_conv(
        x, weight, bias, activation=activation, offsets=offsets, left_context=left_context
    )


def require_one_packed_row(x: Tensor, cu_seqlens: Tensor, total: int | None = None) -> None:
    """Refuse document boundaries that do not describe `x` [B, L, ...].

    Args:
        x: any tensor with batch first and sequence second.
        cu_seqlens: int32 boundaries of the whole packed sequence.
        total: tokens of the whole sequence, if `x` holds only a part of it.

    Raises:
        ValueError: the batch has several rows, the boundaries are no integers in one dimension, or
            they do not rise from 0 to `total`.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or not is_integer(cu_seqlens):
        what = type(cu_seqlens).__name__
        if isinstance(cu_seqlens, Tensor):
            what = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(
            f"cu_seqlens is a {what}: give the boundaries as an int32 tensor [documents + 1]"
        )
    total = x.shape[1] if total is None else total
    if x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens with a batch of {x.shape[0]} rows: packed documents share one row; "
            "flatten the batch to [1, B * T] (hybridsp.shard_batch does)"
        )
    bounds = cu_seqlens.tolist()
    rises = all(a <= b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or not rises:
        shown = f"{bounds[:4]} ... {bounds[-1]}" if len(bounds) > 8 else f"{bounds}"
        raise ValueError(
            f"cu_seqlens = {shown} must rise from 0 to the sequence's {total} tokens; "
            "it holds the boundaries of the whole packed sequence, not of one rank's part"
        )


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds whole numbers of 32 or 64 bits."""
    return x.dtype in (torch.int32, torch.int64)


LINEAR_ATTENTION_FUNCTIONS = LinearAttentionInterface()
LINEAR_ATTENTION_FUNCTIONS.register("local", local_linear_attention)

SHORT_CONVOLUTION_FUNCTIONS = ShortConvolutionInterface()
SHORT_CONVOLUTION_FUNCTIONS.register("local", local_short_convolution)

__all__ = [
    "LINEAR_ATTENTION_FUNCTIONS",
    "SHORT_CONVOLUTION_FUNCTIONS",
    "LinearAttentionInterface",
    "ShortConvolutionInterface",
    "is_integer",
    "local_linear_attention",
    "local_short_convolution",
    "require_one_packed_row",
]
