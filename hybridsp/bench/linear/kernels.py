"""How far each Triton kernel of the linear layer is from its memory floor.

One forward and backward of the `local` op is profiled. Its kernels run in an order that the plan
fixes, so the n-th kernel of the profile has a known job, and with it the bytes that it cannot avoid
to move: what it needs read once, what it makes written once. The floor is the time in which a copy
at this device's bandwidth moves as many. All parts of a backward, and all calls of the same job,
make one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hybridsp.bench.linear.ops import Inputs, Op, forward_backward
from hybridsp.ops.gla.contract import Tokens

KERNELS = ("prepare_kernel", "walk_kernel", "scan_kernel", "gradient_kernel")
TITLE = "the kernels of one forward and backward, and the bytes that they cannot avoid to move"
COLUMNS = {
    "job": "kernel",
    "calls": "calls",
    "milliseconds": "ms",
    "gigabytes": "GB",
    "gigabytes_per_second": "GB/s",
    "times_floor": "x floor",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launch is for, and the bytes that it needs and makes."""

    name: str
    kernel: str
    bytes: int


def kernel_rows(op: Op, inputs: Inputs, bandwidth: float) -> list[dict[str, Any]]:
    """A row per job of the Triton backend, in the order of their first launch.

    Args:
        op: `local_op("triton")`.
        inputs: on a CUDA device.
        bandwidth: bytes per second of a copy.
    """
    todo = list(_jobs(inputs))
    launched = _profile(lambda: forward_backward(op, inputs))
    assert [kernel for kernel, _ in launched] == [job.kernel for job in todo], launched
    rows = []
    for name in dict.fromkeys(job.name for job in todo):
        pairs = zip(todo, launched, strict=True)
        mine = [(job.bytes, seconds) for job, (_, seconds) in pairs if job.name == name]
        moved, seconds = (sum(column) for column in zip(*mine, strict=True))
        rows.append(
            {
                "job": name,
                "calls": len(mine),
                "milliseconds": 1e3 * seconds,
                "gigabytes": moved / 1e9,
                "gigabytes_per_second": moved / 1e9 / seconds,
                "times_floor": seconds * bandwidth / moved,
            }
        )
    return rows


def _profile(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and seconds of each of our kernels in one call, in order."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [event for event in profiler.events() if event.name in KERNELS]
    found.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in found]


def _jobs(inputs: Inputs) -> Iterator[Job]:
    """The launches of `passes.TritonForward` and `passes.TritonBackward`, in order."""
    from hybridsp.ops.gla.triton.plan import Plan

    tokens = Tokens(q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, scale=1.0, segments=None)
    plan = Plan(tokens)
    heads, exact = plan.num_heads, torch.float32.itemsize
    q, v, g = (x.numel() * x.element_size() for x in (inputs.q, inputs.v, inputs.g))
    kept = heads * plan.chunks * plan.G * exact
    pairs = heads * plan.chunks * plan.C * plan.C * exact
    stretches = heads * plan.stretches * plan.K * plan.V * exact
    flags = heads * plan.chunks

    def job(name: str, kernel: str, *parts: int) -> Job:
        return Job(name=name, kernel=f"{kernel}_kernel", bytes=sum(parts))

    def strong() -> Iterator[Job]:
        if plan.channels:
            yield job("pairs of strong chunks", "prepare", flags)

    def states(name: str) -> Iterator[Job]:
        yield job(f"{name}: from zero", "walk", q, v, kept, stretches)
        yield job(f"{name}: scan of stretches", "scan", stretches, stretches)

    def prepare(name: str, chunks: range, *parts: int) -> Iterator[Job]:
        if chunks:
            yield job(f"prepare: {name}", "prepare", sum(parts) * len(chunks) // plan.chunks)

    yield from prepare("all", plan.chunks_at_once, 4 * q, g, kept, pairs, flags)
    yield from prepare("read, written", plan.chunks_in_flight, 4 * q, g, kept)
    yield from states("states")
    yield from prepare("pairs", plan.chunks_in_flight, 2 * q, g, pairs, flags)
    yield from strong()
    yield job("output", "walk", 2 * q, 2 * v, kept, pairs, stretches)
    yield from prepare("all", plan.all_chunks, 4 * q, g, kept, pairs, flags)
    yield from strong()
    yield from states("gradients of states")
    yield from states("states")
    for part in plan.parts():
        share = len(part.heads) * plan.num_chunks(part) / (heads * plan.chunks)
        chunks = len(part.heads) * plan.num_chunks(part) * plan.K
        state, crossed = chunks * plan.V * inputs.q.element_size(), chunks * plan.v_parts * exact
        tails = 0 if inputs.q.dtype == torch.float32 else chunks * plan.V

        def whole(*parts: int, share: float = share) -> int:
            return int(share * sum(parts))

        mine = whole(2 * q, 2 * v, kept, pairs, stretches)
        yield job("dv, gradients of chunks", "walk", mine, state, tails)
        mine = whole(q, v, kept, stretches)
        yield job("states of chunks", "walk", mine, 2 * state, tails, crossed)
        mine = whole(4 * q, 2 * v, 2 * g)
        yield job("dq, dk, dg", "gradient", mine, 2 * state, crossed)
        if plan.channels:
            yield job("dq, dk, dg of strong chunks", "gradient", whole(flags))
