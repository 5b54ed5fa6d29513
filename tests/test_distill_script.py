"""The script of three phases: from a raw conversion to a model that anyone can load.

Its `main` runs on two ranks of the harness, each in a directory of its own, as two hosts without a
shared disk have it; only the run's output lies where both see it.
"""

import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from distributed import DEEPSPEED, PRELOAD, run_ranks
from finetune_hosts import HOSTS, byte_tokenizer, make_host, run_script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hybridsp.convert import convert_model
from hybridsp.train import distill

PRELOAD += [*DEEPSPEED, distill.__name__]

RESULTS = ("aligned", "distilled", "finetuned")
RECIPE = {
    "teacher": "teacher",
    "model": "model",
    "data": "data/train.jsonl",
    "eval_data": "data/heldout.jsonl",
    "output_dir": "../run",
    "deepspeed": "ds.json",
    "seq_length": 48,
    "ulysses": 2,
    "eval_every": 4,
    "save_every": 3,
    "align": {"max_steps": 6, "learning_rate": 1e-2},
    "distill": {
        "max_steps": 8,
        "learning_rate": 1e-3,
        "converted_learning_rate": 5e-3,
        "micro_batch_size": 2,
    },
    "finetune": {
        "learning_rate": 1e-3,
        "stages": [{"seq_length": 48, "max_steps": 2}, {"seq_length": "64", "max_steps": 2}],
    },
}


def train_teacher(tokenizer, directory):
    """A tiny Llama that has learnt documents such as the harness makes."""
    sentence, text = "one two three four, one two three four. ", []
    for i in range(40):
        text += [*tokenizer(sentence * (1 + i % 3))["input_ids"], tokenizer.eos_token_id]
    tokens = torch.tensor(text)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    teacher = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(60):
        starts = torch.randint(len(tokens) - 48, (8,)).tolist()
        rows = torch.stack([tokens[start : start + 48] for start in starts])
        teacher(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return teacher


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two hosts with a teacher, its raw conversion, documents and the recipe."""
    directory = tmp_path_factory.mktemp("project")
    tokenizer = byte_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model several only wait for each other
    teacher = train_teacher(tokenizer, directory / "teacher")
    torch.set_num_threads(threads)
    convert_model(teacher, [1]).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for host in HOSTS:
        make_host(directory / host, "unused")
        for folder in ("teacher", "model"):
            shutil.rmtree(directory / host / folder, ignore_errors=True)
            shutil.copytree(directory / folder, directory / host / folder)
        (directory / host / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return directory


def succeed(directory, *arguments):
    """Output of rank 0."""
    results = run_ranks(run_script, 2, directory, arguments, distill.main, timeout=240)
    assert [code for code, _, _ in results] == [0, 0], results[0]
    return results[0][1]


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """The run, finished."""
    directory = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(project, directory)
    return directory, succeed(directory)


def rows_of(directory, phase, key):
    lines = (directory / "run" / phase / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_three_phases_recover_what_conversion_lost(finished):
    directory, output = finished
    run = directory / "run"
    summary = json.loads((run / "summary.json").read_text())
    first, last = rows_of(directory, "align", "mse"), rows_of(directory, "finetune", "eval_loss")
    assert first[6] < 0.8 * first[1]
    assert set(rows_of(directory, "align", "mse/layer_02")) == set(range(1, 7))
    divergence = rows_of(directory, "distill", "kl")
    assert divergence[8] < 0.8 * divergence[1]
    assert summary["teacher_loss"] < summary["converted_loss"]
    assert [row["phase"] for row in summary["phases"]] == ["align", "distill", "finetune"]
    assert [row["tokens"] for row in summary["phases"]] == [6 * 48, 8 * 96, 2 * 48 + 2 * 64]
    assert summary["phases"][-1]["eval_loss"] == last[4]
    recovered = [row["recovered"] for row in summary["phases"]]
    assert 0.2 < recovered[0] < 0.8 < min(recovered[1:])
    assert (run / "recovery.png").read_bytes().startswith(b"\x89PNG")
    assert f"{recovered[2]:.1%}" in output
    # The sections' losses are of the same held-out sequences, whatever their own length is.
    assert rows_of(directory, "distill", "eval_loss")[0] == pytest.approx(
        rows_of(directory, "align", "eval_loss")[6], rel=1e-5
    )


def test_fewer_held_out_sequences_than_all_are_spread_over_all(tmp_path, monkeypatch):
    """The first ones may all lie in one long document."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh" * 5)
    recipe = SimpleNamespace(eval_seq_length=4, eval_sequences=3)
    settings = SimpleNamespace(eval_data=str(tmp_path / "text.txt"), seed=0)
    mesh = SimpleNamespace(dp=1, dp_rank=0)
    every, three = (
        distill.held_out_data(one, settings, byte_tokenizer(), mesh).dataset["input_ids"]
        for one in (SimpleNamespace(**{**vars(recipe), "eval_sequences": None}), recipe)
    )
    assert len(every) == 10
    assert [row.tolist() for row in three] == [every[at].tolist() for at in (0, 3, 6)]


def test_each_phase_leaves_a_model_in_which_only_the_right_weights_have_learnt(finished):
    directory, _ = finished
    before = weights(directory / "model")
    for name in RESULTS:
        after = weights(directory / "run" / name)
        changed = {n for n in after if not torch.equal(after[n], before[n])}
        mixers = {n for n in after if ".linear_attn." in n}
        assert changed == (mixers if name == "aligned" else set(after)), name
        before = after


def test_a_run_stopped_in_the_middle_of_a_phase_ends_with_the_same_bytes(finished, tmp_path):
    directory = shutil.copytree(finished[0], tmp_path / "project")
    run = directory / "run"
    for left in ("distilled", "finetuned", "finetune", "distill/checkpoints/step-000008"):
        shutil.rmtree(run / left)
    output = succeed(directory)
    assert "align: ../run/aligned is there already" in output
    assert "6 taken, 8 in all" in output
    for name in RESULTS:
        again = (run / name / "model.safetensors").read_bytes()
        assert again == (finished[0] / "run" / name / "model.safetensors").read_bytes(), name
    assert "there already" in succeed(directory)


def test_zero_3_cuts_the_teacher_too_and_changes_nothing(finished, project, tmp_path):
    """The run above is at ZeRO-3, as make_host has it; here at ZeRO-1."""
    directory = shutil.copytree(project, tmp_path / "project")
    succeed(directory, "deepspeed=zero1", "ulysses=1", "ring=2")
    for phase in ("align", "distill", "finetune"):
        got, want = (rows_of(d, phase, "loss") for d in (directory, finished[0]))
        assert got == pytest.approx(want, rel=1e-3), phase
