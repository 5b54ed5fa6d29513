"""Profiler traces, and what they say about overlap.

Communication costs nothing only while something else computes. A trace shows the GPU's streams;
`overlap` reads from it for how much of the time during which a side stream was busy (the scan, and
NCCL's own streams) kernels of the main stream ran too. A NCCL kernel that waits for a peer is busy,
so time lost by waiting counts as scan time that is not hidden. What is traced runs as inside a
training step: ranks start together, and the GPU is held until the host has launched the whole call.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hybridsp.bench.job import attempt
from hybridsp.bench.timing import hold_gpu, meet_on_gpu, synchronize
from hybridsp.mesh import SPMesh

GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
HOLDING, HOLD_SECONDS = "spin_kernel", 0.05  # a profiled host is several times slower
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Microseconds of one trace: side streams busy, and of these with the main stream busy too."""

    side_us: float
    hidden_us: float

    @property
    def fraction(self) -> float:
        """The share of the side streams' time that is hidden."""
        return self.hidden_us / self.side_us


def record(call: Callable[[], Any], mesh: SPMesh, path: Path, *, beside: str = "the scan") -> str:
    """Trace one call and save it as a chrome trace; says in a line what it shows. Collective.

    The trace is rank 1's, which both receives and sends; rank 0's in a job of one. A trace that
    cannot be had is a line that says why: it must not cost the run its figures.
    """
    line, reason = attempt(partial(_record, call, mesh, path, beside), mesh)
    box = [f"{path.name}: {line or reason}"]
    dist.broadcast_object_list(box, src=_traced(mesh) if reason is None else 0)
    return box[0]


def _traced(mesh: SPMesh) -> int:
    return min(1, mesh.world_size - 1)


def _record(call: Callable[[], Any], mesh: SPMesh, path: Path, beside: str) -> str:
    """What `record` says, on the rank that is traced; elsewhere nothing."""
    activities = [ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    line = ""
    for last in (False, True):  # the first profile starts the profiler, which holds up the peers
        synchronize(mesh)
        dist.barrier()
        tracing = mesh.rank == _traced(mesh)
        with profile(activities=activities) if tracing else nullcontext() as profiler:
            if mesh.device.type == "cuda":
                meet_on_gpu(mesh)
                hold_gpu(HOLD_SECONDS)
            call()
            synchronize(mesh)
        if last and profiler is not None:
            line = _exported(profiler, path, beside)
    return line


def _exported(profiler: profile, path: Path, beside: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return describe(json.loads(path.read_text())["traceEvents"], beside)
    except OSError as error:
        return f"it cannot be written: {error}"


def describe(events: Sequence[Mapping[str, Any]], beside: str = "the scan") -> str:
    """One line about the overlap in a trace's events; `beside` is what runs on side streams."""
    found = overlap(events)
    if found is None:
        return "no GPU work in the trace, so no overlap to see"
    if found.side_us == 0:
        return "nothing ran beside the main stream"
    return (
        f"{found.side_us:.0f} us on side streams ({beside}), {found.hidden_us:.0f} us of them "
        f"while the main stream computed: {found.fraction:.0%} hidden"
    )


def overlap(events: Sequence[Mapping[str, Any]]) -> Overlap | None:
    """How much of the side streams' time the main stream covers; None without GPU work.

    The main stream is the one that computes longest; NCCL's kernels do not count as computing.
    What ran before the GPU was let go is no part of the call.
    """
    held = [e for e in events if e.get("ph") == "X" and HOLDING in e.get("name", "")]
    let_go = max((float(e["ts"]) + float(e["dur"]) for e in held), default=0.0)
    events = [event for event in events if float(event.get("ts", 0)) >= let_go]
    busy: dict[Any, list[Interval]] = defaultdict(list)
    computing: dict[Any, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in GPU_CATEGORIES:
            stream, start = event["args"]["stream"], float(event["ts"])
            busy[stream].append((start, start + float(event["dur"])))
            computing[stream] += 0.0 if "nccl" in event["name"].lower() else float(event["dur"])
    if not busy:
        return None
    main = max(computing, key=lambda stream: computing[stream])
    side = union(span for stream, spans in busy.items() if stream != main for span in spans)
    covered = union(busy[main])
    return Overlap(side_us=length_of(side), hidden_us=length_of(_intersection(side, covered)))


def union(spans: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same time, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _intersection(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """What two lists of disjoint intervals, in order, have in common."""
    common, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def length_of(spans: Iterable[Interval]) -> float:
    """Of disjoint intervals together."""
    return sum(stop - start for start, stop in spans)
