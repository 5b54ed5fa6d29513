"""`hybridsp bench step`: real steps at toy size, the planner's figures beside them."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from planner_cases import SOURCES
from test_bench import command, commands, record_of, told_by_rank_zero
from tiny import tiny_config

from hybridsp.bench.step import case as step_case
from hybridsp.bench.step import command as step
from hybridsp.bench.step.report import row_of, table_row
from hybridsp.planner import GPUS, Cluster
from hybridsp.planner.kernels import model_flops
from hybridsp.planner.memory import memory
from hybridsp.planner.time import step_time

PRELOAD += DEEPSPEED


def write_config(folder, config):
    folder.mkdir()
    fields = config.to_diff_dict() | {"model_type": config.model_type}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.fixture
def dense(tmp_path):
    return write_config(tmp_path / "dense", SOURCES["tiny"])


def test_what_saves_memory_takes_the_same_step(tmp_path, dense):
    hybrid = write_config(tmp_path / "hybrid", tiny_config())
    common = ["step", "--dtype", "fp32", "--tokens-per-rank", "48", "--steps", "1"]
    ablation = [*common, "--model", dense, "--softmax-layers", "0.5,dense", "--gpu", "h200-141"]
    ablation += ["--tiled-mlp", "whole,16", "--offload-activations", "off,on"]
    ablation += ["--checkpointing", "off,on", "--out", str(tmp_path / "a")]
    as_it_is = [*common, "--model", hybrid, "--keep-attention", "off,on", "--out"]
    as_it_is += [str(tmp_path / "b"), "--offload-optimizer", "on", "--stage", "3"]
    ranks = run_ranks(commands, 2, ablation, as_it_is, timeout=150)
    a, b = zip(*ranks, strict=True)

    out = told_by_rank_zero(a, tmp_path / "a")
    record = record_of(tmp_path / "a", "step")
    rows = record["cases"]
    # Two models, two ways of the MLP; layers kept, checkpointed here or there.
    assert len(rows) == 2 * 2 * 3
    for layers in ("0.5", None):
        losses = [row["loss"] for row in rows if row["softmax_layers"] == layers]
        assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
    for row in rows:
        check_row(row, dense)
    assert "planned as h200-141" in out
    assert out.count("tiles of 16") == len(rows) / 2

    told_by_rank_zero(b, tmp_path / "b")
    rows = record_of(tmp_path / "b", "step")["cases"]
    assert [row["keep_attention"] for row in rows] == [False, True]
    for row in rows:
        assert row["reason"] is None
        assert row["offload_optimizer"]
        assert not {"predicted_seconds", "mfu"} & set(row), "nobody knows this chip"


def check_row(row, model):
    assert row["reason"] is None
    assert (row["tokens"], row["ring"] * row["ulysses"]) == (96, 2)
    assert row["tokens_per_second"] == pytest.approx(96 / row["seconds"])
    assert 0 < row["resident_bytes"] < 2**36
    assert row["peak_bytes"] is None, "of a CPU nobody asks"
    names = ("stage", "offload_optimizer", "checkpointing", "keep_attention")
    setting = step_case.Setting(
        gpus=2,
        batch=1,
        dtype_bytes=4,
        **{name: row[name] for name in (*names, "offload_activations", "tiled_mlp")},
        **{name: row[name] for name in ("ring", "ulysses")},
    )
    shape = step_case.load_shape(model, row["softmax_layers"])
    cluster = Cluster(gpu="h200-141", gpus=2)
    assert row["predicted_peak_bytes"] == memory(shape, setting, cluster, 96).allocated
    assert row["predicted_seconds"] == step_time(shape, setting, cluster, 96).seconds
    assert row["seconds_error"] == pytest.approx(row["predicted_seconds"] / row["seconds"] - 1)
    assert row["flops"] == model_flops(shape, 96)
    assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 2 / GPUS["h200-141"].peak)


def out_of_memory_at_first(line):
    """The command's answer where the first case takes more than there is."""
    tried = []

    def take_steps(case, *args, **kwargs):
        tried.append(case)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return step_case.take_steps(case, *args, **kwargs)

    with mock.patch.object(step, "take_steps", take_steps):
        return command(line)


def test_a_case_without_room_is_a_row(tmp_path, dense):
    line = ["step", "--dtype", "fp32", "--tokens-per-rank", "64,16", "--steps", "1"]
    line += ["--model", dense, "--gpu", "h100-80", "--out", str(tmp_path / "a")]
    results = run_ranks(out_of_memory_at_first, 1, line, timeout=90)
    out = told_by_rank_zero(results, tmp_path / "a")
    first, second = record_of(tmp_path / "a", "step")["cases"]
    assert first["reason"].startswith("OutOfMemoryError: CUDA out of memory")
    assert first["predicted_peak_bytes"] > second["predicted_peak_bytes"]
    assert "seconds" not in first
    assert second["reason"] is None
    assert second["seconds"] > 0
    assert "[1] cannot run: OutOfMemoryError" in out


def test_shares_of_the_plan_in_the_table(tmp_path, dense):
    case = step.Case(
        model=dense,
        softmax_layers=None,
        setting=step.Setting(
            gpus=1, ring=1, ulysses=1, stage=1, offload_optimizer=True, checkpointing=True,
            keep_attention=False, offload_activations=True, tiled_mlp=2048, batch=1, dtype_bytes=2,
        ),
        tokens_per_rank=4096,
    )  # fmt: skip
    measured = {"seconds": 2.0, "peak_bytes": 10 * 2**30, "flops": 2 * 989e12 / 4}
    predicted = {"predicted_seconds": 1.5, "predicted_peak_bytes": 11 * 2**30}
    shown = table_row(row_of(case, measured, predicted, "h100-80", None))
    assert (shown["seconds_off"], shown["peak_off"]) == (-25, pytest.approx(10))
    assert shown["mfu_percent"] == pytest.approx(25)
    assert (shown["zero"], shown["tiles"]) == ("1, host", "tiles of 2K")
    assert (shown["checkpoints"], shown["tokens_shown"]) == ("host, attention again", "4K")


def test_sequence_parallelism_beside_data_parallelism(tmp_path, dense):
    line = ["step", "--dtype", "fp32", "--tokens-per-rank", "16", "--steps", "1", "--sp", "2,1"]
    line += ["--model", dense, "--out", str(tmp_path / "a")]
    results = run_ranks(command, 2, line, timeout=90)
    out = told_by_rank_zero(results, tmp_path / "a")
    shared, own = record_of(tmp_path / "a", "step")["cases"]
    assert [(row["dp"], row["tokens"], row["labels"]) for row in (shared, own)] == [
        (1, 32, 31),
        (2, 16, 2 * 15),
    ]
    for row in (shared, own):
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
    share = 100 * own["seconds"] / shared["seconds"]
    assert f"16 tokens per GPU: {Path(dense).name} 0.25 at SP 2 trains {share:.1f}% of" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sp", "2"], "--sp 2 does not divide the 1 ranks"),
        (["--stage", "4"], "'4' is unknown: choose from 1, 2, 3"),
        (["--tiled-mlp", "some"], "'some' is no size"),
        (["--offload-activations", "yes"], "'yes' is unknown: choose from off, on"),
        (["--gpu", "v100"], "invalid choice: 'v100'"),
        (["--model", "nothing"], "MODEL = nothing does not exist"),
        (["--softmax-layers", "1.5"], "1.5"),
    ],
)
def test_mistakes(options, message):
    ((code, out, err),) = run_ranks(command, 1, ["step", *options], timeout=60)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.gpu
def test_the_plan_holds_on_a_gpu(tmp_path):
    """Issue 5's figure: the peak of a GPU within a tenth, at lengths where it is not constants."""
    line = ["step", "--model", "smollm2-135m", "--tokens-per-rank", "64K,256K", "--steps", "1"]
    line += ["--tiled-mlp", "whole,8K", "--offload-activations", "off,on"]
    results = run_ranks(
        commands, 1, [*line, "--out", str(tmp_path / "a")], backend="nccl", timeout=280
    )
    told_by_rank_zero([each[0] for each in results], tmp_path / "a")
    rows = record_of(tmp_path / "a", "step")["cases"]
    assert len(rows) == 8
    for row in rows:
        assert row["reason"] is None, row
        assert abs(row["peak_bytes_error"]) < 0.1, row
