"""Runs of train/finetune.py that are disturbed at random, and what becomes of them.

    python tests/kill_runs.py --trials 100 --out docs/kill_runs.json

Each trial trains a tiny model on forked ranks by the script's own `main`, disturbs it once at a
random moment, starts it again until it has finished, and compares its record and weights with those
of an undisturbed run, bit by bit. A `Job` (rank_job.py) stands in for a launcher.
A full disk takes leave to mount one; it is left out where there is none.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import datasets
from distributed import DEEPSPEED, PRELOAD
from finetune_hosts import SCRIPT, make_host, rows_of
from rank_job import Job

from hybridsp.train import finetune

PRELOAD += [*DEEPSPEED, finetune.__name__]

WORLD = 2
STEPS, SAVE_EVERY = 8, 2
# Room for all that a run keeps.
DISK_BYTES, FILLER = 64 * 2**20, "filler"
RECIPE = {
    "ulysses": WORLD,
    "max_steps": STEPS,
    "save_every": SAVE_EVERY,
    "keep_checkpoints": 3,
    "eval_data": None,
    "eval_every": None,
    "generate_prompt": None,
    "self_check": False,
    "hang_timeout": 10,
}


def fine_tune(directory, overrides=(), file_limit=None):
    """The script's `main` in a directory made by `make_host`."""
    os.chdir(directory)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    cache = Path(f"cache{os.environ['RANK']}").absolute()
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
        finetune.main(["recipe.yaml", *overrides])


@dataclass
class Trial:
    """One disturbed run, and what became of it."""

    kind: str
    seed: int
    disturbed_at: float = 0.0  # seconds after the start, or behind a step
    codes: list[int] = field(default_factory=list)
    restarts: int = 0
    seconds_to_end: float = 0.0  # from the disturbance to the end of the last rank
    steps_lost: int = 0
    message: str = ""  # what the disturbed run said of it
    failure: str = ""


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
    """Disturbs a job while a checkpoint is being written."""

    def __init__(self, run, rng, act):
        super().__init__(run, rng, act)
        self.save, self.delay = rng.randrange(STEPS // SAVE_EVERY), rng.uniform(0, 0.1)
        self.seen = set()

    def __call__(self, job):
        self.seen |= {path.name for path in (self.run / "checkpoints").glob("*.partial")}
        if self.due is None and len(self.seen) > self.save:
            self.due = time.monotonic() + self.delay
        self.step = STEPS + 1
        super().__call__(job)


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


FULL_DISK = "full disk"
KINDS = (
    "kill",
    "kill in a save",
    "signal",
    "signal to one rank",
    FULL_DISK,
    "limit on file size",
    "truncated file",
    "flipped bit",
)


def disturb(kind, directory, rng, trial, at):
    """The disturbed start of a trial's run; returns how it ended. `at` as in `attempt`."""
    run = directory / "run"
    overrides, limit, moment = [], None, None
    if kind == "kill":
        moment = AtStep(run, rng, kill_a_rank(rng))
    elif kind == "kill in a save":
        moment = DuringSave(run, rng, kill_a_rank(rng))
    elif kind == "signal":
        moment = AtStep(run, rng, terminate(rng))
    elif kind == "signal to one rank":
        moment = AtStep(run, rng, signal_one_rank(rng))
        moment.step = rng.randrange(1, STEPS - 2)
    elif kind == FULL_DISK:
        moment = rng.choice([AtStep, DuringSave])(run, rng, fill_disk(run))
    elif kind == "limit on file size":
        limit = rng.randrange(20_000, 280_000)  # less than the optimizer states of a rank
    else:
        moment = AtStep(run, rng, kill_a_rank(rng))
        moment.step = rng.randrange(SAVE_EVERY + 1, STEPS)
    if at is not None and type(moment) is AtStep:
        moment.step, moment.delay = at, 0.0
    job = Job(directory, fine_tune, directory, overrides, limit)
    end = job.wait(moment or (lambda job: None))
    (run / FILLER).unlink(missing_ok=True)
    trial.disturbed_at = 0.0 if moment is None else round(moment.done or 0.0, 3)
    return end


def attempt(kind, seed, template, expected, at=None):
    """One trial, from the disturbance to the comparison.

    What disturbs the run at a step comes behind step `at`, or else at a moment drawn by the seed,
    which on a fast machine may be after the run's end.
    """
    rng, trial = random.Random(f"{kind} {seed}"), Trial(kind, seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as place:
        directory = Path(place) / "host"
        shutil.copytree(template, directory)
        with small_disk(directory / "run") if kind == FULL_DISK else contextlib.nullcontext():
            begin_and_go_on(trial, rng, directory, expected, at)
    return trial


def begin_and_go_on(trial, rng, directory, expected, at):
    run, kind = directory / "run", trial.kind
    end = disturb(kind, directory, rng, trial, at)
    trial.codes = end.codes
    trial.seconds_to_end = round(end.seconds - trial.disturbed_at, 2)
    said = re.search(r"(error( on rank \d+)?: |Stopped by ).*", end.output)
    trial.message = said[0].replace(f"{SCRIPT.parents[1]}/", "")[:300] if said else ""
    saved, reached = complete_step(run), steps_of(run)
    damaged = None
    if kind in ("truncated file", "flipped bit") and saved:
        damaged = spoil_a_file(run, rng, flip=kind == "flipped bit")
        saved = 0
    trial.steps_lost = reached - saved
    again = end
    while any(again.codes) and trial.restarts < 3:
        again = Job(directory, fine_tune, directory).wait()
        trial.restarts += 1
        if "Traceback" in again.output:
            trial.failure = again.output[-3000:]
        elif any(again.codes) and damaged and damaged in again.output:
            shutil.rmtree(run / "checkpoints" / damaged)  # the remedy that the message names
        elif any(again.codes):
            trial.failure = again.output[-3000:]
        elif (taken := steps_taken(again.output)) < saved:
            trial.failure = f"step {saved} was saved, but step {taken} was resumed"
    if end.hung or again.hung or any(again.codes):
        trial.failure = f"hung or not finished: {end} {again}"[-3000:]
    elif result_of(run) != expected:
        trial.failure = f"not the undisturbed result: {rows_of(run, 'loss')}"


def steps_taken(output):
    """Optimizer steps that a run said it had behind it when it began."""
    return int(output.partition(" taken, ")[0].rsplit(None, 1)[-1])


def result_of(run):
    """What two equal runs have in common, to the bit."""
    columns = {name: rows_of(run, name) for name in ("loss", "grad_norm", "learning_rate")}
    return columns, (run / "model" / "model.safetensors").read_bytes()


def undisturbed(place):
    """A prepared directory and the result of its run; data are packed there once for all trials."""
    directory = Path(place) / "template"
    make_host(directory, "run", **RECIPE)
    end = Job(directory, fine_tune, directory).wait()
    if any(end.codes):
        raise RuntimeError(f"the undisturbed run failed: {end.output}")
    expected = result_of(directory / "run")
    shutil.rmtree(directory / "run")
    return directory, expected


def table(trials):
    """Markdown: a row per kind of disturbance."""
    head = (
        "disturbance",
        "trials",
        "equal to the undisturbed run",
        "steps lost",
        "ranks ended after (s)",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind in dict.fromkeys(trial.kind for trial in trials):
        ones = [trial for trial in trials if trial.kind == kind]
        good = sum(not trial.failure for trial in ones)
        lost = f"0-{max(trial.steps_lost for trial in ones)}"
        ends = sorted(trial.seconds_to_end for trial in ones)
        lines.append(f"| {kind} | {len(ones)} | {good} | {lost} | at most {ends[-1]:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of all trials")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if kind != FULL_DISK or can_mount()]
    trials = []
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as place:
        template, expected = undisturbed(place)
        for number in range(options.trials):
            kind = kinds[number % len(kinds)]
            trials.append(attempt(kind, options.seed + number, template, expected))
            print(number, asdict(trials[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps([asdict(t) for t in trials], indent=1) + "\n")
    print(table(trials))
    sys.exit(any(trial.failure for trial in trials))


if __name__ == "__main__":
    # Ranks import what they run by the module's name.
    import kill_runs

    kill_runs.main()
