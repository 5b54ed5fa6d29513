"""The promise, as a grid: one step's gradient, norm, clipping and loss are those of one process.

    ZeRO 0 to 3 x reduce_scatter on, off x optimizer offload on, off (ZeRO 1 to 3)
    x gradient accumulation 1, 3 x every mesh of four ranks, with the same twelve sequences

A third of the sequences has no label, and none has as many as another, so ranks and whole
micro-batches are without any. On a CPU "offload" is DeepSpeed's code path for it with PyTorch's
optimizer: its own CPUAdam would be compiled, and computes no gradient.
"""

import itertools
from unittest import mock

import pytest
import torch
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_engine import deepspeed_config
from tiny import VOCABULARY, reference_loss_sum, tiny_model

import hybridsp

PRELOAD += DEEPSPEED

SEQUENCES, LENGTH = 12, 16
CLIP = 0.25
# (ring, ulysses); dp is what remains of four ranks.
MESHES = [(4, 1), (2, 2), (1, 4), (2, 1), (1, 2), (1, 1)]
FP32_GRID = [
    (stage, reduce_scatter, offload, accumulation)
    for stage, reduce_scatter, offload, accumulation in itertools.product(
        (0, 1, 2, 3), (True, False), (False, True), (1, 3)
    )
    if stage > 0 or not offload
]
BF16_GRID = [
    (stage, True, offload, accumulation)
    for stage, offload, accumulation in itertools.product((0, 1, 2, 3), (False, True), (1, 3))
    if stage > 0 or not offload
]


def small_model():
    """One layer of each kind: DeepSpeed's part is what the grid is about."""
    return tiny_model(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])


def global_batch():
    """Twelve sequences; number i has labels for its last i tokens, if i is no multiple of 3."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    labels = tokens.clone()
    for number, row in enumerate(labels):
        row[: LENGTH if number % 3 == 0 else LENGTH - number] = -100
    return tokens, labels


def micro_batches(mesh, accumulation):
    """This rank's parts of the one global batch."""
    rows = SEQUENCES // (mesh.dp * accumulation)
    tokens, labels = (x.view(accumulation, mesh.dp, rows, LENGTH) for x in global_batch())
    return [
        hybridsp.shard_batch(
            {"input_ids": tokens[i, mesh.dp_rank], "labels": labels[i, mesh.dp_rank]}, mesh
        )
        for i in range(accumulation)
    ]


def one_step(ring, ulysses, grid, dtype):
    """Of each configuration: loss, reported norm, gradient, and what the update took away."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
    results = []
    for stage, reduce_scatter, offload, accumulation in grid:
        with case((stage, reduce_scatter, offload, accumulation)):
            config = deepspeed_config(
                stage,
                reduce_scatter,
                gradient_accumulation_steps=accumulation,
                gradient_clipping=CLIP,
                bf16={"enabled": dtype == torch.bfloat16},
                zero_allow_untested_optimizer=True,
                zero_force_ds_cpu_optimizer=False,
            )
            if offload:
                config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            model = small_model().to(dtype)
            before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
            hybridsp.parallelize(model, mesh)
            # The update is then the clipped gradient itself.
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            engine = hybridsp.initialize(model, mesh, config, optimizer=optimizer, self_check=False)
            named, grads, step = dict(engine.module.named_parameters()), {}, engine.step

            def note_gradients(engine=engine, named=named, grads=grads, step=step):
                if engine.is_gradient_accumulation_boundary():
                    for name, p in named.items():
                        grads[name] = safe_get_full_grad(p).float().clone()
                step()

            with mock.patch.object(engine, "step", note_gradients):
                result = hybridsp.train_step(engine, micro_batches(mesh, accumulation))
            update = {}
            for name, p in named.items():
                after = safe_get_full_fp32_param(p) if stage > 0 else p.detach()
                update[name] = before[name] - after.float().view_as(before[name])
            results.append((result.loss, result.grad_norm, flat(grads), flat(update)))
            engine.destroy()
    return results


def flat(tensors):
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def one_process(model):
    """Mean loss and its gradient."""
    loss, count = 0.0, 0
    for tokens, labels in zip(*global_batch(), strict=True):
        one, labels_of_one = reference_loss_sum(
            model, {"input_ids": tokens[None], "labels": labels[None]}
        )
        loss, count = loss + one.float(), count + labels_of_one
    loss = loss / count
    loss.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters()}
    return loss.item(), flat(grads), grads


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("ring", "ulysses"), MESHES)
def test_one_step_equals_one_process(ring, ulysses):
    loss, grad, by_name = one_process(small_model())
    norm = grad.norm()
    assert norm > 2 * CLIP, "clipping does something"
    sizes = [by_name[name].numel() for name in sorted(by_name)]
    for results in run_ranks(one_step, 4, ring, ulysses, FP32_GRID, torch.float32, timeout=280):
        for setting, (got_loss, got_norm, got_grad, update) in zip(FP32_GRID, results, strict=True):
            where = "ZeRO {}, reduce_scatter {}, offload {}, accumulation {}".format(*setting)
            assert got_loss == pytest.approx(loss, rel=1e-5), where
            assert got_norm == pytest.approx(norm.item(), rel=1e-5), where
            parts = zip(got_grad.split(sizes), grad.split(sizes), sorted(by_name), strict=True)
            wrong = {name: e for a, b, name in parts if not (e := error(a, b)) <= 1e-5}
            assert not wrong, where
            # To weights of about 0.2 an update of 0.25 in all is added with fp32's last digit.
            assert error(update, grad * (CLIP / norm)) <= 3e-5, where


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 2), (1, 2), (1, 1)])
def test_one_step_in_bf16_is_no_less_exact_than_one_process(ring, ulysses):
    """Against fp32 with the same weights; sums over micro-batches round once more each."""
    loss, grad, _ = one_process(small_model().bfloat16().float())
    _, grad_in_bf16, _ = one_process(small_model().bfloat16())
    allowed = 1.25 * error(grad_in_bf16, grad)
    for results in run_ranks(one_step, 4, ring, ulysses, BF16_GRID, torch.bfloat16, timeout=280):
        for setting, (got_loss, got_norm, got_grad, _) in zip(BF16_GRID, results, strict=True):
            where = "ZeRO {}, reduce_scatter {}, offload {}, accumulation {}".format(*setting)
            assert got_loss == pytest.approx(loss, rel=2**-8), where
            assert got_norm == pytest.approx(got_grad.norm().item(), rel=2**-8), where
            assert error(got_grad, grad) <= allowed, where
