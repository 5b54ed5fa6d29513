"""Softmax attention that runs forward once, although activation checkpointing runs its layer twice.

Checkpointing forgets what a layer computed and computes it again for the backward. Attention is
what that costs most for, its work grows with the length squared, and what its backward wants of
it is least: one output as large as q and one number per query and head. So the layer's first run
keeps those two, and its second takes them; projections and all-to-alls are done again, the ring
and the kernels are not (the checkpointing of DISTFLASHATTN, arXiv:2310.03294).

What is kept belongs to one checkpointed call. It lies in the function handed to the checkpoint,
which nothing but the call's own part of autograd's graph holds, until the second run takes it. So
micro-batches in flight cannot mix, and a forward that fails, or has no backward, leaves nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

OutAndLse = tuple[Tensor, Tensor]
Attend = Callable[[], OutAndLse]
PutAway = Callable[[Tensor], Callable[[], Tensor]]

# What is done with the attention of the checkpointed call that runs now; None outside of one.
_treatment: ContextVar[Callable[[Attend], OutAndLse] | None] = ContextVar("treatment", default=None)


def attend_once(attend: Attend) -> OutAndLse:
    """What `attend()` returns, or returned in the first run of the checkpointed call around it.

    To be called with gradients disabled, as in the forward of an autograd Function.
    """
    treatment = _treatment.get()
    return attend() if treatment is None else treatment(attend)


class KeepingAttention:
    """A checkpointing function under which attention runs forward once.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint`, reentrant or not, or whatever else takes a
            function and its arguments, calls it, and calls it again in the backward.
        put_away: called in the first run with each tensor that is kept; what it returns is called
            in the second, and returns the tensor. None to hold the tensors as they are.
    """

    def __init__(self, checkpoint: Callable[..., Any], put_away: PutAway | None = None) -> None:
        self.checkpoint = checkpoint
        self.put_away = put_away or _hold

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function(*args)`; `kwargs` as the checkpointing function defines them."""
        if torch.is_grad_enabled():
            function = _Call(function, self.put_away)
        return self.checkpoint(function, *args, **kwargs)


def _hold(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


class _Call:
    """The function of one checkpointed call, and out and lse of each attention in it, by number."""

    def __init__(self, function: Callable[..., Any], put_away: PutAway) -> None:
        self._function = function
        self._put_away = put_away
        self._kept: dict[int, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {}
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        treat = self._take if self._has_run else self._keep
        self._has_run = True
        numbers = itertools.count()
        token = _treatment.set(lambda attend: treat(next(numbers), attend))
        try:
            return self._function(*args, **kwargs)
        finally:
            _treatment.reset(token)

    def _keep(self, number: int, attend: Attend) -> OutAndLse:
        out, lse = attend()
        # Detached: `out` is about to become part of the graph, which holds this object.
        self._kept[number] = self._put_away(out.detach()), self._put_away(lse)
        return out, lse

    def _take(self, number: int, attend: Attend) -> OutAndLse:
        # Taken for good, so that memory is free when the layer's backward is done. Who goes
        # backward through a retained graph once more computes attention once more.
        kept = self._kept.pop(number, None)
        return attend() if kept is None else (kept[0](), kept[1]())
