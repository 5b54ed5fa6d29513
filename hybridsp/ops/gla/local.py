"""Gated linear attention of a whole sequence on one device, as one autograd Function.

It keeps its inputs and nothing else: the backward recomputes the states of the chunks, which would
take [B, H, chunks, K, V] to keep. A state may enter (generation goes on from a cache) and the last
one leaves; both have gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.ops.gla.contract import (
    Backend,
    Tokens,
    check_tokens,
    choose_backend,
    without_autocast,
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    segments: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention of a whole sequence on one device; differentiable.

    Args:
        q, k: [B, L, H, K].
        v: [B, L, H, V].
        g: log decay <= 0, [B, L, H, K], or [B, L, H, 1] for one decay per head.
        scale: factor on q.
        segments: int [L] from `segment_ids`; None for one document.
        initial_state: [B, H, K, V], the state before the first token; None for zero.
        backend: "plain", "triton", or None for the fastest that can, see `choose_backend`.

    Returns:
        o [B, L, H, V] in v's dtype and the state after the last token [B, H, K, V] fp32.

    Raises:
        ValueError: tensors or options that do not fit, see `check_tokens` and `choose_backend`.
    """
    tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=segments)
    check_tokens(tokens)
    state_shape = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}; these tokens need "
            f"[B, H, K, V] = {state_shape}"
        )
    chosen = choose_backend(tokens, backend)
    return GatedLinearAttention.apply(q, k, v, g, initial_state, scale, segments, chosen)


class GatedLinearAttention(torch.autograd.Function):
    """The whole sequence on one device.

    forward   q, k [B, L, H, K], v [B, L, H, V], g [B, L, H, K or 1], S_0 [B, H, K, V]
              -> o [B, L, H, V], S_L [B, H, K, V]
    backward  do, dS_L -> dq, dk, dv, dg, dS_0, by recomputation from the saved inputs
    """

    @staticmethod
    def forward(ctx, q, k, v, g, initial_state, scale, segments, backend: Backend):  # noqa: D102
        ctx.set_materialize_grads(False)  # training does not read the final state
        ctx.save_for_backward(q, k, v, g, initial_state)
        ctx.options = scale, segments, backend
        incoming = None if initial_state is None else initial_state.float()
        tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=segments)
        with without_autocast(tokens):
            forward = backend.forward(tokens)
            end, decay = forward.end_state()
            forward.intra_chunk()
            out = forward.output(incoming)
        return out, end if incoming is None else decay[..., None] * incoming + end

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):  # noqa: D102
        q, k, v, g, initial_state = ctx.saved_tensors
        scale, segments, backend = ctx.options
        incoming = None if initial_state is None else initial_state.float()
        dout = torch.zeros_like(v) if dout is None else dout
        tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=segments)
        with without_autocast(tokens):
            backward = backend.backward(tokens, dout, incoming)
            start, decay = backward.start_gradient()
            backward.intra_chunk()
            grads = backward.gradients(dfinal)
        dinitial = None
        if initial_state is not None:
            dinitial = start if dfinal is None else decay[..., None] * dfinal + start
            dinitial = dinitial.to(initial_state.dtype)
        return *grads, dinitial, None, None, None
