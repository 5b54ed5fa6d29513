"""A rank that fails in one of the known ways ends its job, in time and with one message.

The ranks are processes as a launcher would start them (`rank_job.Job`), because what is tested is
how processes end. A rank walks through steps of one collective each, until the fault.
"""

import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from rank_job import Job

import hybridsp
from hybridsp.faults import (
    EXIT_FAULT,
    Position,
    StopSignals,
    Watchdog,
    check_in_step,
    follow,
    launcher,
    resources,
    watchdog,
)
from hybridsp.faults.board import Notice
from hybridsp.faults.watchdog import hang_report
from hybridsp.host_memory import HostMemory
from hybridsp.train.console import errors_of_users

HANG_SECONDS, TICK = 3, 0.5
# From the fault to the end of the last rank: the grace of the ranks that do not speak, and reserve
# for a machine that does other things as well.
END_SECONDS = 20


def walk(directory, faults, steps=6):
    """Steps of one collective each; `faults` says by rank what happens in step 3."""
    mesh = hybridsp.SPMesh()
    guard = Watchdog(mesh, directory, hang_timeout=HANG_SECONDS, tick=TICK)
    # The launcher's SIGTERM, which comes as soon as one rank has ended, is not to end those that
    # have something to say.
    with StopSignals(), guard, guard.position.during("training", watched=True):
        for step in range(1, steps + 1):
            guard.position.enter("forward", step=step, layer=7)
            if step == 3 and mesh.rank in faults:
                happen(faults[mesh.rank])
            reduce_something(mesh)
            time.sleep(TICK)  # so that what is posted is not old
    dist.destroy_process_group()


def reduce_something(mesh):
    dist.all_reduce(torch.ones(2), group=mesh.data_group)


def happen(fault):
    time.sleep(2 * TICK)
    if fault == "raise":
        raise RuntimeError("the third step went wrong, token=hunter2\nand more of it")
    if fault == "refuse":
        raise ValueError("lr = 7: choose less")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleep":
        time.sleep(100)


def ended(tmp_path, faults, world=3):
    job = Job(tmp_path, walk, tmp_path, faults, world=world)

    def kill_the_frozen(job):
        others = [rank.exitcode for i, rank in enumerate(job.ranks) if faults.get(i) != "freeze"]
        if None not in others:
            job.terminate(signal.SIGKILL)

    end = job.wait(kill_the_frozen if "freeze" in faults.values() else lambda job: None)
    errors = re.findall(r"^error: .*(?:\n  .*)*", end.output, re.MULTILINE)
    return end, errors


@pytest.mark.parametrize(
    ("faults", "codes", "expected"),
    [
        (
            {1: "raise"},
            {EXIT_FAULT},
            r"error: rank 1 ended the job: RuntimeError: the third step went wrong, token=\*\*\*\n"
            r"  at step 3, forward of layer 7; the traceback is in .*rank-00001.txt",
        ),
        (
            {2: "die"},
            {EXIT_FAULT, -signal.SIGKILL},
            r"error: rank 2 died \(killed, or out of memory\); last seen:\n"
            r"  rank 2: step 3, forward of layer 7; .*",
        ),
        (
            {0: "die"},  # and the store with it
            {EXIT_FAULT, -signal.SIGKILL},
            r"error: rank 0 died \(killed, or out of memory\); last seen:\n"
            r"  rank 0: about where this one is, step 3, .*",
        ),
        (
            {1: "sleep"},
            {EXIT_FAULT},
            r"error: no progress for 3 s \(hang_timeout\): rank 1 keeps the others waiting\n"
            r"  rank 1: step 3, forward of layer 7; .*\n"
            r"  ranks 0, 2: step 3, forward of layer 7; collective all_reduce, .*",
        ),
        (
            {2: "freeze"},
            {EXIT_FAULT, -signal.SIGKILL},
            r"error: no progress for 3 s \(hang_timeout\): rank 2 keeps the others waiting\n"
            r"  rank 2: silent, last step 3, forward of layer 7; .*\n"
            r"  ranks 0, 1: step 3, forward of layer 7; collective all_reduce, .*",
        ),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_fault_of_one_rank_ends_the_job_with_one_message(tmp_path, faults, codes, expected):
    end, errors = ended(tmp_path, faults)
    assert not end.hung, end.output
    assert set(end.codes) <= codes | {-signal.SIGTERM}, end.output
    assert len(errors) == 1, end.output
    assert re.fullmatch(expected, errors[0]), errors[0]
    assert "Traceback" not in end.output
    if 0 not in faults or faults[0] != "die":  # torch says in its own way that a store is gone
        assert "frame #" not in end.output
    assert end.after_fault < END_SECONDS


@pytest.mark.parametrize("rank", [0, 1])  # with rank 0 the store ends
def test_a_users_error_of_one_rank_is_its_own_to_tell(tmp_path, rank):
    end, errors = ended(tmp_path, {rank: "refuse"})
    assert not end.hung
    assert errors == []
    assert end.codes[rank] == 1  # what the script does with it
    assert "ValueError: lr = 7: choose less" in end.output
    assert end.after_fault < END_SECONDS


def test_without_a_fault_nothing_is_said(tmp_path):
    end, _ = ended(tmp_path, {})
    assert end.codes == [0, 0, 0]
    assert end.output == ""


def notice(rank, place, *, beat=1, passed=5):
    return Notice(
        rank=rank, beat=beat, host="h", pid=1, position="step 1", standing=place, passed=passed
    )


def test_a_report_names_first_who_is_behind():
    before = {rank: notice(rank, "collective wait, a.py:1") for rank in range(3)}
    after = {rank: notice(rank, "collective wait, a.py:1", beat=2) for rank in range(3)}
    after[1] = notice(1, "collective wait, a.py:1 in b", beat=2, passed=4)
    report = hang_report(before, after, 4, 60)
    assert report.splitlines() == [
        "no progress for 60 s (hang_timeout): rank 3 keeps the others waiting",
        "  rank 3: has never been seen",
        "  rank 1: step 1; collective wait, a.py:1 in b",
        "  ranks 0, 2: step 1; collective wait, a.py:1",
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_followed_forward_and_backward(checkpointing):
    from tiny import batch_of, tiny_model

    model = tiny_model()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    seen = []

    class Noted(Position):
        def enter(self, phase, *, step=None, layer=None):
            seen.append((phase, layer))
            super().enter(phase, step=step, layer=layer)

    batch = batch_of(1, 8, seed=0)
    with follow(model.model.layers, Noted()):
        model(**batch).loss.backward()
    backwards = [layer for phase, layer in seen if phase == "backward"]
    assert seen[:4] == [("forward", layer) for layer in range(4)]
    assert backwards == [3, 2, 1, 0]
    seen.clear()
    model(**batch)
    assert seen == []


def facts_of_ranks():
    mesh = hybridsp.SPMesh(ulysses=2)
    check_in_step(mesh, {"a": "1"}, {"content": str(mesh.dp_rank)})
    messages = []
    for common, sequence in [
        ({"seed": str(mesh.rank == 2)}, {}),
        ({}, {"content": str(mesh.rank)}),
        ({"b": "0"} if mesh.rank else {}, {}),
    ]:
        with pytest.raises(ValueError, match="not in step") as caught:
            check_in_step(mesh, common, sequence)
        messages.append(str(caught.value).partition(". Start")[0])
    return messages


def test_ranks_out_of_step_are_named_on_every_rank():
    expected = [
        "the ranks are not in step, seed differs: rank 2: True; ranks 0, 1, 3: False",
        "the ranks are not in step, content differs: rank 0: 0; rank 1: 1",
        "the ranks are not in step, b differs: rank 0: not stated; ranks 1, 2, 3: 0",
    ]
    assert run_ranks(facts_of_ranks, 4) == [expected] * 4


def agree_on_a_signal():
    mesh = hybridsp.SPMesh()
    with StopSignals() as signals:
        heard = [signals.agreed(mesh)]
        if mesh.rank == 1:
            for _ in range(2):  # the launcher's repetition of it is no second one
                os.kill(os.getpid(), signal.SIGUSR1)
        heard.append(signals.agreed(mesh))
    return heard


def test_a_signal_to_one_rank_is_heard_by_all():
    assert run_ranks(agree_on_a_signal, 2) == [[None, "SIGUSR1"]] * 2


def agree_on_a_lost_launcher():
    mesh = hybridsp.SPMesh()
    lost = mock.Mock(is_lost=lambda: mesh.rank == 1)  # the other rank's is on another host
    with mock.patch("hybridsp.faults.signals.AT_START", lost), StopSignals() as signals:
        return signals.agreed(mesh)


def test_a_lost_launcher_is_a_signal_to_all():
    assert run_ranks(agree_on_a_lost_launcher, 2) == ["SIGTERM"] * 2


# A command starts a launcher, which starts a rank, which writes down once a moment what it sees.
FAMILY = """
import runpy, subprocess, sys, time
role, name, launcher_file, seen = sys.argv[1:]
after = {"command": "launcher", "launcher": "rank"}
if role in after:
    argv = [sys.executable, __file__, after[role], name, launcher_file, seen]
    subprocess.run(argv)
else:
    launcher = runpy.run_path(launcher_file)["Launcher"]()
    for _ in range(300):
        with open(seen, "a") as file:
            file.write(f"{launcher.is_lost()}\\n")
        time.sleep(0.05)
"""


def sees(path, what):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and what in path.read_text().splitlines():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "torch.distributed.run"])
def test_a_rank_sees_that_deepspeeds_launcher_has_lost_its_command(tmp_path, name):
    script, seen = tmp_path / "family.py", tmp_path / "seen"
    script.write_text(FAMILY)
    argv = [sys.executable, str(script), "command", name, launcher.__file__, str(seen)]
    with subprocess.Popen(argv, start_new_session=True) as command:
        try:
            assert sees(seen, "False")
            command.terminate()
            command.wait(10)
            lines = len(seen.read_text().splitlines())
            if name.startswith("deepspeed"):
                assert sees(seen, "True")
            else:
                time.sleep(0.5)
                assert len(seen.read_text().splitlines()) > lines
                assert "True" not in seen.read_text()
        finally:
            os.killpg(command.pid, signal.SIGKILL)


def be_signalled_twice():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_second_signal_ends_the_process(tmp_path):
    end = Job(tmp_path, be_signalled_twice, world=1).wait()
    assert end.codes == [128 + signal.SIGTERM]
    assert end.seconds < 10


def test_handlers_are_given_back_unless_the_block_fails():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        with pytest.raises(RuntimeError, match="a lost peer"), StopSignals():
            raise RuntimeError("a lost peer")
        assert signal.getsignal(signal.SIGTERM) != before
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_disk_without_room_is_refused_before_the_run(tmp_path, monkeypatch):
    sizes = {"trained": 2**30, "parameters": 2**30, "bytes_per_weight": 2}
    place = tmp_path / "not" / "yet"
    usage = {"free": 58 * 2**30}
    monkeypatch.setattr(
        resources.shutil,
        "disk_usage",
        lambda _: resources.shutil._ntuple_diskusage(0, 0, usage["free"]),
    )
    resources.check_room(place, **sizes, checkpoints=4)  # 4 * 14 + 2 GiB
    usage["free"] -= 1
    with pytest.raises(ValueError, match=r"4 checkpoints of 14\.0 GiB .* need 58\.0: make room"):
        resources.check_room(place, **sizes, checkpoints=4)
    resources.check_room(place, **sizes, checkpoints=0)
    place.mkdir(parents=True)
    (place / "old").write_bytes(b"x")  # of an earlier start of the same run: it will be replaced
    resources.check_room(place, **sizes, checkpoints=4)


def test_memory_that_runs_out_is_told(monkeypatch):
    for available, told in ((2**30, True), (2**36, False)):
        memory = HostMemory(total=2**36, available=available)
        monkeypatch.setattr(resources, "host_memory", lambda memory=memory: memory)
        assert (resources.memory_warning() is not None) == told
    monkeypatch.setattr(resources, "host_memory", lambda: None)
    assert resources.memory_warning() is None
    assert watchdog.MEMORY_EVERY > 1


def test_an_interrupt_is_one_line(capsys):
    with pytest.raises(SystemExit) as end, errors_of_users(show_traceback=False):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == (
        "interrupted: start again to go on from the last checkpoint\n"
    )
