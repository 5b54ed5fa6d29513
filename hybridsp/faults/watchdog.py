"""A rank that dies, hangs or raises ends the job, with one message that says where it stood.

Beside each rank's training runs a thread that once a second posts where the rank stands, reads
whether another one has failed, and looks after the processes on its host. What it finds:

    a rank raised      it tells the others before it leaves; told in 1 tick
    a process is gone  seen on its host in 2 ticks
    the store is gone  rank 0's process ended, or the launcher; seen in 3 ticks on any host
    nothing moves      the rank's own step and layer stay the same for `hang_timeout` seconds

Whoever finds it first speaks and the others leave in silence, all with exit code 70. A fault of the
user's, which every rank may be about to raise, is left to the script, which ends with its own code.
Time is counted in ticks: a job that the batch system suspends does not hang. Two jobs in one
directory would be each other's fault, so it is claimed (`claim`) before all else.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from hybridsp.faults.board import GONE, Board, Notice, dead
from hybridsp.faults.claim import Claim
from hybridsp.faults.position import Position, standing
from hybridsp.faults.resources import memory_warning
from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh
from hybridsp.untrusted import redact

EXIT_FAULT = 70
TICK_SECONDS = 1.0
# Others wait at most so long before they leave: for the speaker, or to raise the same error.
GRACE_SECONDS = 6.0
STORE_FAILURES = 3
# A rank that posts nothing for so long is not merely slow.
SILENT_TICKS = 4
LAST_TICKS = 3
# New neighbours are read from the store a few at a time, so that no rank asks for all at once.
READ_AT_ONCE = 64
MEMORY_EVERY = 10
# Errors that a rank gets because another one is gone.
LOST_PEER = ("connection closed", "connection reset", "broken pipe", "connection refused", "nccl")

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches over a job while its block runs. Entering and leaving it is collective.

    Entering it raises ValueError on every rank if another job is at work in the directory.

    Args:
        mesh: the job's ranks.
        directory: of the run, and of no other job meanwhile; tracebacks go to `faults/` in it.
        hang_timeout: seconds without any progress after which a watched phase counts as hung.
        user_errors: exceptions that pass to the caller instead of ending the process here.
        tick: seconds between two looks.

    Attributes:
        position: where this rank stands; whoever trains keeps it up to date.
    """

    def __init__(
        self,
        mesh: SPMesh,
        directory: str | Path,
        *,
        hang_timeout: float,
        user_errors: tuple[type[Exception], ...] = (ValueError,),
        tick: float = TICK_SECONDS,
    ) -> None:
        self.position = Position()
        self._mesh, self._user_errors = mesh, user_errors
        self._hang_timeout, self._tick = hang_timeout, tick
        self._directory = Path(directory) / "faults"
        self._claim = Claim(directory)
        self._board = Board(mesh.rank, self._directory)
        self._neighbours: dict[int, Notice] = {}
        self._unread = [rank for rank in range(mesh.world_size) if rank != mesh.rank]
        self._fault_heard: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._is_memory_scarce = False
        self._is_first_of_host = rank_from_environment().local_rank == 0

    def __enter__(self) -> Watchdog:
        self._mesh.on_rank_zero(self._claim.take)
        self._post()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self._tell(error)
        self._over.set()
        self._thread.join()
        if error is None:
            # Who leaves takes its process with it, and rank 0 maybe the store: not before all
            # have stopped to look.
            self._mesh.agree(None)
        self._claim.release()

    # What the training thread does

    def _tell(self, error: Exception) -> None:
        """Tell the others of an error; returns only if it is for the caller to report."""
        users = isinstance(error, self._user_errors)
        if _names_a_lost_peer(error):
            # The watching thread finds out who it was, and ends this process.
            time.sleep(GRACE_SECONDS)
        message = redact(f"{type(error).__name__}: {_first_line(error)}")
        first = self._board.blame(message, GRACE_SECONDS)
        if users:
            if self._mesh.rank == 0 and self.position.step:
                # The store may end with this process; who finds both gone asks the file. Before the
                # first step all ranks raise alike, and a run that is refused leaves nothing.
                self._board.blame(message, GRACE_SECONDS, by_file=True)
            return
        if first:
            where = self._write_traceback(error)
            self._say(
                f"rank {self._mesh.rank} ended the job: {message}\n  at {self.position}; {where}"
            )
            self._board.close()
        self._leave_after_others()

    def _write_traceback(self, error: Exception) -> str:
        """Write it into a file and say into which; say all of it if that fails."""
        text = redact("".join(traceback.format_exception(error)))
        file = self._directory / f"rank-{self._mesh.rank:05d}.txt"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as full:
            return f"the traceback cannot be written ({full}):\n{text}"
        return f"the traceback is in {file}"

    # What the watching thread does

    def _watch(self) -> None:
        ticks, failures, stalled, passed = 0, 0, 0.0, -1
        while not self._over.wait(self._tick):
            ticks += 1
            if self._is_first_of_host and ticks % MEMORY_EVERY == 1:
                self._warn_of_memory()
            try:
                self.look()
                failures = 0
            except GONE:
                failures += 1
                if self._fault_heard is not None:
                    _leave()
                if failures == STORE_FAILURES and not self._over.is_set():
                    self._end("the job's store is gone: rank 0's process or the launcher has ended")
            watched, before, passed = self.position.watched, passed, self.position.passed
            stalled = stalled + self._tick if watched and passed == before else 0.0
            if stalled >= self._hang_timeout:
                self._end_hung()

    def look(self) -> None:
        """What the watching thread does once per tick: see, tell and hear."""
        self._look_after_neighbours()
        self._post()
        self._listen()

    def _listen(self) -> None:
        """Leave some time after another rank has said why the job ends."""
        fault = self._board.fault()
        if fault is None or fault.rank == self._mesh.rank:
            return
        now = time.monotonic()
        self._fault_heard = self._fault_heard or now
        if self._board.closed() or now - self._fault_heard > fault.grace:
            self._leave_after_others()

    def _post(self) -> None:
        self._board.post(
            position=str(self.position), standing=standing(), passed=self.position.passed
        )

    def _look_after_neighbours(self) -> None:
        gone = [n for n in self._neighbours.values() if dead(n, self._board.host)]
        if gone and not self._over.is_set():
            seen = [self._last_seen(notice) for notice in gone]
            listed = "\n".join(f"  {place}" for place in seen)
            ranks = _ranks([notice.rank for notice in gone])
            message = f"{ranks} died (killed, or out of memory); last seen:\n{listed}"
            self._end(message, by_file=0 in {notice.rank for notice in gone})
        for notice in self._board.notices(self._unread[:READ_AT_ONCE]):
            self._unread.remove(notice.rank)
            if notice.host == self._board.host:
                self._neighbours[notice.rank] = notice

    def _last_seen(self, notice: Notice) -> str:
        if notice.rank == 0:  # in whose process the store may have been
            return f"rank 0: about where this one is, {self.position}; {standing()}"
        notice = self._board.notices([notice.rank])[0]
        return f"rank {notice.rank}: {notice.position}; {notice.standing}"

    def _end(self, message: str, *, by_file: bool = False) -> None:
        if self._board.blame(message, GRACE_SECONDS, by_file=by_file):
            self._say(message)
            if not by_file:
                self._board.close()
        self._leave_after_others()

    def _end_hung(self) -> None:
        """Ask all where they stand, say it, and leave."""
        if not self._board.blame("the job hangs", GRACE_SECONDS):
            return  # the next look finds who speaks
        ranks = range(self._mesh.world_size)
        before = {notice.rank: notice for notice in self._board.notices(ranks)}
        time.sleep(SILENT_TICKS * self._tick)
        self._post()
        after = {notice.rank: notice for notice in self._board.notices(ranks)}
        self._say(hang_report(before, after, self._mesh.world_size, self._hang_timeout))
        self._board.close()
        self._leave_after_others()

    def _leave_after_others(self) -> None:
        """Leave; rank 0, which may take the store along, when the others have had time to."""
        if self._mesh.rank == 0:
            time.sleep(LAST_TICKS * self._tick)
        _leave()

    def _say(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)

    def _warn_of_memory(self) -> None:
        """Say it once each time that memory becomes scarce."""
        warning = memory_warning()
        if warning and not self._is_memory_scarce:
            logger.warning("rank %d: %s", self._mesh.rank, warning)
        self._is_memory_scarce = warning is not None


def hang_report(
    before: dict[int, Notice], after: dict[int, Notice], world_size: int, seconds: float
) -> str:
    """Who stands where, those first who keep the others waiting.

    Args:
        before: notices of the ranks, some ticks old.
        after: notices now; a rank whose is the same does not even post any more.
        world_size: ranks of the job.
        seconds: without progress.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for rank in range(world_size):
        if rank not in after:
            groups["has never been seen"].append(rank)
            continue
        notice = after[rank]
        silent = "silent, last " if notice == before.get(rank) else ""
        groups[f"{silent}{notice.position}; {notice.standing}"].append(rank)

    def innocence(item: tuple[str, list[int]]) -> tuple[bool, bool, int, int]:
        place, ranks = item
        passed = min(after[rank].passed if rank in after else -1 for rank in ranks)
        return not place.startswith("silent"), "collective " in place, passed, len(ranks)

    ordered = sorted(groups.items(), key=innocence)
    lines = [f"  {_ranks(ranks)}: {place}" for place, ranks in ordered]
    first = _ranks(ordered[0][1])
    who = f"{first} keeps the others waiting" if len(ordered) > 1 else "all stand at one place"
    return "\n".join([f"no progress for {seconds:g} s (hang_timeout): {who}", *lines])


def _names_a_lost_peer(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in LOST_PEER)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _leave() -> None:
    """End the process at once: what is left of it may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAULT)


__all__ = ["EXIT_FAULT", "Watchdog", "hang_report"]
