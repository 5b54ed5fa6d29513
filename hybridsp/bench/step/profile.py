"""Where the time of a training step goes, by kind of work.

A profiler knows kernels by name and calls by nesting; what a user wants to know is how much is
attention, how much products, how much copies. So each kernel is told by what launched it, where
that says it (the loss, the optimizer, an attention layer), and else by its name. Kinds run beside
one another on several streams, so that their times may add up to more than the step; what is left
when no stream does anything is idle: the GPU waits for the host.

On a CPU there are no kernels, and a call's own time, without the calls in it, takes their place.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from hybridsp.bench.timing import synchronize
from hybridsp.bench.trace import GPU_CATEGORIES, Interval, length_of, union
from hybridsp.mesh import SPMesh

STEP, LOSS, OPTIMIZER = "hybridsp.step", "hybridsp.loss", "hybridsp.optimizer"
CALLS, LAUNCHES = {"cpu_op", "user_annotation"}, {"cuda_runtime", "cuda_driver"}
SOFTMAX, LINEAR, IDLE = "softmax attention", "linear attention", "idle"
OTHER = "norms, RoPE, activations, sums"

# By the name of a kernel or call itself: what needs no surroundings to be told.
TRANSFERS = (
    ("collectives", re.compile(r"nccl|gloo|c10d", re.IGNORECASE)),
    ("copies host <-> device", re.compile(r"Memcpy (HtoD|DtoH)")),
)
# By a call around it.
SURROUNDINGS = (
    ("loss", re.compile(LOSS)),
    ("optimizer", re.compile(OPTIMIZER)),
    (SOFTMAX, re.compile(r"RingAttention")),
    (LINEAR, re.compile(r"LinearAttention|AllScan")),
)
# By its name, where nothing around it says more.
NAMES = (
    (SOFTMAX, re.compile(r"sdpa|flash|fmha", re.IGNORECASE)),
    (
        "products",
        re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitKreduce|aten::(mm|addmm|bmm)$"),
    ),
)


class Row(NamedTuple):
    """Seconds of one kind, and how many kernels or calls they are."""

    kind: str
    seconds: float
    calls: int


def profile_step(
    engine: Any, step: Callable[[], None], mesh: SPMesh
) -> list[dict[str, Any]] | None:
    """What a step's time goes into on rank 0, largest first; None elsewhere. Collective.

    Args:
        engine: takes the step.
        step: one training step.
        mesh: the job.
    """
    activities = [ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(mesh)
    dist.barrier()
    tracing = mesh.rank == 0
    traced = profile(activities=activities) if tracing else nullcontext()
    with _named_parts(engine), traced as found, record_function(STEP):
        step()
        synchronize(mesh)
    if found is None:
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [row._asdict() for row in tabulate(events)]


@contextmanager
def _named_parts(engine: Any) -> Iterator[None]:
    """Name what a trace would not tell apart by itself."""
    with ExitStack() as stack:
        for owner, method, name in (
            (engine.module.lm_head, "forward", LOSS),
            (engine, "step", OPTIMIZER),
        ):
            stack.enter_context(_named(owner, method, name))
        yield


@contextmanager
def _named(owner: Any, method: str, name: str) -> Iterator[None]:
    before, was_own = getattr(owner, method), method in vars(owner)

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return before(*args, **kwargs)

    setattr(owner, method, run)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, method, before)
        else:
            delattr(owner, method)


@dataclass
class _Call:
    """A call on the host: microseconds, and the kind of work that it belongs to, if that is known.

    `own` is its time without that of the calls in it.
    """

    event: Mapping[str, Any]
    start: float
    stop: float
    around: str | None
    own: float


def tabulate(events: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The table of a chrome trace's events with one call named STEP in it.

    Returns:
        Kinds, largest first, then IDLE and the whole step.
    """
    events = [event for event in events if event.get("ph") == "X"]
    calls = list(_calls(events))
    (step,) = (call for call in calls if call.event["name"] == STEP)
    kernels = [event for event in events if event["cat"] in GPU_CATEGORIES]
    parts = _of_kernels(kernels, calls) if kernels else _of_calls(calls, step)
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for kind, microseconds, _ in parts:
        seconds[kind] += microseconds / 1e6
        counts[kind] += 1
    table = [Row(kind, total, counts[kind]) for kind, total in seconds.items()]
    table.sort(key=lambda row: -row.seconds)
    idle = step.stop - step.start - length_of(union(span for _, _, span in parts))
    whole = Row("step", (step.stop - step.start) / 1e6, 1)
    return [*table, Row(IDLE, max(idle, 0.0) / 1e6, 0), whole]


def _calls(events: Iterable[Mapping[str, Any]]) -> Iterator[_Call]:
    """Calls and launches of all threads, each behind the calls that it is in."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event["cat"] in CALLS | LAUNCHES:
            threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        stack: list[_Call] = []
        for event in sorted(thread, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            start, stop = _span(event)
            while stack and stack[-1].stop <= start:
                stack.pop()
            outer = stack[-1] if stack else None
            around = _told_by(SURROUNDINGS, event["name"]) or (outer.around if outer else None)
            call = _Call(event, start, stop, around, stop - start)
            if outer is not None:
                outer.own -= stop - start
            stack.append(call)
            yield call


def _of_kernels(
    kernels: Iterable[Mapping[str, Any]], calls: Iterable[_Call]
) -> list[tuple[str, float, Interval]]:
    """Kind, microseconds and span of everything that the GPU did."""
    launched = {
        call.event["args"].get("correlation"): call.around
        for call in calls
        if call.event["cat"] in LAUNCHES
    }
    parts = []
    for kernel in kernels:
        start, stop = _span(kernel)
        around = launched.get(kernel["args"].get("correlation"))
        parts.append((_kind(kernel["name"], around), stop - start, (start, stop)))
    return parts


def _of_calls(calls: Iterable[_Call], step: _Call) -> list[tuple[str, float, Interval]]:
    """Kind, own microseconds and span of what the host computed in the step."""
    return [
        (_kind(call.event["name"], call.around), call.own, (call.start, call.stop))
        for call in calls
        if call.event["cat"] == "cpu_op" and step.start <= call.start < step.stop
    ]


def _kind(name: str, around: str | None) -> str:
    return _told_by(TRANSFERS, name) or around or _told_by(NAMES, name) or OTHER


def _told_by(patterns: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str | None:
    return next((kind for kind, pattern in patterns if pattern.search(name)), None)


def _span(event: Mapping[str, Any]) -> Interval:
    start = float(event["ts"])
    return start, start + float(event["dur"])


__all__ = ["IDLE", "LOSS", "OPTIMIZER", "STEP", "Row", "profile_step", "tabulate"]
