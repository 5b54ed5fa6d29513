"""The planner against what was measured: the records of steps and kernels in docs/measurements.

A step's record says how it was run, how long it took and how much memory it needed; what the
planner said then is in it too, but does not count: today's planner is asked again, from the row's
own settings. A row that ended in an error has nothing to compare and is left out.
"""

import json
from functools import cache
from pathlib import Path

import pytest

from hybridsp.planner import Cluster, Setting, load_shape
from hybridsp.planner.hardware import GPUS
from hybridsp.planner.kernels import linear_seconds, model_flops
from hybridsp.planner.memory import memory
from hybridsp.planner.presets import PRESETS
from hybridsp.planner.time import step_time

MEASUREMENTS = Path(__file__).parents[1] / "docs" / "measurements"
SECONDS, PEAK = 0.25, 0.10
# Of a layer's kernels by themselves; with fewer tokens, what each takes to start weighs more.
KERNELS, FEWEST_TOKENS = 0.10, 128 * 1024
# Parts of softmax layers in which checkpoints that were measured were converted; None is dense.
CONVERTED = (None, "0.25", "0.5", "0.125")


def rows_of(path):
    """(record, row) of each row with a measured step; how many have none."""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = record["cases"]
    told = [row for row in rows if row.get("seconds") and not row.get("reason")]
    # What the case before has left on the GPU is no part of a row's peak.
    left = [0, *(row.get("left_bytes", 0) for row in rows[:-1])]
    for row, before in zip(rows, left, strict=True):
        if row in told:
            row["peak_bytes"] -= before
    return [(record, row) for row in told], len(rows) - len(told)


@cache
def shape_of_row(model, softmax_layers, parameters):
    """The model's shape; a checkpoint's, which is not here, by its number of parameters."""
    if model in PRESETS:
        return load_shape(model, softmax_layers)
    for preset in PRESETS:
        for choice in CONVERTED:
            shape = load_shape(preset, choice)
            if shape.parameters == parameters:
                return shape
    raise ValueError(
        f"model = {model!r} with {parameters:,} parameters is no preset and none converted with "
        f"softmax_layers in {CONVERTED}: add its choice there"
    )


def setting_of_row(record, row):
    world = record["environment"]["world"]
    same = ("ring", "ulysses", "stage", "offload_optimizer", "checkpointing", "keep_attention")
    return Setting(
        gpus=world,
        batch=world // (row["ring"] * row["ulysses"]),
        dtype_bytes={"bf16": 2, "fp32": 4}[record["options"]["dtype"]],
        offload_activations=row["offload_activations"],
        tiled_mlp=row["tiled_mlp"],
        **{name: row[name] for name in same},
    )


def pairs_of_row(shape, setting, row):
    """Of one document's pairs of tokens those that its documents have, from the operations."""
    if row.get("num_documents", 1) == 1:
        return None
    none, all_of_them = (model_flops(shape, row["tokens"], part) for part in (0.0, 1.0))
    return (row["flops"] / setting.batch - none) / (all_of_them - none)


def compare(record, row):
    """The line of a row, and whether the planner is near enough."""
    shape = shape_of_row(row["model"], row["softmax_layers"], row["parameters"])
    setting, length = setting_of_row(record, row), row["tokens"]
    env = record["environment"]
    per_node = max(env["world"] // env["hosts"], 1)
    cluster = Cluster(gpu=record["gpu"], gpus=env["world"], gpus_per_node=per_node)
    time = step_time(shape, setting, cluster, length, pairs_of_row(shape, setting, row))
    peak = memory(shape, setting, cluster, length).allocated
    slower, wider = time.seconds / row["seconds"] - 1, peak / row["peak_bytes"] - 1
    kept = "-" if not setting.checkpointing else "host" if setting.offload_activations else "GPU"
    line = (
        f"{record['gpu']:9} {Path(row['model']).name:13} {length // 1024:5}K zero{setting.stage} "
        f"{kept:5} tile {setting.tiled_mlp or '-':5} {row['seconds']:8.3f} s {time.seconds:8.3f} "
        f"{100 * slower:+6.1f}% {row['peak_bytes'] / 2**30:7.2f} GiB {peak / 2**30:7.2f} "
        f"{100 * wider:+6.1f}%"
    )
    return line, abs(slower) <= SECONDS and abs(wider) <= PEAK


@pytest.mark.parametrize("path", sorted(MEASUREMENTS.glob("*-step-*.json")), ids=lambda p: p.stem)
def test_measured_steps_are_predicted(path):
    rows, left_out = rows_of(path)
    assert rows, "nothing in it was measured"
    compared = [compare(*row) for row in rows]
    table = "\n".join([*(line for line, _ in compared), f"{left_out} rows ended in an error"])
    print(f"\n{table}")
    assert all(near for _, near in compared), (
        f"beyond {SECONDS:.0%} of seconds or {PEAK:.0%} of memory:\n{table}"
    )


def test_enough_steps_were_measured():
    """At least eight configurations of length, model and offload, on more than one chip."""
    rows = [row for path in MEASUREMENTS.glob("*-step-*.json") for row in rows_of(path)[0]]
    of_a_row = ("tokens", "parameters", "offload_activations", "offload_optimizer", "tiled_mlp")
    assert len({tuple(row[name] for name in of_a_row) for _, row in rows}) >= 8
    assert len({record["gpu"] for record, _ in rows}) >= 2


@pytest.mark.parametrize("path", sorted(MEASUREMENTS.glob("*-linear-*.json")), ids=lambda p: p.stem)
def test_measured_linear_layers_are_predicted(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    options = record["options"]
    shape = load_shape("smollm2-135m", "0.25")
    shape.config.linear_num_heads = options["heads"]
    shape.config.linear_key_head_dim = options["key_dim"]
    shape.config.linear_value_head_dim = options["value_dim"]
    setting = Setting(gpus=1, ring=1, ulysses=1, stage=1)
    chip = next(name for name in GPUS if name.partition("-")[0] in path.name)
    for case in record["cases"]:
        tokens = case["tokens_per_rank"]
        if case["backend"] != "triton" or tokens < FEWEST_TOKENS:
            continue
        forward, backward = linear_seconds(shape, setting, Cluster(gpu=chip, gpus=1), tokens)
        measured = [case["passes"][name]["seconds"] for name in ("fwd", "fwd+bwd")]
        assert [forward, forward + backward] == pytest.approx(measured, rel=KERNELS), tokens
