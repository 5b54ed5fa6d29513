"""The training script: from a recipe to a model that anyone can load, or one clear error for all.

One test launches a whole job as a user does. The others run the script's `main` on two ranks of the
harness, each in a directory of its own, as two hosts without a shared disk have it; only the run's
output lies where both see it. So what is damaged can be damaged on one host alone.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from finetune_hosts import (
    BYTES,
    HOSTS,
    RECIPE,
    SAVED,
    SCRIPT,
    STEPS,
    make_host,
    rows_of,
    run_script,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from hybridsp.train import finetune

PRELOAD += [*DEEPSPEED, finetune.__name__]

LAUNCH_SECONDS = 150


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def snapshot(directory):
    """Each path below, with time of change and content."""
    return {
        path.relative_to(directory): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in directory.rglob("*")
    }


def launch(directory, *overrides, ranks, device):
    """Run the script by DeepSpeed's launcher; nothing of it is left, whatever it does."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(port), str(SCRIPT), "recipe.yaml", *overrides]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(directory / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    job = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=LAUNCH_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # as it is after an orderly end
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, output


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_launched_job_trains_a_model_that_anyone_can_load(tmp_path, device):
    run, ulysses = tmp_path / "run", {"cpu": 2, "cuda": 1}[device]
    make_host(tmp_path, "run", ring=2, ulysses=ulysses, deepspeed="zero3")
    code, output = launch(tmp_path, "schedule=linear", ranks=2 * ulysses, device=device)
    assert code == 0, output
    assert f"dp 1 x ring 2 x ulysses {ulysses} on {device}" in output
    assert "ZeRO stage      3" in output

    losses, evaluations = rows_of(run, "loss"), rows_of(run, "eval_loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert list(evaluations) == [0, SAVED, STEPS]
    assert losses[STEPS] < losses[1] - 0.5
    assert evaluations[STEPS] < evaluations[0] - 0.5
    assert set(rows_of(run, "tokens").values()) == {RECIPE["seq_length"]}
    rates = rows_of(run, "learning_rate")
    falls = {step: 1e-2 * (STEPS + 1 - step) / STEPS for step in rates}  # linear, as overridden
    assert rates == pytest.approx(falls)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(list(losses.values()))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step-000003", "step-000006"]
    assert (run / "checkpoints" / "latest").read_text() == "step-000006"
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    unchanged = [k for k, v in model.state_dict().items() if torch.equal(v, before[k])]
    assert not unchanged
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "model")
    prompt = tokenizer(RECIPE["generate_prompt"], return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=RECIPE["max_new_tokens"], do_sample=False)
    continued = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "The trained model is in run/model\n" in output
    assert f"\n{continued}\n" in output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two hosts."""
    directory = tmp_path_factory.mktemp("finished")
    for host in HOSTS:
        make_host(directory / host, Path("..") / "run", ulysses=2)
    results = run_ranks(run_script, 2, directory, [])
    assert [code for code, _, _ in results] == [0, 0]
    return directory


@pytest.fixture
def project(finished, tmp_path):
    """A copy of it, for one test to break."""
    return shutil.copytree(finished, tmp_path / "project")


def test_a_resumed_run_ends_with_the_same_bytes(finished, project):
    shutil.rmtree(project / "run" / "checkpoints" / "step-000006")
    shutil.rmtree(project / "run" / "model")
    (first, out, _), (second, silence, _) = run_ranks(run_script, 2, project, ["async_save=true"])
    assert (first, second) == (0, 0)
    assert "3 taken, 6 in all" in out
    assert silence == ""
    weights = Path("run") / "model" / "model.safetensors"
    assert (project / weights).read_bytes() == (finished / weights).read_bytes()
    for column in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        assert rows_of(project / "run", column) == rows_of(finished / "run", column)


def test_a_changed_rate_holds_from_the_first_step_after_a_resume(finished, project):
    shutil.rmtree(project / "run" / "checkpoints" / "step-000006")
    changes = ["learning_rate=0.02", "generate_prompt=null"]
    results = run_ranks(run_script, 2, project, changes)
    assert [code for code, _, _ in results] == [0, 0]
    before, after = (rows_of(run / "run", "learning_rate") for run in (finished, project))
    assert after == pytest.approx({k: rate * (2 if k > 3 else 1) for k, rate in before.items()})


def test_an_evaluation_that_a_stop_has_left_out_is_made_up_for(finished, project):
    record = project / "run" / "metrics.jsonl"
    lines = record.read_text().splitlines()
    left_out = next(line for line in reversed(lines) if '"eval_loss"' in line)
    assert json.loads(left_out)["step"] == 6
    record.write_text("".join(f"{line}\n" for line in lines if line != left_out))
    results = run_ranks(run_script, 2, project, ["generate_prompt=null"])
    assert [code for code, _, _ in results] == [0, 0]
    assert rows_of(project / "run", "eval_loss") == rows_of(finished / "run", "eval_loss")


def test_nothing_is_trained_again_after_the_last_step(finished, project):
    results = run_ranks(run_script, 2, project, ["generate_prompt=null"])
    assert [code for code, _, _ in results] == [0, 0]
    assert "6 taken, 6 in all" in results[0][1]
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/latest"):
        assert (project / "run" / name).read_bytes() == (finished / "run" / name).read_bytes()


def refused(project, *arguments):
    """The message that both ranks end with, exit code 2, while every file stays as it was."""
    before = snapshot(project)
    results = run_ranks(run_script, 2, project, [*arguments], timeout=30)
    caches = [project / host / "cache" for host in HOSTS]
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    after = snapshot(project)
    times = {Path(host) for host in HOSTS}  # which the cache has changed
    assert {k: v for k, v in after.items() if k not in times} == {
        k: v for k, v in before.items() if k not in times and "cache" not in k.parts
    }
    assert [code for code, _, _ in results] == [2, 2], results
    first, second = (error for _, _, error in results)
    message = first.removeprefix("error: ")
    assert first != message
    assert second.replace(*reversed(HOSTS)) == f"error on rank 1: {message}"
    assert message.endswith("\n")
    return message.removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ulyses=2"], "command line: unknown key 'ulyses'; did you mean 'ulysses'?"),
        (["betas=[0.9"], "betas=[0.9"),
        (["model=nowhere"], "model = 'nowhere' holds no config.json: download"),
        (["data=nowhere.jsonl"], "data = 'nowhere.jsonl' matches no file"),
        (["seq_length=0"], "seq_length = 0: Input should be greater than or equal to 1"),
        (["seq_length=-8"], "seq_length = -8: Input should be greater than or equal to 1"),
        (["seq_length=100000"], "data: the corpus has 3200 tokens in 40 documents, but one sample"),
        (["seq_length=400"], "eval_data: the corpus has 284 tokens in 4 documents"),
        (["ring=3", "ulysses=1"], "ring * ulysses = 3 * 1 = 3 does not divide the job's 2 ranks"),
        (["deepspeed={gradient_cliping: 1.0}"], "did you mean 'gradient_clipping'?"),
        (["deepspeed={gradient_accumulation_steps: 4}"], "= 4 contradicts the recipe's gradient"),
        # What does not fit the checkpoint that is there.
        (["resume=never"], "resume = 'never', but"),
        (["max_steps=5"], "max_steps = 5, but the checkpoint has taken 6: raise it"),
        (["dtype=bfloat16"], "saved at dtype = float32, but this run has dtype = bfloat16"),
        (["seed=1"], "the data state has seed=0, but"),
        (["seq_length=40"], "the data state has num_samples="),
        (["deepspeed={zero_optimization: {stage: 0}}"], "only ZeRO 1, 2 and 3 can be exchanged"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_recipe_that_cannot_be_followed_is_refused(project, arguments, expected):
    message = refused(project, *arguments)
    assert expected in message
    assert "\n" not in message


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def deepen(host):
    kinds = [*tiny_config().layer_types, "full_attention"]
    edit_json(host / "model" / "config.json", num_hidden_layers=5, layer_types=kinds)


def mamba(host):
    config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=len(BYTES) + 1)
    MambaForCausalLM(config).save_pretrained(host / "model")


def edit_config(**changes):
    return lambda host: edit_json(host / "model" / "config.json", **changes)


# What happens to a host's files, and what the message says at least.
DAMAGES = {
    "corrupt weights": (
        lambda host: halve(host / "model" / "model.safetensors"),
        ["model/model.safetensors", "incomplete metadata"],
    ),
    "no weights": (
        lambda host: (host / "model" / "model.safetensors").unlink(),
        ["model holds neither model.safetensors nor"],
    ),
    "corrupt config": (lambda host: halve(host / "model" / "config.json"), ["config.json"]),
    "no tokenizer": (
        lambda host: [file.unlink() for file in (host / "model").glob("token*")],
        ["model holds no tokenizer (tokenizer.json, tokenizer_config.json): copy its files there"],
    ),
    "corrupt tokenizer": (lambda host: halve(host / "model" / "tokenizer.json"), ["tokenizer"]),
    "other shapes": (edit_config(vocab_size=300), ["model does not fit its own config"]),
    "missing layer": (deepen, ["model does not fit its own config", "model.layers.4."]),
    "text for a number": (edit_config(hidden_size="36"), ["'hidden_size' expected int"]),
    "unknown mixer": (
        edit_config(layer_types=["sliding_attention"] * 4),
        ["layer_types[0] = 'sliding_attention' is unknown"],
    ),
    "unknown family": (
        edit_config(model_type="hybrid_xyz", auto_map={}),  # else transformers asks to run its code
        ["model_type = 'hybrid_xyz' is unknown"],
    ),
    "family without adapter": (mamba, ["'mamba' (MambaForCausalLM, token mixers MambaMixer"]),
    "corrupt data": (
        lambda host: halve(host / "data" / "train.jsonl"),
        ["source='data/train.jsonl' cannot be read: "],
    ),
    "empty data": (
        lambda host: (host / "data" / "heldout.jsonl").write_text(""),
        ["source='data/heldout.jsonl' names no file with content"],
    ),
    "corrupt DeepSpeed JSON": (
        lambda host: halve(host / "ds.json"),
        ["deepspeed = 'ds.json' is no valid JSON"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_one_error_of_all_ranks(project, name):
    damage, expected = DAMAGES[name]
    for host in HOSTS:
        damage(project / host)
    message = refused(project)
    assert all(part in message for part in expected), message
    assert not message.startswith("rank")
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "corrupt weights",
        "corrupt tokenizer",
        "missing layer",
        "family without adapter",
        "corrupt data",
        "corrupt DeepSpeed JSON",
    ],
)
def test_a_file_damaged_on_one_host_is_an_error_of_all_ranks(project, name):
    damage, expected = DAMAGES[name]
    damage(project / "host1")
    message = refused(project)
    assert message.startswith("rank 1: ")
    assert all(part in message for part in expected), message


def test_a_checkpoint_of_another_model_is_not_resumed(project):
    smaller = tiny_model(vocab_size=len(BYTES) + 1, intermediate_size=20)
    for host in HOSTS:
        smaller.save_pretrained(project / host / "model")
    assert "step-000006" in refused(project)


def test_a_truncated_checkpoint_is_not_resumed(project):
    step = project / "run" / "checkpoints" / "step-000006"
    optimizer = next(step.glob("*rank_1*optim_states.pt"))
    os.truncate(optimizer, optimizer.stat().st_size - 1)
    message = refused(project, f"resume=../run/checkpoints/{step.name}")
    assert f"{optimizer.name} has" in message
    assert "delete that directory to resume from the checkpoint before it" in message


def test_an_output_directory_that_is_a_file_is_refused(project):
    (project / "taken").write_text("something else")
    assert "taken" in refused(project, "output_dir=../taken")


def test_a_record_that_cannot_be_read_is_refused(project):
    record = project / "run" / "metrics.jsonl"
    record.write_text("not JSON\n" + record.read_text())
    assert "line 1 of ../run/metrics.jsonl is no JSON object" in refused(project)
