"""The ranks of a scan in its order, and messages between them.

The reverse scan is the same scan on the reversed line, and a scan inside one host is the same scan
on a part of it; so no algorithm knows of directions or hosts.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.per_group import per_group

# Tags of the messages of a scan, out of the way of the other collectives' small ones.
TAGS = range(2**16, 2**17)

# Yields handles to wait for, returns In [B, H, K, V].
Scan = Generator[list[dist.Work], None, Tensor]
# The same for a scan that returns a pair, and for a single exchange.
PairScan = Generator[list[dist.Work], None, tuple[Tensor, Tensor]]
Exchange = Generator[list[dist.Work], None, None]


@per_group
def _tags(_group: dist.ProcessGroup) -> Iterator[int]:
    return itertools.cycle(TAGS)


@dataclass(frozen=True)
class Line:
    """Some ranks of a group in the order of a scan, this rank among them.

    Attributes:
        group: whose ranks they are.
        ranks: numbers in the group, the first of the scan first.
        tag: tells scans apart that are in flight at once (gloo; NCCL goes by order).
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]
    tag: int

    @classmethod
    def whole(cls, group: dist.ProcessGroup, *, reverse: bool = False) -> Line:
        """All ranks of a group, for a new scan; every rank of the group draws the same tag."""
        ranks = range(group.size())
        return cls(group, tuple(ranks[::-1] if reverse else ranks), next(_tags(group)))

    @property
    def position(self) -> int:
        """Where this rank stands."""
        return self.ranks.index(self.group.rank())

    @property
    def is_first(self) -> bool:
        """Whether nothing enters this rank."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether nobody wants what leaves this rank."""
        return self.position == len(self.ranks) - 1

    def part(self, ranks: Sequence[int]) -> Line:
        """The line of some of these ranks."""
        return Line(self.group, tuple(ranks), self.tag)

    def send(self, tensor: Tensor, rank: int) -> dist.P2POp:
        """A message to a rank of the group, to be exchanged."""
        return self._message(dist.isend, tensor.contiguous(), rank)

    def receive(self, buffer: Tensor, rank: int) -> dist.P2POp:
        """A message from a rank of the group, to be exchanged."""
        return self._message(dist.irecv, buffer, rank)

    def _message(self, operation: Any, tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, group_peer=rank, tag=self.tag)


def exchange(operations: list[dist.P2POp]) -> Exchange:
    """Send and receive at once; their buffers live until the messages have arrived."""
    if operations:
        yield dist.batch_isend_irecv(operations)


def carry(state: Tensor, decay: Tensor, incoming: Tensor | None) -> Tensor:
    """What leaves a span: decay * In + S; In = None is zero."""
    return state if incoming is None else torch.addcmul(state, decay[..., None], incoming)
