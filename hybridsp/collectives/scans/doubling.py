"""All-Scan by recursive doubling: ceil(log2 P) exchanges of (state, decay), for any P.

Two spans that follow one another, (S, d) and (S', d'), are together (d' S + S', d d'). A rank keeps
the pair of what lies *before* it. Before the step of distance h that is h - 1 ranks; it sends them
and its own, h ranks together, to the rank h further on, and receives the h ranks further back.
Where a pair reaches the start of the line, what decays there is zero, and its decay is not sent.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.scans.line import Line, PairScan, Scan, carry, exchange

# A state [B, H, K, V] and its decay [B, H, K] or [B, H, 1]; None where nobody will ask for it.
Pair = tuple[Tensor, Tensor | None]


def doubling(line: Line, state: Tensor, decay: Tensor) -> Scan:
    """In(p) [B, H, K, V] for S_p [B, H, K, V] and d_p [B, H, K] or [B, H, 1]."""
    incoming, _ = yield from _before(line, state, decay, keep_decay=False)
    return incoming


def doubling_pairs(line: Line, state: Tensor, decay: Tensor) -> PairScan:
    """In(p) as if zero entered the line, and the decay of all ranks before p, in decay's shape.

    With both, whatever does enter the line can be added later.
    """
    incoming, before = yield from _before(line, state, decay, keep_decay=True)
    assert before is not None
    return incoming, before


def _before(
    line: Line, state: Tensor, decay: Tensor, *, keep_decay: bool
) -> Generator[list[dist.Work], None, Pair]:
    position, size = line.position, len(line.ranks)
    before: Pair | None = None
    distance = 1
    while distance < size:
        operations, buffer = [], None
        if position + distance < size:
            pair = _join(before, (state, decay))
            with_decay = keep_decay or not _reaches_start(position, distance)
            message = _pack(pair, with_decay)
            operations.append(line.send(message, line.ranks[position + distance]))
        if position - distance >= 0:
            with_decay = keep_decay or not _reaches_start(position - distance, distance)
            buffer = state.new_empty(state.numel() + with_decay * decay.numel())
            operations.append(line.receive(buffer, line.ranks[position - distance]))
        yield from exchange(operations)
        if buffer is not None:
            before = _join(_unpack(buffer, state, decay), before)
        distance *= 2
    return before or (state.new_zeros(state.shape), decay.new_ones(decay.shape))


def _reaches_start(position: int, num_ranks: int) -> bool:
    """Whether so many ranks that end at `position` begin at the start of the line."""
    return position - num_ranks + 1 <= 0


def _join(left: Pair | None, right: Pair | None) -> Pair:
    """The pair of two spans that follow one another; None is an empty span."""
    if left is None or right is None:
        present = left or right
        assert present is not None
        return present
    (state, decay), (next_state, next_decay) = left, right
    assert next_decay is not None
    joined = None if decay is None else decay * next_decay
    return carry(next_state, next_decay, state), joined


def _pack(pair: Pair, with_decay: bool) -> Tensor:
    state, decay = pair
    if not with_decay:
        return state.flatten()
    assert decay is not None
    return torch.cat([state.flatten(), decay.flatten()])


def _unpack(message: Tensor, state: Tensor, decay: Tensor) -> Pair:
    values, rest = message[: state.numel()], message[state.numel() :]
    return values.view(state.shape), rest.view(decay.shape) if rest.numel() else None
