"""Tune the launches of the Triton kernels on this chip: `hybridsp bench tune`.

Every kernel is timed with every candidate at a short length, because which launch is best does not
depend on the number of tokens. Compiling takes longer than timing, so processes side by side
compile all candidates first (Triton keeps what it compiled on disk). The winners are written as
the file that the package reads at start (`hybridsp.ops.gla.triton.tuning`).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from tqdm import tqdm

from hybridsp.files import write_atomically

if TYPE_CHECKING:
    from hybridsp.ops.gla.contract import Tokens
    from hybridsp.ops.gla.triton.tuning import Kernel, Launch

Case: TypeAlias = tuple[int, int, bool, torch.dtype]
"""K, V, whether the decay is one per channel, dtype."""
Task: TypeAlias = "tuple[Case, Kernel, Launch, int]"

# (K, V) of heads that people train: GLA's, Lightning's and Mamba-2's, SmolLM2's and Llama's.
HEADS = ((64, 64), (128, 128), (256, 256), (256, 512))
TIMED_STATE_ROWS = 2048  # heads x K: enough programs to fill the chip
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hybridsp bench tune`."""
    parser.add_argument(
        "--heads",
        default=",".join(f"{k}x{v}" for k, v in HEADS),
        metavar="KxV,...",
        help="key and value dims to tune for; default %(default)s",
    )
    parser.add_argument(
        "--decay", default="channel,head", help="one per channel, one per head; default %(default)s"
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16,float32; default %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="length to time at; default %(default)s"
    )
    parser.add_argument(
        "--processes", type=int, default=8, help="that compile; default %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder for the file; default: this one"
    )


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench tune`."""
    if not torch.cuda.is_available():
        raise ValueError("bench tune times Triton's kernels and needs a CUDA device; found none")
    from hybridsp.ops.gla.triton import assembler, tuning

    reason = assembler.why_not(torch.cuda.get_device_capability())
    if reason is not None:
        raise ValueError(f"bench tune cannot compile Triton's kernels: {reason}")
    cases = _cases(args)
    tasks = [
        (case, kernel, launch, args.tokens)
        for case in cases
        for kernel in tuning.KERNELS
        for launch in candidates(kernel, *case[:2])
    ]
    sound = _sound(tasks, args.processes)
    chip = torch.cuda.get_device_name()
    entries: dict[str, Launch] = {}
    for case in cases:
        for kernel in tuning.KERNELS:
            name = tuning.entry_name(kernel, *case)
            best, seconds, default = _fastest(kernel, case, args.tokens, sound)
            if best is None:
                print(f"{name:40} no candidate fits this chip")
                continue
            entries[name] = best
            print(f"{name:40} {1e3 * seconds:8.3f} ms  (rule of thumb {1e3 * default:.3f})  {best}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / tuning.file_of(chip)
    write_atomically(path, tuning.dump(entries))
    print(f"{path}: {len(entries)} launches for {chip}")


def candidates(kernel: Kernel, key_dim: int, value_dim: int) -> Iterator[Launch]:
    """Launches worth a try for heads of K x V."""
    from hybridsp.ops.gla.triton.tuning import Launch, power_of_two

    rows, columns = power_of_two(key_dim), power_of_two(value_dim)
    # BK, BV, warps, stages, registers
    grids = {
        "prepare": ((32, 64, 128), (16,), (4, 8), (1,), (0, 168, 128)),
        "states": ((64, 128), (64, 128), (4, 8), (2, 3), (0,)),
        "scan": ((8, 16), (32, 64), (2, 4), (1,), (0,)),
        "output": ((rows,), (32, 64, 128), (4, 8), (2, 3), (0,)),
        "gradient": ((32, 64), (32, 64, 128), (4, 8), (2,), (0, 168, 128)),
    }
    heights, widths, warps, stages, registers = grids[kernel]
    blocks = {(min(BK, rows), min(BV, columns)) for BK in heights for BV in widths}
    for (BK, BV), num_warps, num_stages, maxnreg in itertools.product(
        sorted(blocks), warps, stages, registers
    ):
        if kernel != "output" or BK * BV <= 32768:
            yield Launch(
                BK=BK,
                BV=BV,
                num_warps=num_warps,
                num_stages=num_stages,
                maxnreg=maxnreg or None,
            )


def _cases(args: argparse.Namespace) -> list[Case]:
    found = []
    for head, decay, dtype in itertools.product(
        args.heads.split(","), args.decay.split(","), args.dtype.split(",")
    ):
        dims = head.split("x")
        if len(dims) != 2 or not all(dim.isdigit() and int(dim) > 0 for dim in dims):
            raise ValueError(f"--heads: {head!r} is not KxV, e.g. 128x128")
        if decay not in ("channel", "head"):
            raise ValueError(f"--decay: {decay!r} is unknown; use channel, head or both")
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"--dtype: {dtype!r} is unknown; use bfloat16, float32 or both")
        found.append((int(dims[0]), int(dims[1]), decay == "channel", getattr(torch, dtype)))
    return found


def _inputs(case: Case, length: int) -> tuple[Tokens, torch.Tensor]:
    """Random tokens and output gradients."""
    from hybridsp.ops.gla.contract import Tokens

    key_dim, value_dim, channels, dtype = case
    heads = max(TIMED_STATE_ROWS // key_dim, 1)

    def random(width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(1, length, heads, width, device="cuda", dtype=dtype)

    g = torch.nn.functional.logsigmoid(random(key_dim if channels else 1, torch.float32)) / 16
    q, k, v, dout = random(key_dim), random(key_dim), random(value_dim), random(value_dim)
    return Tokens(q=q, k=k, v=v, g=g, scale=key_dim**-0.5, segments=None), dout


class _Work:
    """One kernel's share of a forward and a backward, over and over."""

    def __init__(self, kernel: Kernel, launch: Launch, tokens: Tokens, dout: torch.Tensor) -> None:
        from hybridsp.ops.gla.triton import passes
        from hybridsp.ops.gla.triton.plan import Plan

        plan = Plan(tokens, {kernel: launch})
        self.kernel, self.plan, self.dout, self.passes = kernel, plan, dout, passes
        self.prepared = passes.Prepared(plan)
        if kernel != "prepare":
            self._prepare()
            self.chunks = passes.ChunkStates(plan, plan.whole)
            chunks = self.chunks
            for states in (chunks.states, chunks.dstates, chunks.dtails, chunks.crossed):
                if states is not None:
                    states.zero_()
        if kernel == "output":
            self.span = passes.Span(plan, self.prepared, plan.v, reverse=False)
            self.gradient = passes.Span(plan, self.prepared, dout, reverse=True)
            self.out = torch.empty_like(plan.v)
        if kernel == "gradient":
            self.gradients = passes.Gradients(plan, self.prepared)

    def __call__(self) -> None:
        plan = self.plan
        if self.kernel == "prepare":
            self.prepared.make(plan.all_chunks, states=True)
            self.prepared.make(plan.all_chunks, pairs=True)
            self._prepare()
        elif self.kernel in ("states", "scan"):
            span = self.passes.Span(plan, self.prepared, plan.v, reverse=False)
            span.walk(plan.whole, span.end, chunks=self.chunks)
            self.passes.Span(plan, self.prepared, self.dout, reverse=True)
        elif self.kernel == "output":
            self.span.walk(plan.whole, self.span.end, out=self.out)
            self.gradient.walk(plan.whole, self.span.end, out=self.out, chunks=self.chunks)
        else:  # strong chunks are rare, so their launch is not worth a choice of its own
            self.gradients.launch(plan.whole, self.dout, self.chunks, strong=False)

    def _prepare(self) -> None:
        self.prepared.make(self.plan.all_chunks, states=True, pairs=True)
        self.prepared.mend_strong()


def _sound(tasks: list[Task], processes: int) -> set[Task]:
    """Those candidates that fit the chip and run, each compiled on the way."""
    outcomes: dict[Task, str] = {}
    while waiting := [task for task in tasks if task not in outcomes]:
        known = _round(waiting, processes)
        if not known:  # one of them takes its process, and with it the pool: find out which
            known = _round(waiting[:1], 1) or {waiting[0]: "its process died"}
        outcomes.update(known)
    for task in tasks:
        if outcomes[task] not in ("sound", "too large"):
            print(*task, outcomes[task], sep=", ")
    return {task for task in tasks if outcomes[task] == "sound"}


def _round(tasks: list[Task], processes: int) -> dict[Task, str]:
    """What became of the tasks whose process lived to tell."""
    known = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        tried = {pool.submit(_try, task): task for task in tasks}
        for future in tqdm(as_completed(tried), total=len(tried), desc="compile"):
            outcome = None if future.exception() else future.result()
            if outcome is not None:
                known[tried[future]] = outcome
    return known


_lost = False


def _try(task: Task) -> str | None:
    """What becomes of one candidate, None if unknown; runs in a process of its own."""
    from triton.runtime.errors import OutOfResources

    global _lost
    if _lost:  # a fault takes the CUDA context with it: another process has to try
        return None
    case, kernel, launch, length = task
    try:
        _Work(kernel, launch, *_inputs(case, length))()
        torch.cuda.synchronize()
    except OutOfResources:
        return "too large"
    except RuntimeError as error:
        _lost = True
        return str(error).splitlines()[0]
    return "sound"


def _fastest(
    kernel: Kernel, case: Case, length: int, sound: set[Task]
) -> tuple[Launch | None, float, float]:
    """The best candidate, its seconds, and those of the rule of thumb."""
    from hybridsp.ops.gla.triton.tuning import rule_of_thumb

    def seconds(launch: Launch) -> float:
        return _seconds(_Work(kernel, launch, *inputs))

    inputs = _inputs(case, length)
    launches = [launch for *which, launch, _ in sound if which == [case, kernel]]
    timed = {launch: seconds(launch) for launch in launches}
    rule = rule_of_thumb(kernel, case[0], case[1], case[3])
    default = timed.get(rule) or seconds(rule)
    best = min(timed, key=lambda launch: timed[launch], default=None)
    return best, 0.0 if best is None else timed[best], default


def _seconds(work: _Work) -> float:
    """The median time of one call."""
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times)[REPEATS // 2]
