"""What another world or ZeRO stage restores is to the bit what was saved, trained or not."""

import random

import deepspeed
import numpy as np
import pytest
import torch
from checkpoint_cases import draws, make_engine, train, weights
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from distributed import run_ranks
from trainer_cases import Documents, arguments, history, model_of, zero

import hybridsp
from hybridsp.checkpoint import load_checkpoint, save_checkpoint
from hybridsp.mesh import SPMesh
from hybridsp.trainer import Trainer

BF16 = {"bf16": {"enabled": True}}
FP32_GRADIENTS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    # name: (ZeRO stage, changes of the engine); DeepSpeed's BF16_Optimizer is the second
    "1": (1, {}),
    "1-bf16": (1, FP32_GRADIENTS),
    "2-frozen": (2, {"frozen": "layers.0"}),
    "3": (3, {}),
    "3-bf16": (3, BF16),
    "3-frozen": (3, {"frozen": "layers.0"}),
}
PAIRS = [("1", "3"), ("3", "1"), ("1-bf16", "3-bf16"), ("3-bf16", "1-bf16"), ("3", "3")]
PAIRS += [("2-frozen", "3-frozen"), ("3-frozen", "2-frozen")]


def start(mesh, case, seed):
    stage, changes = CASES[case]
    return make_engine(mesh, stage, seed=seed, **changes)


def everything(engine):
    """Weights of the model, fp32 masters and moments, and what is left of the engine's state."""
    if engine.zero_optimization_stage() < 3:  # else they are linked at the next step
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    whole = {n: [safe_get_full_fp32_param(p).clone()] for n, p in trained}
    for name, parameter in trained:
        for key in ("exp_avg", "exp_avg_sq"):
            whole[name].append(safe_get_full_optimizer_state(parameter, key).clone())
    group = engine.optimizer.param_groups[0]
    options = {key: group[key] for key in ("lr", "betas", "weight_decay")}
    steps = engine.global_steps, engine.skipped_steps, engine.lr_scheduler.state_dict()
    return weights(engine), whole, options, steps


def save_each(directory):
    mesh = SPMesh()
    found = {}
    for case in CASES:
        engine = start(mesh, case, seed=0)
        torch.manual_seed(5)
        train(engine, mesh, 2)
        save_checkpoint(engine, mesh, directory / case, 2, {"case": case})
        found[case] = everything(engine)
    return found


def load_each(directory):
    mesh = SPMesh()
    found, generators = {}, []
    for source, target in PAIRS:
        engine = start(mesh, target, seed=9)
        assert load_checkpoint(engine, mesh, directory / source) == {"case": source}
        generators.append(draws())
        found[source, target] = everything(engine)
        deepspeed.comm.barrier()
    return found, generators


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_every_number_arrives_as_it_was_saved(before, after, tmp_path):
    saved, *_ = run_ranks(save_each, before, tmp_path, timeout=200)
    results = run_ranks(load_each, after, tmp_path, timeout=200)
    for loaded, _ in results:
        for (source, _), state in loaded.items():
            torch.testing.assert_close(state, saved[source], rtol=0, atol=0)
    # The generators are seeded anew, each rank's otherwise, always alike.
    drawn = [generators for _, generators in results]
    assert all(draw == draws[0] for draws in drawn for draw in draws)
    assert len({tuple(draws[0]) for draws in drawn}) == after
    random.seed(0)
    np.random.seed(0)


def lacking(directory):
    mesh = SPMesh()
    engine = make_engine(mesh, 2, frozen="layers.0")
    train(engine, mesh, 1)
    save_checkpoint(engine, mesh, directory, 1, {})
    with pytest.raises(ValueError, match=r"has 0 of the .* elements of .*layers\.0.* resume with"):
        load_checkpoint(make_engine(mesh, 3), mesh, directory)
    engine = make_engine(mesh, 3)
    train(engine, mesh, 1)
    save_checkpoint(engine, mesh, directory / "all", 1, {})
    with pytest.raises(ValueError, match=r"has trained .*layers\.0.*, which this run does not"):
        load_checkpoint(make_engine(mesh, 2, frozen="layers.0"), mesh, directory / "all")


def test_a_checkpoint_that_trained_other_parameters_is_refused(tmp_path):
    run_ranks(lacking, 2, tmp_path)


def trainer_of(mesh, directory, stage, **options):
    model = model_of("hybrid")
    hybridsp.parallelize(model, mesh)
    args = arguments(directory, deepspeed=zero(stage), max_steps=4, **options)
    return Trainer(model, args, train_dataset=Documents(), mesh=mesh, self_check=False)


def change_the_mesh_of_a_trainer(directory):
    """Losses of a run, of one that goes on at another mesh, and why a third cannot."""
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(SPMesh(ring=2), directory, 2, **saved)
    whole.train()
    mesh, checkpoint = SPMesh(ring=4), f"{directory}/checkpoint-2"
    resumed = trainer_of(mesh, f"{directory}/other", 3, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=checkpoint)
    other = trainer_of(mesh, f"{directory}/other", 3)
    with pytest.raises(ValueError, match="steps have 2 sequences, this run's 1"):
        other.train(resume_from_checkpoint=checkpoint)
    return history(whole, "loss", "learning_rate"), history(resumed, "loss", "learning_rate")


def test_a_trainer_goes_on_at_another_mesh_and_stage(tmp_path):
    undisturbed, resumed = run_ranks(change_the_mesh_of_a_trainer, 4, tmp_path, timeout=400)[0]
    assert len(resumed) == 4
    for here, there in zip(resumed, undisturbed, strict=True):
        assert here == pytest.approx(there, rel=2e-4)  # both are logged rounded
