"""Trading tokens for heads in linear layers (Ulysses, arXiv:2309.14509), in contiguous order.

A recurrence has no use for the zigzag order of softmax layers (`collectives.all_to_all`): each rank
gets the whole sequence in order, for its share of the heads, and the shares may differ by one head.
q, k and v may be bf16 and the log decays fp32, so what two ranks have for each other travels as
bytes: one message per pair of ranks whatever the tensors are.

What comes is taken to be laid out like what goes: ranks that differ in B, L, H, D or dtype would
exchange messages that do not match. It is `attention.linear` that compares the ranks' calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.layout import even_cuts

# Every piece of a message starts on such a byte, so that it can be read in its own dtype.
ALIGNMENT = 16


def tokens_to_heads(*tensors: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Give up most heads for the whole sequence; differentiable.

    Args:
        tensors: [B, L, H, D], D and dtype each its own; this rank's contiguous tokens. Shapes and
            dtypes are the same on every rank, which is not looked at.
        group: the ranks, in sequence order, at most H of them.

    Returns:
        [B, P * L, H', D] each: all tokens of this rank's H' of the heads (`layout.even_cuts`).
    """
    if group.size() == 1:
        return tensors
    return TokensToHeads.apply(group, *tensors)


def heads_to_tokens(x: Tensor, *, num_heads: int, group: dist.ProcessGroup) -> Tensor:
    """The way back: [B, P * L, H', D] -> [B, L, H, D] with H = `num_heads`; differentiable."""
    if group.size() == 1:
        return x
    return HeadsToTokens.apply(group, num_heads, x)


class TokensToHeads(torch.autograd.Function):
    """Gather the tokens, scatter the heads (before a recurrence).

    forward   [B, L, H, D] -> [B, P L, H', D]   of each tensor, in one message per rank
    backward  [B, P L, H', D] -> [B, L, H, D]   (HeadsToTokens, its transpose)
    """

    @staticmethod
    def forward(ctx, group, *tensors):  # noqa: D102
        ctx.group, ctx.num_heads = group, tensors[0].shape[2]
        return _scatter_heads(tensors, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102
        return None, *_gather_heads(grads, ctx.num_heads, ctx.group)


class HeadsToTokens(torch.autograd.Function):
    """Gather the heads, scatter the tokens (after a recurrence).

    forward   [B, P L, H', D] -> [B, L, H, D]
    backward  [B, L, H, D] -> [B, P L, H', D]   (TokensToHeads, its transpose)
    """

    @staticmethod
    def forward(ctx, group, num_heads, x):  # noqa: D102
        ctx.group = group
        return _gather_heads([x], num_heads, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        return None, None, *_scatter_heads([grad], ctx.group)


def _scatter_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    shares = even_cuts(tensors[0].shape[2], group.size())
    sent = [[x[:, :, first:last] for x in tensors] for first, last in shares]
    received = _exchange(sent, [sent[group.rank()]] * group.size(), group)
    return tuple(torch.cat(parts, dim=1) for parts in zip(*received, strict=True))


def _gather_heads(
    tensors: Sequence[Tensor], num_heads: int, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    spans = [x.chunk(group.size(), dim=1) for x in tensors]
    sent = [list(pieces) for pieces in zip(*spans, strict=True)]
    shares = even_cuts(num_heads, group.size())
    mine = sent[group.rank()]
    likes = [[x[:, :, :1].expand(-1, -1, b - a, -1) for x in mine] for a, b in shares]
    received = _exchange(sent, likes, group)
    return tuple(torch.cat(parts, dim=2) for parts in zip(*received, strict=True))


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies among the bytes of all messages."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


def _exchange(
    sent: Sequence[Sequence[Tensor]], likes: Sequence[Sequence[Tensor]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """All-to-all of lists of tensors; those from rank r have shapes and dtypes of `likes[r]`."""
    device = sent[0][0].device
    sent_pieces, sent_sizes = _lay_out(sent)
    received_pieces, received_sizes = _lay_out(likes)
    outgoing = torch.empty(sum(sent_sizes), dtype=torch.uint8, device=device)
    incoming = torch.empty(sum(received_sizes), dtype=torch.uint8, device=device)
    for pieces, tensors in zip(sent_pieces, sent, strict=True):
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.view(outgoing).copy_(tensor)
    dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes, group=group)
    return [[piece.view(incoming) for piece in pieces] for pieces in received_pieces]


def _lay_out(messages: Sequence[Sequence[Tensor]]) -> tuple[list[list[_Piece]], list[int]]:
    """Where each tensor of each message lies, and the bytes of each message."""
    laid, sizes, start = [], [], 0
    for tensors in messages:
        pieces, first = [], start
        for tensor in tensors:
            piece = _Piece(start, tuple(tensor.shape), tensor.dtype)
            pieces.append(piece)
            start += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
        laid.append(pieces)
        sizes.append(start - first)
    return laid, sizes
