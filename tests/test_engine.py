"""The engine against one process: loss and every gradient, at every mesh and ZeRO stage."""

import itertools

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, expect_raises, run_ranks
from tiny import batch_of, reference_loss_sum, tiny_model

import hybridsp

PRELOAD += DEEPSPEED

LENGTH = 32
# One step for two data-parallel ranks. On four ranks of 8 tokens: a document cut by a rank edge,
# one aligned with it, one spanning three ranks, one of a single token; ranks without any label.
PACKED = [
    batch_of(1, LENGTH, seed=1, cu_seqlens=[0, 1, 5, 24, 32], ignored=[slice(0, 9)]),
    batch_of(1, LENGTH, seed=2, cu_seqlens=[0, 8, 30, 32], ignored=[slice(14, 32)]),
]
UNPACKED = [
    batch_of(2, LENGTH, seed=3, ignored=[slice(20, 32)]),
    batch_of(2, LENGTH, seed=4, ignored=[slice(3, 5)]),
]
STAGES = [(0, True), (1, True), (2, True), (3, True), (3, False)]


def deepspeed_config(stage=3, reduce_scatter=True, **changes):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": reduce_scatter,
            "reduce_bucket_size": 10000,
            "stage3_param_persistence_threshold": 0,
        },
        **changes,
    }


def reference(batches, **model_options):
    """Mean loss and gradients of one process on whole sequences."""
    model = tiny_model(**model_options)
    sums, counts = zip(*(reference_loss_sum(model, batch) for batch in batches), strict=True)
    loss = sum(sums) / sum(counts)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), grads


def gradients_on_mesh(ring, ulysses, dp_batches, stages, model_options):
    """Loss and gradients at each stage."""
    from deepspeed.utils import safe_get_full_grad

    mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
    batch = dp_batches[mesh.dp_rank]
    results = []
    for stage, reduce_scatter in stages:
        model = tiny_model(**model_options)
        hybridsp.parallelize(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config = deepspeed_config(stage, reduce_scatter)
        engine = hybridsp.initialize(model, mesh, config, optimizer=optimizer)
        loss = engine(**hybridsp.shard_batch(batch, mesh)).loss
        engine.backward(loss)
        grads = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
        results.append((loss.item(), grads))
    return results


def meshes(ranks):
    """Every (ring, ulysses) for P = ranks."""
    return [(ranks // u, u) for u in range(1, ranks + 1) if ranks % u == 0]


def check(ring, ulysses, dp, batches, stages, **model_options):
    expected_loss, expected = reference(batches[:dp], **model_options)
    results = run_ranks(
        gradients_on_mesh,
        dp * ring * ulysses,
        ring,
        ulysses,
        batches[:dp],
        stages,
        model_options,
        timeout=180,
    )
    scale = max(grad.abs().max() for grad in expected.values())
    for rank_result in results:
        for (stage, _), (loss, grads) in zip(stages, rank_result, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5), f"loss at stage {stage}"
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(
                    grad,
                    expected[name],
                    rtol=1e-5,
                    atol=1e-5 * scale,
                    msg=lambda m, n=name, s=stage: f"{n} at stage {s}: {m}",
                )


@pytest.mark.parametrize("batches", [PACKED, UNPACKED], ids=["packed", "unpacked"])
@pytest.mark.parametrize(("ring", "ulysses"), [*meshes(1), *meshes(2), *meshes(4)])
def test_gradients_equal_one_process(ring, ulysses, batches):
    """ZeRO-0 (plain all-reduce) and ZeRO-3 (DeepSpeed's other divisor) at every split."""
    check(ring, ulysses, 1, batches, [(0, True), (3, True)])


@pytest.mark.parametrize("batches", [PACKED, UNPACKED], ids=["packed", "unpacked"])
@pytest.mark.parametrize(("ring", "ulysses", "dp"), [(1, 1, 2), (2, 1, 2), (1, 2, 2)])
def test_gradients_equal_one_process_in_data_parallel(ring, ulysses, dp, batches):
    check(ring, ulysses, dp, batches, STAGES)
