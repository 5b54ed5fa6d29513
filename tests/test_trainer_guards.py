"""The Trainer's guards: bad steps, signals, ranks out of step, and a rank that hangs."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from distributed import RankFailedError, run_ranks
from safetensors.torch import load_file
from test_trainer import make_trainer, pytestmark, spare_a_compiler
from test_trainer_misuse import message_of
from trainer_cases import Documents, history, zero

import hybridsp
from hybridsp.trainer.guards import Guards

__all__ = ["pytestmark"]

STOPPED_AT = 2


class Recorder(transformers.TrainerCallback):
    """This rank's part of the weights behind each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        parts = [getattr(p, "ds_tensor", p).detach().clone() for p in model.parameters()]
        self.weights.append(parts)

    def unchanged(self):
        """Steps, from 2, that changed nothing."""
        pairs = zip(self.weights[1:], self.weights[:-1], strict=True)
        same = [all(map(torch.equal, new, old)) for new, old in pairs]
        return [step for step, is_same in enumerate(same, start=2) if is_same]


def poison(trainer, bad_steps):
    """Let the second rank's hidden states be NaN in some steps."""

    def spoil(_module, _inputs, hidden):
        is_bad = trainer.mesh.rank == 1 and trainer.state.global_step + 1 in bad_steps
        return hidden * math.nan if is_bad else hidden

    trainer.model.get_input_embeddings().register_forward_hook(spoil)


def bad_steps(directory):
    """What is seen of a bad step at each ZeRO stage, and the error after too many."""
    spare_a_compiler()
    mesh, seen = hybridsp.SPMesh(ring=2), {}
    options = {"kind": "dense", "max_steps": 4, "gradient_accumulation_steps": 2}
    for stage in (0, 2, 3):
        recorder = Recorder()
        trainer = make_trainer(
            mesh, f"{directory}/{stage}", zero(stage), callbacks=[recorder], **options
        )
        poison(trainer, {3})
        output = trainer.train()
        rates = [rate for (rate,) in history(trainer, "learning_rate")]
        counts = [row.get("bad_steps") for row in trainer.state.log_history]
        seen[stage] = recorder.unchanged(), rates, counts, output.metrics.get("bad_steps")
    lost = make_trainer(
        mesh, f"{directory}/lost", zero(0), max_bad_steps=2, self_check=False, **options
    )
    poison(lost, {1, 3, 4})
    return seen, message_of(lost.train), lost.state.global_step


def test_bad_steps_are_left_out_and_counted_and_too_many_are_an_error(tmp_path):
    for seen, message, steps in run_ranks(bad_steps, 2, str(tmp_path), timeout=400):
        for unchanged, rates, counts, total in seen.values():
            assert unchanged == [3]
            assert rates[3] == rates[2] != rates[1], "the schedule stands still too"
            assert counts == [None, None, 1, 1, 1]
            assert total == 1
        assert "had all of the last 2 (max_bad_steps)" in message
        assert steps == 4, "a bad step before good ones does not count"
    kept = tmp_path / "3" / "bad_steps" / "step-000003"
    facts = json.loads((kept / "step.json").read_text())
    assert facts["loss"] == "nan"
    assert facts["mesh"] == {"dp": 1, "ring": 2, "ulysses": 1}
    parts = [load_file(kept / f"rank-0000{rank}.safetensors") for rank in (0, 1)]
    assert all({"0.input_ids", "1.shift_labels"} <= part.keys() for part in parts)


class Terminate(transformers.TrainerCallback):
    """Sends the second rank SIGTERM in a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == STOPPED_AT and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_and_resumed(directory, config, strategy):
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ulysses=2)
    options = {
        "max_steps": 4,
        "save_strategy": strategy,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": Documents(3, seed=1),
        "per_device_train_batch_size": 6,  # an epoch ends within the third step
    }
    results = []
    for name, callbacks, resume in [
        ("whole", [], None),
        ("stopped", [Terminate()], None),
        ("stopped", [], True),
    ]:
        output_dir = f"{directory}/{name}"
        trainer = make_trainer(mesh, output_dir, config, callbacks=callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        logs = history(trainer, "loss", "grad_norm", "learning_rate")
        evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
        results.append((trainer.stopped_by, logs, evaluated))
        if name == "whole" or resume:
            trainer.save_model()
    return results


@pytest.mark.parametrize(("stage", "strategy"), [(3, "no"), (0, "epoch")])
def test_a_signal_saves_and_stops_and_the_resumed_run_ends_bitwise(stage, strategy, tmp_path):
    ranks = run_ranks(stopped_and_resumed, 2, str(tmp_path), zero(stage), strategy, timeout=400)
    for (none, whole, _), (name, stopped, evaluated), (again, resumed, _) in ranks:
        assert (none, name, again) == (None, "SIGTERM", None)
        assert stopped == whole[:STOPPED_AT]
        assert resumed == whole
        assert evaluated == [], "left out behind the step that was stopped"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def out_of_step(directory):
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)
    messages = {}
    for name, changes in {
        "arguments": {"logging_steps": 1 + mesh.rank},
        "configuration": {"adam_beta2": 0.9 + 0.05 * mesh.rank},
        "recomputation": {"activation_checkpointing": mesh.rank == 1},
    }.items():
        config = zero(0, optimizer={"type": "AdamW", "params": {"betas": "auto", "lr": "auto"}})
        trainer = make_trainer(mesh, directory, config, kind="dense", **changes)
        messages[name] = message_of(trainer.train)
    other = make_trainer(mesh, directory, zero(0), kind="dense")
    other.train_dataset = Documents(seed=mesh.rank)
    return {**messages, "batches": message_of(other.train)}


def test_ranks_out_of_step_are_told_on_every_rank(tmp_path):
    for messages in run_ranks(out_of_step, 2, str(tmp_path), timeout=400):
        for name, part in {
            "arguments": r"argument logging_steps differs: rank 0: 1; rank 1: 2",
            "configuration": r"DeepSpeed configuration's optimizer differs: .*0.95",
            "recomputation": r"activation checkpointing differs: rank 0: False; rank 1: True",
            "batches": "ranks that share a sequence got different batches",
        }.items():
            assert re.search(part, messages[name]), messages[name]


class Hang(transformers.TrainerCallback):
    """Keeps the second rank from its second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and torch.distributed.get_rank() == 1:
            time.sleep(300)


def hang(directory):
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)
    options = {"kind": "dense", "hang_timeout": 5.0, "callbacks": [Hang()]}
    make_trainer(mesh, directory, zero(0), **options).train()


def test_a_rank_that_hangs_ends_the_job_with_a_report(tmp_path, capfd):
    with pytest.raises(RankFailedError, match="died with exit code 70"):
        run_ranks(hang, 2, str(tmp_path), timeout=120)
    said = capfd.readouterr().out
    assert "no progress for 5 s (hang_timeout)" in said
    assert re.search(r"rank 0: step 2, \w+", said)
    assert not Path(tmp_path / "bad_steps").exists()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bad_steps": 0, "hang_timeout": 9}, "max_bad_steps = 0: give a positive integer"),
        ({"max_bad_steps": True, "hang_timeout": 9}, "max_bad_steps = True"),
        ({"max_bad_steps": 1, "hang_timeout": 0.0}, "hang_timeout = 0.0: give a positive number"),
        ({"max_bad_steps": 1, "hang_timeout": math.nan}, "hang_timeout = nan"),
    ],
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Guards(**limits)
