"""How the keys of a ring's other ranks come to this rank, and their gradients go home.

    variant       step s > 0 brings                  gradients of these keys go
    ring          the shared keys of rank r - s      straight to rank r - s, once they are made
    double_ring   those of a rank of another host    to the rank of this host that brought them,
                  (or this one), see `ring_plan`     and the host's sum, in fp32, to their owner
    allgather     the shared keys of all others      to all others, summed in fp32 on the way

Keys that come next travel while this step computes, and in a ring so do gradients that are done: a
message straight to its owner is no longer than one to the neighbour, and nothing has to wait until
it has been all the way around. `ring.py` computes over any `Transport`.

A double ring (LoongTrain, arXiv:2406.18485) is one in each host and one from host to host: what
came from the left host goes around this one in M steps, and meanwhile on to the right host, each
rank sending to the one at its own place. So a host's ranks use all its network cards, and a message
between hosts has M steps' time. Gradients are summed in the host first, or M times as many bytes,
and those in fp32, would leave it.
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
from hybridsp.mesh import SPMesh

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


def transport_of(plan: RingPlan, mesh: SPMesh) -> Transport:
    """How keys and gradients travel in the mesh's ring under a plan."""
    if plan.variant == "allgather":
        return AllGatherTransport(plan, mesh.ring_group)
    return RingTransport(plan, mesh)


class RingTransport:
    """Around the host one neighbour at a time, and from host to host one host at a time.

    A ring on one host, or that does not ask for hosts, has one round of R steps and no more than
    the first of these ways. What goes between hosts goes through the SP group, which the ring's
    ranks are part of: under NCCL messages of one group wait for each other, and the messages of a
    whole round shall not wait for the next host's.
    """

    def __init__(self, plan: RingPlan, mesh: SPMesh) -> None:
        self._plan, self._near_group, self._far_group = plan, mesh.ring_group, mesh.sp_group
        self._rows = plan.layout.shared_rows(plan.rank)
        self._hop = plan.round * mesh.ulysses  # SP ranks to the same place on the next host
        self._gradients = RingExchange(self._near_group, tag=1, ranks=plan.round)
        self._sums = RingExchange(self._far_group, tag=1)
        self._host = 0
        self._sum: Tensor | None = None

    def visits(self, k: Tensor, v: Tensor) -> Visits:
        """Own ones first; the next ones travel meanwhile, and go on as they have come."""
        steps, around = self._plan.steps, self._plan.round
        near = RingExchange(self._near_group, ranks=around)
        far = RingExchange(self._far_group)
        keys, values = k, v
        if steps > 1:
            message = pack([take(k, self._rows), take(v, self._rows)])
        for step in range(steps):
            begins, ends = step % around == 0, (step + 1) % around == 0
            if begins and step + around < steps:
                far.post(message, self._elements(step + around, k, v), shift=self._hop)
            if not ends and step + 1 < steps:
                near.post(message, self._elements(step + 1, k, v))
            yield step, keys, values
            if step + 1 < steps:
                message = (far if ends else near).wait()
                keys, values = unpack(message, self._shapes(step + 1, k, v))

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Start sending them; add to dk, dv what has come of the step before's."""
        self._collect_share(dk, dv)
        host, place = divmod(step, self._plan.round)
        share = pack([step_dk, step_dv])
        if place:
            # To the rank of this host that brought the keys; at home they are its own.
            incoming = self._elements(host * self._plan.round, dk, dv)
            self._gradients.post(share, incoming, shift=-place)
        else:
            self._send_sum(dk, dv)
            self._host, self._sum = host, share

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Of the last step that was sent home, and of what other hosts have for them."""
        self._collect_share(dk, dv)
        self._send_sum(dk, dv)
        self._collect_sum(dk, dv)

    def _collect_share(self, dk: Tensor, dv: Tensor) -> None:
        """Of a neighbour on this host: for own keys, or for those that this rank brought here."""
        if not self._gradients.in_flight:
            return
        message = self._gradients.wait()
        if self._sum is None:
            self._add(message, dk, dv)
        else:
            self._sum.add_(message)

    def _send_sum(self, dk: Tensor, dv: Tensor) -> None:
        """Start sending home what this whole host has for the keys that this rank brought here."""
        self._collect_sum(dk, dv)
        if self._sum is not None:
            incoming = self._elements(0, dk, dv)
            self._sums.post(self._sum, incoming, shift=-self._host * self._hop)
            self._sum = None

    def _collect_sum(self, dk: Tensor, dv: Tensor) -> None:
        if self._sums.in_flight:
            self._add(self._sums.wait(), dk, dv)

    def _add(self, message: Tensor, dk: Tensor, dv: Tensor) -> None:
        for whole, share in zip((dk, dv), unpack(message, self._shapes(0, dk, dv)), strict=True):
            add(whole, self._rows, share)

    def _shapes(self, step: int, k: Tensor, v: Tensor) -> list[torch.Size]:
        """Of what a step brings."""
        return shared_shapes(self._plan, self._plan.owner(step), k, v)

    def _elements(self, step: int, k: Tensor, v: Tensor) -> int:
        return sum(shape.numel() for shape in self._shapes(step, k, v))


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
