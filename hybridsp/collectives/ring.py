"""Passing a message around a ring while computing: post, compute, wait.

Each rank sends to its right neighbour and receives from its left one, or, where a message has an
owner further away, straight to a rank some places off: every rank sends equally far, so it stays
one message each way. Several tensors travel as one message. The message's buffers are kept until it
has arrived, so the caller may drop its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RingExchange:
    """One message in flight around a ring.

    Args:
        group: the ring.
        tag: tells exchanges apart that are in flight at once on one group.
    """

    def __init__(self, group: dist.ProcessGroup, *, tag: int = 0) -> None:
        self._group, self._tag = group, tag
        self._handles: list[dist.Work] = []
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._shapes: list[torch.Size] = []

    @property
    def in_flight(self) -> bool:
        """Whether a message has been posted and not waited for."""
        return self._buffers is not None

    def post(
        self, tensors: Sequence[Tensor], shapes: Sequence[torch.Size], *, shift: int = 1
    ) -> None:
        """Start sending `tensors`, of one dtype, and receiving tensors of the given shapes.

        Args:
            tensors: go to rank r + shift.
            shapes: of what comes from rank r - shift.
            shift: places to the right, the same on every rank; negative ones are to the left.
        """
        assert self._buffers is None, "post called twice without wait"
        size = self._group.size()
        target, source = (self._group.rank() + shift) % size, (self._group.rank() - shift) % size
        sent = torch.cat([tensor.flatten() for tensor in tensors])
        if shift % size == 0:
            self._buffers, self._shapes = (sent, sent), list(shapes)
            return
        received = sent.new_empty(sum(shape.numel() for shape in shapes))
        operations = [
            dist.P2POp(dist.isend, sent, None, self._group, self._tag, target),
            dist.P2POp(dist.irecv, received, None, self._group, self._tag, source),
        ]
        self._handles = dist.batch_isend_irecv(operations)
        self._buffers, self._shapes = (sent, received), list(shapes)

    def wait(self) -> list[Tensor]:
        """The tensors that have come."""
        assert self._buffers is not None, "wait called without post"
        for handle in self._handles:
            handle.wait()
        _, received = self._buffers
        parts = received.split([shape.numel() for shape in self._shapes])
        self._handles, self._buffers = [], None
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
