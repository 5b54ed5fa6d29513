"""What a scan over ranks costs, and so which algorithm and how many blocks.

A message of s bytes takes latency + s / bandwidth. For a state of S bytes on P ranks:

    chain, n blocks    (P - 2 + n) (latency + S / (n bandwidth))
    all-gather         latency + (P - 1) S / bandwidth

and the chain is fastest at n = sqrt((P - 2) S / (latency * bandwidth)).
The chain's first block needs P - 1 hops and the other n - 1 follow one behind the other (ZeCO,
arXiv:2507.01004, whose formula leaves the latency out and so wants ever more blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between two ranks.

    Attributes:
        latency: seconds of a message of no bytes.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float


# NCCL send/recv between two H200 over NVLink: 35-50 us up to 4 MiB, 256 MiB in 743 us.
NVLINK = Link(latency=40e-6, bandwidth=360e9)
# gloo over loopback: assumed, not measured.
LOOPBACK = Link(latency=200e-6, bandwidth=1e9)


def link_of(device: torch.device) -> Link:
    """The assumed link between ranks that compute on `device`."""
    return NVLINK if device.type == "cuda" else LOOPBACK


def chain_seconds(link: Link, ranks: int, num_bytes: int, blocks: int) -> float:
    """Time of a pipelined chain."""
    return (ranks - 2 + blocks) * (link.latency + num_bytes / (blocks * link.bandwidth))


def all_gather_seconds(link: Link, ranks: int, num_bytes: int) -> float:
    """Time of an all-gather in which every rank receives P - 1 states."""
    return link.latency + (ranks - 1) * num_bytes / link.bandwidth


def chain_blocks(link: Link, ranks: int, num_bytes: int, most: int) -> int:
    """The number of blocks, 1 to `most`, that makes the chain fastest."""
    best = sqrt(max(ranks - 2, 0) * num_bytes / (link.latency * link.bandwidth))
    return min(max(round(best), 1), most)
