"""What disturbs a run (kill_runs.py), and when: at a moment drawn at random, once.

Each moment is called again and again while the job runs, and acts when it is due.
"""

import contextlib
import signal
import subprocess
import tempfile
import time
from pathlib import Path

STEPS, SAVE_EVERY = 8, 2
# Of so small a model the files are written before the next step begins. A disk that takes so long
# for each file, of which a rank writes three, is still at it when the next save is due.
SLOW_FILE_SECONDS = 0.2
SLOW_SAVE_SECONDS = 3 * SLOW_FILE_SECONDS
# Room for all that a run keeps.
DISK_BYTES, FILLER = 64 * 2**20, "filler"


class AtStep:
    """Disturbs a job at a random moment behind a step, once."""

    def __init__(self, run, rng, act):
        self.run, self.act = run, act
        self.step, self.delay = rng.randrange(STEPS), rng.uniform(0, 0.4)
        self.due = self.done = None

    def __call__(self, job):
        now = time.monotonic()
        if self.due is None and steps_of(self.run) >= self.step:
            self.due = now + self.delay
        if self.done is None and self.due is not None and now >= self.due:
            self.done = now - job.began
            self.act(job)


class DuringSave(AtStep):
    """Disturbs a job while a checkpoint is being written; `in_save` says whether it was."""

    longest = 0.1

    def __init__(self, run, rng, act):
        super().__init__(run, rng, act)
        self.save, self.delay = rng.randrange(STEPS // SAVE_EVERY), rng.uniform(0, self.longest)
        self.seen, self.in_save = [], None

    def __call__(self, job):
        for path in (self.run / "checkpoints").glob("*.partial"):
            self.seen += [] if path in self.seen else [path]  # older ones go under this name, too
        if self.due is None and len(self.seen) > self.save:
            self.due = time.monotonic() + self.delay
        if self.due is None:
            return
        partial = self.seen[self.save]
        before = partial.exists()
        super().__call__(job)
        if self.in_save is None and self.done is not None:
            self.in_save = before and partial.exists()


class DuringBackgroundSave(DuringSave):
    """Disturbs a job at any moment of a save that training goes on beside."""

    longest = SLOW_SAVE_SECONDS


def steps_of(run):
    record = run / "metrics.jsonl"
    return record.read_text().count("\n") if record.exists() else 0


def complete_step(run):
    """The step of the newest complete checkpoint; 0 without one."""
    pointer = run / "checkpoints" / "latest"
    return int(pointer.read_text().removeprefix("step-")[:6]) if pointer.exists() else 0


def kill_a_rank(rng):
    return lambda job: job.send(rng.choice(job.ranks), signal.SIGKILL)


def terminate(rng):
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
    return lambda job: job.terminate(number)


def signal_one_rank(rng):
    return lambda job: job.send(rng.choice(job.ranks), signal.SIGUSR1)


@contextlib.contextmanager
def small_disk(place):
    """A file system of its own, which can be filled; OSError where it may not be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def can_mount():
    with (
        tempfile.TemporaryDirectory() as place,
        contextlib.suppress(OSError),
        small_disk(Path(place) / "disk"),
    ):
        return True
    return False


def fill_disk(run):
    """What another program may do at any moment."""

    def fill(job):
        with contextlib.suppress(OSError), (run / FILLER).open("ab", buffering=0) as filler:
            while filler.write(bytes(2**16)):
                pass

    return fill


def spoil_a_file(run, rng, flip):
    """Truncate or change one file of the newest checkpoint; returns the checkpoint's name."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if flip:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: rng.randrange(len(data))])
    return folder.name
