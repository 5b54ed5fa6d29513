"""`hybridsp bench linear`: the linear layer against its memory floor, FLA and other parallelism.

Each row is one way to compute the layer on so many tokens per rank. `local` is the layer without
sequence parallelism: the same number of tokens on one device, with a state that enters. The others
are sequence parallel over the whole job, so a row's SP tax is its time over that of `local` with
the same backend: 1.0 means that sequence parallelism is free. The floor is the time in which a copy
at this device's bandwidth, measured in the same run, would move each input and output once.

The first call of each op, on few tokens, is timed apart: it compiles and tunes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hybridsp.attention.linear import METHODS
from hybridsp.bench import trace
from hybridsp.bench.job import attempt, job, one_voice
from hybridsp.bench.linear import check, kernels
from hybridsp.bench.linear.ops import (
    DTYPES,
    FLA,
    Inputs,
    Op,
    Shape,
    forward,
    forward_backward,
    local_op,
    make_inputs,
    parallel_op,
)
from hybridsp.bench.linear.report import describe, draw
from hybridsp.bench.options import add_common, add_layer, names
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.bench.timing import Times, check_queued, copy_bandwidth, measure, seconds_of_one
from hybridsp.collectives.all_scan import ALGORITHMS
from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh
from hybridsp.ops.gla.contract import BACKENDS

LOCAL, ZECO = "local", "zeco"
DEFAULT_ALGORITHMS = ("auto",)
PASSES: dict[str, Callable[[Op, Inputs], Any]] = {"fwd": forward, "fwd+bwd": forward_backward}
DEFAULT_TOKENS = {"cuda": (2**13, 2**15, 2**17), "cpu": (2**9, 2**11)}
# Kernels are keyed by head sizes, not by length: compile and tune where a call is cheap.
FIRST_CALL_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench linear`."""
    add_layer(
        parser,
        cpu_tokens="512,2K",
        dims={"--heads": 16, "--key-dim": 128, "--value-dim": 128},
        dtypes=tuple(DTYPES),
    )
    parser.add_argument(
        "--decay",
        choices=("vector", "scalar"),
        default="vector",
        help="a gate per key channel or per head; default %(default)s",
    )
    parser.add_argument(
        "--methods",
        type=names(METHODS),
        metavar="NAME,...",
        help=f"of {', '.join(METHODS)}; default all of them, none in a job of one rank",
    )
    parser.add_argument(
        "--algorithms",
        type=names(ALGORITHMS),
        metavar="NAME,...",
        help=f"of the All-Scan under zeco, of {', '.join(ALGORITHMS)}; default auto",
    )
    parser.add_argument(
        "--backends",
        type=names((*BACKENDS, FLA)),
        default=("triton", "plain", FLA),
        metavar="NAME,...",
        help=f"of {', '.join((*BACKENDS, FLA))} (fla is the rival, without sequence parallelism); "
        "default all of them",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        type=names(tuple(PASSES)),
        default=tuple(PASSES),
        metavar="NAME,...",
        help="of fwd, fwd+bwd; default both",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also compare outputs and gradients with a naive recurrence, for four kinds of gates",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also time each Triton kernel at the longest length, beside its own memory floor",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench linear`."""
    with one_voice():
        _check(args)
    with job() as mesh:
        with one_voice():
            check_queued(mesh, queued=args.queued)
            folder = mesh.on_rank_zero(make_folder, "linear", args.out)
        record = measure_all(args, mesh, folder)
        if mesh.rank == 0:
            print(describe(record.content, folder))
        record.finish()
        if mesh.rank == 0:
            draw(record.content["cases"], folder / "linear.png", record.content["environment"])


def measure_all(args: argparse.Namespace, mesh: SPMesh, folder: Path) -> Record:
    """The record of a run, to be finished. Collective."""
    bandwidth = copy_bandwidth(mesh, repeats=args.repeats)
    content: dict[str, Any] = {
        "bench": "linear",
        "environment": environment(mesh),
        "options": _options(args, mesh),
        "copy_bytes_per_second": bandwidth,
        "cases": [],
        "checks": [],
        "kernels": [],
        "traces": [],
    }
    record = Record(mesh, folder / "linear.json", content)
    measure_cases(args, mesh, folder, record)
    if args.check:
        record.content["checks"] = check.check_all(args, mesh)
        record.save()
    if args.kernels:
        record.content["kernels"] = _kernels(args, mesh, bandwidth)
    return record


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a method, under zeco the scan's algorithm, a backend and a shape."""

    method: str
    algorithm: str | None
    backend: str
    shape: Shape

    def op(self, mesh: SPMesh) -> Op:
        """What is timed."""
        if self.method == LOCAL:
            return local_op(self.backend)
        return parallel_op(self.method, self.algorithm or "auto", self.backend, mesh)

    @property
    def kind(self) -> tuple[str, ...]:
        """What it is called apart from its length."""
        return tuple(filter(None, (self.method, self.algorithm, self.backend)))


def cases(args: argparse.Namespace, mesh: SPMesh) -> list[Case]:
    """All rows, `local` before what is compared with it."""
    kinds: list[tuple[str, str | None, str]]
    kinds = [(LOCAL, None, backend) for backend in args.backends]
    for method in _methods(args, mesh.world_size):
        algorithms = (args.algorithms or DEFAULT_ALGORITHMS) if method == ZECO else (None,)
        ours = [name for name in args.backends if name != FLA]
        kinds += [(method, algorithm, name) for algorithm in algorithms for name in ours]
    lengths = args.tokens_per_rank or DEFAULT_TOKENS[mesh.device.type]
    return [
        Case(method=method, algorithm=algorithm, backend=backend, shape=shape_of(args, tokens))
        for tokens in lengths
        for method, algorithm, backend in kinds
    ]


def _methods(args: argparse.Namespace, ranks: int) -> tuple[str, ...]:
    return args.methods or (METHODS if ranks > 1 else ())


def shape_of(args: argparse.Namespace, tokens: int) -> Shape:
    """The layer that the options describe, on so many tokens."""
    return Shape(
        tokens=tokens,
        heads=args.heads,
        key_dim=args.key_dim,
        value_dim=args.value_dim,
        decay=args.decay,
        dtype=DTYPES[args.dtype],
    )


def measure_cases(args: argparse.Namespace, mesh: SPMesh, folder: Path, record: Record) -> None:
    """Add every case's row to the record, and a line for each trace. Collective."""
    todo = cases(args, mesh)
    longest = max(case.shape.tokens for case in todo)
    first_calls: dict[tuple[str, ...], float] = {}
    rows, traces = record.content["cases"], record.content["traces"]
    for case in tqdm(todo, desc="linear", unit="case", disable=mesh.rank > 0):
        work = partial(_measure, case, args, mesh, first_calls.get(case.kind))
        result, reason = attempt(work, mesh, foreign=case.backend == FLA)
        if result is None:
            result = {"times": {}}
        elif case.kind not in first_calls:
            first_calls[case.kind] = result["first_call_seconds"]
        rows.append(_row(case, result, reason, record.content["copy_bytes_per_second"]))
        _add_tax(rows)
        record.save()
        if args.trace and reason is None and case.shape.tokens == longest:
            path = folder / f"trace-{'-'.join(case.kind)}-{longest}.json"
            traces.append(_trace(case, args, mesh, path))


def _measure(
    case: Case, args: argparse.Namespace, mesh: SPMesh, first_call: float | None
) -> dict[str, Any]:
    op = case.op(mesh)
    if first_call is None:
        first_call = _first_call(op, case.shape, args.passes, mesh)
    inputs = make_inputs(case.shape, mesh.device, seed=mesh.rank)
    times = {
        name: measure(
            partial(PASSES[name], op, inputs), mesh, repeats=args.repeats, queued=args.queued
        )
        for name in args.passes
    }
    return {"first_call_seconds": first_call, "times": times}


def _first_call(op: Op, shape: Shape, passes: Sequence[str], mesh: SPMesh) -> float:
    """Seconds of the first call of each pass, on few tokens."""
    few = replace(shape, tokens=min(shape.tokens, FIRST_CALL_TOKENS))
    inputs = make_inputs(few, mesh.device, seed=mesh.rank)
    return sum(seconds_of_one(partial(PASSES[name], op, inputs), mesh) for name in passes)


def _row(
    case: Case, result: dict[str, Any], reason: str | None, bandwidth: float
) -> dict[str, Any]:
    times: dict[str, Times] = result["times"]
    passes = {}
    for name, measured in times.items():
        floor = case.shape.bytes_of(name) / bandwidth
        passes[name] = {
            **measured.as_json(),
            "floor_seconds": floor,
            "times_floor": measured.median / floor,
            "tokens_per_second": case.shape.tokens / measured.median,
        }
    return {
        "method": case.method,
        "algorithm": case.algorithm,
        "backend": case.backend,
        "tokens_per_rank": case.shape.tokens,
        "passes": passes,
        "first_call_seconds": result.get("first_call_seconds"),
        "reason": reason,
    }


def _add_tax(rows: list[dict[str, Any]]) -> None:
    """To the last row the SP tax of each pass, where `local`, which came before it, has that."""
    *before, row = rows
    if row["method"] == LOCAL:
        return
    (alone,) = (
        other
        for other in before
        if other["method"] == LOCAL
        and all(other[key] == row[key] for key in ("backend", "tokens_per_rank"))
    )
    for name, figures in row["passes"].items():
        if name in alone["passes"]:
            figures["sp_tax"] = figures["seconds"] / alone["passes"][name]["seconds"]


def _trace(case: Case, args: argparse.Namespace, mesh: SPMesh, path: Path) -> str:
    """Of the widest pass that was asked for."""
    op, inputs = case.op(mesh), make_inputs(case.shape, mesh.device, seed=mesh.rank)
    call = PASSES["fwd+bwd" if "fwd+bwd" in args.passes else "fwd"]
    return trace.record(partial(call, op, inputs), mesh, path)


def _kernels(args: argparse.Namespace, mesh: SPMesh, bandwidth: float) -> list[dict[str, Any]]:
    """This rank's, without communication; the record holds rank 0's."""
    longest = max(case.shape.tokens for case in cases(args, mesh))
    inputs = make_inputs(shape_of(args, longest), mesh.device, seed=mesh.rank)
    rows, reason = attempt(lambda: kernels.kernel_rows(local_op("triton"), inputs, bandwidth), mesh)
    return rows or [{"job": "none", "reason": reason}]


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not fit this job, before any rank joins it."""
    if args.kernels and not torch.cuda.is_available():
        raise ValueError("--kernels profiles Triton's kernels and needs a CUDA device; found none")
    ranks = rank_from_environment().world_size
    if args.algorithms and ZECO not in _methods(args, ranks):
        raise ValueError(
            f"--algorithms {','.join(args.algorithms)}: these are of the All-Scan under {ZECO}, "
            f"which is not measured here; name it in --methods, or leave --algorithms out"
        )


def _options(args: argparse.Namespace, mesh: SPMesh) -> dict[str, Any]:
    asked = ("heads", "key_dim", "value_dim", "decay", "dtype", "backends", "passes")
    todo = cases(args, mesh)
    return {
        **{name: getattr(args, name) for name in (*asked, "repeats", "queued")},
        "algorithms": args.algorithms or DEFAULT_ALGORITHMS,
        "methods": list(dict.fromkeys(case.method for case in todo)),
        "tokens_per_rank": list(dict.fromkeys(case.shape.tokens for case in todo)),
    }
