"""How fast the ranks of a group reach each other, measured once per group in a few milliseconds.

Messages are timed as a scan sends them: every rank to the next one at once, first between ranks of
one host, then between hosts, then an all-gather; small ones for the latency, large ones for the
bandwidth. The slowest rank's time counts, so all ranks know the same figures and decide alike.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.cost import Link, Topology
from hybridsp.collectives.per_group import per_group
from hybridsp.collectives.scans.line import Line
from hybridsp.collectives.torch_names import all_gather
from hybridsp.mesh import gather_objects

SMALL_BYTES = 4 * 2**10
# Up to 4 MiB a message over NVLink costs its launch; gloo moves about a gigabyte a second.
LARGE_BYTES = {"cuda": 16 * 2**20, "cpu": 256 * 2**10}
# The best of some bursts: noise only ever adds time.
BURSTS, MESSAGES_PER_BURST = 3, 4
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


def topology(group: dist.ProcessGroup, device: torch.device) -> Topology:
    """Measure the group's links; later calls return what the first one found.

    Args:
        group: of at least 2 ranks, all of which call this.
        device: between whose memory and the peers' messages go.

    Returns:
        The same on every rank, all figures positive and finite.
    """
    known = _measured(group)
    if device.type not in known:
        known[device.type] = _measure(group, device)
        if group.rank() == 0:
            logger.info(
                "%s ranks on %s measured: %s", group.size(), device.type, known[device.type]
            )
    return known[device.type]


@per_group
def _measured(_group: dist.ProcessGroup) -> dict[str, Topology]:
    """What has been measured, by type of device."""
    return {}


def host_identity() -> str:
    """The same on two ranks if and only if they run on one host."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()} {boot}"


@per_group
def hosts_of(group: dist.ProcessGroup) -> list[str]:
    """The host of each rank, in rank order. Collective where it has not been asked before."""
    return gather_objects(host_identity(), group)


def consecutive_ranks(hosts: list[str]) -> int | None:
    """Ranks per host if hosts hold equally many consecutive ranks, the last perhaps fewer."""
    per_host = next((n for n, host in enumerate(hosts) if host != hosts[0]), len(hosts))
    blocks = [hosts[start : start + per_host] for start in range(0, len(hosts), per_host)]
    distinct = len({block[0] for block in blocks}) == len(blocks)
    return per_host if distinct and all(len(set(block)) == 1 for block in blocks) else None


def _measure(group: dist.ProcessGroup, device: torch.device) -> Topology:
    hosts = hosts_of(group)
    line, ranks = Line.whole(group), group.size()
    near = [a == b for a, b in pairwise(hosts)]
    far = [not is_near for is_near in near]
    within = measure_link(lambda x: _shift(x, line, near), 1, device, group)
    between = measure_link(lambda x: _shift(x, line, far), 1, device, group)
    # Each rank sends a share of the bytes, so that the probe stays small on many ranks.
    gathered = measure_link(lambda x: gather_once(x, group), ranks, device, group)
    return Topology(
        ranks_per_host=consecutive_ranks(hosts),
        within=within if any(near) else None,
        between=between if any(far) else None,
        all_gather=gathered,
    )


def measure_link(
    send: Callable[[Tensor], None], shares: int, device: torch.device, group: dist.ProcessGroup
) -> Link:
    """The link that explains how long the slowest rank takes for a small and a large message.

    Args:
        send: passes a message on and receives as much, `shares` - 1 times as much if that is
            greater; the group's ranks call it together.
        shares: each rank sends one of so many, so that all together stay small.
        device: where the messages are.
        group: whose slowest rank counts.

    Returns:
        The same on every rank.
    """
    sizes = [max(size // shares, 1) for size in (SMALL_BYTES, LARGE_BYTES[device.type])]
    mine = [_seconds(send, torch.zeros(size, dtype=torch.uint8, device=device)) for size in sizes]
    small, large = (max(times) for times in zip(*gather_objects(mine, group), strict=True))
    received = [size * max(shares - 1, 1) for size in sizes]
    # Where noise made the small message no faster, the large one's time is all wire.
    wire = large - small if large > small else large
    return Link(latency=small, bandwidth=(received[1] - received[0]) / wire)


def _seconds(send: Callable[[Tensor], None], message: Tensor) -> float:
    """Of one message among several, one behind the other."""
    send(message)  # connects, and lines the ranks up
    return min(_burst(send, message) for _ in range(BURSTS)) / MESSAGES_PER_BURST


def _burst(send: Callable[[Tensor], None], message: Tensor) -> float:
    _finish(message.device)
    start = time.perf_counter()
    for _ in range(MESSAGES_PER_BURST):
        send(message)
    _finish(message.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shift(message: Tensor, line: Line, links: list[bool]) -> None:
    """Every rank to the next one at once, where `links`, of rank r to r + 1, says so."""
    operations, rank = [], line.position
    if not line.is_last and links[rank]:
        operations.append(line.send(message, rank + 1))
    if not line.is_first and links[rank - 1]:
        operations.append(line.receive(torch.empty_like(message), rank - 1))
    for handle in dist.batch_isend_irecv(operations) if operations else []:
        handle.wait()


def gather_once(message: Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's message to all."""
    all_gather(message.new_empty(group.size() * message.numel()), message, group=group)
