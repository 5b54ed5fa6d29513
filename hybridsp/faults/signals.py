"""Stopping on request: a signal asks for it, and all ranks stop behind the same step.

A batch system that takes its nodes back sends SIGTERM or, some minutes ahead where it is asked to
(Slurm's `--signal=USR1@300`), SIGUSR1, to one rank or to all, and each gets it at another moment.
So the handler only notes it, and behind every step the ranks ask each other, one number each,
whether anyone has heard of it. Then the run saves and ends with exit code 75, by which a batch
system knows that starting it again goes on with it. A SIGTERM that reached the `deepspeed` command
and nobody else counts as one to all (`launcher.py`).

A second signal ends a rank at once. One that comes within 5 seconds of the first is the same
request again: launchers pass on to the ranks what their process group has already received.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from hybridsp.faults.launcher import AT_START
from hybridsp.mesh import SPMesh

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 5.0


class StopSignals:
    """Takes the signals while its block runs; to be entered on the main thread.

    They are given back only if there was no request and the block did not fail: the launcher ends
    the ranks that are left when one has ended, and these may have to tell why it did.
    """

    def __init__(self) -> None:
        self._requested: tuple[signal.Signals, float] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._requested is None and kind is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._requested[1] > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def agreed(self, mesh: SPMesh) -> str | None:
        """The signal by which any rank was asked to stop, if one was. Collective over all ranks."""
        if self._requested is None and AT_START.is_lost():
            self._requested = signal.SIGTERM, time.monotonic()
        number = 0 if self._requested is None else int(self._requested[0])
        heard = torch.tensor(number, device=mesh.device)
        dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=mesh.data_group)
        return signal.Signals(int(heard)).name if heard else None


__all__ = ["EXIT_STOPPED", "StopSignals"]
