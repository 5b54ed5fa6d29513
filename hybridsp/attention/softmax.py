"""Softmax attention over the mesh: USP, Ulysses x ring (arXiv:2405.07719, algorithm 1).

One all-to-all over the SP group trades most heads for more tokens and puts those in zigzag order;
then K and V go around the ring, one neighbour at a time, while each rank computes attention of its
queries over the keys it holds and merges it into a running (out, lse); one all-to-all goes back.

The backward goes around the ring once more with the *merged* out and lse, so each block's gradients
are exact shares. dK and dV travel one step behind K and V, collect every rank's share, and one last
hop brings them home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.collectives import RingExchange, heads_to_seq, seq_to_heads
from hybridsp.layout import Block, Span, attention_blocks, relayout, zigzag_spans
from hybridsp.mesh import SPMesh
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.ops.merge import merge_attention
from hybridsp.ops.softmax import block_attention, block_attention_backward


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: SPMesh,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of a sequence cut over the mesh's SP ranks.

    Args:
        q: this rank's contiguous tokens [B, L, Hq, D], positions already applied; L is the same
            on every rank.
        k: [B, L, Hkv, D]; Hkv divides Hq.
        v: [B, L, Hkv, Dv].
        mesh: the grid of ranks; `mesh.ulysses` may not exceed Hq.
        causal: a token does not see what comes after it.
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1); None for one
            document per row.
        scale: factor on the scores; None for D ** -0.5.

    Returns:
        [B, L, Hq, Dv] in q's dtype.

    Raises:
        ValueError: shapes, heads or boundaries that do not fit.
    """
    _check_shapes(q, k, v)
    total = q.shape[1] * mesh.sp
    bounds = [0, total]
    if cu_seqlens is not None:
        require_one_packed_row(q, cu_seqlens, total)
        bounds = cu_seqlens.tolist()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    route = relayout(total, mesh.ring, mesh.ulysses, q.shape[2], k.shape[2])
    q, k, v = seq_to_heads(q, k, v, route, mesh.sp_group)
    plan = RingPlan(
        group=mesh.ring_group,
        halves=tuple(zigzag_spans(total, mesh.ring)),
        bounds=tuple(bounds),
        causal=causal,
        scale=scale,
    )
    out = RingAttention.apply(q, k, v, plan)
    return heads_to_seq(out, route, mesh.sp_group)


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """What a ring computes: its ranks' half-chunks, the documents, and the scale."""

    group: dist.ProcessGroup
    halves: tuple[tuple[Span, ...], ...]
    bounds: tuple[int, ...]
    causal: bool
    scale: float

    def owner(self, step: int) -> int:
        """The ring rank whose keys this rank holds at a step."""
        return (self.group.rank() - step) % self.group.size()

    def num_tokens(self, rank: int) -> int:
        """Tokens of a ring rank."""
        return sum(stop - start for start, stop in self.halves[rank])

    def blocks(self, step: int) -> list[Block]:
        """What this rank computes at a step."""
        mine, theirs = self.halves[self.group.rank()], self.halves[self.owner(step)]
        return _blocks(mine, theirs, self.bounds, causal=self.causal)


# All layers of a model, forward and backward, ask for the same few plans.
_blocks = lru_cache(maxsize=256)(attention_blocks)


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries over the whole ring's keys.

    forward   q [B, Lz, Hq, D], k, v [B, Lz, Hkv, D] -> out [B, Lz, Hq, Dv]   K, V once around
    backward  dout -> dq, dk, dv      K, V once around, dK, dV behind them and home
    """

    @staticmethod
    def forward(ctx, q, k, v, plan):  # noqa: D102
        ctx.kv_dtype = k.dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        for step, keys, values in _around_the_ring(k, v, plan):
            for block in plan.blocks(step):
                block_out, block_lse = block_attention(
                    q[:, block.q],
                    keys[:, block.k],
                    values[:, block.k],
                    scale=plan.scale,
                    causal=block.causal,
                )
                out[:, block.q], lse[:, block.q] = merge_attention(
                    out[:, block.q], lse[:, block.q], block_out, block_lse
                )
        out = out.to(q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: D102
        plan = ctx.plan
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        gradients = RingExchange(plan.group, tag=1)
        for step, keys, values in _around_the_ring(k, v, plan):
            step_dk = torch.zeros(keys.shape, dtype=torch.float32, device=k.device)
            step_dv = torch.zeros(values.shape, dtype=torch.float32, device=v.device)
            for block in plan.blocks(step):
                block_dq, block_dk, block_dv = block_attention_backward(
                    dout[:, block.q],
                    q[:, block.q],
                    keys[:, block.k],
                    values[:, block.k],
                    out[:, block.q],
                    lse[:, block.q],
                    scale=plan.scale,
                    causal=block.causal,
                )
                dq[:, block.q] += block_dq
                step_dk[:, block.k] += block_dk
                step_dv[:, block.k] += block_dv
            if step > 0:
                dk, dv = gradients.wait()
                step_dk, step_dv = step_dk + dk, step_dv + dv
            # What comes next belongs to the owner of the keys that come next.
            tokens = plan.num_tokens(plan.owner(step + 1))
            gradients.post([step_dk, step_dv], [_resized(k, tokens), _resized(v, tokens)])
        dk, dv = gradients.wait()
        return dq.to(q.dtype), dk.to(ctx.kv_dtype), dv.to(ctx.kv_dtype), None


def _around_the_ring(k: Tensor, v: Tensor, plan: RingPlan) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, k, v) of every ring rank, own ones first; the next ones travel meanwhile."""
    exchange, last = RingExchange(plan.group), plan.group.size() - 1
    for step in range(plan.group.size()):
        if step < last:
            tokens = plan.num_tokens(plan.owner(step + 1))
            exchange.post([k, v], [_resized(k, tokens), _resized(v, tokens)])
        yield step, k, v
        if step < last:
            k, v = exchange.wait()


def _resized(x: Tensor, tokens: int) -> torch.Size:
    return torch.Size((x.shape[0], tokens, *x.shape[2:]))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: q is "
            "[B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv], and Hkv divides Hq"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: use one")
