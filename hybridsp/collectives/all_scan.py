"""All-Scan: the recurrent state that enters each rank (ZeCO, arXiv:2507.01004, algorithm 2).

Rank p knows what its own tokens do to a state: they decay it by d_p and add S_p. What enters it is

    In(0) = 0        In(p+1) = d_p * In(p) + S_p

`collectives.scans` holds the ways to compute it, `collectives.cost` what each of them costs; `auto`
takes what is predicted to be fastest on links that are measured once per group.

The transpose of a scan is the scan from the other end. With G(p) the gradient of In(p),

    D(P) = 0         D(p) = d_p * D(p+1) + G(p)
    dS_p = D(p+1)    dd_p = sum over V of D(p+1) * In(p)

and D(p+1) is exactly what enters rank p of the reverse scan of (G, d).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.collectives.cost import Plan
from hybridsp.collectives.scan_plan import ALGORITHMS, Algorithm, Options, plan_scan
from hybridsp.collectives.scans import Line, Scan, begin
from hybridsp.collectives.side_stream import Enqueued
from hybridsp.collectives.symmetric import symmetric_scan

__all__ = ["ALGORITHMS", "Algorithm", "AllScan", "PendingScan", "all_scan", "start_all_scan"]


def all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup,
    *,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
    num_blocks: int | None = None,
    ranks_per_host: int | None = None,
) -> Tensor:
    """The state that enters this rank; differentiable in `state` and `decay`.

    The first call of a kind (shapes, options) on a group compares it between the ranks, and may
    measure the group's links; both wait for every rank. Later calls of that kind cost neither.

    Args:
        state: S_p [B, H, K, V] fp32, this rank's end state computed from zero.
        decay: d_p [B, H, K] fp32 in [0, 1], or [B, H, 1] for one decay per head; 0 where a
            document starts inside this rank. On CUDA its values are looked at in the first call
            of a kind only, because the look has to wait for the GPU.
        group: the ranks, in sequence order.
        reverse: scan from the last rank to the first.
        algorithm: "chain", "doubling", "allgather", "hierarchical" (between hosts), "symmetric"
            (CUDA, one host), or "auto" for the one predicted to be fastest.
        num_blocks: blocks of "chain" or "hierarchical", 1 to K; None for the best predicted.
        ranks_per_host: of "hierarchical": so many consecutive ranks of the group form a host, the
            last host has what remains; None for what was found.

    Returns:
        In(p) [B, H, K, V] fp32; zero on the first rank (the last one if `reverse`).

    Raises:
        ValueError: shapes, dtypes, values or options that do not fit. In the first call of a kind,
            also where they differ between the ranks: then every rank raises, before anything is
            sent. Later calls of that kind are not compared: a refusal (of decays, on the CPU) is
            raised on its rank alone, and ranks that need its messages wait for the group's timeout
            and fail there. So does a rank that repeats an old kind while another makes a call of a
            new one, which raises after the timeout of the group's store.
    """
    plan = plan_scan(state, decay, group, Options(algorithm, num_blocks, ranks_per_host))
    return AllScan.apply(state, decay, group, reverse, plan)


def start_all_scan(
    state: Tensor,
    decay: Tensor,
    group: dist.ProcessGroup,
    *,
    reverse: bool = False,
    algorithm: Algorithm = "auto",
    num_blocks: int | None = None,
    ranks_per_host: int | None = None,
) -> PendingScan:
    """Start an All-Scan, to be waited for after work that does not need it; not differentiable.

    On CUDA the whole scan is enqueued now, on a stream of its own that first waits for the current
    one. On the CPU the first messages start now and the others in `wait`. Scans of a group may be
    in flight together; every rank waits for them in the same order.

    Args and Raises as of `all_scan`; also ValueError if a gradient would be lost.
    """
    if torch.is_grad_enabled() and (state.requires_grad or decay.requires_grad):
        raise ValueError(
            "start_all_scan is not differentiable and state or decay requires a gradient: call "
            "all_scan, or call it in an autograd Function or under torch.no_grad()"
        )
    plan = plan_scan(state, decay, group, Options(algorithm, num_blocks, ranks_per_host))
    return PendingScan(state, decay, group, reverse, plan)


class PendingScan:
    """A scan in flight; `start_all_scan` makes it."""

    def __init__(
        self, state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool, plan: Plan
    ) -> None:
        self._incoming: Tensor | None = None
        self._enqueued: Enqueued | None = None
        self._scan: Scan | None = None
        if group.size() == 1:
            self._incoming = state.new_zeros(state.shape)
        elif state.is_cuda:
            self._enqueued = Enqueued(
                lambda: _scan_through(state, decay, group, reverse, plan), [state, decay]
            )
        else:
            self._scan = begin(plan, Line.whole(group, reverse=reverse), state, decay)
            self._handles = next(self._scan)

    def wait(self) -> Tensor:
        """In(p) [B, H, K, V] fp32; the same tensor every time.

        On CUDA the current stream waits, the host does not; every stream that reads the result
        has to wait for it.
        """
        if self._enqueued is not None:
            return self._enqueued.wait()
        if self._scan is not None:
            self._incoming, self._scan = _finish(self._scan, self._handles), None
        assert self._incoming is not None
        return self._incoming


class AllScan(torch.autograd.Function):
    """Scan (state, decay) over the ranks.

    forward   S [B, H, K, V], d [B, H, K] -> In [B, H, K, V]
    backward  G = dIn -> dS [B, H, K, V], dd [B, H, K]   (AllScan from the other end, its transpose)
    """

    @staticmethod
    def forward(ctx, state, decay, group, reverse, plan):  # noqa: D102
        ctx.options = group, reverse, plan
        incoming = PendingScan(state, decay, group, reverse, plan).wait()
        ctx.save_for_backward(decay, incoming)
        return incoming

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        decay, incoming = ctx.saved_tensors
        group, reverse, plan = ctx.options
        dstate = PendingScan(grad, decay, group, not reverse, plan).wait()
        ddecay = (dstate * incoming).sum(dim=-1).sum_to_size(decay.shape)
        return dstate, ddecay, None, None, None


def _scan_through(
    state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool, plan: Plan
) -> Tensor:
    """A whole scan on the current stream."""
    if plan.algorithm == "symmetric":
        return symmetric_scan(state, decay, group, reverse)
    scan = begin(plan, Line.whole(group, reverse=reverse), state, decay)
    return _finish(scan, next(scan))


def _finish(scan: Scan, handles: list[dist.Work]) -> Tensor:
    """Run a scan to its end, from the messages that have just been started."""
    while True:
        for handle in handles:
            handle.wait()
        try:
            handles = next(scan)
        except StopIteration as end:
            return end.value
