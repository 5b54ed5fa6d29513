"""Short causal convolution: each channel mixes with its last few tokens.

Linear-attention layers put it in front of q, k and v. With W taps a token needs the W-1 tokens
before it; on several ranks they come from the left neighbour (`collectives.halo`) and are passed
in as `left_context`. A tap never reaches past the start of its document, which `offsets` (how far
each token stands from its document's start) decides without any knowledge of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = (None, "silu")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    offsets: Tensor | None = None,
    left_context: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution.

    Args:
        x: [B, L, D].
        weight: [D, W]; the last tap multiplies the token itself.
        bias: [D] or None.
        activation: None or "silu", applied to the result.
        offsets: int [L], each token's distance from its document's start; None where all of x
            and `left_context` is one document.
        left_context: [B, W-1, D], the tokens before x; None for zeros.

    Returns:
        [B, L, D] in x's dtype.

    Raises:
        ValueError: unknown activation, or a left context of the wrong shape.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is unknown; use one of {ACTIVATIONS}")
    batch, length, channels = x.shape
    width = weight.shape[1]
    if left_context is None:
        left_context = x.new_zeros(batch, width - 1, channels)
    elif left_context.shape != (batch, width - 1, channels):
        raise ValueError(
            f"left_context has shape {tuple(left_context.shape)}; a convolution of {width} taps "
            f"over x {tuple(x.shape)} needs {(batch, width - 1, channels)}"
        )
    padded = torch.cat([left_context, x], dim=1)
    y = x * weight[:, width - 1]
    for distance in range(1, width):
        tap = padded[:, width - 1 - distance : width - 1 - distance + length]
        tap = tap * weight[:, width - 1 - distance]
        if offsets is not None:
            tap = tap * (offsets >= distance)[:, None]
        y = y + tap
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation == "silu" else y


def document_offsets(
    bounds: Sequence[int], start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """Distance of each token in [start, stop) from the start of its document.

    Args:
        bounds: document boundaries of the whole packed sequence, rising from 0.
        start, stop: the span of tokens asked for.
        device: where the result lives.

    Returns:
        int64 [stop - start].
    """
    position = torch.arange(start, stop)
    starts = torch.tensor(list(bounds))
    document = torch.bucketize(position, starts, right=True) - 1
    return (position - starts[document]).to(device)
