"""What a recipe can ask of the training script beyond its plain run: stages, LoRA, offload."""

import json
import shutil

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from finetune_hosts import HOSTS, make_host, rows_of, run_script
from peft import PeftModel
from safetensors.torch import load_file
from tiny_softmax import logits
from transformers import AutoModelForCausalLM

from hybridsp.train import finetune

PRELOAD += [*DEEPSPEED, finetune.__name__, "peft"]

STAGES = [
    {"seq_length": 32, "max_steps": 2, "gradient_accumulation_steps": 2},
    {"seq_length": 48, "max_steps": 4, "rope_parameters": {"rope_theta": 5e5}},
    {
        "seq_length": 96,
        "max_steps": 2,
        "learning_rate": 5e-3,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
]


def make_hosts(directory, **changes):
    """Two hosts with one run; `changes` replace keys of the recipe, None takes them out."""
    for host in HOSTS:
        make_host(directory / host, "../run", ulysses=2, generate_prompt=None, **changes)


def run(directory, *overrides):
    results = run_ranks(run_script, 2, directory, [*overrides], timeout=150)
    assert [code for code, _, _ in results] == [0, 0], results
    return results[0][1]


@pytest.mark.parametrize("config", ["zero3", "zero2"])
def test_a_curriculum_resumes_in_the_middle_of_any_stage(tmp_path, config):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"stages": STAGES, "save_every": 1, "keep_checkpoints": 99, "eval_every": 2}
    if config == "zero2":
        zero = {"stage": 2, "reduce_bucket_size": 10000, "allgather_bucket_size": 10000}
        settings["deepspeed"] = {"zero_optimization": zero, "gradient_clipping": 1.0}
    make_hosts(whole, seq_length=96, max_steps=8, **settings)
    out = run(whole)
    assert "steps 3-6       48 tokens per step (1 sequences of 48)" in out
    assert rows_of(whole / "run", "stage") == {
        0: 1,
        1: 1,
        2: 1,
        **dict.fromkeys(range(3, 7), 2),
        **dict.fromkeys((7, 8), 3),
    }
    assert set(rows_of(whole / "run", "seq_length").values()) == {32, 48, 96}
    assert list(rows_of(whole / "run", "tokens").values()) == [64] * 2 + [48] * 4 + [96] * 2
    assert list(rows_of(whole / "run", "eval_loss")) == [0, 2, 4, 6, 8]
    saved = json.loads((whole / "run" / "model" / "config.json").read_text())
    assert saved["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    assert saved["max_position_embeddings"] == 128, "which it was, and more than any stage's"

    # In the middle of a stage, between two stages, and behind the last step.
    for step in (1, 2, 4, 7, 8):
        shutil.copytree(whole, parts)
        for checkpoint in (parts / "run" / "checkpoints").glob("step-*"):
            if checkpoint.name > f"step-{step:06d}":
                shutil.rmtree(checkpoint)
        (parts / "run" / "checkpoints" / "latest").unlink()
        shutil.rmtree(parts / "run" / "model")
        # As a signal behind this step leaves it, which an evaluation does not wait for.
        record = parts / "run" / "metrics.jsonl"
        rows = map(json.loads, record.read_text().splitlines())
        kept = [row for row in rows if not (row["step"] == step and "eval_loss" in row)]
        record.write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert f"{step} taken, 8 in all" in run(parts)
        for column in ("loss", "eval_loss", "learning_rate", "grad_norm", "stage"):
            assert rows_of(parts / "run", column) == rows_of(whole / "run", column), (step, column)
        for file in ("model.safetensors", "config.json"):
            paths = [place / "run" / "model" / file for place in (parts, whole)]
            assert paths[0].read_bytes() == paths[1].read_bytes(), (step, file)
        shutil.rmtree(parts)
    moved = ["seq_length=48", "stages=" + json.dumps([STAGES[0], {**STAGES[1], "max_steps": 6}])]
    refused = run_ranks(run_script, 2, whole, moved)
    assert [code for code, _, _ in refused] == [2, 2]
    assert "step 8 was one of stage 3, but by this recipe it is one of stage 2" in refused[0][2]


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_leaves_an_adapter_and_a_merged_model(tmp_path, stage):
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    zero = {"stage": stage, "reduce_bucket_size": 10000}
    settings = {"deepspeed": {"zero_optimization": zero}, "activation_checkpointing": True}
    make_hosts(tmp_path, lora=lora, schedule="constant", **settings)
    out = run(tmp_path)
    assert " trained)" in out
    losses = rows_of(tmp_path / "run", "loss")
    assert losses[6] < losses[1] - 0.2

    base, result = tmp_path / HOSTS[0] / "model", tmp_path / "run"
    tokens = torch.arange(20)[None]
    load = AutoModelForCausalLM.from_pretrained
    merged = logits(load(result / "model"), tokens)
    on_base = logits(PeftModel.from_pretrained(load(base), str(result / "adapter")), tokens)
    torch.testing.assert_close(merged, on_base, rtol=1e-4, atol=1e-4)

    adapter = load_file(result / "adapter" / "adapter_model.safetensors")
    record = (result / "metrics.jsonl").read_text()
    shutil.rmtree(result / "checkpoints" / "step-000006")
    run(tmp_path)
    assert rows_of(result, "loss") == losses
    assert len((result / "metrics.jsonl").read_text().splitlines()) == len(record.splitlines())
    again = load_file(result / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(again, adapter, rtol=0, atol=0)
    refused = run_ranks(run_script, 2, tmp_path, ["lora=" + json.dumps({**lora, "alpha": 9})])
    assert [code for code, _, _ in refused] == [2, 2]
    assert "lora.alpha = 9.0, but the checkpoint was trained with 8.0: keep" in refused[0][2]


def test_memory_options_change_no_number(tmp_path):
    """Optimizer offload by name, tiles, attention computed twice, no check: the same losses."""
    make_hosts(tmp_path, eval_data=None, eval_every=None)
    run(tmp_path, "output_dir=../plain")
    saving = ["deepspeed=zero3_offload", "activation_checkpointing=true", "keep_attention=false"]
    saving += ["offload_activations=true", "tiled_mlp=5", "self_check=false"]
    run(tmp_path, "output_dir=../saving", *saving)
    plain, saved = (rows_of(tmp_path / name, "loss") for name in ("plain", "saving"))
    assert saved == pytest.approx(plain, rel=1e-4)
    assert len(saved) == 6
