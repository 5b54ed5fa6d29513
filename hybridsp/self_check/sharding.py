"""Is what ZeRO should shard really sharded, over all ranks?

ZeRO-1 gives each rank the optimizer's fp32 copy of 1/n of the parameters, with n all ranks, those
of the sequence among them; ZeRO-3 also 1/n of each parameter. DeepSpeed derives n from the mesh's
`mpu`: where it takes it from elsewhere nothing fails, memory is only larger, or the copies of the
sequence's ranks drift apart. So what this rank holds is counted.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridsp.mesh import SPMesh

# Each optimizer of DeepSpeed 0.19.8 that shards, and its fp32 partitions of this rank.
MASTERS = {
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
    "BF16_Optimizer": "fp32_groups_flat_partition",
}
# More than ZeRO pads each parameter's part, or each group's, on a rank.
PADDING = 64


def sharding_problems(engine: Any, mesh: SPMesh) -> tuple[list[str], str]:
    """What this rank holds more, or less, of than its share; and what it holds, in words."""
    stage = engine.zero_optimization_stage()
    parameters = list(engine.module.parameters())
    if stage == 0:
        return [], "ZeRO stage 0 shards nothing"
    problems, found = [], []
    whole = sum(numel(p) for p in parameters if p.requires_grad)
    padding = PADDING * len(parameters)
    if not getattr(engine.optimizer, "swap_optimizer", False):  # swapped out, they have no size
        held = sum(partition.numel() for partition in optimizer_partitions(engine.optimizer))
        problems += _judge("the optimizer's fp32 parameters", held, whole, mesh, padding)
        found.append(f"{held:,} of {whole:,} optimizer elements")
    if stage == 3:
        whole = sum(numel(p) for p in parameters)
        held = sum(p.ds_tensor.numel() for p in parameters)
        problems += _judge("the parameters", held, whole, mesh, padding)
        found.append(f"{held:,} of {whole:,} parameters")
    return problems, "this rank holds " + (" and ".join(found) or "what is swapped in")


def optimizer_partitions(optimizer: Any) -> list[Tensor]:
    """The fp32 parameters that this rank's optimizer updates."""
    name = type(optimizer).__name__
    assert name in MASTERS, f"{name} shards nothing that HybridSP knows of"
    return list(getattr(optimizer, MASTERS[name]))


def numel(parameter: Any) -> int:
    """Elements of a parameter, which ZeRO-3 may have partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _judge(what: str, held: int, whole: int, mesh: SPMesh, padding: int) -> list[str]:
    """Whether `held` of `whole` elements are this rank's share, up to padding."""
    share = whole / mesh.world_size
    if share - padding <= held <= share + padding:
        return []
    return [
        f"sharding: this rank holds {held:,} of {what}' {whole:,} elements, but its share among "
        f"{mesh.world_size} ranks is {share:,.0f}: ZeRO shards over {whole / max(held, 1):.2f} "
        f"ranks (mesh: dp = {mesh.dp}, sp = {mesh.sp}). The mpu that DeepSpeed was given does not "
        "say that every rank of a sequence carries data; let hybridsp.initialize pass mesh.mpu"
    ]
