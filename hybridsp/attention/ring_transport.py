"""How the keys of a ring's other ranks come to this rank, and their gradients go home.

    variant     step s > 0 brings                    gradients of these keys go
    ring        the shared keys of rank r - s        straight to rank r - s, once they are made
    allgather   the shared keys of all others        to all others, summed in fp32 on the way

Keys that come next travel while this step computes, and in a ring so do gradients that are done: a
message straight to its owner is no longer than one to the neighbour, and nothing has to wait until
it has been all the way around.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridsp.attention.ring_plan import RingPlan, others_shared
from hybridsp.collectives import KVGather, RingExchange
from hybridsp.layout import Span

Visits = Iterator[tuple[int, Tensor, Tensor]]


def transport_of(plan: RingPlan, k: Tensor, v: Tensor) -> RingTransport | AllGatherTransport:
    """How the other ranks' keys come to this rank, which has k, v [B, Lz, Hkv, D], and go back."""
    return (RingTransport if plan.variant == "ring" else AllGatherTransport)(plan, k, v)


class RingTransport:
    """Keys one neighbour at a time; each step's gradients straight to the owner of its keys."""

    def __init__(self, plan: RingPlan, k: Tensor, v: Tensor) -> None:
        self._plan, self._k, self._v = plan, k, v
        self._rows = plan.layout.shared_rows(plan.group.rank())
        self._gradients = RingExchange(plan.group, tag=1)

    def visits(self) -> Visits:
        """Yield (step, k, v), own ones first; the next ones travel meanwhile."""
        plan, k, v, last = self._plan, self._k, self._v, self._plan.steps - 1
        exchange = RingExchange(plan.group)
        for step in range(plan.steps):
            if step < last:
                sent = [_take(k, self._rows), _take(v, self._rows)] if step == 0 else [k, v]
                exchange.post(sent, self._shapes(plan.owner(step + 1)))
            yield step, k, v
            if step < last:
                k, v = exchange.wait()

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Start sending a step's gradients; add to dk, dv what has come of the step before's."""
        self.collect(dk, dv)
        shapes = self._shapes(self._plan.group.rank())
        self._gradients.post([step_dk, step_dv], shapes, shift=-step)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Add to dk, dv what is on its way to them."""
        if self._gradients.in_flight:
            for whole, share in zip((dk, dv), self._gradients.wait(), strict=True):
                _add(whole, self._rows, share)

    def _shapes(self, rank: int) -> list[torch.Size]:
        return _shapes(self._plan, rank, self._k, self._v)


class AllGatherTransport:
    """The keys of all others at once, laid side by side in the order of their positions."""

    def __init__(self, plan: RingPlan, k: Tensor, v: Tensor) -> None:
        self._plan, self._k, self._v = plan, k, v
        self._ranks = range(plan.group.size())
        self._gather = KVGather(plan.group, [_shapes(plan, r, k, v) for r in self._ranks])
        self._rows = plan.layout.shared_rows(plan.group.rank())
        others = others_shared(plan.layout, plan.group.rank())
        self._owners = [rank for rank, _ in others]
        self._sizes = [stop - start for _, (start, stop) in others]

    def visits(self) -> Visits:
        """Yield (0, own k, v) and (1, all others' k, v), which travel meanwhile."""
        if self._plan.steps > 1:
            self._gather.post([_take(self._k, self._rows), _take(self._v, self._rows)])
        yield 0, self._k, self._v
        if self._plan.steps > 1:
            keys, values = zip(*self._gather.wait(), strict=True)
            yield 1, self._in_order(keys), self._in_order(values)

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Send the others' gradients, and add to dk, dv what all others have for them."""
        shares = zip(self._by_owner(step_dk), self._by_owner(step_dv), strict=True)
        for whole, share in zip((dk, dv), self._gather.give_back(list(shares)), strict=True):
            _add(whole, self._rows, share)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Nothing is on its way."""

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
        mine = self._plan.group.rank()
        tokens = sum(_lengths(self._plan.layout.shared[mine]))
        parts[mine] = [x.new_zeros(x.shape[0], tokens, *x.shape[2:])]
        return [torch.cat(of_rank, dim=1) for of_rank in parts]


def _lengths(spans: tuple[Span, ...]) -> list[int]:
    return [stop - start for start, stop in spans]


def _shapes(plan: RingPlan, rank: int, k: Tensor, v: Tensor) -> list[torch.Size]:
    """Shapes of the keys and values that a rank shares."""
    tokens = sum(_lengths(plan.layout.shared[rank]))
    return [torch.Size((x.shape[0], tokens, *x.shape[2:])) for x in (k, v)]


def _take(x: Tensor, rows: list[slice]) -> Tensor:
    parts = [x[:, part] for part in rows] or [x[:, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(whole: Tensor, rows: list[slice], share: Tensor) -> None:
    sizes = [part.stop - part.start for part in rows]
    for part, values in zip(rows, share.split(sizes, dim=1), strict=True):
        whole[:, part] += values
