"""SPMesh: one object that owns every process group.

The job's ranks form a grid of three axes, the last one fastest:

    rank = (dp_rank * ring + ring_rank) * ulysses + ulysses_rank

    axis      who shares it                                used by
    dp        same tokens' place, different sequences      nothing of ours yet
    sp        = ring x ulysses: one sequence, cut in P     All-Scan, halo, softmax relayout
    ring      passes K and V around                        softmax layers
    ulysses   holds the ring's chunk, by heads             softmax layers, inside sp
    data      all ranks: every one carries other tokens    ZeRO, loss

Ulysses neighbours are neighbouring ranks, so its all-to-all stays on the fastest links. DeepSpeed
sees the mesh through `SPMesh.mpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from hybridsp.launch import COLLECTIVE_TIMEOUT, init_distributed

T = TypeVar("T")


class SPMesh:
    """The grid dp x ring x ulysses and its process groups.

    Joins the launcher's job if nothing has yet (`hybridsp.launch`). Every rank must build it, in
    the same order as other process groups, because creating groups is itself collective.

    Args:
        ring: ranks among which K and V travel.
        ulysses: ranks among which tokens are traded for heads.
        timeout: how long a collective may wait for its peers before it fails.

    Raises:
        ValueError: a degree is not a positive integer, or ring * ulysses does not divide the
            number of ranks.
    """

    dp: int
    """Number of sequences trained at once: what remains of the world."""
    ring: int
    ulysses: int
    sp: int
    """Sequence-parallel degree P = ring * ulysses: ranks that share one sequence."""

    def __init__(
        self, ring: int = 1, ulysses: int = 1, *, timeout: timedelta = COLLECTIVE_TIMEOUT
    ) -> None:
        for name, degree in (("ring", ring), ("ulysses", ulysses)):
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise ValueError(f"{name} = {degree!r} must be a positive integer")
        self.device = init_distributed(timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ring, self.ulysses, self.sp = ring, ulysses, ring * ulysses
        if len(asked := dict.fromkeys(gather_objects((ring, ulysses)))) > 1:
            raise ValueError(
                f"(ring, ulysses) differ between ranks: {', '.join(map(str, asked))}. Start all of "
                "them from the same recipe and arguments"
            )
        if self.world_size % self.sp:
            raise ValueError(
                f"ring * ulysses = {ring} * {ulysses} = {self.sp} does not divide the job's "
                f"{self.world_size} ranks: start a multiple of {self.sp} ranks, or choose degrees "
                f"whose product divides {self.world_size}"
            )
        self.dp = self.world_size // self.sp
        self.dp_rank, self.sp_rank = divmod(self.rank, self.sp)
        self.ring_rank, self.ulysses_rank = divmod(self.sp_rank, self.ulysses)
        self._create_groups(timeout)

    @classmethod
    def auto(
        cls, sp: int, *, num_heads: int, num_kv_heads: int, gpus_per_node: int | None = None
    ) -> SPMesh:
        """A mesh of the given SP degree with ring and Ulysses degrees that fit the model.

        Args: as in `choose_degrees`; `gpus_per_node` defaults to the GPUs of this host, or to the
            whole job where there are none.
        """
        if gpus_per_node is None:
            gpus_per_node = torch.cuda.device_count() or sp
        ring, ulysses = choose_degrees(sp, num_heads, num_kv_heads, gpus_per_node)
        return cls(ring=ring, ulysses=ulysses)

    @property
    def mpu(self) -> DeepSpeedView:
        """What DeepSpeed takes as `mpu`."""
        return DeepSpeedView(self)

    def agree(self, error: Exception | str | None) -> None:
        """Fail on every rank at once if any rank brings an error. Collective over the world.

        Use it after any check whose outcome can differ between ranks (files, data): a rank that
        raised alone would leave the others waiting in their next collective.

        Raises:
            ValueError: some rank brought an error; the message names each such rank and error.
        """
        reports = gather_objects(_message(error) if isinstance(error, Exception) else error)
        failed = {rank: report for rank, report in enumerate(reports) if report is not None}
        if not failed:
            return
        if len(set(failed.values())) == 1 and len(failed) == self.world_size:
            message = failed[0]
        else:
            message = "; ".join(f"rank {rank}: {report}" for rank, report in failed.items())
        raise ValueError(message) from error if isinstance(error, Exception) else None

    def on_every_rank(self, work: Callable[..., T], *args: Any) -> T:
        """What `work(*args)` returns; where it fails on any rank, it fails on all. Collective.

        For work on files and data, which can fail on one host alone.

        Raises:
            ValueError: some rank met an error.
        """
        result, failure = _attempt(work, *args)
        self.agree(failure)
        return cast("T", result)

    def on_rank_zero(self, work: Callable[..., T], *args: Any) -> T:
        """What `work(*args)` returns or raises on rank 0, on every rank. Collective.

        For one view of the file system, which other hosts may see later.

        Raises:
            ValueError: rank 0 met an error.
        """
        result, failure = _attempt(work, *args) if self.rank == 0 else (None, None)
        outcome = [result, None if failure is None else _message(failure)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise ValueError(outcome[1]) from failure
        return cast("T", outcome[0])

    def __repr__(self) -> str:
        return (
            f"SPMesh(dp={self.dp}, ring={self.ring}, ulysses={self.ulysses}, rank={self.rank} of "
            f"{self.world_size}, device={self.device})"
        )

    def _create_groups(self, timeout: timedelta) -> None:
        grid = torch.arange(self.world_size).view(self.dp, self.ring, self.ulysses)
        self.dp_group = _my_group(grid.flatten(1).T, timeout)
        self.sp_group = _my_group(grid.flatten(1), timeout)
        self.ring_group = _my_group(grid.transpose(1, 2).flatten(0, 1), timeout)
        self.ulysses_group = _my_group(grid.flatten(0, 1), timeout)
        self.data_group = _my_group(grid.view(1, -1), timeout)
        self.self_group = _my_group(grid.view(-1, 1), timeout)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order. Collective over the group, over all ranks for None.

    Pickled, so for what is found out once, not for tensors. On NCCL the host waits for the GPU.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def choose_degrees(
    sp: int, num_heads: int, num_kv_heads: int, gpus_per_node: int
) -> tuple[int, int]:
    """Split an SP degree into ring x Ulysses.

    Ulysses moves each of Q, K, V and O once and needs no balancing, so it gets the largest degree
    that stays inside a host and cuts the heads evenly: it divides the query heads, and divides the
    KV heads or is a multiple of them (then KV heads are replicated). The ring takes the rest, so
    the SP degree is not capped by heads.

    Args:
        sp: the sequence-parallel degree P.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        gpus_per_node: ranks on one host.

    Returns:
        (ring, ulysses).

    Raises:
        ValueError: an argument is not a positive integer.
    """
    arguments = {
        "sp": sp,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "gpus_per_node": gpus_per_node,
    }
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} must be a positive integer")

    def fits(ulysses: int) -> bool:
        even_kv = num_kv_heads % ulysses == 0 or ulysses % num_kv_heads == 0
        one_host = sp <= gpus_per_node or gpus_per_node % ulysses == 0
        return sp % ulysses == 0 and num_heads % ulysses == 0 and even_kv and one_host

    ulysses = max(u for u in range(1, min(sp, gpus_per_node) + 1) if fits(u))
    return sp // ulysses, ulysses


class DeepSpeedView:
    """The mesh as DeepSpeed's `mpu` sees it (checked against DeepSpeed 0.19.8).

    ZeRO shards over the sequence-data group, which is every rank, since each carries other tokens.
    There is no tensor parallelism, so those groups hold one rank. Two things are easy to get wrong:
    the mere presence of `initialize_sequence_parallel` is what switches DeepSpeed to sequence
    parallelism, and a method named `get_data_parallel_*` would make ZeRO-3 shard over dp alone and
    let the parameters of SP ranks drift apart, so none is offered.
    """

    initialize_sequence_parallel = None

    def __init__(self, mesh: SPMesh) -> None:
        self._mesh = mesh

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share this rank's sequence."""
        return self._mesh.sp_group

    def get_sequence_parallel_world_size(self) -> int:
        """Number of those ranks."""
        return self._mesh.sp

    def get_sequence_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self._mesh.sp_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks over which ZeRO shards and reduces: all."""
        return self._mesh.data_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """Number of all ranks."""
        return self._mesh.world_size

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's number among all."""
        return self._mesh.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone: the model is not split."""
        return self._mesh.self_group

    def get_model_parallel_world_size(self) -> int:
        """Always 1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Always 0."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def _attempt(work: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    try:
        return work(*args), None
    except Exception as error:  # noqa: BLE001 - none is lost: every rank raises it
        return None, error


def _message(error: Exception) -> str:
    """What an error says, with its type where that is not one that speaks for itself."""
    speaks = isinstance(error, (OSError, RuntimeError, ValueError))
    return str(error) if speaks else f"{type(error).__name__}: {error}"


def _my_group(rows: torch.Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """Create one group per row of ranks, and return the one that this rank is in."""
    ranks: Iterable[list[int]] = rows.tolist()
    group, _ = dist.new_subgroups_by_enumeration(list(ranks), timeout=timeout)
    assert group is not None, "every rank is in one row"
    return group


__all__ = ["DeepSpeedView", "SPMesh", "choose_degrees", "gather_objects"]
