"""Attention of a ring's ranks over all their keys: each step's blocks, merged.

At step 0 a rank attends to the keys it has; a `Transport` brings the others' in later steps.
Outputs are merged in fp32 by their log-sum-exp, so the error does not grow with the ring. The
backward visits the same keys once more with the *merged* out and lse, so every block's gradients
are exact shares; they are added up in fp32 where they belong.

Packed documents make many small blocks. Where the backend can, a step is one call of it, or two
(`ops.softmax.calls`). A rank's own calls cover its rows once and in order: what they need is split
off and what they return laid side by side, all at once, and of one call nothing is copied. Those of
later steps are merged in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.attention.keep import attend_once
from hybridsp.attention.ring_plan import RingPlan
from hybridsp.attention.ring_transport import Transport
from hybridsp.ops.softmax import Call, calls_of


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries over the whole ring's keys.

    A forward that checkpointing repeats is computed, and K, V travel, the first time only (`keep`).

    forward   q [B, Lz, Hq, D], k, v [B, Lz, Hkv, D] -> out [B, Lz, Hq, Dv]   K, V to all who need
    backward  dout -> dq, dk, dv           K, V to all who need, shares of dK, dV to their owners
    """

    @staticmethod
    def forward(ctx, q, k, v, plan, transport):  # noqa: D102
        ctx.plan, ctx.transport, ctx.kv_dtype = plan, transport, k.dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
        out, lse = attend_once(lambda: attend(q, k, v, plan, transport))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: D102
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = differentiate(dout, q, k, v, out, lse, ctx.plan, ctx.transport)
        return dq.to(q.dtype), dk.to(ctx.kv_dtype), dv.to(ctx.kv_dtype), None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, transport: Transport
) -> tuple[Tensor, Tensor]:
    """Attention of one rank's queries over the whole ring's keys.

    Args:
        q: [B, Lz, Hq, D], this rank's.
        k, v: [B, Lz, Hkv, D or Dv] in q's dtype, this rank's.
        plan: of the ring, on this rank.
        transport: brings the others'.

    Returns:
        out [B, Lz, Hq, Dv] in q's dtype, and lse [B, Lz, Hq] fp32.
    """
    visits = transport.visits(k, v)
    _, keys, values = next(visits)
    out, lse = _attend_to_own(q, keys, values, plan)
    for step, keys, values in visits:
        for call in step_calls(plan, step, q.device):
            call.merge_forward_(out, lse, q, keys, values)
    return out.to(q.dtype), lse


def differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: RingPlan,
    transport: Transport,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`.

    Args:
        dout: [B, Lz, Hq, Dv], of out.
        q, k, v, plan, transport: as in `attend`.
        out, lse: what it returned.

    Returns:
        dq, dk, dv of this rank's q, k, v: in fp32 where any are sums of several steps, else in the
        backend's dtype.
    """
    visits = transport.visits(k, v)
    _, keys, values = next(visits)
    dq, dk, dv = _differentiate_own(dout, q, keys, values, out, lse, plan)
    for step, keys, values in visits:
        step_dk, step_dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (keys, values))
        for call in step_calls(plan, step, q.device):
            call.add_backward_(dq, step_dk, step_dv, dout, q, keys, values, out, lse)
        transport.send_home(step, step_dk, step_dv, dk, dv)
    transport.collect(dk, dv)
    return dq, dk, dv


def step_calls(plan: RingPlan, step: int, device: torch.device) -> list[Call]:
    """What this rank computes at a step."""
    return _calls_of_steps(plan, device)[step]


# All layers of a model, forward and backward, ask for the same steps, and on a GPU what says where
# rows lie is there already. A few plans, not steps: a ring of a hundred ranks has a hundred.
@lru_cache(maxsize=8)
def _calls_of_steps(plan: RingPlan, device: torch.device) -> list[list[Call]]:
    return [
        calls_of(plan.blocks(step), plan.backend, device, scale=plan.scale, window=plan.window)
        for step in range(plan.steps)
    ]


def _attend_to_own(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan) -> tuple[Tensor, Tensor]:
    """Out and lse over the rank's own keys, which every query sees some of; out fp32 to merge."""
    calls = step_calls(plan, 0, q.device)
    if not calls:  # documents shorter than the ring can leave a rank without tokens
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=torch.float32)
    parts = _by_call([q, k, v], calls)
    results = [call.forward(*part) for call, part in zip(calls, parts, strict=True)]
    outs, lses = zip(*results, strict=True)
    out = _side_by_side(outs, dim=1)
    # Laid head by head, whatever the view says: as kernels give it and take it back.
    lse = _side_by_side([x.transpose(1, 2) for x in lses], dim=2).transpose(1, 2)
    return out.float() if plan.steps > 1 else out, lse


def _differentiate_own(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: RingPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients within the rank's own keys; fp32 where others are added to them."""
    calls = step_calls(plan, 0, q.device)
    if not calls:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    else:
        parts = _by_call([dout, q, k, v, out, lse], calls)
        results = [call.backward(*part) for call, part in zip(calls, parts, strict=True)]
        dq, dk, dv = (_side_by_side(shares, dim=1) for shares in zip(*results, strict=True))
    return (dq.float(), dk.float(), dv.float()) if plan.steps > 1 else (dq, dk, dv)


def _by_call(tensors: Sequence[Tensor], calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
    """Each own call's rows of tensors [B, Lz, ...]."""
    if len(calls) == 1:
        return [tuple(tensors)]
    sizes = [call.q.size for call in calls]
    return list(zip(*(x.split(sizes, dim=1) for x in tensors), strict=True))


def _side_by_side(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    """The own calls' results as one tensor, their rows along `dim`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
