"""All checks in order, on every rank: first what each sees alone, then what they do together.

examine     each rank its GPU, the first rank of a host the host as well
together    join the process group and try each collective
report      the first rank that is there puts all answers together; the others hear the verdict
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import Store

from hybridsp.collectives.per_group import per_group
from hybridsp.doctor import gpu, host, software
from hybridsp.doctor.finding import Finding, exit_status, failing, merge, ok
from hybridsp.doctor.plan import Needs, check_plan, read_needs
from hybridsp.doctor.roll_call import RollCall
from hybridsp.doctor.together import GRACE, try_collectives
from hybridsp.host_memory import host_memory
from hybridsp.launch import Rank, rank_from_environment, variables
from hybridsp.recipe import one_line

Check = Callable[[], Finding | list[Finding]]
Tell = Callable[[list[Finding]], None]

LIMIT = 120.0  # seconds: NCCL's first call on many hosts, and a kernel's compilation, take a while
DEFAULT_PORT = 29500  # what `init_distributed` takes where MASTER_PORT is not set


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What came out.

    Attributes:
        findings: the table; empty on all ranks but the one that speaks.
        speaks: whether this rank has told.
        exit_status: 1 if anything fails, the same on all ranks that are there.
        broken: a thread of this process hangs in a collective, or its peers are gone; only the end
            of the process ends that.
        untold: what `tell` raised, if it did. It is for the caller to raise: where the group is
            broken, an exception that ends the process would wait for it.
    """

    findings: list[Finding] = field(default_factory=list)
    speaks: bool
    exit_status: int
    broken: bool = False
    untold: Exception | None = None


def diagnose(
    *,
    out: Path | None = None,
    plan: Path | None = None,
    limit: float = LIMIT,
    tell: Tell = lambda findings: None,
) -> Diagnosis:
    """Examine this machine and, under a launcher, try each collective. Every rank calls it.

    Args:
        out: the folder that a run would write to; None for the plan's, or this one.
        plan: a recipe, or the folder that `hybridsp plan --out` wrote.
        limit: seconds that each collective, and the wait for its ranks, may take.
        tell: called with the table on the one rank that speaks, while the others still wait; what
            it raises is in the result.

    Raises:
        ValueError: the launcher's variables are not whole, or the others cannot be reached.
    """
    me = rank_from_environment()
    device = own_device(me)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mine = examine(me, device, out, plan)
    if me.world_size == 1:
        mine.append(
            ok(
                "collectives",
                "not tried with one rank: start this under torchrun or deepspeed, as "
                "`torchrun --nproc-per-node 8 -m hybridsp.cli doctor`",
            )
        )
        untold = _why_untold(tell, mine)
        status = exit_status(mine)
        return Diagnosis(findings=mine, speaks=True, exit_status=status, untold=untold)
    roll = RollCall(_meeting_place(me, limit), me)
    roll.answer("findings", json.dumps([finding.as_json() for finding in mine]))
    together, broken = try_collectives(roll, device, limit)
    return _report(roll, together, broken, limit, tell)


def own_device(me: Rank) -> torch.device:
    """The device that this rank will compute on, as `init_distributed` chooses it."""
    to_cpu = variables("DS_ACCELERATOR").get("DS_ACCELERATOR") == "cpu"
    if to_cpu or not torch.cuda.is_available() or me.local_rank >= torch.cuda.device_count():
        return torch.device("cpu")
    return torch.device("cuda", me.local_rank)


def examine(me: Rank, device: torch.device, out: Path | None, plan: Path | None) -> list[Finding]:
    """What this rank sees alone."""
    checks: dict[str, Check] = {
        "linear attention": lambda: software.linear_attention(device),
        "softmax attention": lambda: software.softmax_attention(device),
    }
    if me.local_rank == 0:
        checks = _checks_of_host(me, device, out, plan) | checks
    if device.type == "cuda":
        checks = {f"GPU {device.index}": lambda: gpu.own(device.index)} | checks
    return [finding for name, check in checks.items() for finding in guarded(name, check)]


def guarded(name: str, check: Check) -> list[Finding]:
    """What a check finds; where it breaks, that is the finding."""
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 - what is broken here must not hide the other checks
        text = f"cannot be examined: {type(error).__name__}: {one_line(error)}"
        return [failing(name, text, "mend what the error says: a run will likely meet it too")]
    return [found] if isinstance(found, Finding) else found


def _checks_of_host(
    me: Rank, device: torch.device, out: Path | None, plan: Path | None
) -> dict[str, Check]:
    """What one rank of a host looks at for all of them."""
    on_gpu = device.type == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else 0
    of_gpus: dict[str, Check] = {"links": gpu.links, "NCCL": gpu.nccl}
    return {
        "GPUs": lambda: gpu.gpus(used=on_gpu),
        **(of_gpus if on_gpu else {}),
        "environment": gpu.settings,
        "packages": software.versions,
        "shared memory": lambda: host.shared_memory(gpus),
        "open files": lambda: host.open_files(me.world_size),
        "locked memory": host.locked_memory,
        "host memory": lambda: host.memory(host_memory()),
        "plan": lambda: _plan_and_room(me, device, out, plan),
    }


def _plan_and_room(
    me: Rank, device: torch.device, out: Path | None, plan: Path | None
) -> list[Finding]:
    """What depends on the run: memory, disk, and whether it offloads the optimizer."""
    on_gpu = device.type == "cuda"
    needs: Needs | None = None
    findings: list[Finding] = []
    if plan is not None:
        ranks = me.world_size if me.world_size > 1 else None
        needs, findings = read_needs(plan, ranks, torch.cuda.device_count() if on_gpu else 0)
    pinning_fails = gpu.pinned_memory() if on_gpu else None
    offloads = needs is not None and needs.offloads_optimizer and on_gpu
    findings.append(software.optimizer_offload(pinning_fails, needed=offloads))
    if needs is None:
        return [*findings, host.disk(out or Path())]
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    findings += check_plan(needs, host_memory(), total)
    return [*findings, host.disk(out or needs.out, needs.disk)]


@per_group
def _diagnoses(_group: dist.ProcessGroup) -> Iterator[int]:
    """Numbers the diagnoses of a group, whose questions would else be answered already."""
    return count()


def _meeting_place(me: Rank, limit: float) -> Store:
    """The job's store, on a connection of its own, which the collectives do not hold up."""
    if dist.is_initialized():
        group = dist.group.WORLD
        assert group is not None
        store = group.get_group_store().clone()  # type: ignore[attr-defined]  # stubs lack it
        return dist.PrefixStore(f"hybridsp/doctor/{next(_diagnoses(group))}", store)
    from torch.distributed.rendezvous import rendezvous

    there = variables("MASTER_")
    if "MASTER_ADDR" not in there:
        raise ValueError(
            f"MASTER_ADDR is not set for a job of {me.world_size} ranks: under srun export it (the "
            "first host of the job)"
        )
    url = "env://" if "MASTER_PORT" in there else f"tcp://{there['MASTER_ADDR']}:{DEFAULT_PORT}"
    # One rank to wait for: with the job's number the store would itself wait, and name nobody.
    found = rendezvous(url, me.rank, 1, timeout=timedelta(seconds=limit))
    try:
        store, _, _ = next(iter(found))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(
            f"rank {me.rank} cannot reach the job's store at MASTER_ADDR:MASTER_PORT ({error}): "
            "see that rank 0 runs, that its port is open to this host, and that no other job has it"
        ) from error
    return dist.PrefixStore("hybridsp/doctor", store)


def _report(
    roll: RollCall, together: list[Finding], broken: bool, limit: float, tell: Tell
) -> Diagnosis:
    alone = {
        rank: [Finding.from_json(fields) for fields in json.loads(text)]
        for rank, text in roll.answers("findings").items()
    }
    speaks = roll.me.rank == min(alone)
    findings = [*merge(alone), *together] if speaks else []
    untold = _why_untold(tell, findings) if speaks else None
    if speaks:
        # Not before: a launcher ends all ranks as soon as one leaves with an exit code of 1.
        roll.tell("verdict", str(exit_status(findings)))
    # Silence is no good sign either.
    verdict = roll.hear("verdict", limit + GRACE) or "1"
    roll.answer("leaving")
    if roll.me.rank == 0:  # the store may be this process's
        roll.missing("leaving", GRACE)
    return Diagnosis(
        findings=findings, speaks=speaks, exit_status=int(verdict), broken=broken, untold=untold
    )


def _why_untold(tell: Tell, findings: list[Finding]) -> Exception | None:
    try:
        tell(findings)
    except Exception as error:  # noqa: BLE001 - the others wait for the verdict, and a broken group
        return error
    return None


__all__ = ["LIMIT", "Diagnosis", "diagnose"]
