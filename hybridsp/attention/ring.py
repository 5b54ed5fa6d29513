"""Attention of a ring's ranks over all their keys: each step's blocks, merged.

At step 0 a rank attends to the keys it has; `ring_transport` brings the others' in later steps.
Outputs are merged in fp32 by their log-sum-exp, so the error does not grow with the ring. The
backward visits the same keys once more with the *merged* out and lse, so every block's gradients
are exact shares; they are added up in fp32 where they belong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.attention.keep import attend_once
from hybridsp.attention.ring_plan import RingPlan
from hybridsp.attention.ring_transport import transport_of
from hybridsp.layout import Block
from hybridsp.ops.merge import merge_attention


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries over the whole ring's keys.

    A forward that checkpointing repeats is computed, and K, V travel, the first time only (`keep`).

    forward   q [B, Lz, Hq, D], k, v [B, Lz, Hkv, D] -> out [B, Lz, Hq, Dv]   K, V to all who need
    backward  dout -> dq, dk, dv           K, V to all who need, shares of dK, dV to their owners
    """

    @staticmethod
    def forward(ctx, q, k, v, plan):  # noqa: D102
        ctx.kv_dtype = k.dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
        out, lse = attend_once(lambda: _ring_attention(q, k, v, plan))
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: D102
        plan = ctx.plan
        q, k, v, out, lse = ctx.saved_tensors
        transport = transport_of(plan, k, v)
        visits = transport.visits()
        _, keys, values = next(visits)
        dq, dk, dv = _own_gradients(dout, q, keys, values, out, lse, plan)
        for step, keys, values in visits:
            step_dk = torch.zeros(keys.shape, dtype=torch.float32, device=k.device)
            step_dv = torch.zeros(values.shape, dtype=torch.float32, device=v.device)
            for block in plan.blocks(step):
                block_dq, block_dk, block_dv = _block_gradients(
                    dout, q, keys, values, out, lse, block, plan
                )
                dq[:, block.q] += block_dq
                step_dk[:, block.k] += block_dk
                step_dv[:, block.k] += block_dv
            transport.send_home(step, step_dk, step_dv, dk, dv)
        transport.collect(dk, dv)
        return dq.to(q.dtype), dk.to(ctx.kv_dtype), dv.to(ctx.kv_dtype), None


def _ring_attention(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> tuple[Tensor, Tensor]:
    """Out [B, Lz, Hq, Dv] in q's dtype and lse [B, Lz, Hq] fp32 over the whole ring's keys."""
    visits = transport_of(plan, k, v).visits()
    _, keys, values = next(visits)
    out, lse = _own_attention(q, keys, values, plan)
    for step, keys, values in visits:
        for block in plan.blocks(step):
            block_out, block_lse = _block_attention(q, keys, values, block, plan)
            out[:, block.q], lse[:, block.q] = merge_attention(
                out[:, block.q], lse[:, block.q], block_out, block_lse
            )
    return out.to(q.dtype), lse


def _own_attention(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> tuple[Tensor, Tensor]:
    """Out and lse over the rank's own keys, which every query sees some of; out fp32 to merge."""
    blocks, merges = plan.blocks(0), plan.steps > 1
    if len(blocks) == 1:
        out, lse = _block_attention(q, k, v, blocks[0], plan)
        return out.float() if merges else out, lse
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32 if merges else q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for block in blocks:
        out[:, block.q], lse[:, block.q] = _block_attention(q, k, v, block, plan)
    return out, lse


def _own_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: RingPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients within the rank's own keys; fp32 where others are added to them."""
    blocks = plan.blocks(0)
    if len(blocks) == 1:
        dq, dk, dv = _block_gradients(dout, q, k, v, out, lse, blocks[0], plan)
        return (dq.float(), dk.float(), dv.float()) if plan.steps > 1 else (dq, dk, dv)
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for block in blocks:
        dq[:, block.q], dk[:, block.k], dv[:, block.k] = _block_gradients(
            dout, q, k, v, out, lse, block, plan
        )
    return dq, dk, dv


def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, block: Block, plan: RingPlan
) -> tuple[Tensor, Tensor]:
    return plan.backend.forward(
        q[:, block.q],
        k[:, block.k],
        v[:, block.k],
        scale=plan.scale,
        causal=block.causal,
        window=plan.window,
    )


def _block_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    plan: RingPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    return plan.backend.backward(
        dout[:, block.q],
        q[:, block.q],
        k[:, block.k],
        v[:, block.k],
        out[:, block.q],
        lse[:, block.q],
        scale=plan.scale,
        causal=block.causal,
        window=plan.window,
    )
