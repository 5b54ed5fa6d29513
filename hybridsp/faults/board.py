"""A notice board of a job: where each rank stands, and who speaks for all.

It hangs in the store through which the ranks found each other, over a connection of its own, so
that it works while every collective hangs. The store may live in rank 0's process and die with it;
then who speaks is settled by a file beside the run. A rank on the same host is asked for more than
its notice: its process can be seen to be dead at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hybridsp.faults.launcher import status_of

STORE_TIMEOUT = timedelta(seconds=10)
# A store that is gone says so in one of these.
GONE = (RuntimeError, OSError)


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a rank writes of itself.

    `passed` grows as long as it gets on, `beat` with each notice.
    """

    rank: int
    beat: int
    host: str
    pid: int
    position: str
    standing: str
    passed: int


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What ended the job, as the rank that noticed it first writes it.

    `grace` is how many seconds the others are to wait before they leave.
    """

    rank: int
    message: str
    grace: float


class Board:
    """The notices of all ranks of a job.

    Args:
        rank: of this process.
        directory: for the file that settles who speaks where the store is gone.
    """

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank, self.directory = rank, directory
        group = dist.group.WORLD
        assert group is not None, "the mesh has joined it"
        store = dist.PrefixStore("hybridsp/faults", group.get_group_store())
        # A job may have one board after another: what is the n-th to one rank is so to all.
        key = f"run/{store.add(f'boards/{rank}', 1)}"
        if rank == 0:
            store.set(key, f"{os.getpid()}-{time.time_ns()}")
        self.run = store.get(key).decode()
        # torch's stub of Store leaves clone out.
        self.store = dist.PrefixStore(self.run, store.clone())  # type: ignore[attr-defined]
        self.store.set_timeout(STORE_TIMEOUT)
        self.host, self._beat = _this_host(), 0

    def post(self, *, position: str, standing: str, passed: int) -> None:
        """Write this rank's notice in place of its last one."""
        self._beat += 1
        notice = Notice(
            rank=self.rank,
            beat=self._beat,
            host=self.host,
            pid=os.getpid(),
            position=position,
            standing=standing,
            passed=passed,
        )
        self.store.set(f"rank/{self.rank}", json.dumps(asdict(notice)))

    def notices(self, ranks: Iterable[int]) -> list[Notice]:
        """Those of some ranks now; ranks that have written nothing are left out."""
        keys = [f"rank/{rank}" for rank in ranks]
        there = [key for key in keys if self.store.check([key])]
        return [Notice(**json.loads(self.store.get(key))) for key in there]

    def blame(self, message: str, grace: float, *, by_file: bool = False) -> bool:
        """Write down what ended the job, if no other rank has: True if this one is to speak.

        Args:
            message: what ended it.
            grace: seconds that the others are to wait for whoever speaks.
            by_file: do not try the store, which ended with rank 0; torch would print a stack.
        """
        fault = Fault(rank=self.rank, message=message, grace=grace)
        if by_file:
            return self._first_beside_the_run()
        try:
            first = self.store.add("speakers", 1) == 1
            if first:
                self.store.set("fault", json.dumps(asdict(fault)))
        except GONE:
            return self._first_beside_the_run()
        return first

    def fault(self) -> Fault | None:
        """What ended the job, if anything has."""
        if not self.store.check(["fault"]):
            return None
        return Fault(**json.loads(self.store.get("fault")))

    def close(self) -> None:
        """Note that all has been said: nobody has to wait any more."""
        with contextlib.suppress(*GONE):
            self.store.set("closed", "")

    def closed(self) -> bool:
        """Whether all has been said."""
        return self.store.check(["closed"])

    def _first_beside_the_run(self) -> bool:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / f"speaker-{self.run}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk, maybe the fault itself: rather several voices than none
            return True
        return True


def dead(notice: Notice, host: str) -> bool:
    """Whether a rank's process is known to be gone, which can be seen on its own host only."""
    if notice.host != host:
        return False
    try:
        state, *_ = status_of(notice.pid)
    except OSError:
        return not _answers(notice.pid)
    return state in "ZX"  # ended, and its parent has not asked how


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _this_host() -> str:
    """Processes with equal answers see each other's process numbers."""
    namespace = Path("/proc/self/ns/pid")
    inside = os.readlink(namespace) if namespace.exists() else ""
    return f"{socket.gethostname()} {inside}".strip()


__all__ = ["GONE", "Board", "Fault", "Notice", "dead"]
