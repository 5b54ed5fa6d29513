"""What a Trainer was asked for, checked against what it does.

transformers' Trainer has some 120 arguments, and under sequence parallelism some of them mean
nothing, or mean something that nobody has shown to be exact. Each of those is refused with what to
do instead; everything else takes effect. The DeepSpeed configuration is filled in as transformers
does it ("auto" takes the value of the TrainingArguments), except that it counts data-parallel
groups where transformers counts ranks, and that a key which is missing counts as "auto" and not as
DeepSpeed's own default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh

NO_LOGITS = "logits are never held, only their loss: export the model and compute it from there"
# What a TrainingArguments may not set: the values that ask for nothing, and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16": ((False,), "set bf16=True"),
    "fp16_full_eval": ((False,), "evaluation runs in the dtype of training: set bf16=True"),
    "bf16_full_eval": ((False,), "evaluation runs in the dtype of training: set bf16=True"),
    "torch_compile": ((False,), "leave it out: it has not been shown to keep gradients exact"),
    "use_liger_kernel": ((False,), "leave it out: hybridsp installs kernels and a loss of its own"),
    "label_smoothing_factor": ((0,), "leave it out: the loss is the plain cross-entropy"),
    "neftune_noise_alpha": ((None,), "leave it out: each rank would draw other noise"),
    "auto_find_batch_size": ((False,), "set per_device_train_batch_size"),
    "use_cache": ((False,), "leave it out: a part of a sequence has no cache"),
    "fsdp": ((None, "", []), "leave it out: DeepSpeed shards the model"),
    "parallelism_config": ((None,), "pass mesh=hybridsp.SPMesh(...) to the Trainer instead"),
    "train_sampling_strategy": (("random", "sequential"), "pack documents to fill batches evenly"),
    "average_tokens_across_devices": (
        (True,),
        "leave it out: the loss is the mean over all labels of a step",
    ),
    "load_best_model_at_end": (
        (False,),
        'set save_strategy="best" and metric_for_best_model="loss", and load '
        "trainer.state.best_model_checkpoint with from_pretrained",
    ),
    "enable_jit_checkpoint": (
        (False,),
        "leave it out: SIGTERM saves and stops, on all ranks behind the same step",
    ),
    "save_on_each_node": ((False,), "let output_dir be on a file system that all hosts share"),
    "label_names": ((None, ["labels"]), "call them labels in the batch"),
    "include_for_metrics": (([],), NO_LOGITS),
    "batch_eval_metrics": ((False,), NO_LOGITS),
    "eval_accumulation_steps": ((None,), NO_LOGITS),
    "eval_do_concat_batches": ((True,), NO_LOGITS),
    "eval_use_gather_object": ((False,), NO_LOGITS),
    "ddp_find_unused_parameters": ((None,), "leave it out: DeepSpeed reduces the gradients"),
    "ddp_bucket_cap_mb": ((None,), "set reduce_bucket_size in the DeepSpeed configuration"),
    "ddp_broadcast_buffers": ((None,), "leave it out: DeepSpeed reduces the gradients"),
    "ddp_static_graph": ((None,), "leave it out: DeepSpeed reduces the gradients"),
}
REFUSED_OF_ACCELERATOR: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_batches": ((False,), "set per_device_train_batch_size to the sequences of one dp group"),
    "dispatch_batches": ((None, False), "leave it out: every rank reads its own batches"),
    "even_batches": ((True,), "leave it out: all ranks must take the same number of steps"),
    "use_seedable_sampler": ((True,), "leave it out: all ranks must draw the same order"),
}
REFUSED_OPTIMIZERS = ("lomo", "adalomo")
# What the Trainer itself may not be given.
REFUSED_OF_TRAINER = {
    "compute_loss_func": "the loss is the cross-entropy of the next token, in a sum over all ranks",
    "compute_metrics": NO_LOGITS,
    "preprocess_logits_for_metrics": NO_LOGITS,
}


def check_arguments(args: TrainingArguments | None, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be honoured, all of it at once.

    Args:
        args: the Trainer's `args`.
        given: the Trainer's arguments by name.

    Raises:
        ValueError: names every such argument, its value and the remedy.
    """
    problems = list(_problems(args, given))
    if problems:
        raise ValueError("hybridsp.Trainer cannot honour:\n  " + "\n  ".join(problems))


def _problems(args: TrainingArguments | None, given: Mapping[str, Any]) -> Iterator[str]:
    if args is None or not args.deepspeed:
        yield (
            "TrainingArguments without deepspeed: pass deepspeed= a configuration, such as "
            '"ds_configs/zero3.json" or {"zero_optimization": {"stage": 2}}'
        )
    for name, remedy in REFUSED_OF_TRAINER.items():
        if given.get(name) is not None:
            yield f"{name} = {given[name]!r}: {remedy}"
    if args is None:
        return
    if args.deepspeed and args.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        yield "a process that no launcher started: start the script with deepspeed or torchrun"
    for owner, table in ((args, REFUSED), (args.accelerator_config, REFUSED_OF_ACCELERATOR)):
        for name, (harmless, remedy) in table.items():
            value = getattr(owner, name)
            if not any(value == other for other in harmless):
                yield f"{name} = {value!r}: {remedy}"
    if args.optim in REFUSED_OPTIMIZERS:
        yield f"optim = {args.optim.value!r}: choose one that DeepSpeed steps, such as adamw_torch"


def mesh_of_all_ranks(model: PreTrainedModel) -> SPMesh:
    """All ranks of the job as one SP group, with degrees that fit the model's heads."""
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    return SPMesh.auto(sp=dist.get_world_size(), num_heads=heads, num_kv_heads=kv_heads)


def introduce_ranks(args: TrainingArguments) -> None:
    """Let accelerate know this process's rank: under DeepSpeed on CPUs it does not ask for it."""
    state = args.distributed_state
    if state.num_processes == dist.get_world_size():
        return
    state.backend = dist.get_backend()
    state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
    state.local_process_index = rank_from_environment().local_rank


def deepspeed_settings(args: TrainingArguments, mesh: SPMesh) -> HfTrainerDeepSpeedConfig:
    """The DeepSpeed configuration with what is known before training filled in.

    Raises:
        ValueError: it sets what the mesh decides.
    """
    settings = HfTrainerDeepSpeedConfig(args.deepspeed)
    config = settings.config
    asked = config.pop("train_batch_size", "auto")
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.setdefault(key, "auto")
    config.setdefault("gradient_clipping", "auto")
    config.setdefault("bf16", {}).setdefault("enabled", "auto")
    settings.trainer_config_process(args)
    per_group = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if asked not in ("auto", per_group * mesh.dp):
        raise ValueError(
            f"the DeepSpeed configuration sets train_batch_size = {asked}, but {mesh.dp} "
            f"data-parallel groups take {per_group} sequences each, {per_group * mesh.dp} in all: "
            'set it to "auto" (the ranks that share a sequence count once)'
        )
    tensor_parallel = config.get("tensor_parallel", {}).get("autotp_size", 1)
    if tensor_parallel > 1:
        raise ValueError(
            f"the DeepSpeed configuration sets tensor_parallel.autotp_size = {tensor_parallel}: "
            "remove it, the mesh is dp x sp"
        )
    return settings


def finished_config(
    settings: HfTrainerDeepSpeedConfig, args: TrainingArguments, model: Any, max_steps: int
) -> dict[str, Any]:
    """The DeepSpeed configuration with everything filled in.

    Raises:
        ValueError: it contradicts the TrainingArguments, or keeps an "auto" that stands for
            nothing.
    """
    settings.trainer_config_finalize(args, model, max_steps)
    config: dict[str, Any] = settings.config
    zero = config.get("zero_optimization", {})
    for key in [key for key, value in zero.items() if value == "auto"]:
        # What belongs to a stage that is not used, or to saving, for which weights are gathered.
        if key.startswith("stage3_") and (not settings.is_zero3() or "on_model_save" in key):
            del zero[key]
    if unknown := sorted(_autos(config)):
        raise ValueError(
            f'the DeepSpeed configuration sets {", ".join(unknown)} to "auto", for which '
            "TrainingArguments has no value: give one"
        )
    return config


def _autos(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{path}{key}.")
        elif value == "auto":
            yield path + key


__all__ = [
    "check_arguments",
    "deepspeed_settings",
    "finished_config",
    "introduce_ranks",
    "mesh_of_all_ranks",
]
