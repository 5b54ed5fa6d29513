"""What activation checkpointing keeps of each layer, held in host memory until its backward.

Checkpointing forgets all that a layer computed but what it started from, its input [B, L, D]. With
many layers and a million tokens those inputs are what fills the GPU. None is looked at until the
backward comes to its layer, so each is copied to the host as soon as the layer has started, beside
the layer's work, and comes back while the layer behind it goes backward.

Two layers' worth are on the device at any time. Forward: what this layer started from, and that of
the one before, whose copy may still be under way. Backward: what this layer needs, and what the
next one will. Only the device waits, one stream for the other's event, never the host; and as the
compute stream alone allocates and frees device memory, and waits before it frees, nothing needs
the allocator's help (`record_stream` would hold memory back for as long as the host runs ahead).

Host memory is pinned, in pages of one size that go from layer to layer, from step to step and from
one length to another: after the first step nothing is pinned any more. A page can be handed on
while a copy from it or to it is under way, because one stream makes all copies, in order.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Checkpoint = Callable[..., Any]

# A power of two, to which PyTorch rounds pinned memory up; half a page per tensor is lost.
PAGE_BYTES = 64 * 2**20


class ActivationOffload:
    """The host memory of one model, and what is on its way there or back.

    Args:
        page_bytes: size of a page of host memory.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES) -> None:
        self.pages = HostPages(page_bytes)
        # The call before the one that comes: where the backward goes on. Not held, so that a graph
        # that is dropped, with or without a backward, gives all back.
        self._previous: weakref.ref[_Call] | None = None
        self._running: _Call | None = None

    def run(self, checkpoint: Checkpoint, *args: Any, is_last: bool, **kwargs: Any) -> Any:
        """`checkpoint(*args, **kwargs)`, and what it saves for the backward goes to the host.

        Args:
            checkpoint: a checkpointing function, reentrant or not.
            args: its positional arguments.
            is_last: whether no other call follows in this forward: all copies to the host are then
                waited for (by the device), and nothing stays behind.
            kwargs: its keyword arguments.
        """
        previous = self._previous() if self._previous is not None else None
        call = _Call(self.pages, self._previous)
        self._previous = weakref.ref(call)
        self._running = call
        try:
            with saved_tensors_hooks(call.pack, call.unpack):
                result = checkpoint(*args, **kwargs)
        finally:
            self._running = None
        for settled in (previous, call if is_last else None):
            if settled is not None:
                settled.forget_sources()
        return result

    def put_away(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Take a tensor of the call that runs now to the host, beside what the call saves.

        Returns:
            What gives the tensor back, in the backward.
        """
        assert self._running is not None, "to be called by what `run` runs"
        return functools.partial(self._running.unpack, self._running.pack(tensor))


class OffloadingCheckpoint:
    """A checkpointing function whose saved inputs lie in host memory.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint`, reentrant or not, or what wraps it.
        offload: the model's.
        is_last: whether this is the model's last layer.
    """

    def __init__(self, checkpoint: Checkpoint, offload: ActivationOffload, is_last: bool) -> None:
        self.checkpoint = checkpoint
        self.offload = offload
        self.is_last = is_last

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function(*args)`; `kwargs` as the checkpointing function defines them."""
        if not torch.is_grad_enabled():
            return self.checkpoint(function, *args, **kwargs)
        return self.offload.run(self.checkpoint, function, *args, is_last=self.is_last, **kwargs)


def require_checkpointing(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse a forward in training in which activations are not checkpointed.

    Args:
        model: what is about to run forward.
        layers: its decoder layers.

    Raises:
        ValueError: a layer's activations are not checkpointed.
    """
    if not (model.training and torch.is_grad_enabled()):
        return
    without = [i for i, x in enumerate(layers) if not getattr(x, "gradient_checkpointing", False)]
    if without:
        raise ValueError(
            "offload_activations = True, but activations are not checkpointed in layers "
            f"{without if len(without) < len(layers) else 'all'}, so all that a layer computes "
            "stays on the device: call model.activation_checkpointing_enable() before the first "
            "step, or parallelize with offload_activations=False"
        )


class HostPages:
    """Host memory in pages of one size, taken and given back, never returned to the system.

    Args:
        page_bytes: size of a page.

    Attributes:
        num_pages: how many there are, in use or not.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = 0
        self._free: list[Tensor] = []

    def take(self, num_bytes: int, *, pinned: bool) -> list[Tensor]:
        """Pages, uint8 [page_bytes] each, for so many bytes."""
        needed = -(-num_bytes // self.page_bytes)
        missing = max(0, needed - len(self._free))
        self.num_pages += missing
        for _ in range(missing):
            page = torch.empty(self.page_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._free.append(page)
        return [self._free.pop() for _ in range(needed)]

    def give_back(self, pages: list[Tensor]) -> None:
        """The pages are free, though copies from them or to them may still be under way."""
        self._free.extend(pages)


class _Call:
    """One checkpointed call: the tensors it saved leave together and come back together."""

    def __init__(self, pages: HostPages, previous: weakref.ref[_Call] | None) -> None:
        self._pages = pages
        self._previous = previous
        self._tensors: list[_Away] = []

    def pack(self, tensor: Tensor) -> int:
        self._tensors.append(_Away(tensor.detach(), self._pages))
        return len(self._tensors) - 1

    def unpack(self, number: int) -> Tensor:
        self.fetch()
        tensor = self._tensors[number].take()
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()
        return tensor

    def fetch(self) -> None:
        for tensor in self._tensors:
            tensor.fetch()

    def forget_sources(self) -> None:
        for tensor in self._tensors:
            tensor.forget_source()


class _Away:
    """A tensor in host memory.

    Args:
        tensor: it; memory of the compute stream, which must not write to it any more.
        pages: where to take host memory from.
    """

    def __init__(self, tensor: Tensor, pages: HostPages) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        data = _bytes_of(tensor.contiguous())
        self._pages = pages.take(data.numel(), pinned=tensor.is_cuda)
        weakref.finalize(self, pages.give_back, self._pages).atexit = False
        leaving = _Transfer(self._device, functools.partial(_copy, self._pages, data, out=True))
        self._leaving: tuple[Tensor, _Transfer] | None = (data, leaving)
        self._coming: tuple[Tensor, weakref.finalize] | None = None
        self._was_taken = False

    def forget_source(self) -> None:
        """Let go of the tensor's device memory, once it is copied."""
        if self._leaving is not None:
            self._leaving[1].wait()
            self._leaving = None

    def fetch(self) -> None:
        """Start its way back, if it has not yet been fetched."""
        if self._coming is None and not self._was_taken:
            tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            data = _bytes_of(tensor)
            copy = functools.partial(_copy, self._pages, data, out=False)
            # Also where a graph is dropped half-way, its memory is free only when the copy is made.
            arrival = weakref.finalize(tensor, _Transfer(self._device, copy).wait)
            arrival.atexit = False
            self._coming = tensor, arrival

    def take(self) -> Tensor:
        """It, on its device; the current stream may read it."""
        if self._coming is None:  # a graph that is kept is gone through once more
            self._was_taken = False
            self.fetch()
        assert self._coming is not None
        tensor, arrival = self._coming
        arrival()
        self._coming, self._was_taken = None, True
        return tensor


class _Transfer:
    """A copy between host and device, on the device's stream for copies.

    Args:
        device: the device.
        copy: makes the copy; runs behind all that the current stream has been given so far.
    """

    def __init__(self, device: torch.device, copy: Callable[[], None]) -> None:
        self._done: torch.cuda.Event | None = None
        if device.type != "cuda":
            copy()
            return
        self._stream = torch.cuda.current_stream(device)
        copies = _copy_stream(device)
        copies.wait_stream(self._stream)
        with torch.cuda.stream(copies):
            copy()
            self._done = copies.record_event()

    def wait(self) -> None:
        """The stream that was current when the copy was asked for waits; the host does not."""
        if self._done is not None:
            self._stream.wait_event(self._done)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, and no other work on it: a copy of seconds must not hold up a message."""
    return torch.cuda.Stream(device)


def _copy(pages: list[Tensor], data: Tensor, *, out: bool) -> None:
    """Between pages and the bytes of a tensor on the device; `out`: from the device."""
    size = pages[0].numel() if pages else 0
    for i, page in enumerate(pages):
        part = data[i * size : (i + 1) * size]
        host = page[: part.numel()]
        target, source = (host, part) if out else (part, host)
        target.copy_(source, non_blocking=True)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)


__all__ = ["ActivationOffload", "HostPages", "OffloadingCheckpoint", "require_checkpointing"]
