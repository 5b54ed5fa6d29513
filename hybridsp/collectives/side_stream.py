"""Work on a GPU stream of its own, so that the caller's work runs beside it.

Two things can go wrong, both silently. The side stream must not read what the current stream has
yet to write, nor the other way round; events order that. And PyTorch gives memory that is freed to
the next allocation of the *same* stream at once, without waiting for the GPU. That is right as long
as one stream uses the memory, so whatever a second stream reads is recorded on that stream: its
memory is kept back, when it is freed, until that stream has come to that point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Enqueued:
    """A tensor that the device's side stream computes.

    Args:
        work: called at once, with the side stream current; what it enqueues runs after all that
            the current stream has been given so far, and its host never waits. It is not kept.
        inputs: the CUDA tensors that it reads, at least one, all on one device. The caller may
            drop them at once.
    """

    def __init__(self, work: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        stream = _side_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for tensor in inputs:
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            self._result = work()
            self._done = stream.record_event()

    def wait(self) -> Tensor:
        """The result. The current stream waits for it, the host does not.

        Any number of streams may each wait, any number of times; only those that have waited may
        use the result.
        """
        current = torch.cuda.current_stream(self._result.device)
        current.wait_event(self._done)
        # Its memory is the side stream's, whose next allocation must not overtake this stream.
        self._result.record_stream(current)
        return self._result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, so that what is enqueued on it runs in that order.

    Of high priority: the caller's own kernels fill the GPU, and the few blocks of ours between two
    messages (sums, the kernel of symmetric memory) should not queue behind theirs. NCCL's kernels
    run on the process group's own stream, whose priority is the group's affair.
    """
    return torch.cuda.Stream(device, priority=-1)
