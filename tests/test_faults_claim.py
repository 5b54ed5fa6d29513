"""One job at a time writes into a directory; one that has ended, however, is in nobody's way."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from unittest import mock

import pytest
from distributed import run_ranks
from rank_job import Job

import hybridsp
from hybridsp.faults import Watchdog, claim
from hybridsp.faults.claim import LOCK, Claim


def hold(directory, host=None):
    """Take a directory, from another host if need be, and have a child that outlives this."""
    mine = Claim(directory)
    with mock.patch.object(socket, "gethostname", return_value=host or "here"):
        mine.take()
    if os.fork() == 0:
        time.sleep(10)
        os._exit(0)
    (directory / "taken").touch()
    time.sleep(60)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Start a process that holds a directory: (the directory, that job)."""
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    jobs = []

    def start(host=None):
        (tmp_path / "run").mkdir()
        job = Job(tmp_path, hold, tmp_path / "run", host, world=1)
        jobs.append(job)
        while not (tmp_path / "run" / "taken").exists():
            assert job.running(), job.logs[0].read_text()
            time.sleep(0.01)
        return tmp_path / "run", job

    yield start
    for job in jobs:
        kill(job)


def kill(job):
    job.terminate(signal.SIGKILL)
    job.wait()


def test_a_second_job_is_refused_until_the_first_is_dead(held):
    run, job = held()
    second = Claim(run)
    with pytest.raises(ValueError, match=r"output_dir = '.*run' is in use by the job") as caught:
        second.take()
    assert f"of process {job.ranks[0].pid} on host here, which began at 20" in str(caught.value)
    assert f"(if it has ended, delete {run / LOCK})" in str(caught.value)
    kill(job)
    assert (run / LOCK).exists(), "nobody removed it"
    second.take()
    assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    second.release()
    assert [path.name for path in run.iterdir()] == ["taken"]


def test_the_lock_of_a_host_that_cannot_be_asked_can_be_removed(held):
    run, job = held()
    (run / LOCK).unlink()
    second = Claim(run)
    second.take()
    (run / LOCK).unlink()
    third = Claim(run)
    third._file = (run / LOCK).open("w")  # of yet another job
    second.release()
    assert (run / LOCK).exists(), "it is not the second one's to remove"
    third.release()
    assert job.running()


def test_a_holder_on_another_host_is_waited_for(held, monkeypatch, caplog):
    run, job = held("far")
    monkeypatch.setattr(claim, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(claim, "LEASE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ValueError, match="on host far"):
        Claim(run).take()
    assert time.monotonic() - began > 0.2
    assert len(caplog.records) == 1
    assert "waiting for 0.2 s, in case that host is down" in caplog.text
    monkeypatch.setattr(claim, "LEASE_SECONDS", 60)
    killer = threading.Timer(0.3, kill, [job])
    killer.start()
    second = Claim(run)
    second.take()
    killer.join()
    second.release()


@pytest.mark.parametrize("said", [b"", b"\xff{", b"[1]", b'{"host": "here"}'])
def test_a_holder_that_does_not_say_who_it_is(held, monkeypatch, said):
    run, _ = held()
    (run / LOCK).write_bytes(said)
    monkeypatch.setattr(claim, "LEASE_SECONDS", 0)
    monkeypatch.setattr(claim, "POLL_SECONDS", 0.01)
    with pytest.raises(ValueError, match="in use by a job that does not say who it is: end that"):
        Claim(run).take()


def test_without_locks_there_is_a_warning(tmp_path, caplog):
    error = OSError(errno.ENOSYS, "Function not implemented")
    with mock.patch.object(fcntl, "lockf", side_effect=error):
        Claim(tmp_path).take()
    assert "cannot be locked (Function not implemented): see to it that no second" in caplog.text
    error = OSError(errno.EIO, "Input/output error")
    with mock.patch.object(fcntl, "lockf", side_effect=error), pytest.raises(OSError, match="Inpu"):
        Claim(tmp_path).take()


def test_what_was_made_goes_unless_it_is_used(tmp_path):
    for used in (False, True):
        mine = Claim(tmp_path / "a" / "b")
        mine.take()
        if used:
            (tmp_path / "a" / "file").touch()
        mine.release()
        mine.release()
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "file"] if used else [])
    os.utime(tmp_path / "a", (1, 1))
    for used in (False, True):
        mine = Claim(tmp_path / "a")
        mine.take()
        time.sleep(0.02)  # file systems count time in ticks
        if used:
            (tmp_path / "a" / "file").rename(tmp_path / "a" / "other")
        mine.release()
        assert (tmp_path / "a").is_dir(), "it was there before"
        assert ((tmp_path / "a").stat().st_mtime == 1) != used


def watch_in_turn(directory):
    """Jobs of the same processes in a row, one of which fails."""
    mesh = hybridsp.SPMesh()
    there = []
    for error in (None, ValueError("a mistake"), None):
        try:
            with Watchdog(mesh, directory, hang_timeout=60, tick=0.1):
                there.append((directory / LOCK).exists())
                mesh.agree(None)
                if error is not None:
                    raise error
        except ValueError as raised:
            assert raised is error  # noqa: PT017 - on every rank
        mesh.agree(None)
        there.append((directory / LOCK).exists())
        mesh.agree(None)
    return there


def test_a_job_gives_its_directory_back(tmp_path):
    assert run_ranks(watch_in_turn, 2, tmp_path) == [[True, False] * 3] * 2
