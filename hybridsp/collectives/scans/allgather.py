"""All-Scan as one all-gather: every rank gets all P pairs (S, d) and scans them alone.

One latency and P times the bytes (LASP-2, and FLA's context parallelism). What enters rank p is

    In(p) = sum over q < p of (d_(q+1) ... d_(p-1)) S_q

one running product and one weighted sum, not a kernel or two for each of the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridsp.collectives.scans.line import Line, Scan
from hybridsp.collectives.torch_names import all_gather


def allgather(line: Line, state: Tensor, decay: Tensor) -> Scan:
    """In(p) [B, H, K, V] for S_p [B, H, K, V] and d_p [B, H, K] or [B, H, 1].

    The line is all ranks of its group, in either direction.
    """
    mine = torch.cat([state.flatten(), decay.flatten()])
    gathered = mine.new_empty(len(line.ranks) * mine.numel())
    yield [all_gather(gathered, mine, group=line.group, async_op=True)]
    if line.is_first:
        return state.new_zeros(state.shape)
    pairs, rank = gathered.view(len(line.ranks), -1), line.group.rank()
    # From the nearest rank back to the first, whichever way the line runs.
    before = pairs[:rank].flip(0) if line.ranks[0] == 0 else pairs[rank + 1 :]
    states, decays = before.split([state.numel(), decay.numel()], dim=1)
    weights = torch.cat([torch.ones_like(decays[:1]), decays[:-1]]).cumprod(dim=0)
    weighted = states.view(-1, *state.shape) * weights.view(-1, *decay.shape, 1)
    return weighted.sum(dim=0)
