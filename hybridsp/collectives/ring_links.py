"""How fast the messages of ring attention are, where its rings span hosts.

Inside a host links are alike, and an order of magnitude is all that choosing a variant needs; it
is written down here, so that the choice is the same in every run. Between hosts links differ a
hundredfold, and whether a host's ranks share a network card is not written anywhere: so the very
exchanges that the variants make are timed, once per mesh, in a few milliseconds:

    step      every rank to the next one in its ring; the slowest, between two hosts, holds up all
    inner     every rank to the next one in its ring on its host
    outer     every rank to the one at its place on the next host, all of a host's at once
    gather    every rank to all others of its ring

All rings of an SP group are timed together, as they run, and the slowest rank of all counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.cost import Link
from hybridsp.collectives.per_group import per_group
from hybridsp.collectives.ring import RingExchange
from hybridsp.collectives.topology import (
    consecutive_ranks,
    gather_once,
    hosts_of,
    measure_link,
)
from hybridsp.mesh import SPMesh


@dataclass(frozen=True, kw_only=True)
class DoubleLinks:
    """What the messages of a double ring cost; see the module's text.

    Attributes:
        ranks_per_host: ranks of the ring on each host, at least 2 on at least 2.
        inner, outer: inside the hosts, and between them.
    """

    ranks_per_host: int
    inner: Link
    outer: Link


@dataclass(frozen=True, kw_only=True)
class RingLinks:
    """What the messages of a ring cost; see the module's text.

    Attributes:
        step: to the next rank of the ring.
        gather: its bandwidth is that at which a rank receives the others' bytes.
        double: of the double ring; None where the ranks' places on the hosts allow none.
    """

    step: Link
    gather: Link
    double: DoubleLinks | None = None


# Of GPUs of 2023 inside a host: what one more message costs, and how fast keys come.
_INSIDE = Link(latency=40e-6, bandwidth=100e9)
ONE_HOST = RingLinks(step=_INSIDE, gather=_INSIDE)


def ring_links(mesh: SPMesh) -> RingLinks:
    """The links of the mesh's rings: measured where they span hosts, else `ONE_HOST`.

    Collective over `mesh.sp_group` where it has not been asked before.

    Returns:
        The same on every rank of the SP group.
    """
    if mesh.ring == 1:
        return ONE_HOST
    known = _measured(mesh.sp_group)
    if mesh.device.type not in known:
        hosts = hosts_of(mesh.sp_group)
        spanning = any(len(set(hosts[u :: mesh.ulysses])) > 1 for u in range(mesh.ulysses))
        known[mesh.device.type] = _measure(mesh) if spanning else ONE_HOST
    return known[mesh.device.type]


def ring_ranks_per_host(hosts: Sequence[str], ulysses: int) -> int | None:
    """Ranks of every ring that share a host, if hosts hold equally many consecutive ones.

    Args:
        hosts: of the SP group's ranks, in rank order.
        ulysses: degree; the ranks of a ring are so many apart.

    Returns:
        From 1, every rank of a ring on a host of its own, to R, each ring on one host; None where
        hosts hold unequal numbers of a ring's ranks, or others lie between them.
    """
    rings = [list(hosts[u::ulysses]) for u in range(ulysses)]
    found = {consecutive_ranks(ring) for ring in rings}
    count = found.pop()
    even = not found and count is not None and len(rings[0]) % count == 0
    return count if even else None


@per_group
def _measured(_group: dist.ProcessGroup) -> dict[str, RingLinks]:
    """What has been found out about an SP group's rings, by type of device."""
    return {}


def _measure(mesh: SPMesh) -> RingLinks:
    ring, whole, device = mesh.ring_group, mesh.sp_group, mesh.device
    step = _shift_link(RingExchange(ring), 1, whole, device)
    gather = measure_link(lambda x: gather_once(x, ring), mesh.ring, device, whole)
    count = ring_ranks_per_host(hosts_of(whole), mesh.ulysses)
    if count is None or not 1 < count < mesh.ring:
        return RingLinks(step=step, gather=gather)
    double = DoubleLinks(
        ranks_per_host=count,
        inner=_shift_link(RingExchange(ring, ranks=count), 1, whole, device),
        outer=_shift_link(RingExchange(whole), count * mesh.ulysses, whole, device),
    )
    return RingLinks(step=step, gather=gather, double=double)


def _shift_link(
    exchange: RingExchange, shift: int, whole: dist.ProcessGroup, device: torch.device
) -> Link:
    def send(message: Tensor) -> None:
        exchange.post(message, message.numel(), shift=shift)
        exchange.wait()

    return measure_link(send, 1, device, whole)
