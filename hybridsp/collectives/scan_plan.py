"""From a user's call of All-Scan to a plan: check it, compare it between ranks, decide the rest.

A call's *kind* is its shapes and options. The first call of a kind on a group does all three and
the plan is remembered, so that later calls cost a look into a table. (On the CPU, where it costs
little, the values of the decays are looked at every time.) Direction is no part of the kind: what
was agreed on in the forward pass serves the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.agreement import compare
from hybridsp.collectives.cost import Plan, chain_plan, choose, hierarchical_plan
from hybridsp.collectives.per_group import per_group
from hybridsp.collectives.symmetric import require_symmetric, why_not
from hybridsp.collectives.topology import topology

Algorithm = Literal["auto", "chain", "doubling", "allgather", "hierarchical", "symmetric"]
logger = logging.getLogger(__name__)

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)


class Options(NamedTuple):
    """What a user may choose; see `collectives.all_scan`."""

    algorithm: str = "auto"
    num_blocks: int | None = None
    ranks_per_host: int | None = None


def plan_scan(state: Tensor, decay: Tensor, group: dist.ProcessGroup, options: Options) -> Plan:
    """How to scan.

    Args:
        state: S_p [B, H, K, V] fp32.
        decay: d_p [B, H, K] or [B, H, 1] fp32 in [0, 1].
        group: all its ranks make this call.
        options: of the user.

    Returns:
        A plan with everything decided, the same on every rank.

    Raises:
        ValueError: whatever is wrong with the call; in the first call of a kind, here or on
            another rank, in later ones here alone.
    """
    plans = _plans(group)
    kind = state.shape, decay.shape, state.dtype, decay.dtype, state.device, decay.device, options
    if kind in plans:
        if not decay.is_cuda and (refusal := refusal_of_values(decay)):
            raise ValueError(refusal)
        return plans[kind]

    def look() -> str:
        if refusal := refusal_of_arguments(state, decay, options) or refusal_of_values(decay):
            raise ValueError(refusal)
        return _describe(state, decay, options)

    compare(group, look, words=str, name="all_scan")
    plans[kind] = _decide(state, decay, group, options)
    return plans[kind]


@per_group
def _plans(_group: dist.ProcessGroup) -> dict[Hashable, Plan]:
    """What has been agreed on and decided, by kind of call."""
    return {}


def _describe(state: Tensor, decay: Tensor, options: Options) -> str:
    chosen = ", ".join(f"{name}={value!r}" for name, value in options._asdict().items())
    return (
        f"all_scan(state {tuple(state.shape)}, decay {tuple(decay.shape)}, {chosen}) "
        f"on {state.device.type}"
    )


def _decide(state: Tensor, decay: Tensor, group: dist.ProcessGroup, options: Options) -> Plan:
    """Fill in what the user has left open. Every rank comes here with the same arguments."""
    algorithm, num_blocks, ranks_per_host = options
    ranks, rows = group.size(), state.shape[2]
    num_bytes = state.numel() * state.element_size()
    decay_bytes = decay.numel() * decay.element_size()
    if ranks == 1:
        return Plan(algorithm="chain", num_blocks=1)
    if algorithm == "auto":
        # Of one host's GPUs it is the fastest, whatever the size (docs/scaling.md).
        if (reason := why_not(state, group)) is None:
            return Plan(algorithm="symmetric")
        logger.info("All-Scan does not go through symmetric memory: %s", reason)
        return choose(topology(group, state.device), ranks, num_bytes, decay_bytes, rows)
    if algorithm == "chain" and num_blocks is None:
        return chain_plan(topology(group, state.device), ranks, num_bytes, rows)[1]
    if algorithm == "hierarchical":
        if ranks_per_host is None:
            ranks_per_host = _found_ranks_per_host(group, state.device)
        if num_blocks is None:
            found = topology(group, state.device)
            return hierarchical_plan(
                found, ranks, num_bytes, decay_bytes, rows, ranks_per_host=ranks_per_host
            )[1]
    if algorithm == "symmetric":
        require_symmetric(state, group)
    return Plan(algorithm=algorithm, num_blocks=num_blocks, ranks_per_host=ranks_per_host)


def _found_ranks_per_host(group: dist.ProcessGroup, device: torch.device) -> int:
    found = topology(group, device).ranks_per_host
    if found is None:
        raise ValueError(
            "algorithm = 'hierarchical' needs hosts that hold equally many consecutive ranks of "
            "the group, and these do not; start the ranks host by host, give ranks_per_host, or "
            "use algorithm = 'auto'"
        )
    return found


def refusal_of_arguments(state: Tensor, decay: Tensor, options: Options) -> str | None:
    """What is wrong with shapes, dtypes, devices or options, or None."""
    if options.algorithm not in ALGORITHMS:
        return f"algorithm = {options.algorithm!r} is unknown; use one of {ALGORITHMS}"
    fits = state.dim() == 4 and decay.dim() == 3 and decay.shape[:2] == state.shape[:2]
    if not fits or decay.shape[2] not in (1, state.shape[2]) or not state.numel():
        return (
            f"state {tuple(state.shape)} and decay {tuple(decay.shape)} do not fit: state is "
            "[B, H, K, V] and decay [B, H, K] or [B, H, 1], none of them 0"
        )
    if state.dtype != torch.float32 or decay.dtype != torch.float32:
        return (
            f"state is {state.dtype} and decay {decay.dtype}: what crosses ranks and accumulates "
            "must be torch.float32; call .float() on them"
        )
    if state.device != decay.device:
        return f"state is on {state.device} and decay on {decay.device}; move one to the other"
    return _refusal_of_options(options, rows=state.shape[2])


def _refusal_of_options(options: Options, rows: int) -> str | None:
    algorithm, num_blocks, ranks_per_host = options
    if num_blocks is not None and algorithm not in ("chain", "hierarchical"):
        return (
            f"num_blocks = {num_blocks} means nothing to algorithm = {algorithm!r}: leave it out, "
            "or use 'chain' or 'hierarchical'"
        )
    if num_blocks is not None and not 1 <= num_blocks <= rows:
        return f"num_blocks = {num_blocks} must lie in 1 .. K = {rows}"
    if ranks_per_host is not None and algorithm != "hierarchical":
        return (
            f"ranks_per_host = {ranks_per_host} means nothing to algorithm = {algorithm!r}: leave "
            "it out, or use 'hierarchical'"
        )
    if ranks_per_host is not None and ranks_per_host < 1:
        return f"ranks_per_host = {ranks_per_host} must be at least 1"
    return None


def refusal_of_values(decay: Tensor) -> str | None:
    """What is wrong with the decays' values, or None. On CUDA the host waits for the answer."""
    lowest, highest = (bound.item() for bound in decay.detach().aminmax())
    if lowest >= 0 and highest <= 1:
        return None
    return (
        f"decay has values from {lowest:g} to {highest:g}, and must lie in [0, 1]: it is a product "
        "of gates, the exponential of a sum of log decays <= 0"
    )
