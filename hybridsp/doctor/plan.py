"""What a recipe needs of this machine, by the planner's model, against what is there.

`hybridsp plan` computed for the machine it was told of; this looks at the one that there is. The
recipe alone is read: how many ranks there are is known here, and the planner's formulas follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from hybridsp.deepspeed_config import deepspeed_config, parse_deepspeed
from hybridsp.doctor.finding import Finding, amount, failing, ok, warning
from hybridsp.host_memory import HostMemory
from hybridsp.planner import Cluster, Setting, load_shape
from hybridsp.planner.files import RECIPE_FILE
from hybridsp.planner.memory import FRAGMENTATION, memory
from hybridsp.recipe import Recipe, load_recipe, one_line
from hybridsp.untrusted import MAX_YAML_BYTES, parse_yaml, read_text

# fp32 weights and AdamW's two moments, and the weights in bf16 for ZeRO 1 and 2.
CHECKPOINT_BYTES = 14
ANY_GPU = "h100-80"  # its rates and size are not used


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run takes, in bytes.

    Attributes:
        ranks: the number of ranks it is computed for.
        gpu: of one GPU at its peak, and what it is doing then.
        phase: what that is.
        host: of one host.
        disk: of the checkpoints that are kept, one more while it is written, and the model.
        out: the run's folder.
        offloads_optimizer: whether CPUAdam has to be built.
    """

    ranks: int
    gpu: float
    phase: str
    host: float
    disk: float
    out: Path
    offloads_optimizer: bool


def read_needs(path: Path, ranks: int | None, gpus: int) -> tuple[Needs | None, list[Finding]]:
    """What a recipe needs, and what is to be said of the recipe itself.

    Args:
        path: a recipe, or the folder that `hybridsp plan --out` wrote.
        ranks: of the job; None before there is one: then as many as this host has GPUs, or the
            recipe needs at least.
        gpus: of this host; 0 where the ranks are CPU processes, which then share one host.

    Returns:
        None and why, where it cannot be known.
    """
    file = path / RECIPE_FILE if path.is_dir() else path
    recipe: Recipe | None
    try:
        recipe = load_recipe(file)
        found = [ok("plan", f"{file} can be read, and the files that it names are there")]
    except ValueError as error:
        found = [failing("plan", one_line(error), "mend the recipe, or make the files it names")]
        recipe = _without_files(file)
    if recipe is None:
        return None, found
    sp = recipe.ring * recipe.ulysses
    whole = max((ranks or gpus) // sp, 1) * sp
    if ranks not in (None, whole):
        found.append(
            failing(
                "plan: ranks",
                f"ring * ulysses = {recipe.ring} * {recipe.ulysses} does not divide {ranks} ranks",
                f"start {whole} ranks, or choose degrees whose product divides {ranks}",
            )
        )
    try:
        return _needs(recipe, whole, gpus), found
    except (ValueError, OSError) as error:
        fix = "mend what is said here; HybridGLA, Llama, Mistral and Qwen models can be planned"
        return None, [*found, warning("plan: memory", f"unknown: {one_line(error)}", fix)]


def check_plan(
    needs: Needs, host_memory: HostMemory | None, gpu_memory: float | None
) -> list[Finding]:
    """The plan's memory against the host's and a GPU's."""
    about = (
        f"{amount(needs.gpu)} of a GPU at the peak ({needs.phase}, {needs.ranks} ranks, modelled)"
    )
    findings = []
    if gpu_memory is None:
        findings.append(ok("plan: GPU memory", f"{about}; there is no GPU here to compare with"))
    elif needs.gpu > gpu_memory * (1 - FRAGMENTATION):
        fix = "use more ranks, or let `hybridsp plan` choose what is offloaded or done in tiles"
        findings.append(failing("plan: GPU memory", f"{about}; it has {amount(gpu_memory)}", fix))
    else:
        findings.append(ok("plan: GPU memory", f"{about}; it has {amount(gpu_memory)}"))
    name, about = "plan: host memory", f"{amount(needs.host)} of a host (modelled)"
    if host_memory is None:
        return [*findings, ok(name, f"{about}; what it has is unknown")]
    found = f"{about}; {amount(host_memory.available)} of {amount(host_memory.total)} available"
    if needs.host > host_memory.total:
        fix = "offload less, use more hosts, or raise the container's memory limit"
        return [*findings, failing(name, found, fix)]
    if needs.host > host_memory.available:
        return [*findings, warning(name, found, "end what else runs on this host")]
    return [*findings, ok(name, found)]


def _without_files(file: Path) -> Recipe | None:
    """The recipe without a look at its files; None where it is none."""
    try:
        return Recipe(**parse_yaml(read_text(file, MAX_YAML_BYTES), str(file)))
    except (OSError, TypeError, ValueError):
        return None


def _needs(recipe: Recipe, ranks: int, gpus: int) -> Needs:
    shape = load_shape(recipe.model)
    dp = ranks // (recipe.ring * recipe.ulysses)
    # All that it asks of a mesh, which would take the whole job to build.
    mesh = SimpleNamespace(dp=dp, device=torch.device("cuda" if gpus else "cpu"))
    config = deepspeed_config(recipe, cast("Any", mesh))
    zero = parse_deepspeed(config, str(recipe.deepspeed)).zero_config
    offload = zero.offload_optimizer
    setting = Setting(
        gpus=ranks,
        ring=recipe.ring,
        ulysses=recipe.ulysses,
        stage=int(zero.stage),
        offload_optimizer=offload is not None and offload.device != "none",
        checkpointing=recipe.activation_checkpointing,
        keep_attention=recipe.keep_attention,
        offload_activations=recipe.offload_activations,
        tiled_mlp=recipe.tiled_mlp,
        batch=dp * recipe.gradient_accumulation_steps,
        dtype_bytes=recipe.torch_dtype.itemsize,
    )
    cluster = Cluster(gpu=ANY_GPU, gpus=ranks, gpus_per_node=min(gpus or ranks, ranks))
    # The sequences of a micro-batch lie side by side, as a longer one would.
    used = memory(shape, setting, cluster, recipe.seq_length * recipe.micro_batch_size)
    copies = recipe.keep_checkpoints + 1 if recipe.save_every is not None else 0
    return Needs(
        ranks=ranks,
        gpu=used.peak,
        phase=used.phase,
        host=used.host_total,
        disk=shape.parameters * (copies * CHECKPOINT_BYTES + setting.dtype_bytes),
        out=Path(recipe.output_dir),
        offloads_optimizer=setting.offload_optimizer,
    )


__all__ = ["Needs", "check_plan", "read_needs"]
