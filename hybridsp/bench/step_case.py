"""One training step, as `hybridsp bench step` takes it, and what the planner says of it.

A case is a model of random weights, a length and a setting. It goes the way of every run: a recipe
makes DeepSpeed's configuration, `parallelize` and `initialize` make the engine, `train_step` takes
the steps. What is measured is what the planner predicts: seconds, the most that PyTorch's allocator
handed out on a GPU (CUDA's context and NCCL's buffers, which it does not see, are no part of it),
and host memory.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import hybridsp
from hybridsp.bench.timing import measure
from hybridsp.convert import hybrid_config
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.mesh import SPMesh
from hybridsp.planner import Cluster, ModelShape, Setting, load_shape
from hybridsp.planner.files import DTYPES
from hybridsp.planner.hardware import GPUS
from hybridsp.planner.memory import HOST_PROCESS, memory
from hybridsp.planner.model import load_config
from hybridsp.planner.time import model_flops, step_time
from hybridsp.recipe import Recipe

# The first step allocates the optimizer's states and compiles the kernels.
WARMUP_STEPS = 1
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row.

    Attributes:
        model: a checkpoint's folder, a config.json or a preset.
        softmax_layers: which layers stay softmax in the hybrid made of it; None for it as it is.
        setting: how it is run.
        tokens_per_rank: L.
    """

    model: str
    softmax_layers: str | None
    setting: Setting
    tokens_per_rank: int

    @property
    def length(self) -> int:
        """T."""
        return self.tokens_per_rank * self.setting.sp

    @cached_property
    def shape(self) -> ModelShape:
        """The model's, for the planner."""
        return load_shape(self.model, self.softmax_layers)

    @property
    def columns(self) -> dict[str, Any]:
        """What tells it from other rows."""
        setting = self.setting
        return {
            "model": self.model,
            "softmax_layers": self.softmax_layers,
            "ring": setting.ring,
            "ulysses": setting.ulysses,
            "tokens": self.length,
            "stage": setting.stage,
            "offload_optimizer": setting.offload_optimizer,
            "checkpointing": setting.checkpointing,
            "keep_attention": setting.keep_attention,
            "offload_activations": setting.offload_activations,
            "tiled_mlp": setting.tiled_mlp,
        }


def take_steps(case: Case, mesh: SPMesh, *, steps: int, seed: int) -> dict[str, Any]:
    """The figures of a case, the largest of all ranks each. Collective over the world.

    Args:
        case: what is run.
        mesh: of the case's degrees.
        steps: timed, behind those that warm up.
        seed: of weights and tokens.
    """
    engine = make_engine(case, mesh, seed)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = case.shape.config.vocab_size
    tokens = torch.randint(vocabulary, (1, case.length), generator=generator)
    batch = hybridsp.shard_batch({"input_ids": tokens, "labels": tokens}, mesh)
    losses: list[float] = []
    _forget_peaks(mesh)
    try:
        times = measure(
            lambda: losses.append(hybridsp.train_step(engine, [batch]).loss),
            mesh,
            repeats=steps,
            warmup=WARMUP_STEPS,
        )
    finally:
        engine.destroy()  # also where memory ran out: the next case needs it
    return {
        **times.as_json(),
        "tokens_per_second": case.length * mesh.dp / times.median,
        "loss": losses[0],
        "parameters": case.shape.parameters,
        "flops": mesh.dp * model_flops(case.shape, case.length),
        **_largest_of_ranks(_memory_of_rank(mesh), mesh),
    }


def make_engine(case: Case, mesh: SPMesh, seed: int) -> Any:
    """A DeepSpeed engine with a model of random weights, the same on every rank."""
    setting = case.setting
    recipe = Recipe(
        model=case.model,
        data="",
        output_dir="",
        seq_length=case.length,
        max_steps=2**20,
        learning_rate=1e-5,
        ring=setting.ring,
        ulysses=setting.ulysses,
        deepspeed=deepspeed_section(setting),
        dtype=DTYPES[setting.dtype_bytes],
        activation_checkpointing=setting.checkpointing,
        keep_attention=setting.keep_attention,
        offload_activations=setting.offload_activations,
        tiled_mlp=setting.tiled_mlp,
    )
    config = load_config(case.model)
    if case.softmax_layers is not None:
        config = hybrid_config(config, case.softmax_layers)
    torch.manual_seed(seed)
    with mesh.device:
        model = AutoModelForCausalLM.from_config(config, dtype=recipe.torch_dtype)
    model.train()
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable()
    hybridsp.parallelize(
        model,
        mesh,
        keep_attention=recipe.keep_attention,
        tiled_mlp=recipe.tiled_mlp,
        offload_activations=recipe.offload_activations,
    )
    engine = hybridsp.initialize(model, mesh, deepspeed_config(recipe, mesh), self_check=False)
    engine.lr_scheduler.step(first_iteration(recipe))
    return engine


def deepspeed_section(setting: Setting) -> dict[str, Any]:
    """The shipped configuration of a stage, and of one that offloads what that one does."""

    def shipped(name: str) -> dict[str, Any]:
        text = (resources.files("hybridsp.ds_configs") / f"{name}.json").read_text("utf-8")
        return json.loads(text)

    config = shipped(f"zero{setting.stage}")
    if setting.offload_optimizer:
        offload = shipped("zero3_offload")["zero_optimization"]["offload_optimizer"]
        config["zero_optimization"]["offload_optimizer"] = offload
    return config


def predict(case: Case, gpu: str | None, ranks_per_host: int) -> dict[str, float]:
    """What the planner says of a case; nothing where it does not know the GPU.

    Args:
        case: what is run.
        gpu: name in `planner.GPUS`.
        ranks_per_host: GPUs of one host.
    """
    if gpu is None:
        return {}
    cluster = Cluster(gpu=gpu, gpus=case.setting.gpus, gpus_per_node=ranks_per_host)
    needed = memory(case.shape, case.setting, cluster, case.length)
    return {
        "predicted_seconds": step_time(case.shape, case.setting, cluster, case.length).seconds,
        "predicted_peak_bytes": needed.allocated,
        "predicted_host_bytes": HOST_PROCESS
        + sum(
            needed.host[name] / cluster.local
            for name in ("offloaded optimizer", "layer inputs", "kept attention")
        ),
    }


def known_gpu(mesh: SPMesh) -> str | None:
    """The planner's name for this rank's GPU; None for a CPU, or a chip that it does not know."""
    if mesh.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(mesh.device).lower()
    return next((known for known in GPUS if known.partition("-")[0] in name), None)


def free(mesh: SPMesh) -> None:
    """Let go of the last case's engine, which refers to itself."""
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()


def _forget_peaks(mesh: SPMesh) -> None:
    """Let the host's peaks begin anew; `measure` does so for the GPU's."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # Linux: the peak of resident memory becomes what there is now
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_host_memory_stats()


def _memory_of_rank(mesh: SPMesh) -> dict[str, int | None]:
    """Bytes; None for what this machine does not tell."""
    resident = None
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        resident = 1024 * int(peaks[0]) if peaks else None
    if mesh.device.type != "cuda":
        return {"resident_bytes": resident}
    free_bytes, all_bytes = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "resident_bytes": resident,
        "pinned_bytes": torch.cuda.host_memory_stats()["active_bytes.peak"],
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        # CUDA's context, loaded kernels and NCCL's buffers; and whoever else uses this GPU.
        "unseen_bytes": all_bytes - free_bytes - reserved,
    }


def _largest_of_ranks(figures: Mapping[str, int | None], mesh: SPMesh) -> dict[str, int | None]:
    ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(ranks, dict(figures))
    return {
        name: max((rank[name] for rank in ranks if rank[name] is not None), default=None)
        for name in figures
    }
