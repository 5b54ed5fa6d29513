"""What a scan over ranks costs, and so which algorithm, how many blocks, and which hosts.

A message of s bytes takes latency + s / bandwidth. On P ranks of one host, for a state of S bytes
and a decay of D bytes,

    chain, n blocks    (P - 2 + n) (latency + S / (n bandwidth))
    doubling           ceil(log2 P) (latency + (S + D) / bandwidth)
    all-gather         latency + (P - 1) (S + D) / bandwidth

The chain's first block needs P - 1 hops and the other n - 1 follow one behind the other, so it is
fastest near n = sqrt((P - 2) S / (latency * bandwidth)). (ZeCO, arXiv:2507.01004, leaves the
latency out of its formula and so wants ever more blocks.) There are at most K blocks, few enough
to try every number, which also serves where links differ.

On H hosts of R ranks a chain crosses hosts H - 1 times, doubling in each of its steps. The
`hierarchical` scan doubles inside the hosts, passes the totals of the hosts along a chain of H
ranks, and hands each block, as it comes, to the other R - 1 ranks of its host:

    hierarchical       doubling on R ranks + (H - 2 + n) max(hop, copies) + copies
                       hop = between hosts, S / n bytes; copies = inside, (R - 1) S / n bytes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way for messages.

    Attributes:
        latency: seconds of a message of no bytes.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        """Time of a message."""
        return self.latency + num_bytes / self.bandwidth

    def __str__(self) -> str:
        return f"{self.latency * 1e6:.0f} us and {self.bandwidth / 1e9:.3g} GB/s"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How fast the ranks of a group reach each other; `collectives.topology` measures it.

    Attributes:
        ranks_per_host: consecutive ranks that share a host (the last host may have fewer); None
            where hosts are not like that, and then every hop counts as one between hosts.
        within: one rank to the next on its host; None if every rank is alone on its host.
        between: one rank to the next on another host; None if there is one host.
        all_gather: the bandwidth at which a rank receives the other ranks' bytes.
    """

    ranks_per_host: int | None
    within: Link | None
    between: Link | None
    all_gather: Link

    def __str__(self) -> str:
        """As a log tells it."""
        links = (
            ("to the next rank of the host", self.within),
            ("to the next host", self.between),
            ("in an all-gather", self.all_gather),
        )
        return ", ".join(f"{link} {where}" for where, link in links if link is not None)

    @property
    def inner(self) -> Link:
        """The link inside a host, or the only one there is."""
        return self._known(self.within, self.between)

    @property
    def outer(self) -> Link:
        """The link between hosts, or the only one there is."""
        return self._known(self.between, self.within)

    @staticmethod
    def _known(link: Link | None, other: Link | None) -> Link:
        known = link or other
        assert known is not None, "a topology of one rank has no links"
        return known

    def hosts(self, ranks: int) -> int:
        """Hosts that so many ranks fill."""
        return ceil(ranks / (self.ranks_per_host or 1))

    def slowest(self, ranks: int) -> Link:
        """The link that holds up a step in which every rank sends to another."""
        return self.inner if self.hosts(ranks) == 1 else self.outer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to scan.

    Attributes:
        algorithm: never "auto".
        num_blocks: of the chain and of the hierarchical scan; None for the others.
        ranks_per_host: of the hierarchical scan; None for the others.
    """

    algorithm: str
    num_blocks: int | None = None
    ranks_per_host: int | None = None


def chain_seconds(topology: Topology, ranks: int, num_bytes: int, blocks: int) -> float:
    """Time of a pipelined chain through all ranks."""
    if ranks == 1:
        return 0.0
    block = num_bytes / blocks
    crossings = topology.hosts(ranks) - 1
    first = crossings * topology.outer.seconds(block)
    first += (ranks - 1 - crossings) * topology.inner.seconds(block)
    return first + (blocks - 1) * topology.slowest(ranks).seconds(block)


def doubling_seconds(topology: Topology, ranks: int, num_bytes: int, decay_bytes: int) -> float:
    """Time of recursive doubling over all ranks."""
    steps = ceil(log2(ranks))
    return steps * topology.slowest(ranks).seconds(num_bytes + decay_bytes) if steps else 0.0


def all_gather_seconds(topology: Topology, ranks: int, num_bytes: int, decay_bytes: int) -> float:
    """Time of one all-gather in which every rank receives P - 1 pairs."""
    return topology.all_gather.seconds((ranks - 1) * (num_bytes + decay_bytes))


def hierarchical_seconds(
    topology: Topology,
    ranks: int,
    num_bytes: int,
    decay_bytes: int,
    blocks: int,
    ranks_per_host: int,
) -> float:
    """Time of doubling inside hosts and a pipelined chain between them."""
    steps, hosts = ceil(log2(ranks_per_host)), ceil(ranks / ranks_per_host)
    inside = steps * topology.inner.seconds(num_bytes + decay_bytes) if steps else 0.0
    if hosts == 1:
        return inside
    block, others = num_bytes / blocks, ranks_per_host - 1
    copies = topology.inner.seconds(others * block) if others else 0.0
    hop = topology.outer.seconds(block)
    return inside + (hosts - 2 + blocks) * max(hop, copies) + copies


def chain_plan(topology: Topology, ranks: int, num_bytes: int, rows: int) -> tuple[float, Plan]:
    """Seconds and number of blocks, 1 to `rows`, of the fastest chain."""
    seconds, blocks = _fastest(lambda n: chain_seconds(topology, ranks, num_bytes, n), rows)
    return seconds, Plan(algorithm="chain", num_blocks=blocks)


def hierarchical_plan(
    topology: Topology,
    ranks: int,
    num_bytes: int,
    decay_bytes: int,
    rows: int,
    ranks_per_host: int,
) -> tuple[float, Plan]:
    """Seconds and number of blocks, 1 to `rows`, of the fastest hierarchical scan."""
    seconds, blocks = _fastest(
        lambda n: hierarchical_seconds(
            topology, ranks, num_bytes, decay_bytes, n, ranks_per_host=ranks_per_host
        ),
        rows,
    )
    plan = Plan(algorithm="hierarchical", num_blocks=blocks, ranks_per_host=ranks_per_host)
    return seconds, plan


@lru_cache(maxsize=1024)
def choose(topology: Topology, ranks: int, num_bytes: int, decay_bytes: int, rows: int) -> Plan:
    """The plan predicted to be fastest.

    Args:
        topology: of the group.
        ranks: size of the group.
        num_bytes: of one rank's state.
        decay_bytes: of one rank's decay.
        rows: K, the most blocks that a state can be cut into.

    Returns:
        A plan with everything decided. Never "symmetric", which is taken wherever it can be had.
        Never "hierarchical" on one host, where it is plain doubling.
    """
    doubling = doubling_seconds(topology, ranks, num_bytes, decay_bytes)
    all_gather = all_gather_seconds(topology, ranks, num_bytes, decay_bytes)
    plans = [
        chain_plan(topology, ranks, num_bytes, rows),
        (doubling, Plan(algorithm="doubling")),
        (all_gather, Plan(algorithm="allgather")),
    ]
    local = topology.ranks_per_host
    if local is not None and 1 < local < ranks:
        plans.append(hierarchical_plan(topology, ranks, num_bytes, decay_bytes, rows, local))
    return min(plans, key=lambda timed: timed[0])[1]


def _fastest(seconds: Callable[[int], float], most: int) -> tuple[float, int]:
    return min((seconds(blocks), blocks) for blocks in range(1, most + 1))
