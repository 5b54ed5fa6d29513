"""DeepSpeed under sequence parallelism: the gradient that one huge device would have produced.

DeepSpeed sums each gradient over all ranks and divides by a number D that depends on the ZeRO
stage (measured on 0.19.8, where SP ranks count as data-carrying ranks):

    ZeRO 0, 1, 2, and 3 with "reduce_scatter": false     D = dp
    ZeRO 3 with "reduce_scatter": true (its default)     D = dp * sp

and `backward` divides by the number of micro-batches GA. So each rank backpropagates
D * GA * (sum of its losses) / N, with N the labels of the whole step: what arrives at the
optimizer, and so clipping and the reported norm, is the gradient of the mean loss, at every stage.

A step whose loss or gradient is not finite is left out. DeepSpeed's own optimizers do that once
they see the gradient's norm ("bf16": {"check_grad_overflow": false}, which forbids it, is refused);
a plain optimizer, as ZeRO 0 uses in fp32, is kept from its step here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from hybridsp.adapters import decoder_layers
from hybridsp.deepspeed_config import (
    parse_deepspeed,
    prefer_torch_adam,
    read_deepspeed,
    skip_inference_op,
)
from hybridsp.loss import TokenMean, count_labels
from hybridsp.mesh import SPMesh
from hybridsp.release import released_on_error
from hybridsp.self_check import self_check as prove

# DeepSpeed settings that change how gradients are summed, scaled or reported, or let pass one that
# is not finite, and the value with which they do not.
UNMEASURED: dict[str, Any] = {
    "managed_gradient_accumulation": True,
    "tensor_parallel.autotp_size": 0,
    "torch_autocast.enabled": False,
    "fp16.enabled": False,
    "bf16.check_grad_overflow": True,
    "bfloat16.check_grad_overflow": True,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zenflow": None,
    "zero_optimization.offload_optimizer.super_offload": False,
}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean over all labels of the step, before it.
        num_tokens: tokens read, padding included, over all ranks.
        num_labels: labels that counted.
        grad_norm: of the gradient of the mean loss, before clipping; infinite where it is unknown
            because the step was left out.
        skipped: whether the step was left out, because its loss or its gradient was not finite:
            weights, optimizer state and the learning rate's schedule stand where they stood.
    """

    loss: float
    num_tokens: int
    num_labels: int
    grad_norm: float
    skipped: bool = False


def initialize(
    model: PreTrainedModel,
    mesh: SPMesh,
    config: Mapping[str, Any] | str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    self_check: bool = True,
) -> Any:
    """A DeepSpeed engine whose gradients are exact at every ZeRO stage and mesh.

    Args:
        model: a model that `hybridsp.parallelize` prepared for the same mesh.
        mesh: the grid of ranks.
        config: a DeepSpeed configuration, or the path of its JSON file.
        optimizer: an optimizer over the model's parameters; None for the configuration's.
        self_check: prove on a short random sequence that state crosses the ranks, that gradients
            are those of the uncut sequence and that ZeRO shards over all ranks, and leave no trace
            of it (`hybridsp.self_check`); False to save its few seconds.

    Returns:
        The `deepspeed.DeepSpeedEngine`, in training mode (`from_pretrained` leaves a model in
        evaluation mode, in which activations are not checkpointed). Train with `train_step`; or,
        with one micro-batch per step, with the usual `engine(**batch).loss`, `engine.backward`,
        `engine.step`.

    Raises:
        ValueError: the model was not parallelized for this mesh, or the configuration cannot be
            read, sets what the mesh decides, or lacks batch sizes or an optimizer.
        SelfCheckError: the self-check failed; on every rank.
    """
    import deepspeed

    if not isinstance(config, Mapping):
        config, _ = read_deepspeed(str(config))
    config = _checked_config(model, mesh, config)
    if optimizer is None and "optimizer" not in config:
        raise ValueError(
            'config has no "optimizer": add one, such as {"type": "AdamW", "params": {"lr": 2e-5}},'
            " or pass optimizer="
        )
    if mesh.device.type == "cpu":
        skip_inference_op()
        prefer_torch_adam(config)
    _fetch_whole_layers(model)
    if not model.get_input_embeddings().weight.requires_grad:
        # What surrounds a layer, as ZeRO-3's hooks and checkpointing do, waits for a gradient of
        # the layer's input.
        model.enable_input_require_grads()
    model.train()
    with released_on_error(model):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config,
            mpu=mesh.mpu,
            dist_init_required=False,
        )
        token_mean: TokenMean = model.token_mean
        token_mean.micro_batches = engine.gradient_accumulation_steps()
        token_mean.gradient_factor = float(_divisor(engine, mesh) * token_mean.micro_batches)
        if self_check:
            prove(engine, mesh)
    return engine


def train_step(engine: Any, micro_batches: Sequence[Mapping[str, Any]]) -> StepResult:
    """One optimizer step, or none if its loss or gradient is not finite. Collective over all ranks.

    Args:
        engine: made by `initialize`.
        micro_batches: as many parts made by `shard_batch` as the configuration's
            gradient_accumulation_steps.

    Raises:
        ValueError: another number of micro-batches, or the engine stands inside a step.
    """
    expected = engine.gradient_accumulation_steps()
    if len(micro_batches) != expected:
        raise ValueError(
            f"train_step got {len(micro_batches)} micro-batches, but gradient_accumulation_steps "
            f"is {expected}: pass the micro-batches of one whole step"
        )
    if engine.micro_steps % expected:
        raise ValueError(
            "train_step was called inside a step that engine.backward had begun: use one or the "
            "other throughout a step"
        )
    num_labels, num_tokens = _count(engine, micro_batches)
    loss, grad_norm = 0.0, None
    for batch in micro_batches:
        batch_loss = engine(**batch, num_items_in_batch=num_labels).loss
        loss += batch_loss.item()
        # A loss that is not finite may have a finite gradient, which would be followed.
        engine.backward(batch_loss if math.isfinite(loss) else batch_loss * math.nan)
        if engine.is_gradient_accumulation_boundary():
            grad_norm = unreported_norm(engine)
        if grad_norm is None or grad_norm.isfinite():
            engine.step()
        else:
            leave_step_out(engine)
    return StepResult(
        loss=loss,
        num_tokens=num_tokens,
        num_labels=num_labels,
        grad_norm=float(engine.get_global_grad_norm() if grad_norm is None else grad_norm),
        skipped=not engine.was_step_applied(),
    )


def leave_step_out(engine: Any) -> None:
    """What DeepSpeed does about a plain optimizer's step, but for the step.

    As with DeepSpeed's own optimizers, it finds `overflow` set and leaves the schedule alone.
    """
    optimizer = engine.optimizer
    optimizer.step, optimizer.overflow = (lambda: None), True
    try:
        engine.step()
    finally:
        del optimizer.step, optimizer.overflow


@torch.no_grad()
def eval_step(engine: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss over all labels of the batches and all ranks. Collective over all ranks."""
    num_labels, _ = _count(engine, batches)
    was_training = engine.module.training
    engine.eval()
    loss = sum(engine(**b, num_items_in_batch=num_labels).loss.item() for b in batches)
    engine.train(was_training)
    return loss


def _count(engine: Any, batches: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Labels and tokens of some batches over all ranks."""
    mesh: SPMesh = engine.module.token_mean.mesh
    labels = sum(int(count_labels(batch["shift_labels"])) for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    counts = torch.tensor([labels, tokens], device=mesh.device)
    dist.all_reduce(counts, group=mesh.data_group)
    return int(counts[0]), int(counts[1])


def unreported_norm(engine: Any) -> Tensor | None:
    """The gradient norm where DeepSpeed reports none: ZeRO-0 with a plain optimizer in fp32.

    Every other optimizer is one of DeepSpeed's own, which notes the norm.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    return get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)


def _divisor(engine: Any, mesh: SPMesh) -> int:
    """What DeepSpeed divides a gradient by after summing it over all ranks."""
    scattered = engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter()
    return mesh.world_size if scattered else mesh.dp


def _checked_config(
    model: PreTrainedModel, mesh: SPMesh, config: Mapping[str, Any]
) -> dict[str, Any]:
    token_mean = getattr(model, "token_mean", None)
    if token_mean is None or token_mean.mesh is not mesh:
        raise ValueError(
            "the model was not parallelized for this mesh: call hybridsp.parallelize(model, mesh) "
            "before hybridsp.initialize(model, mesh, config)"
        )
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if key in config:
            raise ValueError(
                f"config sets {key} = {config[key]}, but the mesh decides it: remove it (dp = "
                f"{mesh.dp}, sp = {mesh.sp})"
            )
    for path, harmless in UNMEASURED.items():
        value: Any = config
        for name in path.split("."):
            value = value.get(name, harmless) if isinstance(value, Mapping) else harmless
        if value != harmless:
            raise ValueError(
                f"config sets {path} = {value!r}, under which nobody has shown that gradients are "
                f"exact: remove it, or set it to {harmless!r}"
            )
    _check_batch_sizes(mesh, config)
    # What remains is DeepSpeed's to judge; batch sizes it would judge without the mesh.
    parse_deepspeed(copy.deepcopy({**config, "train_micro_batch_size_per_gpu": 1}), "config")
    return copy.deepcopy(dict(config))


def _check_batch_sizes(mesh: SPMesh, config: Mapping[str, Any]) -> None:
    """Refuse a train_batch_size, counted in sequences of all dp ranks, that does not come out."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"config sets {name} = {value!r}: give a number")
    total, micro, accumulation = (config.get(name) for name in names)
    if total is None and micro is None:
        raise ValueError(
            "config sets no train_micro_batch_size_per_gpu: add it, sequences of a micro-batch "
            "(usually 1 where sequences are long)"
        )
    if total is None:
        return
    parts = mesh.dp * (micro or 1) * (accumulation or 1)
    determined = micro is not None and accumulation is not None
    if total != parts if determined else total % parts:
        raise ValueError(
            f"config sets train_batch_size = {total}, but a step has dp = {mesh.dp} x "
            f"train_micro_batch_size_per_gpu = {micro or 1} x gradient_accumulation_steps = "
            f"{accumulation or 1} = {parts} sequences{'' if determined else ' or a multiple'} (the "
            f"{mesh.sp} SP ranks share one): remove train_batch_size, or set it to {parts}"
        )


def _fetch_whole_layers(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather a decoder layer at once, not each of its dozen small modules.

    One large message instead of many small ones, and DeepSpeed, which walks over all modules that
    are still to come each time it releases one, has a dozen times fewer to walk over.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder_layers(model):
        set_z3_leaf_module(layer, True)


__all__ = [
    "StepResult",
    "eval_step",
    "initialize",
    "leave_step_out",
    "train_step",
    "unreported_norm",
]
