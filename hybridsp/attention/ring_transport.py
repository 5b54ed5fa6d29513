"""How the keys of a ring's other ranks come to this rank, and their gradients go home.

    variant     step s > 0 brings                    gradients of these keys go
    ring        the shared keys of rank r - s        straight to rank r - s, once they are made
    allgather   the shared keys of all others        to all others, summed in fp32 on the way

Keys that come next travel while this step computes, and in a ring so do gradients that are done: a
message straight to its owner is no longer than one to the neighbour, and nothing has to wait until
it has been all the way around. `ring.py` computes over any `Transport`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.attention.ring_plan import RingPlan, others_shared
from hybridsp.collectives import KVGather, RingExchange
from hybridsp.collectives.message import pack, unpack
from hybridsp.layout import Span

Visits = Iterator[tuple[int, Tensor, Tensor]]


class Transport(Protocol):
    """Between the ranks of a ring, for any number of passes, one after another."""

    def visits(self, k: Tensor, v: Tensor) -> Visits:
        """Yield (step, keys, values) of all steps: at step 0 this rank's k, v [B, Lz, Hkv, D]."""

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Send a step's gradients to the owners of its keys.

        Args:
            step: later than 0.
            step_dk, step_dv: fp32, shaped as the keys and values that it brought.
            dk, dv: fp32, of this rank's own; what has come for them by now may be added.
        """

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Add to dk, dv whatever is still on its way to them, after the last step."""


def transport_of(plan: RingPlan, group: dist.ProcessGroup) -> Transport:
    """How keys and gradients travel in a ring under a plan."""
    return (RingTransport if plan.variant == "ring" else AllGatherTransport)(plan, group)


class RingTransport:
    """Keys one neighbour at a time; each step's gradients straight to the owner of its keys."""

    def __init__(self, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self._plan, self._group = plan, group
        self._rows = plan.layout.shared_rows(plan.rank)
        self._gradients = RingExchange(group, tag=1)

    def visits(self, k: Tensor, v: Tensor) -> Visits:
        """Own ones first; the next ones travel meanwhile, and go on as they have come."""
        visit, exchange = (0, k, v), RingExchange(self._group)
        if self._plan.steps > 1:
            message = pack([take(k, self._rows), take(v, self._rows)])
        for step in range(1, self._plan.steps):
            shapes = shared_shapes(self._plan, self._plan.owner(step), k, v)
            exchange.post(message, sum(shape.numel() for shape in shapes))
            yield visit
            message = exchange.wait()
            keys, values = unpack(message, shapes)
            visit = step, keys, values
        yield visit

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Start sending them; add to dk, dv what has come of the step before's."""
        self.collect(dk, dv)
        shapes = shared_shapes(self._plan, self._plan.rank, dk, dv)
        incoming = sum(shape.numel() for shape in shapes)
        self._gradients.post(pack([step_dk, step_dv]), incoming, shift=-step)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Of the last step that was sent home."""
        if self._gradients.in_flight:
            shapes = shared_shapes(self._plan, self._plan.rank, dk, dv)
            for whole, share in zip((dk, dv), unpack(self._gradients.wait(), shapes), strict=True):
                add(whole, self._rows, share)


class AllGatherTransport:
    """The keys of all others at once, laid side by side in the order of their positions."""

    def __init__(self, plan: RingPlan, group: dist.ProcessGroup) -> None:
        self._plan, self._group = plan, group
        self._ranks = range(group.size())
        self._rows = plan.layout.shared_rows(plan.rank)
        others = others_shared(plan.layout, plan.rank)
        self._owners = [rank for rank, _ in others]
        self._sizes = [stop - start for _, (start, stop) in others]

    def visits(self, k: Tensor, v: Tensor) -> Visits:
        """At step 0 own ones, at step 1 all others', which travel meanwhile."""
        if self._plan.steps == 1:
            yield 0, k, v
            return
        gather = self._gather(k, v)
        gather.post([take(k, self._rows), take(v, self._rows)])
        yield 0, k, v
        keys, values = zip(*gather.wait(), strict=True)
        yield 1, self._in_order(keys), self._in_order(values)

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Send the others' gradients, and add to dk, dv what all others have for them."""
        shares = zip(self._by_owner(step_dk), self._by_owner(step_dv), strict=True)
        received = self._gather(dk, dv).give_back(list(shares))
        for whole, share in zip((dk, dv), received, strict=True):
            add(whole, self._rows, share)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Nothing is on its way."""

    def _gather(self, k: Tensor, v: Tensor) -> KVGather:
        shapes = [shared_shapes(self._plan, rank, k, v) for rank in self._ranks]
        return KVGather(self._group, shapes)

    def _in_order(self, of_ranks: tuple[Tensor, ...]) -> Tensor:
        """Every rank's tokens -> all others' tokens in the order of their positions."""
        shared = self._plan.layout.shared
        parts = [
            iter(x.split(_lengths(spans), dim=1)) for x, spans in zip(of_ranks, shared, strict=True)
        ]
        return torch.cat([next(parts[rank]) for rank in self._owners], dim=1)

    def _by_owner(self, x: Tensor) -> list[Tensor]:
        """The way back: all others' tokens in order -> each rank's, with zeros for this one's."""
        parts: list[list[Tensor]] = [[x[:, :0]] for _ in self._ranks]
        for rank, part in zip(self._owners, x.split(self._sizes, dim=1), strict=True):
            parts[rank].append(part)
        mine = self._plan.rank
        tokens = sum(_lengths(self._plan.layout.shared[mine]))
        parts[mine] = [x.new_zeros(x.shape[0], tokens, *x.shape[2:])]
        return [torch.cat(of_rank, dim=1) for of_rank in parts]


def _lengths(spans: tuple[Span, ...]) -> list[int]:
    return [stop - start for start, stop in spans]


def shared_shapes(plan: RingPlan, rank: int, k: Tensor, v: Tensor) -> list[torch.Size]:
    """Shapes of what a rank shares of its keys and values, k and v being any rank's."""
    tokens = sum(_lengths(plan.layout.shared[rank]))
    return [torch.Size((x.shape[0], tokens, *x.shape[2:])) for x in (k, v)]


def take(x: Tensor, rows: list[slice]) -> Tensor:
    """The shared ones [B, n, H, D] of a rank's tokens."""
    parts = [x[:, part] for part in rows] or [x[:, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def add(whole: Tensor, rows: list[slice], share: Tensor) -> None:
    """The way back: add to a rank's tokens what has come for the shared ones."""
    sizes = [part.stop - part.start for part in rows]
    for part, values in zip(rows, share.split(sizes, dim=1), strict=True):
        whole[:, part].add_(values)
