"""HybridGLA, this project's own family: linear layers ask the registries of `hybridsp.ops`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridsp.adapters.base import IMPLEMENTATION, Adapter
from hybridsp.attention import linear_attention, short_convolution
from hybridsp.ops import LINEAR_ATTENTION_FUNCTIONS, SHORT_CONVOLUTION_FUNCTIONS


class HybridGLAAdapter(Adapter):
    """Gated linear attention layers beside Llama-like softmax layers."""

    model_types = ("hybrid_gla",)
    softmax = ("HybridGLAAttention",)
    linear = ("HybridGLALinearAttention",)
    mlps = ("LlamaMLP",)


def sp_linear_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, None]:
    """`linear_attention` in the form of the registry.

    Raises:
        ValueError: a cache, which sequence parallelism does not do.
    """
    if initial_state is not None or output_final_state:
        raise ValueError(
            "past_key_values: a cache is not supported under sequence parallelism; generate with "
            "the exported model on one device"
        )
    out = linear_attention(q, k, v, g, mesh=module.sp_mesh, cu_seqlens=cu_seqlens, scale=scale)
    return out, None


def sp_short_convolution(
    module: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    left_context: Tensor | None = None,
) -> Tensor:
    """`short_convolution` in the form of the registry."""
    assert left_context is None, "a cache is refused before the convolution runs"
    return short_convolution(
        x, weight, bias, mesh=module.sp_mesh, activation=activation, cu_seqlens=cu_seqlens
    )


LINEAR_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sp_linear_attention)
SHORT_CONVOLUTION_FUNCTIONS.register(IMPLEMENTATION, sp_short_convolution)
