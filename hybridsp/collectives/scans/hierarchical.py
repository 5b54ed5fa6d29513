"""All-Scan over hosts: doubling inside a host, one pipelined chain between them.

    1  inside each host every rank learns the pair (S, d) of the ranks before it on the host
    2  the last rank of a host then knows the host's total; the last ranks form a chain, so that a
       block crosses from host to host in one hop and never passes through a rank in between
    3  each block that enters a host goes on from its last rank to the others at once

Only 2 uses the network between hosts, and sends one state per host over it.
"""

from __future__ import annotations

from itertools import groupby

from torch import Tensor

from hybridsp.collectives.scans.chain import chain, listen
from hybridsp.collectives.scans.doubling import doubling_pairs
from hybridsp.collectives.scans.line import Line, Scan, carry


def hierarchical(
    line: Line, state: Tensor, decay: Tensor, num_blocks: int, ranks_per_host: int
) -> Scan:
    """Scan along a line of hosts.

    Args:
        line: all ranks of a group, in either direction.
        state: S_p [B, H, K, V].
        decay: d_p [B, H, K] or [B, H, 1].
        num_blocks: of the chain, 1 to K.
        ranks_per_host: so many consecutive ranks of the group form a host; the group's last host
            has what remains.

    Returns:
        In(p) [B, H, K, V].
    """
    hosts = [tuple(ranks) for _, ranks in groupby(line.ranks, lambda rank: rank // ranks_per_host)]
    home = next(host for host in hosts if line.group.rank() in host)
    inside, leader = line.part(home), home[-1]
    incoming, before = yield from doubling_pairs(inside, state, decay)
    if not inside.is_last:
        if home == hosts[0]:
            return incoming
        entering = yield from listen(line, state, num_blocks, leader)
        return carry(incoming, before, entering)
    total, total_decay = carry(state, decay, incoming), decay * before
    leaders = line.part([host[-1] for host in hosts])
    entering = yield from chain(leaders, total, total_decay, num_blocks, listeners=home[:-1])
    return carry(incoming, before, entering)
