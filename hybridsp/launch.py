"""Joining a job: the one place that reads the environment.

A rank learns who it is from the launcher's variables: `deepspeed`, `torchrun` and `accelerate` set
RANK, WORLD_SIZE and LOCAL_RANK; Slurm's `srun` sets SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID.
With none of them there is one process, and it still gets a real process group of size 1, so that
no other code needs to ask whether it is distributed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Who this process is: its number in the job, the job's size, its number on its host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def rank_from_environment(environment: Mapping[str, str] | None = None) -> Rank:
    """Read this process's rank from the launcher's variables.

    Args:
        environment: the variables; None for the process's own.

    Returns:
        The rank; rank 0 of 1 where no launcher speaks.

    Raises:
        ValueError: a launcher set some of its variables and not the others, or not to numbers.
    """
    environment = os.environ if environment is None else environment
    for names in (LAUNCHER_VARIABLES, SLURM_VARIABLES):
        if names[0] not in environment and names[1] not in environment:
            continue
        values = {name: environment.get(name) for name in names}
        try:
            rank, world_size, local_rank = (int(value or "") for value in values.values())
        except ValueError:
            raise ValueError(
                f"the launcher's variables {values} must all be numbers: start the script with "
                "deepspeed, torchrun or srun, or unset them to run as one process"
            ) from None
        if not 0 <= rank < world_size:
            raise ValueError(f"{names[0]} = {rank} must lie in 0 .. {names[1]} - 1 of {values}")
        return Rank(rank=rank, world_size=world_size, local_rank=local_rank)
    return Rank()


def variables(*prefixes: str) -> dict[str, str]:
    """This process's environment variables whose names begin with one of `prefixes`."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def init_distributed(timeout: timedelta = COLLECTIVE_TIMEOUT) -> torch.device:
    """Join the job's process group, unless that is done, and choose this rank's device.

    NCCL and this rank's GPU where CUDA is there, unless DS_ACCELERATOR=cpu tells DeepSpeed to
    leave it alone; gloo and the CPU elsewhere.

    Args:
        timeout: how long a collective may wait for its peers before it fails.

    Returns:
        The device this rank computes on.

    Raises:
        ValueError: the launcher's variables are incomplete, or a host has fewer GPUs than ranks.
    """
    if dist.is_initialized():
        on_gpu = "nccl" in dist.get_backend()
    else:
        on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cpu")
    if on_gpu:
        device = _this_ranks_gpu(rank_from_environment().local_rank)
        torch.cuda.set_device(device)
    _tell_like_a_launcher()
    if not dist.is_initialized():
        _init_process_group("nccl" if on_gpu else "gloo", timeout, device if on_gpu else None)
    return device


def _tell_like_a_launcher() -> None:
    """Set the variables that DeepSpeed reads, where Slurm or nobody started this process."""
    me = rank_from_environment()
    for name, value in zip(
        LAUNCHER_VARIABLES, (me.rank, me.world_size, me.local_rank), strict=True
    ):
        os.environ.setdefault(name, str(value))


def _this_ranks_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK = {local_rank}, but this host shows {torch.cuda.device_count()} GPUs: "
            "start at most one rank per GPU (deepspeed --num_gpus, torchrun --nproc_per_node)"
        )
    return torch.device("cuda", local_rank)


def _init_process_group(backend: str, timeout: timedelta, device: torch.device | None) -> None:
    me = rank_from_environment()
    alone = me.world_size == 1 and "MASTER_ADDR" not in os.environ
    if not alone and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"MASTER_ADDR is not set for a job of {me.world_size} ranks: under srun export "
            "MASTER_ADDR (the first host of the job) and MASTER_PORT before the script"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    try:
        dist.init_process_group(
            backend,
            init_method=None if alone else "env://",
            store=dist.HashStore() if alone else None,
            rank=me.rank,
            world_size=me.world_size,
            timeout=timeout,
            device_id=device,
        )
    except dist.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"rank {me.rank} cannot meet the others at {place} ({error}): is another job there? "
            "Choose another port (--master_port)"
        ) from error


__all__ = ["COLLECTIVE_TIMEOUT", "Rank", "init_distributed", "rank_from_environment", "variables"]
