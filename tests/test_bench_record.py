"""The record of a benchmark: what its file holds after each step, and after the run is cut off."""

import itertools
import json
import math
import pkgutil
from unittest import mock

import pytest
from distributed import DEEPSPEED, PRELOAD, run_ranks

from hybridsp.bench import record
from hybridsp.bench.all_scan import command as all_scan
from hybridsp.bench.record import Record
from hybridsp.cli import main
from hybridsp.mesh import SPMesh

PRELOAD += DEEPSPEED

TINY = ["--heads", "2", "--backends", "plain", "--tokens-per-rank", "16", "--repeats", "1"]
LINEAR = ["linear", *TINY, "--key-dim", "8", "--value-dim", "4", "--pass", "fwd"]
SOFTMAX = ["softmax", *TINY, "--kv-heads", "2", "--head-dim", "8", "--documents", "1"]
SCAN = ["all-scan", "--bytes", "512", "--algorithms", "chain", "--repeats", "1"]
CHECK = ["--check", "--variants", "ring"]
LENGTHS = ["--tokens-per-rank", "16,32,48"]


def test_json_holds_no_nan(tmp_path):
    record.write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.5, None], "b": {"c": None}}


def keep_a_record(path):
    """A disk that is full for a while, and one that is full at the end."""
    mesh = SPMesh()
    if mesh.rank == 0:
        record.write_json(path, {"cases": ["another run's"], "complete": True})
    kept = Record(mesh, path, {"cases": []})
    full = mock.patch.object(record, "write_json", side_effect=OSError(28, "disk full"))
    kept.content["cases"].append(1)
    if mesh.rank == 0:
        with full, mock.patch.object(record.logger, "warning") as warning:
            kept.save()
        assert "disk full" in str(warning.call_args)
        assert json.loads(path.read_text()) == {"cases": [], "complete": False}
    kept.content["cases"].append(2)
    kept.save()
    if mesh.rank == 0:
        assert json.loads(path.read_text()) == {"cases": [1, 2], "complete": False}
    with full, pytest.raises(ValueError if mesh.rank == 0 else SystemExit):
        kept.finish()
    kept.finish()
    return kept.content


def test_a_record_is_kept_by_the_first_rank(tmp_path):
    path = tmp_path / "x.json"
    whole = {"cases": [1, 2], "complete": True}
    assert run_ranks(keep_a_record, 2, path) == [whole] * 2
    assert json.loads(path.read_text()) == whole


def cut_off(line, target, calls):
    """The bench is stopped, as by ^C, where it calls `target` after so many calls."""
    original, made = pkgutil.resolve_name(target), itertools.count()

    def cut(*args, **kwargs):
        if next(made) == calls:
            raise KeyboardInterrupt
        return {"seconds": 1.0} if "take_steps" in target else original(*args, **kwargs)

    with mock.patch(target, cut):
        assert main(["bench", *line]) == 130


@pytest.mark.parametrize(
    ("line", "target", "calls", "rows", "has"),
    [
        (LINEAR, "linear.command.measure", 2, 2, {}),
        (
            SOFTMAX,
            "softmax.command.measure",
            2,
            1,
            {"model": False},
        ),  # two calls a row: both passes
        (SCAN, "all_scan.command.measure", 2, 2, {}),
        ([*LINEAR, "--trace"], "trace.record", 1, 2, {"traces": True}),
        ([*SCAN, "--trace"], "trace.record", 0, 3, {"traces": False}),
        ([*SOFTMAX, "--trace"], "trace.record", 0, 1, {"traces": False}),
        ([*SOFTMAX, *CHECK], "softmax.check.check_all", 0, 3, {"model": True, "checks": False}),
        (["step", "--model", "smollm2-135m", *LENGTHS], "step.command.take_steps", 2, 2, {}),
        (["alst", "--model", "llama-1b", *LENGTHS], "alst.command.take_steps", 2, 2, {}),
    ],
)
def test_what_is_cut_off_leaves_what_it_has(line, target, calls, rows, has, tmp_path):
    line = [*line, "--out", str(tmp_path)]
    run_ranks(cut_off, 2, line, f"hybridsp.bench.{target}", calls, timeout=60)
    left = json.loads((tmp_path / f"{line[0]}.json").read_text())
    assert left["complete"] is False
    assert [row["reason"] for row in left["cases"]] == [None] * rows
    assert {name: bool(left[name]) for name in has} == has


def test_a_record_that_was_cut_off_is_not_included(tmp_path):
    path = tmp_path / "all-scan.json"
    path.write_text(json.dumps({"bench": "all-scan", "cases": [], "complete": False}))
    with pytest.raises(ValueError, match=r"all-scan\.json is of a run that was cut off"):
        all_scan._read_included([path])
