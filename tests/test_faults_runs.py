"""Runs of the training script that are disturbed go on as if nothing had been.

A few of the trials of `kill_runs.py`, which has as many as one likes; and a run that goes on with
fewer ranks, as an elastic launcher starts it when a host is lost; and one that is started twice.
"""

import random
import shutil
import signal

import pytest
from disturbances import STEPS, AtStep, can_mount, complete_step, steps_of
from finetune_hosts import make_host, rows_of
from kill_runs import (
    BACKGROUND_KINDS,
    KINDS,
    RECIPE,
    attempt,
    fine_tune,
    needs_a_disk,
    result_of,
    steps_taken,
    undisturbed,
)
from rank_job import Job

from hybridsp.faults import EXIT_STOPPED


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("kind", KINDS + BACKGROUND_KINDS)
def test_a_disturbed_run_ends_as_the_undisturbed_one(prepared, kind):
    if needs_a_disk(kind) and not can_mount():
        pytest.skip("a disk that can be filled has to be mounted, which is not allowed here")
    trial = attempt(kind, 0, *prepared, at=STEPS // 2)
    assert not trial.failure
    assert trial.restarts >= 1
    assert trial.in_save or kind in KINDS


class StopAt(AtStep):
    """SIGTERM to all ranks behind a step."""

    def __init__(self, run, step):
        self.run, self.step, self.delay = run, step, 0
        self.due = self.done = None
        self.act = Job.terminate


def test_a_run_goes_on_with_fewer_ranks(tmp_path):
    make_host(tmp_path, "run", **RECIPE)
    run = tmp_path / "run"
    stopped = Job(tmp_path, fine_tune, tmp_path, world=4).wait(StopAt(run, 2))
    assert stopped.codes == [EXIT_STOPPED] * 4, stopped.output
    assert "Stopped by SIGTERM; all is saved" in stopped.output
    assert "dp 2 x ring 1 x ulysses 2" in stopped.output
    saved = complete_step(run)
    assert 2 <= saved == max(rows_of(run, "loss")) < STEPS
    before = rows_of(run, "loss")
    resumed = Job(tmp_path, fine_tune, tmp_path, world=2).wait()
    assert resumed.codes == [0, 0], resumed.output
    assert "dp 1 x ring 1 x ulysses 2" in resumed.output
    assert steps_taken(resumed.output) == saved
    losses = rows_of(run, "loss")
    assert {step: losses[step] for step in before} == before
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[saved]


class SecondJob(AtStep):
    """Another start of the same run behind a step, while the first job is suspended."""

    def __init__(self, directory, step):
        super().__init__(directory / "run", random.Random(0), self.start)
        self.directory, self.step, self.delay = directory, step, 0
        self.end = self.held = None

    def start(self, job):
        job.terminate(signal.SIGSTOP)
        self.held = job.ranks[0].pid, steps_of(self.run)
        logs = self.directory / "second"
        logs.mkdir()
        self.end = Job(logs, fine_tune, self.directory).wait()
        assert steps_of(self.run) == self.held[1]
        job.terminate(signal.SIGCONT)


def test_a_second_job_in_the_same_directory_is_refused_and_the_first_goes_on(prepared, tmp_path):
    template, expected = prepared
    directory = shutil.copytree(template, tmp_path / "host")
    second = SecondJob(directory, 3)
    first = Job(directory, fine_tune, directory).wait(second)
    assert second.end.codes[0] == 2, second.end.output
    assert set(second.end.codes) <= {2, -signal.SIGTERM}
    errors = [line for line in second.end.output.splitlines() if line.startswith("error")]
    assert len(set(errors)) == 1, second.end.output
    assert "output_dir = 'run' is in use by the job of process" in errors[0]
    assert f"of process {second.held[0]} on host" in errors[0]
    assert "Traceback" not in second.end.output
    assert first.codes == [0, 0], first.output
    assert result_of(directory / "run") == expected
    assert not list((directory / "run").glob("*.lock"))


def test_bad_steps_in_a_row_end_the_run_with_their_batches_kept(tmp_path):
    make_host(tmp_path, "run", **RECIPE)
    # A rate at which the weights are lost after the first step.
    changes = ["learning_rate=1.0e30", "max_bad_steps=2", "save_every=null", "schedule=constant"]
    end = Job(tmp_path, fine_tune, tmp_path, changes).wait()
    assert 2 in end.codes, end.output
    assert set(end.codes) <= {2, -signal.SIGTERM}
    assert "all of the last 2 (max_bad_steps), none of which changed the weights" in end.output
    assert "left out (1 in a row, 1 in all)" in end.output
    kept = sorted(path.name for path in (tmp_path / "run" / "bad_steps").iterdir())
    assert kept == ["step-000002", "step-000003"]
