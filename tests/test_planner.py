"""The planner: plans that hold, files that pass validation, mistakes that are one line."""

import re
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFWriter
from planner_cases import HUGE, HYBRIDS, SOURCES, K, setting_of, shape_of
from transformers import LlamaConfig

import hybridsp  # noqa: F401 - registers the family with the Auto classes
from hybridsp.cli import main
from hybridsp.convert import hybrid_config
from hybridsp.deepspeed_config import deepspeed_config
from hybridsp.planner import Cluster, Job, load_shape, make_plan, write_files
from hybridsp.planner.hardware import GPUS
from hybridsp.planner.kernels import model_flops
from hybridsp.planner.memory import memory
from hybridsp.planner.search import longest, rank, settings
from hybridsp.planner.time import step_time
from hybridsp.recipe import load_recipe


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Llama-8B's shape, a quarter of its layers softmax."""
    return shape_of(tmp_path_factory.mktemp("large"), SOURCES["large"], "0.25")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SmolLM2-135M's shape, dense."""
    return shape_of(tmp_path_factory.mktemp("small"), SOURCES["small"])


def job_of(model, gpus=8, length=128 * K, gpu="h100-80", **changes):
    return Job(model=model, cluster=Cluster(gpu=gpu, gpus=gpus), length=length, **changes)


def test_a_gguf_file_is_read_without_its_weights(tmp_path, capsys):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    for number in range(11):
        writer.add_tensor(f"weight.{number}", torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_shape(tmp_path / "model.gguf").config.hidden_size == 32
    out = tmp_path / "out"
    arguments = ["--gpus", "1", "--gpu", "h100-80", "--seq", "1K", "--out", str(out)]
    assert main(["plan", str(tmp_path), *arguments]) == 0
    recipe = (out / "recipe.yaml").read_text()
    assert f"hybridsp convert {tmp_path} {out / 'checkpoint'} --softmax-layers 1.0" in recipe


@pytest.mark.parametrize(("gpus", "dtype"), [(1, "bf16"), (8, "bf16"), (8, "fp32"), (24, "bf16")])
def test_the_longest_length_fits_and_a_little_more_does_not(small, gpus, dtype):
    job = job_of(small, gpus=gpus, length=4 * K, dtype=dtype)
    plan = make_plan(job)
    for setting, length in ((plan.best.setting, plan.longest), plan.longest_any[::-1]):
        assert memory(small, setting, job.cluster, length).fits
        assert not memory(small, setting, job.cluster, int(length * 1.05)).fits
    assert make_plan(replace(job, length=plan.longest_any[0])).best.memory.fits
    assert plan.longest_any[0] == max(longest(job, setting) for setting in settings(job))


def test_the_recommendation_is_the_fastest_that_fits(large):
    job = job_of(large, gpus=16, length=128 * K, batch=4)
    plan = make_plan(job)
    fastest = min(c.time.seconds for c in plan.candidates if c.memory.fits)
    assert plan.best.time.seconds <= 1.01 * fastest
    assert {c.setting.dp for c in plan.candidates} == {1, 2, 4}
    assert all(c.setting.dp * c.setting.accumulation == 4 for c in plan.candidates)
    assert [c.memory.fits for c in plan.candidates] == sorted(
        (c.memory.fits for c in plan.candidates), reverse=True
    )


def test_memory_is_saved_where_it_is_needed(large, small):
    short = make_plan(job_of(small, gpus=1, length=16 * K)).best.setting
    assert not short.checkpointing
    assert short.tiled_mlp is None
    # What 8 H100s need for a million tokens of an 8B hybrid, and what they cannot do without it.
    job = job_of(large, length=K * K)
    plan = make_plan(job)
    best = plan.best.setting
    assert (best.tiled_mlp, best.offload_activations, best.offload_optimizer) == (
        8 * K,
        True,
        False,
    )
    assert best.keep_attention
    for simpler in ({"tiled_mlp": None}, {"offload_activations": False}):
        lean = memory(large, replace(best, **simpler), job.cluster, job.length)
        assert lean.peak > 0.9 * lean.usable
    # A length at which tiles make no difference: they are no candidates, but tell how far it goes.
    plan = make_plan(replace(job, length=32 * K))
    assert not any(c.setting.tiled_mlp for c in plan.candidates)
    assert plan.longest_any[1].tiled_mlp == 8 * K


def test_time_of_what_saves_memory(large, small, monkeypatch):
    there, waiting = {"offload_activations": True}, []
    cluster = Cluster(gpu="h100-80", gpus=8)

    def seconds(model=large, length=K * K, **changes):
        parts = step_time(model, setting_of(**changes), cluster, length).parts
        return {name: part.seconds for name, part in parts.items()}

    plain, tiled = seconds(), seconds(tiled_mlp=8 * K)
    sums = tiled.pop("sums over tiles of the MLP")
    # Tiles are kernels of their own: 25 of each of 16, in 32 layers.
    started = tiled.pop("starts of kernels") - plain.pop("starts of kernels")
    assert started == pytest.approx(16 * 25 * 32 * 6e-6)
    assert tiled == plain
    # 16 tiles; fp32 sums read and written, bf16 gradients read; output and gradient put in place.
    copied = 2 * 2 * 2 * 4096 * K * K / 8
    assert sums == pytest.approx(32 * (16 * 10 * 3 * 4096 * 14336 + copied) / 2.974e12)
    products = "projections and MLP"
    once = seconds(checkpointing=False)
    again = seconds(checkpointing=False, tiled_mlp=8 * K)
    share = 3 * 4096 * 14336 * 32 * 2 * K * K / 8 / 752e12  # the MLPs' forward, once more
    assert again[products] - once[products] == pytest.approx(share)
    assert "activations over PCIe" not in seconds(**there)
    # Over a slow bus each layer waits for its copies: at half the speed for twice as long.
    for rate in (1e9, 5e8):
        monkeypatch.setitem(GPUS, "slow", replace(GPUS["h100-80"], pcie=rate))
        slow = replace(cluster, gpu="slow")
        waiting.append(step_time(small, setting_of(**there), slow, 64 * K).parts)
    fast, slow = (parts["activations over PCIe"].seconds for parts in waiting)
    copied = 2 * 30 * (2 * 576 + 9 * (2 * 64 + 4)) * 64 * K / 8
    assert slow - fast == pytest.approx(copied / 5e8 - copied / 1e9)
    attention = seconds(keep_attention=False)["softmax attention"] / plain["softmax attention"]
    assert attention == pytest.approx(4.5 / 3.5, rel=0.05)


def test_time_follows_the_work(large, small):
    cluster = Cluster(gpu="h200-141", gpus=8)
    for model in (large, small):
        times = [step_time(model, setting_of(), cluster, n * K) for n in (64, 128, 1024)]
        assert all(a.seconds < b.seconds for a, b in pairwise(times))
        assert all(0 < each.mfu < 0.8 for each in times)
    once = step_time(large, setting_of(checkpointing=False), cluster, 128 * K)
    twice = step_time(large, setting_of(), cluster, 128 * K)
    assert once.seconds < twice.seconds < 2 * once.seconds
    # Of a million tokens causal attention is T^2 H d multiplied twice, three times over.
    dense = replace(large, config=hybrid_config(SOURCES["large"], 1.0))
    attention = 3 * 32 * 2 * (K * K) ** 2 * 4096
    assert (
        model_flops(dense, K * K)
        == 6 * (dense.parameters - dense.embedding - 65 * 4096) * (K * K) + attention + 0
    )


def test_a_thousand_gpus_in_two_seconds(large):
    start = time.perf_counter()
    plan = make_plan(job_of(large, gpus=1024, length=8 * K * K, batch=1024))
    assert time.perf_counter() - start < 2
    assert plan.best.setting.gpus == 1024
    assert len(plan.candidates) > 11 * 4 * 5


@pytest.mark.parametrize("gpu", GPUS)
def test_every_chip_has_a_plan(small, gpu):
    for gpus in (1, 2, 8, 16, 1000):
        assert rank(job_of(small, gpus=gpus, gpu=gpu))[0].memory.fits


@pytest.mark.parametrize(
    ("softmax_layers", "length", "gpus"), [(None, "64K", "1"), ("0.25", "1M", "8")]
)
def test_written_files_pass_validation(tmp_path, monkeypatch, capsys, softmax_layers, length, gpus):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    source = tmp_path / "source"
    source.mkdir()
    shape_of(source, SOURCES["large" if gpus == "8" else "small"])
    options = ["--gpus", gpus, "--gpu", "h100-80", "--seq", length, "--out", "plan"]
    options += ["--softmax-layers", softmax_layers] if softmax_layers else []
    assert main(["plan", str(source), *options]) == 0
    printed = capsys.readouterr().out
    assert "written: plan/deepspeed.json\nwritten: plan/recipe.yaml\n" in printed
    assert ("a step of the dense model takes" in printed) == bool(softmax_layers)
    if softmax_layers:
        convert = f"hybridsp convert {source} plan/checkpoint --softmax-layers 0.25"
        assert convert in (tmp_path / "plan" / "recipe.yaml").read_text()
        (tmp_path / "plan" / "checkpoint").mkdir()
        (tmp_path / "plan" / "checkpoint" / "config.json").touch()
    recipe = load_recipe("plan/recipe.yaml")
    mesh = SimpleNamespace(dp=1, device=torch.device("cuda"))
    config = deepspeed_config(recipe, mesh)
    assert recipe.ring * recipe.ulysses == int(gpus)
    found = re.search(r"ring (\d+) x ulysses (\d+), ZeRO-(\d)", printed).groups()
    stage = config["zero_optimization"]["stage"]
    assert found == (str(recipe.ring), str(recipe.ulysses), str(stage))
    assert config["bf16"]["enabled"]
    said = next(line for line in printed.splitlines() if line.startswith("run as"))
    assert recipe.offload_activations == ("checkpoints on the host" in said) == (gpus == "8")
    assert recipe.tiled_mlp == (8 * K if "MLP in tiles of 8,192 tokens" in said else None)
    assert (recipe.tiled_mlp is None) == (gpus == "1")
    assert recipe.keep_attention
    assert main(["plan", str(source), *options]) == 2
    assert "plan/deepspeed.json exists" in capsys.readouterr().err


def test_a_plan_says_what_it_needs(tmp_path, capsys):
    shape_of(tmp_path, SOURCES["large"])
    arguments = ["plan", str(tmp_path), "--gpus", "8", "--gpu", "h100-80", "--seq", "128K"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in (
        "parameters     8,030,261,248",
        "layers         32 (0 linear, 32 softmax)",
        "sequence       131,072 tokens, 1 per optimizer step",
    ):
        assert f"{line}\n" in printed
    for word in ("ZeRO-", "NCCL buffers", "softmax attention", "MFU", "recommended", "tiles"):
        assert word in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "v100"}, "gpu = 'v100' is unknown; known are a100-80, h100-80"),
        ({"gpu": "h100"}, "gpu = 'h100' is unknown; did you mean h100-80? known are a100-80"),
        ({"gpus": "12"}, "gpus = 12 is no multiple of gpus_per_node = 8; use 8 or 16"),
        ({"gpus": "1025"}, "gpus = 1025 is out of range"),
        ({"network": "0"}, "network = 0.0 must be positive"),
        ({"seq": "2G"}, "seq = 2147483648 is out of range"),
        ({"softmax-layers": "9.0"}, "no fraction in [0, 1]"),
        (
            {"seq": "256M"},
            "seq = 268435456 does not fit on 8 x h100-80: the nearest setting lacks",
        ),
        ({"host-memory": "1G"}, "GiB of host memory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, changes, message):
    shape_of(tmp_path, SOURCES["small"])
    options = {"gpus": "8", "gpu": "h100-80", "seq": "64K"} | changes
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["plan", str(tmp_path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"hybridsp plan: error: [^\n]*\n", err)
    assert message in err


def test_other_chips_are_named_where_more_of_these_do_not_help(large):
    # A head whose gradient fills a GPU, however many there are.
    config = hybrid_config(LlamaConfig(**HUGE | {"vocab_size": 2**20}), 0.25)
    job = job_of(replace(large, config=config), gpus=64)
    with pytest.raises(
        ValueError, match=r"not enough for this length; it fits on as many h200-141"
    ):
        make_plan(job)


def test_of_equally_fast_plans_those_with_room_come_first(small):
    for length in range(100 * K, 700 * K, 100 * K):
        plan = make_plan(job_of(small, gpus=1, length=length))
        equal = [
            c
            for c in plan.candidates
            if c.memory.fits and c.time.seconds < 1.01 * plan.best.time.seconds
        ]
        tight = [c.memory.peak > 0.9 * c.memory.usable for c in equal]
        assert tight[0] == all(tight)


def test_what_does_not_fit_says_what_would(small):
    with pytest.raises(ValueError, match="does not fit") as error:
        make_plan(job_of(small, gpus=2, length=8 * K * K))
    message = str(error.value)
    lacking = float(re.search(r"lacks ([\d.]+) GiB of GPU memory", message)[1])
    reach = int(re.search(r"up to (\d+) tokens fit", message)[1])
    enough = int(re.search(r"fits on (\d+) GPUs", message)[1])
    assert lacking > 0
    assert make_plan(job_of(small, gpus=2, length=reach)).best.memory.fits
    assert make_plan(job_of(small, gpus=enough, length=8 * K * K)).best.memory.fits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ('{"model_type": "bert"}', "model_type 'bert', which cannot be planned"),
        ("[]", "must hold a JSON object, not"),
        ("{}", "model_type = None is unknown"),
    ],
)
def test_configs_that_cannot_be_planned(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_shape(tmp_path)


def test_a_hybrid_has_its_layers_already(tmp_path):
    with pytest.raises(ValueError, match="is a hybrid already"):
        shape_of(tmp_path, HYBRIDS["fixed"], "0.25")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_shape(tmp_path / "absent")


def test_presets(tmp_path, capsys):
    arguments = ["plan", "smollm2-135m", "--gpus", "1", "--gpu", "h100-80", "--seq", "64K"]
    assert main(arguments) == 0
    assert "parameters     134,515,008\n" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "is a shape without weights" in capsys.readouterr().err
    assert load_shape("llama-1b").parameters == 1_235_814_400
    assert load_shape("llama-8b").parameters == 8_030_261_248


def test_files_are_not_written_over(tmp_path, small):
    plan = make_plan(job_of(small, gpus=1, length=64 * K))
    write_files(plan, tmp_path)
    with pytest.raises(ValueError, match="exists: choose another"):
        write_files(plan, tmp_path)
