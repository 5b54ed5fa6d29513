"""Trading tokens for heads, with the ring's zigzag order folded in.

Ulysses gathers the sequence and scatters the heads before softmax attention (arXiv:2309.14509). The
ring behind it wants each rank to hold an early and a late half-chunk, so that a causal mask gives
all ranks equal work. Both are one all-to-all over the whole SP group: each token goes straight to
the rank that computes it, and the way out sends it home, so the order outside stays contiguous and
zigzag costs no bytes. `layout.Relayout` says who gets what. All tensors of a call travel in one
message per pair of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.layout import Relayout


def seq_to_heads(
    q: Tensor, k: Tensor, v: Tensor, relayout: Relayout, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Give up most heads for more of the sequence; differentiable.

    Args:
        q: [B, L, Hq, D], this rank's contiguous tokens.
        k: [B, L, Hkv, D].
        v: [B, L, Hkv, Dv], of q's dtype as k is.
        relayout: who computes what.
        group: the SP ranks.

    Returns:
        q, k, v with this rank's half-chunks as tokens (early one first) and its share of heads;
        k and v in fp32 where other ranks have copies of their heads.
    """
    if group.size() == 1:
        return q, k, v
    return SeqToHeads.apply(q, k, v, relayout, group)


def heads_to_seq(out: Tensor, relayout: Relayout, group: dist.ProcessGroup) -> Tensor:
    """The way back: [B, tokens of the half-chunks, share of Hq, D] -> [B, L, Hq, D]."""
    if group.size() == 1:
        return out
    return HeadsToSeq.apply(out, relayout, group)


class SeqToHeads(torch.autograd.Function):
    """Gather the sequence in zigzag order, scatter the heads (before attention).

    forward   q [B, L, Hq, D], k, v [B, L, Hkv, D] -> q [B, Lz, Hq', D], k, v [B, Lz, Hkv', D]
    backward  the same shapes back; gradients of replicated KV heads add up (HeadsToSeq)
    """

    @staticmethod
    def forward(ctx, q, k, v, relayout, group):  # noqa: D102
        ctx.heads, ctx.relayout, ctx.group = (q.shape[2], k.shape[2], v.shape[2]), relayout, group
        ctx.dtype = q.dtype
        q, k, v = _scatter_heads([q, k, v], _shares(relayout), relayout, group)
        # A gradient has its tensor's dtype: in fp32 those of the replicas add up before rounding.
        return (q, k.float(), v.float()) if relayout.replicates else (q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102
        shares = _shares(ctx.relayout)
        whole = _gather_heads(grads, shares, ctx.heads, ctx.relayout, ctx.group)
        return (*(grad.to(ctx.dtype) for grad in whole), None, None)


class HeadsToSeq(torch.autograd.Function):
    """Gather the heads, scatter the sequence back to contiguous order (after attention).

    forward   [B, Lz, Hq', D] -> [B, L, Hq, D]
    backward  [B, L, Hq, D] -> [B, Lz, Hq', D]   (SeqToHeads, its transpose)
    """

    @staticmethod
    def forward(ctx, out, relayout, group):  # noqa: D102
        ctx.relayout, ctx.group = relayout, group
        num_heads = sum(len(share.q) for share in relayout.shares)
        shares = [share[:1] for share in _shares(relayout)]
        return _gather_heads([out], shares, [num_heads], relayout, group)[0].to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        shares = [share[:1] for share in _shares(ctx.relayout)]
        return _scatter_heads([grad], shares, ctx.relayout, ctx.group)[0], None, None


HeadLists = Sequence[Sequence[tuple[int, ...]]]
"""For each SP rank, the heads it computes of each of the tensors that travel."""


def _shares(relayout: Relayout) -> list[tuple[tuple[int, ...], ...]]:
    shares = (relayout.share(rank) for rank in range(relayout.sp))
    return [(share.q, share.kv, share.kv) for share in shares]


def _scatter_heads(
    tensors: Sequence[Tensor], heads: HeadLists, relayout: Relayout, group: dist.ProcessGroup
) -> list[Tensor]:
    me, ranks = group.rank(), range(group.size())
    sent = []
    for target in ranks:
        pieces = []
        for tensor, chosen in zip(tensors, heads[target], strict=True):
            parts = [tensor[:, rows] for rows in relayout.sent(me, target)] or [tensor[:, :0]]
            pieces.append(torch.cat(parts, dim=1)[:, :, _selection(chosen)])
        sent.append(pieces)
    shapes = [
        [
            (x.shape[0], relayout.num_sent(source, me), len(h), x.shape[3])
            for x, h in zip(tensors, heads[me], strict=True)
        ]
        for source in ranks
    ]
    received = _exchange(sent, shapes, group)
    return [torch.cat(parts, dim=1) for parts in zip(*received, strict=True)]


def _gather_heads(
    tensors: Sequence[Tensor],
    heads: HeadLists,
    num_heads: Sequence[int],
    relayout: Relayout,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    me, ranks = group.rank(), range(group.size())
    counts = [relayout.num_sent(target, me) for target in ranks]
    pieces = [tensor.split(counts, dim=1) for tensor in tensors]
    sent = [[piece[target] for piece in pieces] for target in ranks]
    shapes = [
        [
            (x.shape[0], relayout.num_sent(me, source), len(h), x.shape[3])
            for x, h in zip(tensors, heads[source], strict=True)
        ]
        for source in ranks
    ]
    received = _exchange(sent, shapes, group)
    length = relayout.total // relayout.sp
    results = []
    for i, (tensor, total) in enumerate(zip(tensors, num_heads, strict=True)):
        shape = (tensor.shape[0], length, total, tensor.shape[3])
        # fp32 because the gradients of a replicated KV head add up here.
        whole = torch.zeros(shape, dtype=torch.float32, device=tensor.device)
        for source in ranks:
            _add_heads(whole, received[source][i], heads[source][i], relayout.sent(me, source))
        results.append(whole)
    return results


def _add_heads(whole: Tensor, part: Tensor, heads: tuple[int, ...], tokens: list[slice]) -> None:
    sizes = [rows.stop - rows.start for rows in tokens]
    for rows, values in zip(tokens, part.split(sizes, dim=1), strict=True):
        if isinstance(selection := _selection(heads), slice):
            whole[:, rows, selection] += values
        else:
            index = torch.tensor(heads, device=whole.device)
            whole[:, rows].index_add_(2, index, values.float())


def _selection(heads: tuple[int, ...]) -> slice | list[int]:
    """An index for some heads: a slice, which costs no copy to the device, unless some repeat."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return list(heads)


def _exchange(
    sent: list[list[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """All-to-all of lists of tensors; `shapes[source]` is what comes from each rank."""
    outgoing = torch.cat([piece.flatten() for pieces in sent for piece in pieces])
    sent_sizes = [sum(piece.numel() for piece in pieces) for pieces in sent]
    received_sizes = [sum(prod(shape) for shape in of_rank) for of_rank in shapes]
    incoming = outgoing.new_empty(sum(received_sizes))
    dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=group)
    received = []
    for message, of_rank in zip(incoming.split(received_sizes), shapes, strict=True):
        parts = message.split([prod(shape) for shape in of_rank])
        received.append([part.view(shape) for part, shape in zip(parts, of_rank, strict=True)])
    return received
