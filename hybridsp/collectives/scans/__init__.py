"""The algorithms of All-Scan, each in a file of its own.

A scan is a generator: it starts messages, yields their handles, and goes on once they have been
waited for, until it returns In. So one text serves two machines. On CUDA, where waiting for a
handle only makes a stream wait, a scan is run through at once; on the CPU it is left at its first
messages while the caller computes.

    chain          P - 1 hops of a whole state, blocks one behind the other
    doubling       ceil(log2 P) exchanges of (state, decay)
    allgather      one collective, then every rank scans alone
    hierarchical   doubling inside hosts, a chain between them
"""

from __future__ import annotations

from torch import Tensor

from hybridsp.collectives.cost import Plan
from hybridsp.collectives.scans.allgather import allgather
from hybridsp.collectives.scans.chain import chain
from hybridsp.collectives.scans.doubling import doubling
from hybridsp.collectives.scans.hierarchical import hierarchical
from hybridsp.collectives.scans.line import Line, Scan

__all__ = ["Line", "Scan", "begin"]


def begin(plan: Plan, line: Line, state: Tensor, decay: Tensor) -> Scan:
    """The scan that `plan` says, not yet started.

    Args:
        plan: algorithm and all that it needs; "symmetric" is no generator and not among these.
        line: all ranks of a group, in the order of the scan.
        state: S_p [B, H, K, V] fp32.
        decay: d_p [B, H, K] or [B, H, 1] fp32.

    Returns:
        A generator of lists of handles, whose value is In(p) [B, H, K, V] fp32.
    """
    if plan.algorithm == "chain":
        assert plan.num_blocks is not None
        return chain(line, state, decay, plan.num_blocks)
    if plan.algorithm == "doubling":
        return doubling(line, state, decay)
    if plan.algorithm == "hierarchical":
        assert plan.num_blocks is not None
        assert plan.ranks_per_host is not None
        return hierarchical(line, state, decay, plan.num_blocks, plan.ranks_per_host)
    assert plan.algorithm == "allgather", plan
    return allgather(line, state, decay)
