"""Runs of train/finetune.py that are disturbed at random, and what becomes of them.

    python tests/kill_runs.py --trials 100 --out docs/kill_runs.json
    python tests/kill_runs.py --background --trials 45 --out docs/kill_background_saves.json

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
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import datasets
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from distributed import DEEPSPEED, PRELOAD
from disturbances import (
    FILLER,
    SAVE_EVERY,
    SLOW_FILE_SECONDS,
    STEPS,
    AtStep,
    DuringBackgroundSave,
    DuringSave,
    can_mount,
    complete_step,
    fill_disk,
    kill_a_rank,
    signal_one_rank,
    small_disk,
    spoil_a_file,
    steps_of,
    terminate,
)
from finetune_hosts import SCRIPT, make_host, rows_of
from rank_job import Job

from hybridsp.train import finetune

PRELOAD += [*DEEPSPEED, finetune.__name__]

WORLD = 2
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


def fine_tune(directory, overrides=(), file_limit=None, slow_disk=False):
    """The script's `main` in a directory made by `make_host`."""
    os.chdir(directory)
    if slow_disk:
        write = TorchCheckpointEngine.save
        TorchCheckpointEngine.save = lambda *args: (time.sleep(SLOW_FILE_SECONDS), write(*args))
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
    in_save: bool | None = None  # whether the moment was one of a save, where that was wanted
    steps_lost: int = 0
    message: str = ""  # what the disturbed run said of it
    failure: str = ""


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
KILL_BESIDE, SIGNAL_BESIDE, FULL_DISK_BESIDE = BACKGROUND_KINDS = (
    "kill, background save",
    "signal, background save",
    "full disk, background save",
)


def needs_a_disk(kind):
    return kind in (FULL_DISK, FULL_DISK_BESIDE)


def overrides_of(kind):
    return ["async_save=true"] if kind in BACKGROUND_KINDS else []


def disturb(kind, directory, rng, trial, at):
    """The disturbed start of a trial's run; returns how it ended. `at` as in `attempt`."""
    run = directory / "run"
    limit, moment = None, None
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
    elif kind == KILL_BESIDE:
        moment = DuringBackgroundSave(run, rng, kill_a_rank(rng))
    elif kind == SIGNAL_BESIDE:
        moment = DuringBackgroundSave(run, rng, rng.choice([terminate, signal_one_rank])(rng))
        moment.save = rng.randrange(STEPS // SAVE_EVERY - 2)  # soon no step is left to hear it
    elif kind == FULL_DISK_BESIDE:
        moment = DuringBackgroundSave(run, rng, fill_disk(run))
    elif kind == "limit on file size":
        limit = rng.randrange(20_000, 280_000)  # less than the optimizer states of a rank
    else:
        moment = AtStep(run, rng, kill_a_rank(rng))
        moment.step = rng.randrange(SAVE_EVERY + 1, STEPS)
    if at is not None and type(moment) is AtStep:
        moment.step, moment.delay = at, 0.0
    slow = kind in BACKGROUND_KINDS
    if slow and at is not None:
        moment.save, moment.delay = at // SAVE_EVERY - 1, SLOW_FILE_SECONDS
    job = Job(directory, fine_tune, directory, overrides_of(kind), limit, slow)
    end = job.wait(moment or (lambda job: None))
    trial.in_save = getattr(moment, "in_save", None)
    (run / FILLER).unlink(missing_ok=True)
    trial.disturbed_at = 0.0 if moment is None else round(moment.done or 0.0, 3)
    return end


def attempt(kind, seed, template, expected, at=None):
    """One trial, from the disturbance to the comparison.

    What disturbs the run at a step, or beside a save, comes behind step `at`, or else at a moment
    drawn by the seed, which on a fast machine may be after the run's end.
    """
    rng, trial = random.Random(f"{kind} {seed}"), Trial(kind, seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as place:
        directory = Path(place) / "host"
        shutil.copytree(template, directory)
        with small_disk(directory / "run") if needs_a_disk(kind) else contextlib.nullcontext():
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
        again = Job(directory, fine_tune, directory, overrides_of(kind)).wait()
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
        "in a save",
        "equal to the undisturbed run",
        "steps lost",
        "ranks ended after (s)",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind in dict.fromkeys(trial.kind for trial in trials):
        ones = [trial for trial in trials if trial.kind == kind]
        inside = sum(trial.in_save or False for trial in ones)
        good = sum(not trial.failure for trial in ones)
        steps = [trial.steps_lost for trial in ones]
        lost = f"{min(steps)}-{max(steps)}"
        ends = sorted(trial.seconds_to_end for trial in ones)
        lines.append(
            f"| {kind} | {len(ones)} | {inside or '-'} | {good} | {lost} | at most {ends[-1]:.1f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--background", action="store_true", help="disturb saves in the background")
    parser.add_argument("--out", type=Path, help="JSON file of all trials")
    options = parser.parse_args()
    wanted = BACKGROUND_KINDS if options.background else KINDS
    kinds = [kind for kind in wanted if not needs_a_disk(kind) or can_mount()]
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
