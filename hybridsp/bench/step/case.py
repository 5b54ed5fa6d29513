"""One training step, as `hybridsp bench step` takes it, and what the planner says of it.

A case is a model, of random weights or a checkpoint's, a sequence and a setting. It goes the way of
every run: a recipe makes DeepSpeed's configuration, `prepare` and `initialize` make the engine,
`train_step` takes the steps: labels, clipping, AdamW. What is measured is what the planner
predicts: seconds, the most that PyTorch's allocator handed out on a GPU (CUDA's context and NCCL's
buffers, which it does not see, are no part of it), and host memory.
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
from transformers import AutoModelForCausalLM, PreTrainedModel

import hybridsp
from hybridsp.bench.job import meet
from hybridsp.bench.step.data import ONE, Sequence, random_sequence, text_sequence
from hybridsp.bench.step.profile import profile_step
from hybridsp.bench.timing import measure
from hybridsp.convert import hybrid_config
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.mesh import SPMesh
from hybridsp.planner import Cluster, ModelShape, Setting, load_shape
from hybridsp.planner.files import DTYPES
from hybridsp.planner.hardware import GPUS
from hybridsp.planner.kernels import model_flops
from hybridsp.planner.memory import HOST_PROCESS, memory, offloaded_activations
from hybridsp.planner.model import load_config
from hybridsp.planner.time import step_time
from hybridsp.prepare import load_prepared, prepare_model
from hybridsp.recipe import Recipe
from hybridsp.release import release

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
        has_weights: `model` is a checkpoint whose weights are taken; else they are random.
        text: what is read; None for random tokens.
        documents: ONE, OWN (the text's), or tokens per document.
        seed: of what is random.
    """

    model: str
    softmax_layers: str | None
    setting: Setting
    tokens_per_rank: int
    has_weights: bool = False
    text: str | None = None
    documents: str | int = ONE
    seed: int = 0

    @property
    def length(self) -> int:
        """T."""
        return self.tokens_per_rank * self.setting.sp

    @cached_property
    def shape(self) -> ModelShape:
        """The model's, for the planner."""
        return load_shape(self.model, self.softmax_layers)

    @cached_property
    def sequence(self) -> Sequence:
        """What is read, the same on every rank.

        Raises:
            ValueError: a text that cannot be read, or is too short.
        """
        if self.text is not None:
            return text_sequence(self.text, self.model, self.length, documents=self.documents)
        vocabulary = self.shape.config.vocab_size
        return random_sequence(vocabulary, self.length, documents=self.documents, seed=self.seed)

    @property
    def columns(self) -> dict[str, Any]:
        """What tells it from other rows."""
        setting = self.setting
        return {
            "model": self.model,
            "softmax_layers": self.softmax_layers,
            "has_weights": self.has_weights,
            "text": self.text,
            "documents": self.documents,
            "ring": setting.ring,
            "ulysses": setting.ulysses,
            "dp": setting.dp,
            "tokens": self.length,
            "stage": setting.stage,
            "offload_optimizer": setting.offload_optimizer,
            "checkpointing": setting.checkpointing,
            "keep_attention": setting.keep_attention,
            "offload_activations": setting.offload_activations,
            "tiled_mlp": setting.tiled_mlp,
        }


def take_steps(
    case: Case,
    mesh: SPMesh,
    *,
    steps: int,
    warmup_tokens: int | None = None,
    profiled: bool = False,
) -> dict[str, Any]:
    """The figures of a case, the largest of all ranks each. Collective over the world.

    Args:
        case: what is run.
        mesh: of the case's degrees.
        steps: timed, behind those that warm up.
        warmup_tokens: tokens per rank of the steps that warm up; None for as many as are timed.
        profiled: take one more step, and say what its time went into.
    """
    batch = hybridsp.shard_batch(case.sequence.batch, mesh)
    meet(None)  # all have their batch, before what knows of no meetings
    engine = make_engine(case, mesh)
    results: list[hybridsp.engine.StepResult] = []
    _forget_peaks(mesh)

    def step() -> None:
        results.append(hybridsp.train_step(engine, [batch]))

    try:
        _warm_up(engine, case, mesh, batch, warmup_tokens)
        times = measure(step, mesh, repeats=steps, warmup=0)
        told = _memory_of_rank(mesh)
        profile = profile_step(engine, step, mesh) if profiled else None
    finally:
        release(engine)  # also where memory ran out: the next case needs it
    pairs = 1.0 if case.sequence.pairs is None else case.sequence.pairs
    return {
        **times.as_json(),
        "warmup_calls": WARMUP_STEPS,
        "tokens_per_second": case.length * mesh.dp / times.median,
        "loss": results[0].loss,
        "last_loss": results[steps - 1].loss,
        "grad_norm": results[0].grad_norm,
        "labels": results[0].num_labels,
        "num_documents": len(case.sequence.lengths or (case.length,)),
        "parameters": case.shape.parameters,
        "flops": mesh.dp * model_flops(case.shape, case.length, pairs),
        **_largest_of_ranks(told),
        **({} if profile is None else {"profile": profile}),
    }


def _warm_up(
    engine: Any, case: Case, mesh: SPMesh, batch: dict[str, Any], tokens: int | None
) -> None:
    """Steps that allocate, compile and pin, and change no weight: their learning rate is 0."""
    if tokens is not None and tokens < case.tokens_per_rank:
        batch = hybridsp.shard_batch(case.sequence.first(tokens * mesh.sp).batch, mesh)
        if (offload := engine.module.activation_offload) is not None:
            needed = int(sum(offloaded_activations(case.shape, case.setting, case.length)))
            pages = offload.pages.take(needed, pinned=mesh.device.type == "cuda")
            offload.pages.give_back(pages)
    for _ in range(WARMUP_STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # the schedule sets the next step's
        hybridsp.train_step(engine, [batch])


def make_engine(case: Case, mesh: SPMesh) -> Any:
    """A DeepSpeed engine with the case's model, the same on every rank."""
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
    config = deepspeed_config(recipe, mesh)
    if case.has_weights:
        model = load_prepared(recipe, mesh, config)
    else:
        model = _random_model(case, mesh, recipe)
        prepare_model(model, mesh, recipe)
    engine = hybridsp.initialize(model, mesh, config, self_check=False)
    engine.lr_scheduler.step(first_iteration(recipe))
    return engine


def _random_model(case: Case, mesh: SPMesh, recipe: Recipe) -> PreTrainedModel:
    config = load_config(case.model)
    if case.softmax_layers is not None:
        config = hybrid_config(config, case.softmax_layers)
    torch.manual_seed(case.seed)
    with mesh.device:
        return AutoModelForCausalLM.from_config(config, dtype=recipe.torch_dtype)


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


def predict(case: Case, gpu: str | None, ranks_per_host: int) -> dict[str, Any]:
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
    time = step_time(case.shape, case.setting, cluster, case.length, case.sequence.pairs)
    return {
        "predicted_seconds": time.seconds,
        "predicted_parts": {name: part.seconds for name, part in time.parts.items()},
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


def free(mesh: SPMesh) -> int:
    """Let go of the last case's engine, which refers to itself; bytes that are still allocated."""
    gc.collect()
    if mesh.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


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


def _largest_of_ranks(figures: Mapping[str, int | None]) -> dict[str, int | None]:
    ranks = meet(dict(figures))
    told = {name: [rank[name] for rank in ranks] for name in figures}
    return {
        name: max((each for each in numbers if each is not None), default=None)
        for name, numbers in told.items()
    }
