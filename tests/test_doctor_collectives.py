"""`hybridsp doctor` as a command, and what it says of collectives that hang or miss a rank."""

import contextlib
import dataclasses
import io
import json
import time
from unittest import mock

import pytest
import torch
from distributed import run_ranks

from hybridsp.cli import main
from hybridsp.collectives.all_scan import ALGORITHMS
from hybridsp.doctor import command, diagnose, diagnosis, host, software, together
from hybridsp.doctor.diagnosis import Diagnosis
from hybridsp.doctor.finding import failing, ok
from hybridsp.doctor.trials import Outcome, Trial

LIMIT = 6  # seconds; a test of a hang waits for as long, and busy machines are slow
ALONE = {
    *("GPUs", "environment", "packages", "shared memory", "open files", "locked memory"),
    *("host memory", "optimizer offload", "disk", "linear attention", "softmax attention"),
}
TRIALS = {
    *("process group", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"),
    *("send/recv ring", "halo", *(f"All-Scan {algorithm}" for algorithm in ALGORITHMS)),
}


def doctor(*options):
    """Exit code, stdout, stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["doctor", *options])
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def one(findings, name):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_one_process(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    settings = {"model": "smollm2-135m", "data": "absent", "output_dir": str(tmp_path)}
    settings |= {"seq_length": 4096, "max_steps": 5, "learning_rate": 1e-4, "ring": 2}
    recipe.write_text(json.dumps(settings))
    code, out, _ = doctor("--json", str(tmp_path / "a.json"), "--plan", str(recipe))
    record = json.loads((tmp_path / "a.json").read_text())
    names = {finding["name"] for finding in record["findings"]}
    assert names >= ALONE | {"collectives", "plan", "plan: GPU memory", "plan: host memory"}
    assert code == record["exit_status"] == int(" 0 failing" not in out)

    bad = failing("shared memory", "none", "make some")
    monkeypatch.setattr(host, "shared_memory", lambda gpus: bad)
    code, out, _ = doctor("--out", str(tmp_path))
    assert code == 1
    assert "failing  shared memory" in out


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    monkeypatch.setattr(software, "versions", mock.Mock(side_effect=KeyError("project")))
    result = diagnose()
    assert "KeyError: 'project'" in one(result.findings, "packages").found
    assert {finding.name for finding in result.findings} >= ALONE
    assert result.exit_status == 1


def test_a_broken_group_ends_the_process_at_once(monkeypatch):
    result = Diagnosis(speaks=True, exit_status=1, broken=True)
    monkeypatch.setattr(command, "diagnose", lambda **options: result)
    left = mock.Mock(side_effect=SystemExit(1))
    monkeypatch.setattr(command.os, "_exit", left)
    assert doctor()[0] == 1
    left.assert_called_once_with(1)
    # Nor does it stay for a file or a screen that cannot be written.
    untold = dataclasses.replace(result, untold=OSError("disk full"))
    monkeypatch.setattr(command, "diagnose", lambda **options: untold)
    code, _, err = doctor()
    assert (code, err) == (1, "hybridsp doctor: error: disk full\n")
    monkeypatch.setattr(command, "print", mock.Mock(side_effect=BrokenPipeError), raising=False)
    assert doctor()[0] == 1
    assert left.call_count == 3


def test_a_file_that_cannot_be_written_is_noticed_first(monkeypatch, tmp_path):
    diagnoses = mock.Mock(return_value=Diagnosis(speaks=True, exit_status=0))
    monkeypatch.setattr(command, "diagnose", diagnoses)
    code, _, err = doctor("--json", str(tmp_path / "absent" / "a.json"))
    assert (code, diagnoses.called) == (2, False)
    assert "No such file" in err
    assert doctor("--json", str(tmp_path / "a.json"))[0] == 0
    assert list(tmp_path.iterdir()) == []  # the look leaves nothing
    diagnoses.return_value = Diagnosis(speaks=True, exit_status=0, untold=OSError("disk full"))
    assert doctor("--json", str(tmp_path / "a.json"))[0] == 2


def examined(folder, *options):
    code, out, err = doctor("--json", f"{folder}/doctor.json", "--time-limit", "40", *options)
    return code, out, err, torch.distributed.is_initialized()


@pytest.mark.parametrize(("ranks", "backend"), [(2, None), (4, "gloo")])
def test_all_collectives(ranks, backend, tmp_path):
    results = run_ranks(examined, ranks, str(tmp_path), backend=backend, timeout=120)
    record = json.loads((tmp_path / "doctor.json").read_text())
    found = {finding["name"]: finding for finding in record["findings"]}
    assert set(found) >= ALONE | TRIALS
    assert {found[name]["status"] for name in TRIALS} == {"ok"}
    assert "needs CUDA" in found["All-Scan symmetric"]["found"]
    assert "for a state of 1 MiB" in found["All-Scan auto"]["found"]
    assert [out for _, out, _, _ in results[1:]] == [""] * (ranks - 1)
    assert {code for code, *_ in results} == {record["exit_status"]}
    # A group that was there before is left as it was; one of our own is not.
    assert {joined for *_, joined in results} == {backend is not None}


def tell_nobody(findings):
    raise OSError("disk full")


def quick_diagnosis(**options):
    """Only what the ranks do together, so that they come to it at the same time."""
    alone = [ok("GPUs", "not looked at")]
    with mock.patch.object(diagnosis, "examine", return_value=alone):
        return diagnose(limit=LIMIT, **options)


def diagnosed_without(absent):
    return None if torch.distributed.get_rank() == absent else quick_diagnosis()


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_does_not_come_is_named(absent):
    results = run_ranks(diagnosed_without, 3, absent)
    (speaker,) = [rank for rank in range(3) if results[rank] and results[rank].speaks]
    assert speaker == (1 if absent == 0 else 0)
    finding = one(results[speaker].findings, "process group")
    assert finding.found == f"rank {absent} did not come within {LIMIT} s"
    assert "All-Scan chain" in one(results[speaker].findings, "the rest").found
    present = [result for result in results if result is not None]
    assert {(result.exit_status, result.broken) for result in present} == {(1, True)}


def troubled():
    """A collective that raises on one rank, one that returns nonsense, and one that hangs."""
    rank = torch.distributed.get_rank()

    def raise_(mesh):
        if rank == 1:
            raise RuntimeError("unhandled system error")
        return lambda: torch.ones(1), torch.ones(1)

    def lie(mesh):
        return lambda: torch.ones(1) * rank, torch.zeros(1)

    def hang(mesh):
        return lambda: time.sleep(600 * (rank == 2)) or torch.ones(1), torch.ones(1)

    cases = {"raises": raise_, "lies": lie, "hangs": hang, "never": lie}
    trials = [Trial(name=name, prepare=prepare) for name, prepare in cases.items()]
    with mock.patch.object(together, "all_trials", return_value=trials):
        return quick_diagnosis(tell=tell_nobody)


def test_collectives_that_fail_name_the_ranks():
    results = run_ranks(troubled, 3)
    findings = results[0].findings
    assert one(findings, "raises").found == "rank 1: RuntimeError: unhandled system error"
    assert one(findings, "lies").found == (
        "rank 1: returned wrong values: off by 1; rank 2: returned wrong values: off by 2"
    )
    hung = one(findings, "hangs")
    assert hung.found == f"rank 2 had not returned after {LIMIT} s"
    assert "GLOO_SOCKET_IFNAME" in hung.fix
    assert one(findings, "the rest").found == "not tried: never"
    assert [result.broken for result in results] == [True] * 3
    assert [str(result.untold) for result in results] == ["disk full", "None", "None"]


def test_what_ends_the_thread_is_no_hang():
    outcome = together.on_a_thread(mock.Mock(side_effect=SystemExit(3)), torch.device("cpu"), 9)
    assert outcome == Outcome(error="SystemExit: 3")


def test_a_rank_that_ends_in_a_collective_is_named():
    gone = together.judge("x", {0: Outcome(stuck=True), 1: Outcome(stuck=True)}, [2], "cuda", 9)
    assert gone.found == "rank 2 ended in it; ranks 0-1 had not returned after 9 s"
    assert "NCCL_P2P_DISABLE" in together.judge("x", {0: Outcome(stuck=True)}, [], "cuda", 9).fix


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_gpus(ranks, tmp_path):
    (code, out, *_), *_ = run_ranks(examined, ranks, str(tmp_path), backend="nccl", timeout=280)
    record = json.loads((tmp_path / "doctor.json").read_text())
    found = {finding["name"]: finding for finding in record["findings"]}
    assert found["linear attention"]["found"].startswith("triton; "), out
    assert found["softmax attention"]["status"] == "ok", out
    assert {"GPU 0", "driver", "NCCL"} <= set(found)
    if ranks > 1:
        assert {found[name]["status"] for name in TRIALS} == {"ok"}, out
    assert code == record["exit_status"]
