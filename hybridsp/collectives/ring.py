"""Passing a message around a ring while computing: post, compute, wait.

Each rank sends to its right neighbour and receives from its left one, or, where a message has an
owner further away, straight to a rank some places off: every rank sends equally far, so it stays
one message each way. A group may be cut in several rings of consecutive ranks, say one per host,
which then all do so at once. What has come may be computed with and sent on at the same time: both
only read it. The message's buffers are kept until it has arrived, so the caller may drop its own.

NCCL knows no tags and matches messages by their order, gloo by tag and order: so all ranks post in
the same order, whatever is in flight.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class RingExchange:
    """One message in flight around a ring.

    Args:
        group: the ring, of two ranks or more.
        tag: tells exchanges apart that are in flight at once on one group.
        ranks: of a ring, which divides the group's; the group then is several rings of consecutive
            ranks. None for one ring.
    """

    def __init__(self, group: dist.ProcessGroup, *, tag: int = 0, ranks: int | None = None) -> None:
        self._group, self._tag = group, tag
        self._size = group.size() if ranks is None else ranks
        assert group.size() % self._size == 0, "rings of unequal size"
        self._handles: list[dist.Work] = []
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a message has been posted and not waited for."""
        return self._buffers is not None

    def post(self, message: Tensor, incoming: int, *, shift: int = 1) -> None:
        """Start sending a message and receiving one.

        Args:
            message: [N], goes to rank r + shift; not to be written to until it has arrived.
            incoming: elements of what comes from rank r - shift, in the same dtype.
            shift: places to the right in the ring, the same on every rank, not back to the sender;
                negative ones are to the left.
        """
        assert self._buffers is None, "post called twice without wait"
        assert shift % self._size, "a message to oneself"
        place = self._group.rank() % self._size
        first = self._group.rank() - place
        target, source = (first + (place + hop) % self._size for hop in (shift, -shift))
        received = message.new_empty(incoming)
        operations = [
            dist.P2POp(dist.isend, message, None, self._group, self._tag, target),
            dist.P2POp(dist.irecv, received, None, self._group, self._tag, source),
        ]
        self._handles = dist.batch_isend_irecv(operations)
        self._buffers = message, received

    def wait(self) -> Tensor:
        """The message that has come, [incoming]. On CUDA the current stream waits, not the host."""
        assert self._buffers is not None, "wait called without post"
        for handle in self._handles:
            handle.wait()
        _, received = self._buffers
        self._handles, self._buffers = [], None
        return received
