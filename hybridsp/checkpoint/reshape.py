"""Resuming at another number of ranks, another mesh or another ZeRO stage.

Each rank asks `Shards` for the ranges of every parameter that ZeRO gives it in this run, lays them
out as this run's own optimizer would save them, and hands that to DeepSpeed's loader of the same
stage. So both ends, the files and the loader, are DeepSpeed's own; only the cut is ours, and it is
copying: no number is changed. Weights in bf16 are rounded from the fp32 masters, as after a step.

Why not by a library (DeepSpeed 0.19.8, torch 2.13): DeepSpeed's universal checkpoint cannot go from
ZeRO 3 to 1 or 2 or back (an assertion), unpickles whatever a file holds, and writes everything once
more, a file per parameter, state and rank; torch.distributed.checkpoint knows no flat partitions
of ZeRO and keeps its metadata in a pickle. Reading the ranges in place writes nothing, so there is
no half-converted checkpoint to be found after a crash either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridsp.checkpoint.manifest import REMEDY
from hybridsp.checkpoint.shards import WEIGHT, Shards
from hybridsp.untrusted import reading

# DeepSpeed's optimizers: their groups of parameters, and their flat fp32 weights.
GROUPS = ("fp16_groups", "bit16_groups", "bf16_groups")
FLAT = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)


@dataclass
class _Range:
    """Of a flattened parameter the elements from `start`, in the flat tensor from `at`."""

    name: str
    at: int
    start: int
    numel: int


@dataclass
class _Cut:
    """What this rank has of one flat tensor: names of all parameters in it, and its own ranges."""

    flat: Tensor
    names: list[str] = field(default_factory=list)
    ranges: list[_Range] = field(default_factory=list)


def load_reshaped(engine: Any, directory: Path, names: Iterable[str]) -> None:
    """Restore weights, optimizer, scheduler and counters from files of any cut.

    Collective; call `check_readable` on every rank first.

    Args:
        engine: a DeepSpeed engine of ZeRO 1, 2 or 3, before its first step.
        directory: a checkpoint of the same model, saved at ZeRO 1, 2 or 3.
        names: its files.
    """
    shards, optimizer = Shards(directory, names), engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = _state_of_this_rank(engine, shards)
    world = torch.distributed.get_world_size(optimizer.dp_process_group)
    optimizer.load_state_dict([state] * world, load_from_fp32_weights=True)
    _restore_what_is_not_trained(engine, shards)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    if engine.lr_scheduler is not None and shards.common["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(shards.common["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, shards.common[counter])


def check_readable(engine: Any, directory: Path, names: Iterable[str]) -> None:
    """Check, before anything is changed, that this rank can read all that it will need.

    Raises:
        ValueError: the checkpoint trains other parameters than this run, or is none of ours.
    """
    named = dict(engine.module.named_parameters())
    trained = {n: getattr(p, "ds_numel", p.numel()) for n, p in named.items() if p.requires_grad}
    with reading(directory, "state", REMEDY):
        shards = Shards(directory, names)
    shards.check_complete(trained)
    shards.check_frozen(named.keys() - trained)


def _state_of_this_rank(engine: Any, shards: Shards) -> dict[str, Any]:
    """What this rank would have saved, had the run been at this mesh and stage all along."""
    cuts = _cuts(engine)
    flats = [_fill(cut, shards) for cut in cuts]
    state = engine.optimizer.state_dict()
    stage_3 = engine.zero_optimization_stage() == 3
    inner = state["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
    weights = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    state[weights] = [flat.pop(WEIGHT) for flat in flats]
    on_host = type(engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam"
    inner["state"] = {
        number: {**_scalars(cut, shards, whole_steps=on_host), **flat}
        for number, (cut, flat) in enumerate(zip(cuts, flats, strict=True))
    }
    for group in inner["param_groups"]:
        group.update(shards.options(cuts[group["params"][0]].names[0]))
    return state


def _scalars(cut: _Cut, shards: Shards, *, whole_steps: bool) -> dict[str, Any]:
    """A parameter's scalars are those of the whole flat tensor: all took the same steps."""
    scalars = shards.scalars(cut.names[0])
    if whole_steps and "step" in scalars:
        scalars["step"] = int(scalars["step"])  # DeepSpeedCPUAdam takes no tensor, as torch's does
    return scalars


def _fill(cut: _Cut, shards: Shards) -> dict[str, Tensor]:
    """The weights and optimizer states of one flat tensor; zero where it is padding."""
    filled = {key: torch.zeros(cut.flat.numel()) for key in shards.keys(cut.names[0])}
    for key, flat in filled.items():
        for part in cut.ranges:
            for offset, values in shards.read(part.name, key, part.start, part.numel):
                at = part.at + offset
                flat[at : at + values.numel()] = values
    return filled


def _cuts(engine: Any) -> list[_Cut]:
    """How this rank's part of the optimizer is laid out in this run."""
    optimizer = engine.optimizer
    groups = next(getattr(optimizer, name) for name in GROUPS if hasattr(optimizer, name))
    flats = next(getattr(optimizer, name) for name in FLAT if hasattr(optimizer, name))
    cuts = [_Cut(flat) for flat in flats]
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    for cut, group in zip(cuts, groups, strict=True):
        at = 0
        for parameter in group:
            name = engine.param_names[parameter]
            cut.names.append(name)
            if hasattr(parameter, "ds_tensor"):
                share = parameter.ds_tensor.ds_numel
                numel = min(share, parameter.ds_numel - rank * share)
                cut.ranges.append(_Range(name, at, rank * share, max(numel, 0)))
                at += share
            elif (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                cut.ranges.append(_Range(name, here.start, there.start, here.numel))
    return cuts


@torch.no_grad()
def _restore_what_is_not_trained(engine: Any, shards: Shards) -> None:
    buffers = dict(engine.module.named_buffers())
    for name in shards.common["buffer_names"]:
        buffers[name].copy_(shards.common["module"][name])
    rank = torch.distributed.get_rank(engine.optimizer.dp_process_group)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        whole = shards.frozen(name, getattr(parameter, "ds_shape", parameter.shape))
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(whole)
            continue
        part = parameter.ds_tensor
        mine = whole.flatten()[rank * part.ds_numel :][: part.ds_numel]
        part.view(-1)[: mine.numel()].copy_(mine)


__all__ = ["check_readable", "load_reshaped"]
