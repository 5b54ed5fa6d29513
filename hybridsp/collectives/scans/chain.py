"""All-Scan as a pipelined chain (ZeCO, arXiv:2507.01004, algorithm 2).

The state passes from rank to rank, cut in blocks along K: row k of the state needs only d_p[k], so
block b+1 travels while block b is updated. Each rank sends K x V numbers per head whatever P is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridsp.collectives.scans.line import Line, Scan, carry, exchange
from hybridsp.layout import even_cuts


def chain(
    line: Line, state: Tensor, decay: Tensor, num_blocks: int, listeners: Sequence[int] = ()
) -> Scan:
    """Pass the state along the line.

    Args:
        line: the ranks.
        state: S_p [B, H, K, V].
        decay: d_p [B, H, K] or [B, H, 1].
        num_blocks: 1 to K.
        listeners: ranks of the group that want this rank's In(p) too, block by block as it comes;
            they call `listen`. Nobody is told of the first rank's, which is zero.

    Returns:
        In(p) [B, H, K, V].
    """
    states, decays = cut(state, num_blocks), cut(decay, num_blocks)
    received: list[Tensor] = []
    # In each round a rank sends the block that it has just updated and receives the next one.
    for current in range(-1, num_blocks):
        operations = []
        if current >= 0 and not line.is_last:
            incoming = None if line.is_first else received[current]
            outgoing = carry(states[current], decays[current], incoming)
            operations.append(line.send(outgoing, line.ranks[line.position + 1]))
        if current >= 0 and not line.is_first:
            operations += [line.send(received[current], listener) for listener in listeners]
        if current + 1 < num_blocks and not line.is_first:
            received.append(state.new_empty(states[current + 1].shape))
            operations.append(line.receive(received[-1], line.ranks[line.position - 1]))
        yield from exchange(operations)
    return state.new_zeros(state.shape) if line.is_first else torch.cat(received, dim=2)


def listen(line: Line, like: Tensor, num_blocks: int, speaker: int) -> Scan:
    """The In [B, H, K, V] of the rank `speaker`, in whose chain this rank is a listener."""
    received = [like.new_empty(block.shape) for block in cut(like, num_blocks)]
    for block in received:
        yield from exchange([line.receive(block, speaker)])
    return torch.cat(received, dim=2)


def cut(x: Tensor, num_blocks: int) -> list[Tensor]:
    """Blocks of [B, H, K, ...] along K; one decay per head, [B, H, 1], goes with every block."""
    if x.dim() == 3 and x.shape[2] == 1:
        return [x] * num_blocks
    return [x[:, :, start:stop] for start, stop in even_cuts(x.shape[2], num_blocks)]
