"""How long a call takes on the slowest rank, and how much memory it needs.

Ranks start each repetition together, behind a barrier. Without one, the first rank of a pipeline
would run ahead by many calls, and the last would see how often a result arrives, not how long one
takes. On a GPU the time is between two CUDA events on the current stream, so the barrier and the
launch of the events cost nothing that is counted; on a CPU it is the wall clock's.

A short call on a GPU is over before the host has launched its kernels, and the events then time the
host. Inside a training step the host is ahead and this costs nothing; `queued` times a call as it
runs there, behind a GPU that is held until everything is launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hybridsp.bench.job import meet
from hybridsp.mesh import SPMesh

# Calls before those that count. The first compiles, tunes and connects, however long it takes; one
# behind it that is long itself is warm, and what is still cold is lost in the next.
WARMUP_CALLS, LONG_CALL_SECONDS = 3, 2.0
# Seconds for which the GPU is held, at first and at most, so that the host gets ahead of it.
FIRST_HOLD, LAST_HOLD = 0.01, 1.0
CYCLES_PER_SECOND = 2e9  # about what a GPU runs at; how long exactly it is held does not matter


@dataclass(frozen=True, kw_only=True)
class Times:
    """What was measured of one call.

    Attributes:
        median, p10, p90: seconds, of the rank whose median is largest.
        peak_bytes: most memory that PyTorch had allocated on a rank's GPU, what was there before
            the call included; None on a CPU.
        warmup_calls: calls before those that were timed.
    """

    median: float
    p10: float
    p90: float
    peak_bytes: int | None
    warmup_calls: int

    def as_json(self) -> dict[str, float | int | None]:
        """The figures by name, with the unit in it."""
        return {
            "seconds": self.median,
            "seconds_p10": self.p10,
            "seconds_p90": self.p90,
            "peak_bytes": self.peak_bytes,
            "warmup_calls": self.warmup_calls,
        }


def measure(
    call: Callable[[], Any],
    mesh: SPMesh,
    *,
    repeats: int,
    warmup: int = WARMUP_CALLS,
    queued: bool = False,
) -> Times:
    """Time `call`, which every rank of the mesh makes. Collective over the world.

    Ranks wait for each call that warms up, and meet behind it. On a GPU the host runs ahead of
    those that are timed, as in training, up to the barrier before each.

    Args:
        call: what is timed; its result is dropped at once.
        mesh: the job; says on which device.
        repeats: timed calls, at least 1.
        warmup: calls before them, at most; the second is the last if it takes
            `LONG_CALL_SECONDS`, and so on.
        queued: hold the GPU until the host has launched the whole call; on a GPU only.

    Raises:
        RuntimeError: `queued`, and the call waits for the GPU, so that it cannot be launched ahead.
        RankFailedError: another rank failed while it warmed up.
    """
    on_gpu = mesh.device.type == "cuda"
    warmup_calls = _warm_up(call, mesh, warmup)
    synchronize(mesh)  # also what the caller has warmed up, on streams of its own
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timed = _clock_seconds
    if on_gpu:
        timed = _queued_seconds if queued else _event_seconds
    seconds = timed(call, mesh, repeats)
    levels = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    mine = torch.tensor(seconds, dtype=torch.float64).quantile(levels).tolist()
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    ranks = meet((mine, peak))
    median, p10, p90 = max(quantiles for quantiles, _ in ranks)
    peaks = [peak for _, peak in ranks if peak is not None]
    return Times(
        median=median,
        p10=p10,
        p90=p90,
        peak_bytes=max(peaks, default=None),
        warmup_calls=warmup_calls,
    )


def seconds_of_one(call: Callable[[], Any], mesh: SPMesh) -> float:
    """Wall seconds of one call, compiling and tuning included; the slowest rank's. Collective.

    Raises:
        RankFailedError: the call, or what was before it, has failed on another rank.
    """
    synchronize(mesh)
    start = time.perf_counter()
    call()
    synchronize(mesh)
    return max(meet(time.perf_counter() - start))


def copy_bandwidth(mesh: SPMesh, *, repeats: int) -> float:
    """Bytes per second, read and written, of a copy inside the slowest rank's own memory."""
    num_bytes = 2**29 if mesh.device.type == "cuda" else 2**25
    source = torch.zeros(num_bytes // 4, device=mesh.device)
    target = torch.zeros_like(source)
    times = measure(lambda: target.copy_(source), mesh, repeats=repeats)
    return 2 * num_bytes / times.median


def synchronize(mesh: SPMesh) -> None:
    """Wait until this rank's device is idle."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()


def check_queued(mesh: SPMesh, *, queued: bool) -> None:
    """Refuse `queued` where there is no GPU to hold.

    Raises:
        ValueError: as it says.
    """
    if queued and mesh.device.type != "cuda":
        raise ValueError("--queued holds a GPU, and this job has none: leave it out")


def meet_on_gpu(mesh: SPMesh) -> None:
    """Let the stream, but not the host, wait for the other ranks'. Collective over the world."""
    if mesh.world_size > 1:
        dist.all_reduce(torch.zeros(1, device=mesh.device))


def hold_gpu(seconds: float) -> None:
    """Keep the current stream busy, so that what is launched meanwhile starts behind it at once."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # kernel `spin_kernel`


def _warm_up(call: Callable[[], Any], mesh: SPMesh, most: int) -> int:
    """How many calls it took, the same on every rank. Collective."""
    for made in range(1, most + 1):
        if seconds_of_one(call, mesh) >= LONG_CALL_SECONDS and made > 1:
            return made
    return most


def _event_seconds(call: Callable[[], Any], mesh: SPMesh, repeats: int) -> list[float]:
    pairs = []
    for _ in range(repeats):
        meet_on_gpu(mesh)
        pairs.append(_between_events(call))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def _queued_seconds(call: Callable[[], Any], mesh: SPMesh, repeats: int) -> list[float]:
    """As `_event_seconds`; a call that some rank did not launch in time is not counted."""
    seconds: list[float] = []
    hold = FIRST_HOLD
    while len(seconds) < repeats:
        hold_gpu(hold)
        meet_on_gpu(mesh)
        start, stop = _between_events(call)
        ahead = not start.query()
        torch.cuda.synchronize()
        if all(meet(ahead)):
            seconds.append(start.elapsed_time(stop) / 1e3)
        elif hold < LAST_HOLD:
            hold *= 2
        else:
            raise RuntimeError(f"not launched within {hold:.1f} s: the call waits for the GPU")
    return seconds


def _between_events(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    return start, stop


def _clock_seconds(call: Callable[[], Any], mesh: SPMesh, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        if mesh.world_size > 1:
            dist.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
