"""Every rank's K and V to all ranks at once, and the gradients' way back.

    gather     rank r's tensors            -> all ranks' tensors, on every rank     (all-gather)
    give back  a share of all ranks' tensors -> rank r's, summed over the shares    (reduce-scatter)

The second is the transpose of the first. Ranks may hold unequal numbers of tokens: messages are
padded to the longest. Several tensors travel as one message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.message import pack_padded, unpack
from hybridsp.collectives.torch_names import all_gather, reduce_scatter


class KVGather:
    """One all-gather in flight: post, compute, wait; then `give_back`.

    Args:
        group: the ranks.
        shapes: of each rank's tensors, rank by rank, the same list on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, shapes: Sequence[Sequence[torch.Size]]) -> None:
        self._group, self._shapes = group, shapes
        self._padded = max(sum(shape.numel() for shape in of_rank) for of_rank in shapes)
        self._handle: dist.Work | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def post(self, tensors: Sequence[Tensor]) -> None:
        """Start sending this rank's tensors, of one dtype."""
        assert self._buffers is None, "post called twice without wait"
        sent = pack_padded([tensors], self._padded)
        received = sent.new_empty(self._group.size() * self._padded)
        self._handle = all_gather(received, sent, group=self._group, async_op=True)
        self._buffers = sent, received

    def wait(self) -> list[list[Tensor]]:
        """All ranks' tensors, rank by rank."""
        assert self._handle is not None, "wait called without post"
        assert self._buffers is not None
        self._handle.wait()
        messages = self._buffers[1].view(self._group.size(), self._padded)
        self._handle, self._buffers = None, None
        return [
            unpack(message, shapes) for message, shapes in zip(messages, self._shapes, strict=True)
        ]

    def give_back(self, shares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """This rank's tensors, summed over what all ranks have for them, in the shares' dtype.

        Args:
            shares: for each rank, tensors shaped as its own.
        """
        sent = pack_padded(shares, self._padded)
        received = sent.new_empty(self._padded)
        reduce_scatter(received, sent, group=self._group)
        return unpack(received, self._shapes[self._group.rank()])
