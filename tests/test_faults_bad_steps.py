"""A step without a finite loss or gradient: nothing changes by it, at every ZeRO stage and dtype.

A gradient is spoilt on one rank alone, as by a flipped bit; all ranks have to leave the step out.
"""

import json
import math

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from safetensors.torch import load_file
from tiny import batch_of, tiny_model

import hybridsp
from hybridsp.engine import StepResult
from hybridsp.faults import BadSteps

PRELOAD += DEEPSPEED

# ZeRO stage, bf16, accumulated micro-batches.
CASES = [
    *((stage, dtype, 1) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")),
    (2, "fp32", 2),
    (3, "bf16", 2),
]


def config_of(stage, dtype, accumulation):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10000,
            "stage3_param_persistence_threshold": 0,
        },
    }


def weights_of(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    full = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    if any(value is None for value in full.values()):  # a plain optimizer has none but the model's
        full = dict(engine.module.named_parameters())
    return {name: value.detach().clone() for name, value in full.items()}


def losses_with(mesh, case, spoil):
    """Losses of five steps of the same batches; the one in `spoil` is done twice, once spoilt.

    Returns them with the results of spoilt steps and whether the weights were moved by one.
    """
    _, dtype, accumulation = case
    model = tiny_model().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    hybridsp.parallelize(model, mesh)
    engine = hybridsp.initialize(model, mesh, config_of(*case), self_check=False)
    losses, spoilt = [], []
    for step in range(5):
        batches = [batch_of(1, 24, seed=10 * step + i) for i in range(accumulation)]
        parts = [hybridsp.shard_batch(batch, mesh) for batch in batches]
        if step in spoil:
            before = weights_of(engine)
            handle = spoil[step](engine.module, mesh)
            result = hybridsp.train_step(engine, parts)
            handle.remove()
            after = weights_of(engine)
            moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
            spoilt.append((result.skipped, math.isfinite(result.grad_norm), moved))
        result = hybridsp.train_step(engine, parts)
        assert not result.skipped
        losses.append((result.loss, result.grad_norm, engine.get_lr()))
    engine.destroy()
    return losses, spoilt


def nan_gradient(model, mesh):
    """On the last rank alone, in the middle of the model."""

    def spoil(_module, _inputs, output):
        if mesh.rank == mesh.world_size - 1:
            output.register_hook(lambda grad: grad.index_fill(1, torch.tensor([2]), math.nan))

    return model.model.layers[1].register_forward_hook(spoil)


def infinite_loss(model, mesh):
    """With gradients that are finite."""
    return model.register_forward_hook(
        lambda _module, _inputs, output: setattr(output, "loss", output.loss + math.inf)
    )


def compare_with_undisturbed():
    mesh = hybridsp.SPMesh(ulysses=2)
    found = []
    for case in CASES:
        undisturbed, _ = losses_with(mesh, case, {})
        disturbed, spoilt = losses_with(mesh, case, {0: infinite_loss, 3: nan_gradient})
        found.append((undisturbed == disturbed, spoilt))
    return found


def test_a_bad_step_changes_nothing():
    for results in run_ranks(compare_with_undisturbed, 2, timeout=150):
        for case, (equal, spoilt) in zip(CASES, results, strict=True):
            assert spoilt == [(True, False, [])] * 2, case
            assert equal, case


def count_bad_steps(directory):
    mesh = hybridsp.SPMesh(ulysses=2)
    bad_steps = BadSteps(mesh, directory, 2)
    batch = hybridsp.shard_batch(batch_of(1, 24, seed=0, cu_seqlens=[0, 10, 24]), mesh)
    good = StepResult(loss=1.0, num_tokens=24, num_labels=23, grad_norm=1.0)
    bad = StepResult(loss=math.nan, num_tokens=24, num_labels=23, grad_norm=math.inf, skipped=True)
    counts = []
    for step, result in enumerate([good, bad, good, bad], start=1):
        bad_steps.note(step, result, [batch], learning_rate=0.1)
        counts.append((bad_steps.in_a_row, bad_steps.total))
    with pytest.raises(ValueError, match=r"step 5 has loss nan .* last 2 \(max_bad_steps\)"):
        bad_steps.note(5, bad, [batch], learning_rate=0.1)
    return counts, batch


def test_their_batches_are_kept_and_too_many_in_a_row_end_the_run(tmp_path):
    results = run_ranks(count_bad_steps, 2, tmp_path)
    folders = sorted(path.name for path in (tmp_path / "bad_steps").iterdir())
    assert folders == ["step-000002", "step-000004", "step-000005"]
    for rank, (counts, batch) in enumerate(results):
        assert counts == [(0, 0), (1, 1), (0, 1), (1, 2)]
        kept = load_file(tmp_path / "bad_steps" / folders[-1] / f"rank-{rank:05d}.safetensors")
        assert set(kept) == {f"0.{name}" for name in batch}
        assert torch.equal(kept["0.input_ids"], batch["input_ids"])
    facts = json.loads((tmp_path / "bad_steps" / folders[0] / "step.json").read_text())
    assert facts["loss"] == "nan"
    assert facts["mesh"] == {"dp": 1, "ring": 1, "ulysses": 2}
