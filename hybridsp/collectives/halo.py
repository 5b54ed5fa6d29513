"""The halo of a short convolution: a rank's first tokens need the tokens before them.

With W taps a rank needs the W-1 tokens to the left of its own. They belong to its left neighbour,
or, where a rank has fewer tokens than that, to several ranks on the left; hop h fetches what the
rank h places to the left has of them. Left of the sequence's start there are zeros.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def left_halo(x: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    """The `width` tokens left of this rank's; differentiable.

    Args:
        x: this rank's tokens [B, L, D]; every rank of the group has the same L.
        width: tokens wanted, >= 0; may exceed L.
        group: the ranks, in sequence order.

    Returns:
        [B, width, D] in x's dtype; zeros where the sequence has not begun.
    """
    return LeftHalo.apply(x, width, group)


class LeftHalo(torch.autograd.Function):
    """Fetch the tokens on the left.

    forward   [B, L, D] -> [B, width, D]   last tokens of each rank to the ranks on its right
    backward  [B, width, D] -> [B, L, D]   their gradients home, where they add up (its transpose)
    """

    @staticmethod
    def forward(ctx, x, width, group):  # noqa: D102
        ctx.length, ctx.width, ctx.group = x.shape[1], width, group
        halo = x.new_zeros(x.shape[0], width, x.shape[2])
        hops = _hops(x.shape[1], width, group)
        for hop, taken in hops:
            received = x.new_empty(x.shape[0], taken, x.shape[2])
            _shift(x[:, x.shape[1] - taken :].contiguous(), received, hop, group)
            if group.rank() - hop >= 0:
                stop = width - (hop - 1) * x.shape[1]
                halo[:, stop - taken : stop] = received
        return halo

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        length, width, group = ctx.length, ctx.width, ctx.group
        dx = torch.zeros(
            grad.shape[0], length, grad.shape[2], dtype=torch.float32, device=grad.device
        )
        for hop, taken in _hops(length, width, group):
            stop = width - (hop - 1) * length
            sent = grad[:, stop - taken : stop].contiguous()
            received = torch.empty_like(sent)
            _shift(sent, received, -hop, group)
            if group.rank() + hop < group.size():
                dx[:, length - taken :] += received
        return dx.to(grad.dtype), None, None


def _hops(length: int, width: int, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """(distance to the owner, tokens taken from it) until the halo is full or ranks run out."""
    hops = -(-width // length)
    return [
        (hop, min(length, width - (hop - 1) * length))
        for hop in range(1, min(hops, group.size() - 1) + 1)
    ]


def _shift(sent: Tensor, received: Tensor, distance: int, group: dist.ProcessGroup) -> None:
    """Send to the rank `distance` places to the right, receive from the one on the left."""
    target, source = group.rank() + distance, group.rank() - distance
    operations = []
    if 0 <= target < group.size():
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=target))
    if 0 <= source < group.size():
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
    for handle in dist.batch_isend_irecv(operations) if operations else []:
        handle.wait()
