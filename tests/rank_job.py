"""A job of ranks, as a launcher on one host runs it: forked here, each with a log of its own.

Of a launcher's duties it has those that matter when a rank fails: it passes on a signal, and ends a
job one of whose ranks has failed, killing what is left after a while.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from distributed import _context, _start_fork_server

# A whole run takes seconds; what is not over by then hangs.
LIMIT_SECONDS = 60
LAUNCHER_GRACE_SECONDS = 30
POLL_SECONDS = 0.01


@dataclass
class Ended:
    """How a job ended."""

    codes: list[int]
    seconds: float
    output: str
    hung: bool = False
    after_fault: float = 0.0  # seconds from the first failed rank to the last one's end


class Job:
    """A job of ranks, as a launcher on one host runs it."""

    def __init__(self, directory, target, *args, world=2):
        _start_fork_server()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.logs = [Path(directory) / f"rank{rank}.log" for rank in range(world)]
        self.began = time.monotonic()
        self.ranks = [
            _context.Process(
                target=_rank_main, args=(rank, world, port, self.logs[rank], target, args)
            )
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def terminate(self, number=signal.SIGTERM):
        """What a launcher does that is told to end."""
        for rank in self.ranks:
            self.send(rank, number)

    def send(self, rank, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, number)

    def running(self):
        return any(rank.exitcode is None for rank in self.ranks)

    def wait(self, disturb=lambda job: None, limit=LIMIT_SECONDS):
        """Look after the ranks until all have ended; `disturb` is called again and again."""
        failed_at, hung = None, False
        while self.running():
            disturb(self)
            now = time.monotonic()
            if failed_at is None and any(rank.exitcode not in (None, 0) for rank in self.ranks):
                failed_at = now
                self.terminate()
            late = failed_at is not None and now - failed_at > LAUNCHER_GRACE_SECONDS
            if late or now - self.began > limit:
                hung = True
                self.terminate(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        ended = time.monotonic()
        for rank in self.ranks:
            rank.join()
        return Ended(
            codes=[rank.exitcode for rank in self.ranks],
            seconds=ended - self.began,
            output="".join(log.read_text(errors="replace") for log in self.logs),
            hung=hung,
            after_fault=0.0 if failed_at is None else ended - failed_at,
        )


def _rank_main(rank, world, port, log, target, args):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        target(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
