"""Where a rank stands: step, phase, layer, and the line of code.

The first three are noted as training passes them, a few assignments per layer. The line is not
noted at all: the thread that wants to know reads the stacks of the others, and only when a report
is due. In the backward pass those of a GPU belong to autograd's threads, not to the main one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

PACKAGE = Path(__file__).parents[1]
OURS = (f"{PACKAGE}/", f"{PACKAGE.parent}/train/", f"{PACKAGE.parent}/models/")
NOT_A_PLACE = f"{Path(__file__).parent}/"
AUTOGRAD = "torch/autograd/"
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "/hybridsp/collectives/")


@dataclass
class Position:
    """What a rank's training has reached.

    Attributes:
        step: optimizer step in progress, from 1; 0 before the first.
        phase: what is being done.
        layer: decoder layer in progress, if any.
        passed: times that anything of this changed: as long as it grows, the rank gets on.
        watched: whether to stand still here for long is a fault, as it is not while files are
            written.
    """

    step: int = 0
    phase: str = "start"
    layer: int | None = None
    passed: int = 0
    watched: bool = False

    def enter(self, phase: str, *, step: int | None = None, layer: int | None = None) -> None:
        """Note a new phase; the step stays where none is given."""
        self.phase, self.layer = phase, layer
        self.step = self.step if step is None else step
        self.passed += 1

    @contextmanager
    def during(self, phase: str, *, watched: bool) -> Iterator[None]:
        """Note a phase and, unless it fails, after it the one before."""
        before = self.phase, self.watched
        self.enter(phase)
        self.watched = watched
        yield
        self.enter(before[0])
        self.watched = before[1]

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"step {self.step}, {self.phase}{layer}"


@contextmanager
def follow(layers: Sequence[nn.Module], position: Position) -> Iterator[None]:
    """Note every layer that a forward or backward pass enters while the block runs.

    Recomputed layers are noted as forward passes, which they are.
    """

    def entered(index: int) -> Any:
        return lambda *_: position.enter("forward", layer=index)

    def left(index: int) -> Any:
        def forward_ended(_module: Any, _inputs: Any, outputs: Any) -> None:
            hidden = outputs[0] if isinstance(outputs, tuple) else outputs
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _grad: position.enter("backward", layer=index))

        return forward_ended

    handles = [layer.register_forward_pre_hook(entered(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(left(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def standing() -> str:
    """The collective and the line of this project in which this process's training stands now."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    stacks = [list(_outwards(frames.pop(main)))] if main in frames else []
    if stacks and AUTOGRAD in stacks[0][0].f_code.co_filename:
        frames.pop(threading.get_ident(), None)
        others = (list(_outwards(frame)) for frame in frames.values())
        stacks = [stack for stack in others if any(map(_is_ours, stack))] + stacks
    return describe(stacks[0]) if stacks else "nowhere"


def describe(stack: list[FrameType]) -> str:
    """A stack, innermost frame first, in a few words."""
    called = [
        f.f_code.co_name for f in stack if any(c in f.f_code.co_filename for c in COLLECTIVES)
    ]
    ours = next((frame for frame in stack if _is_ours(frame)), stack[0])
    path = ours.f_code.co_filename
    short = path.removeprefix(f"{PACKAGE.parent}/")
    place = f"{short}:{ours.f_lineno} in {ours.f_code.co_name}"
    public = [name for name in called if name not in ("wrapper", "__call__", "forward", "backward")]
    return f"collective {public[-1]}, {place}" if public else place


def _is_ours(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path.startswith(OURS) and not path.startswith(NOT_A_PLACE)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


__all__ = ["Position", "describe", "follow", "standing"]
