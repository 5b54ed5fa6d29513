"""All-Scan: the recurrent state that enters each rank (ZeCO, arXiv:2507.01004, algorithm 2).

Rank p knows what its own tokens do to a state: they decay it by d_p and add S_p. What enters it is

    In(0) = 0        In(p+1) = d_p * In(p) + S_p

Two ways to compute it. The `chain` passes the state from rank to rank, cut in blocks along K: row
k of the state needs only d_p[k], so block b+1 travels while block b is updated, and each rank
sends K x V numbers per head whatever P is. The `allgather` hands every rank all P pairs (S, d) in
one collective and lets it scan them alone: one latency, P times the bytes. `auto` takes what
`collectives.cost` predicts to be faster.

The transpose of a scan is the scan from the other end. With G(p) the gradient of In(p),

    D(P) = 0         D(p) = d_p * D(p+1) + G(p)
    dS_p = D(p+1)    dd_p = sum over V of D(p+1) * In(p)

and D(p+1) is exactly what enters rank p of the reverse scan of (G, d).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.collectives.cost import all_gather_seconds, chain_blocks, chain_seconds, link_of

Algorithm = Literal["auto", "chain", "allgather"]
# torch 2.13 renamed it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
ALGORITHMS = ("auto", "chain", "allgather")


def all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup,
    *,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
    num_blocks: int | None = None,
) -> Tensor:
    """The state that enters this rank; differentiable in `state` and `decay`.

    Args:
        state: S_p [B, H, K, V] fp32, this rank's end state computed from zero.
        decay: d_p [B, H, K] fp32 in [0, 1], or [B, H, 1] for one decay per head; 0 where a
            document starts inside this rank.
        group: the ranks, in sequence order.
        reverse: scan from the last rank to the first.
        algorithm: "chain", "allgather", or "auto" for the one predicted to be faster.
        num_blocks: blocks of the chain, 1 to K; None for the best predicted number.

    Returns:
        In(p) [B, H, K, V] fp32; zero on the first rank (the last one if `reverse`).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, before anything is sent.
    """
    _check(state, decay, algorithm, num_blocks)
    if algorithm == "auto":
        algorithm = _choose(state, group.size())
    if num_blocks is None:
        num_bytes, rows = state.numel() * state.element_size(), state.shape[2]
        num_blocks = chain_blocks(link_of(state.device), group.size(), num_bytes, rows)
    return AllScan.apply(state, decay, group, reverse, algorithm, num_blocks)


class AllScan(torch.autograd.Function):
    """Scan (state, decay) over the ranks.

    forward   S [B, H, K, V], d [B, H, K] -> In [B, H, K, V]
    backward  G = dIn -> dS [B, H, K, V], dd [B, H, K]   (AllScan from the other end, its transpose)
    """

    @staticmethod
    def forward(ctx, state, decay, group, reverse, algorithm, num_blocks):  # noqa: D102
        ctx.options = group, reverse, algorithm, num_blocks
        incoming = _scan(state, decay, group, reverse, algorithm, num_blocks)
        ctx.save_for_backward(decay, incoming)
        return incoming

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        decay, incoming = ctx.saved_tensors
        group, reverse, algorithm, num_blocks = ctx.options
        dstate = _scan(grad, decay, group, not reverse, algorithm, num_blocks)
        ddecay = (dstate * incoming).sum(dim=-1).sum_to_size(decay.shape)
        return dstate, ddecay, None, None, None, None


def _scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup,
    reverse: bool,
    algorithm: str,
    num_blocks: int,
) -> Tensor:
    if group.size() == 1:
        return torch.zeros_like(state)
    if algorithm == "chain":
        return _chain(state, decay, group, reverse, num_blocks)
    return _all_gather_scan(state, decay, group, reverse)


def _chain(
    state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool, num_blocks: int
) -> Tensor:
    step = -1 if reverse else 1
    upstream, downstream = group.rank() - step, group.rank() + step
    ranks = range(group.size())
    incoming = torch.zeros_like(state)
    edges = [int(rows[0]) for rows in torch.arange(state.shape[2]).tensor_split(num_blocks)]
    blocks = [slice(a, b) for a, b in pairwise([*edges, state.shape[2]])]
    # In each round a rank sends the block that it has just updated and receives the next one.
    for current, following in pairwise([None, *blocks, None]):
        operations = []
        if current is not None and downstream in ranks:
            kept = decay if decay.shape[2] == 1 else decay[:, :, current]
            outgoing = kept[..., None] * incoming[:, :, current] + state[:, :, current]
            operations.append(_p2p(dist.isend, outgoing.contiguous(), downstream, group))
        if following is not None and upstream in ranks:
            received = incoming.new_empty(incoming[:, :, following].shape)
            operations.append(_p2p(dist.irecv, received, upstream, group))
        for handle in dist.batch_isend_irecv(operations) if operations else []:
            handle.wait()
        if following is not None and upstream in ranks:
            incoming[:, :, following] = received
    return incoming


def _p2p(operation: Any, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> dist.P2POp:
    return dist.P2POp(operation, tensor, group=group, group_peer=peer)


def _all_gather_scan(
    state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool
) -> Tensor:
    mine = torch.cat([state.flatten(), decay.flatten()])
    gathered = mine.new_empty(group.size() * mine.numel())
    _all_gather(gathered, mine, group=group)
    before = range(group.size() - 1, group.rank(), -1) if reverse else range(group.rank())
    incoming = torch.zeros_like(state)
    for rank in before:
        pair = gathered.view(group.size(), -1)[rank].split([state.numel(), decay.numel()])
        incoming = pair[1].view_as(decay)[..., None] * incoming + pair[0].view_as(state)
    return incoming


def _choose(state: Tensor, ranks: int) -> Algorithm:
    link, num_bytes = link_of(state.device), state.numel() * state.element_size()
    blocks = chain_blocks(link, ranks, num_bytes, state.shape[2])
    chain = chain_seconds(link, ranks, num_bytes, blocks)
    return "chain" if chain < all_gather_seconds(link, ranks, num_bytes) else "allgather"


def _check(state: Tensor, decay: Tensor, algorithm: str, num_blocks: int | None) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm = {algorithm!r} is unknown; use one of {ALGORITHMS}")
    fits = state.dim() == 4 and decay.dim() == 3 and decay.shape[:2] == state.shape[:2]
    if not fits or decay.shape[2] not in (1, state.shape[2]):
        raise ValueError(
            f"state {tuple(state.shape)} and decay {tuple(decay.shape)} do not fit: state is "
            "[B, H, K, V] and decay [B, H, K] or [B, H, 1]"
        )
    if state.dtype != torch.float32 or decay.dtype != torch.float32:
        raise ValueError(
            f"state is {state.dtype} and decay {decay.dtype}: what crosses ranks and accumulates "
            "must be torch.float32; call .float() on them"
        )
    if num_blocks is not None and not 1 <= num_blocks <= state.shape[2]:
        raise ValueError(f"num_blocks = {num_blocks} must lie in 1 .. K = {state.shape[2]}")
