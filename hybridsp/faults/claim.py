"""One job at a time writes into a run's directory.

A second one, started by mistake or by a batch system that takes the first for dead, would remove
the checkpoint that the first one is writing and mix its steps into the record. So rank 0 holds a
lock on a file there, in which it says who it is, as long as its job runs.

The lock is the kernel's and goes with the process, however that ends: a file that is still there
means nothing by itself, and nothing is to be cleaned up before a job is started again. It is the
process's (`lockf`) and not the open file's (`flock`), which processes that a killed rank leaves
behind would go on holding; but it is given up as well when this process opens and closes the file
in another way, as a copy of the directory does, so nothing here may. On a network file system the
server keeps it, and hears of a host that went down when its lease runs out; so a holder on another
host is waited for. A file system without locks lets every job in, with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from hybridsp.collectives.topology import host_identity
from hybridsp.untrusted import shown

LOCK = "job.lock"
# NFS 4 takes a host for dead after 90 s.
LEASE_SECONDS = 120.0
POLL_SECONDS = 1.0
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
MAX_BYTES = 1000

logger = logging.getLogger(__name__)


class Claim:
    """A process's right to write into a directory, which no other process on any host has then.

    Args:
        directory: of a run; made where it is not there.
    """

    def __init__(self, directory: str | Path) -> None:
        self._path = Path(directory) / LOCK
        self._file: IO[str] | None = None
        self._made: list[Path] = []
        self._time_before = self._time_after = 0

    def take(self) -> None:
        """Take the directory, or find out who has it.

        A holder on another host is waited for until it would be known to be dead.

        Raises:
            ValueError: another job has it.
            OSError: the directory cannot be written.
        """
        assert self._file is None, "it is taken once"
        around = (self._path.parent, *self._path.parent.parents)
        self._made = [folder for folder in around if not folder.exists()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._time_before = self._path.parent.stat().st_mtime_ns
        began = time.monotonic()
        told = False
        while (holder := self._try_to_take()) is not None:
            is_here = holder.get("machine") == host_identity()
            if is_here or time.monotonic() - began > LEASE_SECONDS:
                raise ValueError(_refusal(self._path, holder))
            if not told:
                logger.warning(
                    "%s is held by %s: waiting for %g s, in case that host is down",
                    self._path,
                    _name(holder),
                    LEASE_SECONDS,
                )
            told = True
            time.sleep(POLL_SECONDS)
        self._time_after = self._path.parent.stat().st_mtime_ns

    def release(self) -> None:
        """Give the directory back: as it was, its time included, if nothing has come into it."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # the file means nothing without its lock
            self._leave_no_trace(self._file)
        self._file.close()
        self._file = None

    def _leave_no_trace(self, file: IO[str]) -> None:
        folder = self._path.parent
        before = folder.stat()
        if self._is_in_place(file):
            self._path.unlink()
        if before.st_mtime_ns == self._time_after:
            os.utime(folder, ns=(before.st_atime_ns, self._time_before))
        for made in self._made:
            made.rmdir()

    def _try_to_take(self) -> dict[str, object] | None:
        """What the holder says of itself; None if it is this process now."""
        while True:
            try:
                file = self._path.open("a+", encoding="utf-8", errors="replace")
            except FileNotFoundError:  # a job that was refused removed the folder that it had made
                self._path.parent.mkdir(parents=True, exist_ok=True)
                continue
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (*HELD, *NO_LOCKS):
                    file.close()
                    raise
                if error.errno in HELD:
                    with file:
                        return _read(file)
                logger.warning(
                    "%s cannot be locked (%s): see to it that no second job writes there",
                    self._path,
                    error.strerror,
                )
            if self._is_in_place(file):
                break
            file.close()  # of a job that ended meanwhile
        self._file = file
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        file.truncate(0)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        json.dump({**me, "machine": host_identity()}, file)
        file.flush()
        os.fsync(file.fileno())  # for other hosts to read
        return None

    def _is_in_place(self, file: IO[str]) -> bool:
        """Whether an open file is still the one that others would find."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def _read(file: IO[str]) -> dict[str, object]:
    """What a holder has written of itself: nothing yet, maybe."""
    file.seek(0)
    try:
        holder = json.loads(file.read(MAX_BYTES))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, object]) -> str:
    if not {"host", "pid", "since"} <= holder.keys():
        return "a job that does not say who it is"
    host, pid, since = (shown(holder[key]).strip("'") for key in ("host", "pid", "since"))
    return f"the job of process {pid} on host {host}, which began at {since}"


def _refusal(lock: Path, holder: dict[str, object]) -> str:
    return (
        f"output_dir = {str(lock.parent)!r} is in use by {_name(holder)}: end that job first, or "
        f"choose another output_dir (if it has ended, delete {lock})"
    )


__all__ = ["Claim"]
