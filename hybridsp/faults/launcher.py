"""Whether the command that started this job still runs.

The `deepspeed` command starts a launcher of its own on each host, which starts the ranks. A SIGTERM
that reaches the command alone ends it, and neither the launcher nor the ranks hear of it: they
would train on, unseen, while whoever sent it takes the job for over (DeepSpeed 0.19.8). What they
can see is that the launcher has another parent then. Other launchers pass signals on, and their
parent is a shell, which may well end while the job goes on; so only DeepSpeed's is looked at. Who
starts `deepspeed.launcher.launch` by hand from a shell keeps that shell, or takes `torchrun`.
"""

from __future__ import annotations

import os
from pathlib import Path

LAUNCHER = b"deepspeed.launcher.launch"
PROCESSES = Path("/proc")


class Launcher:
    """What started this process, as far as it can be lost without a sign."""

    def __init__(self) -> None:
        self._launcher = os.getppid()
        self._command = _parent_of(self._launcher) if _is_deepspeeds(self._launcher) else None

    def is_lost(self) -> bool:
        """Whether DeepSpeed's launcher is left without the command that started it."""
        return self._command is not None and _parent_of(self._launcher) != self._command


def status_of(process: int) -> list[str]:
    """What the kernel says of a process: its state, its parent ...; OSError where it says nothing.

    Args:
        process: its number.
    """
    status = (PROCESSES / str(process) / "stat").read_text(encoding="utf-8")
    # pid (name) state parent ...; a name may hold spaces and brackets.
    return status.rpartition(")")[2].split()


def _is_deepspeeds(process: int) -> bool:
    try:
        return LAUNCHER in (PROCESSES / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:  # no Linux, or it has ended
        return False


def _parent_of(process: int) -> int | None:
    """The parent of a process; None if there is no such process, or none that can be seen."""
    try:
        return int(status_of(process)[1])
    except OSError:
        return None


# A command that is gone when training begins was still there when the process started.
AT_START = Launcher()

__all__ = ["AT_START", "Launcher", "status_of"]
