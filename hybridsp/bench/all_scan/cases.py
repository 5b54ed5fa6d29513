"""What `hybridsp bench all-scan` times: states, the wire's own calls, the scans.

How each scan will go (its blocks, its hosts) comes from where `all_scan` itself has it, so the
record says what was timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.bench.all_scan.cost_model import Scan
from hybridsp.bench.options import human_bytes
from hybridsp.bench.timing import measure
from hybridsp.collectives.all_scan import all_scan
from hybridsp.collectives.cost import Plan
from hybridsp.collectives.scan_plan import Options, plan_scan
from hybridsp.collectives.torch_names import all_gather
from hybridsp.mesh import SPMesh

KEY_DIM = VALUE_DIM = 128
LARGE_MESSAGE_BYTES = {"cuda": 2**28, "cpu": 2**24}
DIRECTIONS = {"forward": False, "reverse": True}
SEND_RECV, ALL_GATHER = "send/recv", "all_gather"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what is called, and the scan that it is (None for the wire's own rows)."""

    name: str
    direction: str | None
    state_bytes: int
    call: Callable[[], Any]
    scan: Scan | None


def reference_cases(state: Tensor, mesh: SPMesh) -> list[Case]:
    """The wire: one message of a state to the next rank, and an all-gather of states."""
    gathered = state.new_empty(mesh.world_size * state.numel())
    calls = {
        SEND_RECV: partial(send_right, state, torch.empty_like(state), mesh),
        ALL_GATHER: partial(all_gather, gathered, state.view(-1), group=mesh.sp_group),
    }
    return [
        Case(name=name, direction=None, state_bytes=state.nbytes, call=call, scan=None)
        for name, call in calls.items()
    ]


def options_of(algorithm: str, ranks_per_host: int | None) -> Options:
    """What is asked of `all_scan`."""
    local = ranks_per_host if algorithm == "hierarchical" else None
    return Options(algorithm=algorithm, ranks_per_host=local)


def plan(options: Options, state: Tensor, decay: Tensor, mesh: SPMesh) -> Plan:
    """What `all_scan` will do with these options, for the record. Collective.

    Raises:
        ValueError: the algorithm cannot run here, or is another one in disguise.
    """
    planned = plan_scan(state, decay, mesh.sp_group, options)
    if options.ranks_per_host is None and (planned.ranks_per_host or 0) >= mesh.sp:
        raise ValueError(
            "one host, on which it is doubling; --ranks-per-host N takes every N ranks for a host"
        )
    return planned


def scan_cases(
    options: Options, state: Tensor, decay: Tensor, mesh: SPMesh, planned: Plan | None
) -> list[Case]:
    """Both directions of an algorithm; without a plan they say only what was asked for."""
    scan = None
    if planned is not None:
        scan = Scan(
            algorithm=planned.algorithm,
            ranks=mesh.sp,
            state_bytes=state.nbytes,
            decay_bytes=decay.nbytes,
            rows=state.shape[2],
            num_blocks=planned.num_blocks,
            ranks_per_host=planned.ranks_per_host,
        )
    call = partial(all_scan, state, decay, mesh.sp_group, **options._asdict())
    return [
        Case(
            name=options.algorithm,
            direction=direction,
            state_bytes=state.nbytes,
            call=partial(call, reverse=reverse),
            scan=scan,
        )
        for direction, reverse in DIRECTIONS.items()
    ]


def send_right(message: Tensor, buffer: Tensor, mesh: SPMesh) -> None:
    """Every rank to the next one at once; the last one only receives."""
    operations = []
    if mesh.sp_rank + 1 < mesh.sp:
        operations.append(_p2p(dist.isend, message, mesh.sp_rank + 1, mesh))
    if mesh.sp_rank > 0:
        operations.append(_p2p(dist.irecv, buffer, mesh.sp_rank - 1, mesh))
    for handle in dist.batch_isend_irecv(operations):
        handle.wait()


def wire_bandwidth(mesh: SPMesh, repeats: int) -> float:
    """Bytes per second of a large message to the next rank."""
    message = torch.zeros(LARGE_MESSAGE_BYTES[mesh.device.type] // 4, device=mesh.device)
    call = partial(send_right, message, torch.empty_like(message), mesh)
    return message.nbytes / measure(call, mesh, repeats=repeats).median


def make_state(shape: tuple[int, int, int], mesh: SPMesh) -> tuple[Tensor, Tensor]:
    """A random state [1, H, K, V] and decay [1, H, K] of this rank."""
    heads, key_dim, value_dim = shape
    generator = torch.Generator(mesh.device).manual_seed(mesh.rank)
    state = torch.randn(1, heads, key_dim, value_dim, generator=generator, device=mesh.device)
    return state, torch.rand(1, heads, key_dim, generator=generator, device=mesh.device)


def shape_of(num_bytes: int) -> tuple[int, int, int]:
    """H, K, V of a state of so many bytes: whole heads of 128 x 128, or a part of one.

    Raises:
        ValueError: there is none.
    """
    row, head = VALUE_DIM * 4, KEY_DIM * VALUE_DIM * 4
    if num_bytes % head == 0:
        return num_bytes // head, KEY_DIM, VALUE_DIM
    if num_bytes < head and num_bytes % row == 0:
        return 1, num_bytes // row, VALUE_DIM
    raise ValueError(
        f"--bytes {human_bytes(num_bytes)} is no state with V = {VALUE_DIM} in fp32: give a "
        f"multiple of {human_bytes(head)}, or below that of {row}; or --heads, --key-dim, "
        "--value-dim"
    )


def _p2p(operation: Any, tensor: Tensor, peer: int, mesh: SPMesh) -> dist.P2POp:
    return dist.P2POp(operation, tensor, group=mesh.sp_group, group_peer=peer)
