"""`hybridsp bench softmax`: softmax attention over many ranks against the kernel of one.

Each row is one way to compute causal attention on so many tokens per rank (`cases`). A rate
is the FLOPs that a rank's share of the pairs needs (`work`) over the time of the slowest
rank, so what is computed in vain, waited for or badly balanced lowers it. Percentages are of the
rate of `local` with the same backend on one document: one causal call over one rank's tokens.

Where a row does the work of `local` and nothing else, its time over that of `local` stands beside
it: the layer in a job of one rank, and a ring emulated on one device (`--emulate-ring`), forward
and backward, whose blocks and merges are all that one device can tell of a ring.
"""

from __future__ import annotations

import argparse
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from hybridsp.attention.ring_plan import VARIANTS
from hybridsp.bench import trace
from hybridsp.bench.job import attempt_each, job, one_voice
from hybridsp.bench.options import add_common, add_layer, names, size, sizes
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.bench.softmax import check
from hybridsp.bench.softmax.cases import (
    DOUBLE,
    LOCAL,
    PARALLEL,
    Case,
    Way,
    all_ways,
    chosen_variant,
    plan,
    splits,
    work_of,
)
from hybridsp.bench.softmax.model import Layer
from hybridsp.bench.softmax.ops import Op, make_inputs
from hybridsp.bench.softmax.report import describe, draw
from hybridsp.bench.softmax.work import (
    DTYPES,
    FORWARDS,
    balance,
    document_bounds,
)
from hybridsp.bench.timing import Times, check_queued, measure
from hybridsp.collectives.cost import Link
from hybridsp.collectives.topology import topology
from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import BACKENDS

DEFAULT_TOKENS = {"cuda": (2**13, 2**15, 2**17), "cpu": (2**7, 2**9)}
# In a job of one rank, the rings whose balance is told all the same.
RINGS_TOLD = (2, 4, 8)
GIVEN_LINK_LATENCY = 10e-6
RECORDED = (
    *("heads", "kv_heads", "head_dim", "dtype", "window", "documents", "seed", "passes"),
    *("tokens_per_rank", "variants", "ranks_per_host", "backends", "emulate_ring"),
    *("repeats", "queued"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench softmax`."""
    _add_layer(parser)
    parser.add_argument(
        "--variants",
        type=names(VARIANTS),
        default=VARIANTS,
        metavar="NAME,...",
        help=f"of the ring: {', '.join(VARIANTS)}; default all of them",
    )
    parser.add_argument(
        "--backends",
        type=names(BACKENDS),
        metavar="NAME,...",
        help=f"of {', '.join(BACKENDS)}; default: all of them on one device (plain only where the "
        "layer would take it), and over ranks the one that the layer takes",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        type=names(tuple(FORWARDS)),
        default=tuple(FORWARDS),
        metavar="NAME,...",
        help="of fwd, fwd+bwd; default both",
    )
    parser.add_argument(
        "--emulate-ring",
        type=size,
        metavar="R",
        help="also make the block calls of a ring of R on one device, one rank after another",
    )
    parser.add_argument(
        "--ranks-per-host",
        type=size,
        metavar="M",
        help="consecutive ranks of a ring that a double ring takes for a host; default as they are",
    )
    parser.add_argument(
        "--link",
        type=float,
        metavar="GB/S",
        help="between ranks, for the model of other numbers of ranks; default as measured in this "
        "job, and no model in a job of one rank",
    )
    parser.add_argument(
        "--host-link",
        type=float,
        metavar="GB/S",
        help="between ranks of different hosts, for the model; default as measured in this job, or "
        "as --link, and then the model has no double rings",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also compare outputs and gradients with plain attention in fp32",
    )
    add_common(parser)


def _add_layer(parser: argparse.ArgumentParser) -> None:
    add_layer(
        parser,
        cpu_tokens="128,512",
        dims={"--heads": 32, "--kv-heads": 8, "--head-dim": 128},
        dtypes=tuple(DTYPES),
    )
    parser.add_argument(
        "--documents",
        type=sizes,
        default=(1, 50),
        metavar="N,...",
        help="documents packed in a sequence, of skewed (lognormal) lengths; default 1,50",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the documents' lengths; default %(default)s"
    )
    parser.add_argument(
        "--window",
        type=size,
        metavar="N",
        help="keys that a query sees, itself included; default all; a ring does none",
    )


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench softmax`."""
    with one_voice():
        _check(args)
    with job() as mesh:
        args.tokens_per_rank = args.tokens_per_rank or DEFAULT_TOKENS[mesh.device.type]
        with one_voice():
            check_queued(mesh, queued=args.queued)
            document_bounds(min(args.tokens_per_rank), max(args.documents), args.seed)
            folder = mesh.on_rank_zero(make_folder, "softmax", args.out)
        record = measure_all(args, mesh, folder)
        if mesh.rank == 0:
            print(describe(record.content, folder))
        record.finish()
        if mesh.rank == 0:
            draw(record.content, folder / "softmax.png")


def measure_all(args: argparse.Namespace, mesh: SPMesh, folder: Path) -> Record:
    """The record of a run, to be finished. Collective."""
    ways = all_ways(args, mesh)
    content: dict[str, Any] = {
        "bench": "softmax",
        "environment": environment(mesh),
        "options": {name: getattr(args, name) for name in RECORDED},
        "cases": [],
        "balance": balance_rows(args, mesh),
        "model": None,
        "checks": [],
        "traces": [],
    }
    record = Record(mesh, folder / "softmax.json", content)
    measure_cases(args, ways, mesh, folder, record)
    content = record.content
    content["model"] = model_of(args, ways, content["cases"], *links_of(args, mesh))
    if args.check:
        record.save()
        content["checks"] = check.check_all(ways, work_of(args, 1, 1), args.seed, mesh)
    return record


def measure_cases(
    args: argparse.Namespace, ways: list[Way], mesh: SPMesh, folder: Path, record: Record
) -> None:
    """Add every case's row to the record, and a line for each trace. Collective."""
    todo = plan(args, ways)
    longest = max(args.tokens_per_rank)
    rows, traces = record.content["cases"], record.content["traces"]
    work = partial(_measure, args=args, mesh=mesh)
    for case, times, reason in attempt_each(todo, work, mesh, name="softmax"):
        rows.append(row_of(case, times or {}, reason))
        add_comparisons(rows, mesh.world_size)
        record.save()
        if args.trace and reason is None and case.tokens_per_rank == longest:
            traces.append(_trace(case, args, mesh, folder))


def _measure(case: Case, args: argparse.Namespace, mesh: SPMesh) -> dict[str, Times]:
    op = _op(case, mesh)
    calls = {"fwd": op.forward, "fwd+bwd": op.forward_backward}
    return {
        name: measure(calls[name], mesh, repeats=args.repeats, queued=args.queued)
        for name in args.passes
    }


def _op(case: Case, mesh: SPMesh) -> Op:
    inputs = make_inputs(case.work, case.tokens_per_rank, mesh.device, seed=mesh.rank)
    return case.way.op(inputs, case.work)


def row_of(case: Case, times: dict[str, Times], reason: str | None) -> dict[str, Any]:
    """A case's entry in the record, without what compares it with others."""
    passes = {}
    for name, measured in times.items():
        flops = case.work.flops(name) / case.way.ranks
        passes[name] = {
            **measured.as_json(),
            "flops_per_rank": flops,
            "flops_per_second": flops / measured.median,
        }
    return {
        **case.way.columns,
        "chosen_variant": None if reason is not None else chosen_variant(case),
        "ranks": case.way.ranks,
        "tokens_per_rank": case.tokens_per_rank,
        "documents": len(case.work.bounds) - 1,
        "passes": passes,
        "reason": reason,
    }


def add_comparisons(rows: list[dict[str, Any]], ranks: int) -> None:
    """Each pass's share of the kernel's rate, and its time over that of `local` for equal work.

    Args:
        rows: of the record; `local` has one document among them for each backend and length.
        ranks: of the job; over several of them a row of `sp` has more to do than `local`.
    """
    local = {
        (row["backend"], row["tokens_per_rank"], row["documents"]): row["passes"]
        for row in rows
        if row["method"] == LOCAL
    }
    for row in rows:
        backend, tokens = row["backend"], row["tokens_per_rank"]
        kernel = local.get((backend, tokens, 1), {})
        twin = local.get((backend, tokens, row["documents"]), {})
        equal_work = row["method"] != LOCAL and (row["method"] != PARALLEL or ranks == 1)
        for name, figures in row["passes"].items():
            if name in kernel:
                rate = kernel[name]["flops_per_second"]
                figures["fraction_of_kernel"] = figures["flops_per_second"] / rate
            if name in twin and equal_work:
                figures["times_local"] = figures["seconds"] / twin[name]["seconds"]


def _trace(case: Case, args: argparse.Namespace, mesh: SPMesh, folder: Path) -> str:
    """Of the widest pass that was asked for."""
    op, columns = _op(case, mesh), case.way.columns
    words = [str(value) for value in columns.values() if value is not None]
    path = folder / f"trace-{'-'.join(words)}-{len(case.work.bounds) - 1}-documents.json"
    call = op.forward_backward if "fwd+bwd" in args.passes else op.forward
    return trace.record(call, mesh, path, beside="messages")


def balance_rows(args: argparse.Namespace, mesh: SPMesh) -> list[dict[str, Any]]:
    """How even the work is, for the longest sequence; none with a window, which no ring does."""
    if args.window is not None:
        return []
    rings = [ring for ring, _ in splits(mesh.world_size) if ring > 1] or list(RINGS_TOLD)
    longest = max(args.tokens_per_rank)
    return [
        balance(document_bounds(longest * max(mesh.world_size, ring), documents, args.seed), ring)
        for documents in args.documents
        for ring in rings
    ]


def links_of(args: argparse.Namespace, mesh: SPMesh) -> tuple[Link | None, Link | None]:
    """The links of the model, of one host and between hosts: given, or of this job. Collective.

    None where nobody knows; between hosts: where it is not told apart.
    """
    inside, between = (
        None if rate is None else Link(latency=GIVEN_LINK_LATENCY, bandwidth=1e9 * rate)
        for rate in (args.link, args.host_link)
    )
    if inside is None and mesh.world_size > 1:
        links = topology(mesh.sp_group, mesh.device)
        inside, between = links.inner, between or links.between
    return inside, between


def model_of(
    args: argparse.Namespace,
    ways: list[Way],
    rows: list[dict[str, Any]],
    link: Link | None,
    host_link: Link | None,
) -> dict[str, Any] | None:
    """The cost model of the widest pass at the longest length, if its rate and link are known.

    None with a window as well, which no ring does.
    """
    longest, passes = max(args.tokens_per_rank), max(args.passes, key=len)
    backend = next(way.backend for way in ways if way.method == PARALLEL)
    rates = [
        row["passes"][passes]["flops_per_second"]
        for row in rows
        if (row["method"], row["backend"], row["documents"]) == (LOCAL, backend, 1)
        and row["tokens_per_rank"] == longest
        and passes in row["passes"]
    ]
    if not rates or link is None or args.window is not None:
        return None
    work = work_of(args, longest, 1)
    layer = Layer(work=work, rate=rates[0], passes=passes, link=link, host_link=host_link)
    return {
        "passes": passes,
        "tokens_per_rank": longest,
        "backend": backend,
        "flops_per_second": rates[0],
        "latency_seconds": link.latency,
        "bytes_per_second": link.bandwidth,
        "host_latency_seconds": None if host_link is None else host_link.latency,
        "host_bytes_per_second": None if host_link is None else host_link.bandwidth,
        "lines": layer.lines(),
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not fit this job, before any rank joins it."""
    if args.heads % args.kv_heads:
        raise ValueError(
            f"--kv-heads {args.kv_heads} does not divide --heads {args.heads}: each KV head serves "
            "equally many query heads"
        )
    if args.emulate_ring is not None and args.emulate_ring < 2:
        raise ValueError("--emulate-ring 1 is no ring: give 2 ranks or more")
    if args.ranks_per_host is not None and args.ranks_per_host < 2:
        raise ValueError("--ranks-per-host 1 is no ring: give 2 ranks or more")
    if args.ranks_per_host is not None and DOUBLE not in args.variants:
        raise ValueError(f"--ranks-per-host is of {DOUBLE}: name it in --variants, or leave it out")
    _check_links(args)


def _check_links(args: argparse.Namespace) -> None:
    """Refuse links that are none, and links of a model that there will not be (`model_of`)."""
    links = {"--link": args.link, "--host-link": args.host_link}
    for option, rate in links.items():
        if rate is None:
            continue
        if not 0 < rate < inf:
            raise ValueError(f"{option} {rate} GB/s: give a positive, finite bandwidth")
        if args.window is not None:
            raise ValueError(
                f"{option} {rate} GB/s with --window {args.window}: links are for the model of "
                "rings, and no ring has windows; leave one of the two out"
            )
    alone = rank_from_environment().world_size == 1
    if alone and args.host_link is not None and args.link is None:
        raise ValueError(
            f"--host-link {args.host_link} GB/s in a job of one rank: without the link inside a "
            "host, which one rank cannot measure, there is no model; give --link as well"
        )
