"""The collectives, tried by all ranks in step, without ever waiting for one that hangs.

For each, all ranks answer in the store that they are there, make the call on a thread, and answer
what became of it. So a rank that does not come is named before anybody waits for it, and a call
that does not return is left behind on its thread, the ranks that are in it named. After either no
other call is made: the group is broken.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist

from hybridsp.doctor.finding import Finding, failing, name_ranks, ok, warning
from hybridsp.doctor.roll_call import RollCall
from hybridsp.doctor.trials import Outcome, all_trials, attempt
from hybridsp.mesh import SPMesh

# A rank that gives up says so a little after its own limit; the others wait for that.
GRACE = 5.0
JOINING = "process group"

Work = Callable[[], Outcome]


def try_collectives(
    roll: RollCall, device: torch.device, limit: float
) -> tuple[list[Finding], bool]:
    """Join the process group and try each collective on it. Every rank calls it.

    Args:
        roll: the ranks.
        device: this rank's.
        limit: seconds for each call, and for the ranks to come to it.

    Returns:
        A finding for each, and whether the group is broken: then the process has to end, as a
        thread of it may hang.
    """
    ours = not dist.is_initialized()
    findings: list[Finding] = []
    works = list(_works(roll))
    for done, (name, work) in enumerate(works, start=1):
        finding, broken = _together(roll, name, work, device, limit)
        findings.append(finding)
        if broken or not dist.is_initialized():
            left = [name for name, _ in works[done:]]
            fix = f"mend first what is said of {name}"
            told = [warning("the rest", f"not tried: {', '.join(left)}", fix)] if left else []
            return findings + told, True
    if ours:
        dist.destroy_process_group()
    return findings, False


def _works(roll: RollCall) -> Iterator[tuple[str, Work]]:
    """What is done, by name: joining, and with the mesh that comes of it everything else."""
    meshes: list[SPMesh] = []

    def join() -> Outcome:
        start = time.perf_counter()
        meshes.append(SPMesh(ring=roll.me.world_size))
        seconds = time.perf_counter() - start
        return Outcome(first=seconds, note=f"{dist.get_backend()}, {roll.me.world_size} ranks")

    yield JOINING, join
    for trial in all_trials():
        yield trial.name, partial(lambda trial: attempt(trial, meshes[0]), trial)


def _together(
    roll: RollCall, name: str, work: Work, device: torch.device, limit: float
) -> tuple[Finding, bool]:
    """One call of all ranks: the finding, and whether the group is broken."""
    roll.answer(f"{name}: here")
    if absent := roll.missing(f"{name}: here", limit):
        found = f"{name_ranks(absent)} did not come within {limit:g} s"
        return failing(name, found, _why_absent(absent)), True
    outcome = on_a_thread(work, device, limit)
    roll.answer(f"{name}: done", json.dumps(outcome.as_json()))
    told = roll.answers(f"{name}: done", limit + GRACE)
    outcomes = {rank: Outcome(**json.loads(text)) for rank, text in told.items()}
    lost = [rank for rank in range(roll.me.world_size) if rank not in outcomes]
    stuck = [rank for rank, outcome in outcomes.items() if outcome.stuck]
    return judge(name, outcomes, lost, device.type, limit), bool(lost or stuck)


def on_a_thread(work: Work, device: torch.device, limit: float) -> Outcome:
    """What `work()` returns or raises, or that it is stuck when the time is over."""
    outcomes: list[Outcome] = []

    def body() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            outcomes.append(work())
        except BaseException as error:  # noqa: BLE001 - told as this rank's outcome
            text = " ".join(str(error).split())
            outcomes.append(Outcome(error=f"{type(error).__name__}: {text}"))

    thread = threading.Thread(target=body, name="hybridsp doctor", daemon=True)
    thread.start()
    thread.join(limit)
    return outcomes[0] if outcomes else Outcome(stuck=True)


def judge(
    name: str, outcomes: Mapping[int, Outcome], lost: list[int], device_type: str, limit: float
) -> Finding:
    """What the ranks' outcomes come to.

    Args:
        name: of the trial.
        outcomes: by rank.
        lost: ranks that came and gave none.
        device_type: "cuda" or "cpu".
        limit: seconds that the call had.
    """
    errors = {rank: one.error for rank, one in outcomes.items() if one.error}
    stuck = [rank for rank, one in outcomes.items() if one.stuck]
    parts = [f"{name_ranks(lost)} ended in it"] if lost else []
    parts += [
        f"{name_ranks(rank for rank in errors if errors[rank] == text)}: {text}"
        for text in dict.fromkeys(errors.values())
    ]
    parts += [f"{name_ranks(stuck)} had not returned after {limit:g} s"] if stuck else []
    if parts:
        fix = _why_absent(lost) if lost else _why_stuck(device_type) if stuck else _why_wrong(name)
        return failing(name, "; ".join(parts), fix)
    refused = next((one.refused for one in outcomes.values() if one.refused), None)
    if refused is not None:
        return ok(name, f"not offered here: {refused}")
    slowest = max(one.seconds for one in outcomes.values())
    first = max(one.first for one in outcomes.values())
    times = [_time(slowest), f"{_time(first)} the first time"] if slowest else [_time(first)]
    notes = [note for note in dict.fromkeys(one.note for one in outcomes.values()) if note]
    return ok(name, "; ".join([*notes, ", ".join(times)]))


def _why_absent(ranks: list[int]) -> str:
    return (
        f"look for the end of {name_ranks(ranks)} in their own output and in dmesg, and start this "
        "on every rank"
    )


def _why_stuck(device_type: str) -> str:
    if device_type == "cuda":
        return (
            "start it again with NCCL_DEBUG=INFO; if it passes with NCCL_P2P_DISABLE=1 the peer "
            "access of the GPUs is at fault, with NCCL_IB_DISABLE=1 the network, and "
            "NCCL_SOCKET_IFNAME names the interface to use"
        )
    return "name the network interface that reaches all hosts: GLOO_SOCKET_IFNAME=eth0"


def _why_wrong(name: str) -> str:
    if name == JOINING:
        return "mend what is said here; every rank needs a GPU of its own, or none has one"
    return "start it again; if it stays, update the GPUs' driver and NCCL, and report it"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"


__all__ = ["GRACE", "on_a_thread", "try_collectives"]
