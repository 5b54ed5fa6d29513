"""`hybridsp bench all-scan`: every All-Scan algorithm against the wire it runs on.

All algorithms are measured in one job, forward and reverse, beside what no scan can beat: one
message of the same bytes to the next rank, and an all-gather of them. The columns:

    us          median over the repetitions, of the slowest rank; p10 and p90 are that rank's too
    sent/rank   bytes that the busiest rank sends, from the algorithm (`cost_model.Scan`)
    % wire      those bytes over the time, in percent of the bandwidth that a large message to the
                next rank reached in this run
    us/hop      the time over the messages that follow one another on the way to the last rank

    model       what the algorithm's formula says with the latency and bandwidth fitted to its rows

An algorithm that cannot run here is a row that says why. From the rows come each algorithm's
effective latency and bandwidth, a table of what they mean for more ranks beside the ZeCO paper's,
and a picture up to 1,024 ranks: see `cost_model`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridsp.bench import trace
from hybridsp.bench.all_scan import cost_model
from hybridsp.bench.all_scan.cases import (
    ALL_GATHER,
    DIRECTIONS,
    KEY_DIM,
    VALUE_DIM,
    Case,
    make_state,
    options_of,
    plan,
    reference_cases,
    scan_cases,
    shape_of,
    wire_bandwidth,
)
from hybridsp.bench.all_scan.cost_model import Fit, Measured, Scan
from hybridsp.bench.job import attempt, job, one_voice
from hybridsp.bench.options import add_common, human_bytes, names, size, sizes
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.bench.report import format_table, scaled
from hybridsp.bench.timing import Times, check_queued, measure
from hybridsp.collectives.all_scan import ALGORITHMS
from hybridsp.collectives.topology import topology
from hybridsp.mesh import SPMesh

DEFAULT_BYTES = {  # 2M is the state of the paper's table
    "cuda": tuple(n * 2**10 for n in (64, 256, 1024, 2048, 4096, 16384, 65536)),
    "cpu": tuple(n * 2**10 for n in (64, 256, 1024, 2048, 4096)),
}
COLUMNS = {
    "name": "algorithm",
    "direction": "direction",
    "state": "state",
    "us": "us",
    "us_p10": "p10",
    "us_p90": "p90",
    "model_us": "model",
    "sent": "sent/rank",
    "percent_of_wire": "% wire",
    "us_per_hop": "us/hop",
    "num_blocks": "blocks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench all-scan`."""
    parser.add_argument(
        "--bytes",
        type=sizes,
        metavar="S,...",
        help="of one rank's state, fp32 with K = V = 128 and as many heads as fit; default "
        "64K,256K,1M,2M,4M,16M,64M on GPUs, up to 4M on CPUs",
    )
    for name, what in (("--heads", "H"), ("--key-dim", "K"), ("--value-dim", "V")):
        parser.add_argument(
            name,
            type=size,
            metavar=what,
            help="one state [1, H, K, V] instead of --bytes; what is not given is "
            f"H = 1, K = {KEY_DIM}, V = {VALUE_DIM}",
        )
    parser.add_argument(
        "--algorithms",
        type=names(ALGORITHMS),
        default=tuple(name for name in ALGORITHMS if name != "auto"),
        metavar="NAME,...",
        help=f"of {', '.join(ALGORITHMS)}; default all but auto",
    )
    parser.add_argument(
        "--ranks-per-host",
        type=size,
        metavar="N",
        help="what the hierarchical scan takes for a host; default the hosts there are",
    )
    parser.add_argument(
        "--include",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="all-scan.json of runs on other numbers of ranks, for the fit and the picture",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench all-scan`."""
    with one_voice():
        shapes = _asked_shapes(args)
    with job() as mesh:
        with one_voice():
            if mesh.world_size == 1:
                raise ValueError(
                    "a scan over 1 rank sends nothing: start at least 2, for example "
                    "torchrun --nproc-per-node 2 -m hybridsp.cli bench all-scan"
                )
            check_queued(mesh, queued=args.queued)
            included = mesh.on_rank_zero(_read_included, args.include)
            folder = mesh.on_rank_zero(make_folder, "all-scan", args.out)
        if shapes is None:
            shapes = [shape_of(num_bytes) for num_bytes in DEFAULT_BYTES[mesh.device.type]]
        record = Record(mesh, folder / "all-scan.json", _header(args, mesh, shapes))
        measure_cases(args, mesh, shapes, folder, record)
        points = [*scans_measured(record.content["cases"]), *included]
        fits = add_fits(record.content, points)
        if mesh.rank == 0:
            print(describe(record.content, fits, folder))
        record.finish()
        if mesh.rank == 0:
            _draw(record.content, points, fits, folder)


def _header(
    args: argparse.Namespace, mesh: SPMesh, shapes: list[tuple[int, int, int]]
) -> dict[str, Any]:
    """What a record says before anything but the wire is measured. Collective."""
    return {
        "bench": "all-scan",
        "environment": environment(mesh),
        "options": {
            "algorithms": args.algorithms,
            "repeats": args.repeats,
            "queued": args.queued,
            "states": shapes,
            "included": [str(path) for path in args.include],
        },
        "wire_bytes_per_second": wire_bandwidth(mesh, args.repeats),
        "topology": asdict(topology(mesh.sp_group, mesh.device)),
        "cases": [],
        "traces": [],
    }


def add_fits(record: dict[str, Any], points: list[Measured]) -> dict[str, Fit]:
    """The link that fits each algorithm's points, by name; the record gets them and what follows.

    That is what the model says of its rows, and of more ranks.
    """
    fits = cost_model.fit_all(points)
    record["fits"] = {name: fitted.as_json() for name, fitted in fits.items()}
    record["predictions"] = cost_model.predictions(points, fits)
    for row in record["cases"]:
        if "seconds" in row and row["scan"] is not None and row["scan"]["algorithm"] in fits:
            scan = Scan(**row["scan"])
            row["model_seconds"] = scan.seconds(fits[scan.algorithm].link)
    return fits


def _draw(
    record: dict[str, Any], points: list[Measured], fits: dict[str, Fit], folder: Path
) -> None:
    rows = record["cases"]
    references = [row for row in rows if row["direction"] is None and "seconds" in row]
    cost_model.draw(points, references, fits, folder / "all-scan.png", _title(record))


def measure_cases(
    args: argparse.Namespace,
    mesh: SPMesh,
    shapes: list[tuple[int, int, int]],
    folder: Path,
    record: Record,
) -> None:
    """Add every row to the record, and a line for each trace. Collective."""
    total = len(shapes) * (2 + len(DIRECTIONS) * len(args.algorithms))
    largest = max(shapes, key=_bytes_of)
    rows, traces = record.content["cases"], record.content["traces"]
    bandwidth = record.content["wire_bytes_per_second"]
    with tqdm(total=total, desc="all-scan", unit="case", disable=mesh.rank > 0) as bar:
        for shape in shapes:
            for case, why_not in cases(args, mesh, shape):
                call = partial(measure, case.call, mesh, repeats=args.repeats, queued=args.queued)
                times, reason = attempt(call, mesh) if why_not is None else (None, why_not)
                rows.append(row_of(case, times, reason, bandwidth, mesh))
                record.save()
                bar.update()
                if args.trace and shape == largest and reason is None and case.scan is not None:
                    path = folder / f"trace-{case.name}-{case.direction}.json"
                    traces.append(trace.record(case.call, mesh, path))


def cases(
    args: argparse.Namespace, mesh: SPMesh, shape: tuple[int, int, int]
) -> Iterator[tuple[Case, str | None]]:
    """The rows of a state, each with the reason why it cannot be had. Collective."""
    state, decay = make_state(shape, mesh)
    for case in reference_cases(state, mesh):
        yield case, None
    for algorithm in args.algorithms:
        options = options_of(algorithm, args.ranks_per_host)
        planned, reason = attempt(partial(plan, options, state, decay, mesh), mesh)
        for case in scan_cases(options, state, decay, mesh, planned):
            yield case, reason


def row_of(
    case: Case, times: Times | None, reason: str | None, bandwidth: float, mesh: SPMesh
) -> dict[str, Any]:
    """A case's entry in the record: what it is, what was measured, what follows from it."""
    row = {
        "name": case.name,
        "direction": case.direction,
        "ranks": mesh.sp,
        "state_bytes": case.state_bytes,
        "scan": None if case.scan is None else asdict(case.scan),
        "reason": reason,
    }
    if times is None:
        return row
    sent, messages = case.state_bytes, 1
    if case.scan is not None:
        sent, messages = case.scan.bytes_sent(), case.scan.messages()
    elif case.name == ALL_GATHER:
        sent, messages = (mesh.sp - 1) * case.state_bytes, mesh.sp - 1
    return {
        **row,
        **times.as_json(),
        "bytes_sent": sent,
        "fraction_of_wire": sent / times.median / bandwidth,
        "seconds_per_hop": times.median / messages,
    }


def scans_measured(rows: list[dict[str, Any]]) -> list[Measured]:
    """The points to fit; "auto" repeats one of the others."""
    return [
        Measured(scan=Scan(**row["scan"]), seconds=row["seconds"])
        for row in rows
        if row["scan"] is not None and row["name"] != "auto" and "seconds" in row
    ]


def describe(record: dict[str, Any], fits: dict[str, Fit], folder: Path) -> str:
    """What is printed: the table, the fits, where the files are."""
    shown = [
        {
            "name": _shown_name(row),
            "direction": row["direction"],
            "state": human_bytes(row["state_bytes"]),
            "us": scaled(row.get("seconds"), 1e6),
            "us_p10": scaled(row.get("seconds_p10"), 1e6),
            "us_p90": scaled(row.get("seconds_p90"), 1e6),
            "model_us": scaled(row.get("model_seconds"), 1e6),
            "sent": human_bytes(row["bytes_sent"]) if "bytes_sent" in row else None,
            "percent_of_wire": scaled(row.get("fraction_of_wire"), 100),
            "us_per_hop": scaled(row.get("seconds_per_hop"), 1e6),
            "num_blocks": (row["scan"] or {}).get("num_blocks"),
            "reason": row["reason"],
        }
        for row in record["cases"]
    ]
    lines = [
        f"{name}: {1e6 * fitted.link.latency:.1f} us + bytes / "
        f"({fitted.link.bandwidth / 1e9:.2f} GB/s), off by {fitted.error:.0%}"
        for name, fitted in fits.items()
    ]
    parts = [_title(record), format_table(COLUMNS, shown)]
    if lines:
        parts.append("\n".join(["effective links (fit; what the dashed lines extend):", *lines]))
        parts.append(_told(record))
    parts += record["traces"]
    return "\n\n".join([*parts, f"written to {folder}"])


def _told(record: dict[str, Any]) -> str:
    """The table of more ranks."""
    nearest = human_bytes(cost_model.PAPER_STATE_BYTES)
    title = (
        f"us at the state nearest to the paper's {nearest}, on the most ranks measured and on "
        "more, if every link were like those of this run (the model) or the paper's own"
    )
    table = format_table(cost_model.PREDICTION_COLUMNS, record["predictions"])
    return f"{title}\n\n{table}"


def _shown_name(row: dict[str, Any]) -> str:
    is_auto = row["name"] == "auto" and row["scan"] is not None
    return f"auto ({row['scan']['algorithm']})" if is_auto else row["name"]


def _title(record: dict[str, Any]) -> str:
    where = record["environment"]
    queued = ", queued" if record["options"]["queued"] else ""
    return (
        f"All-Scan, {where['world']} x {where['chip']} on {where['hosts']} host(s), "
        f"{where['backend']}{queued}; wire {record['wire_bytes_per_second'] / 1e9:.2f} GB/s"
    )


def _asked_shapes(args: argparse.Namespace) -> list[tuple[int, int, int]] | None:
    """H, K, V of each state that the options name; None where they name none."""
    given = args.heads, args.key_dim, args.value_dim
    if any(given) and args.bytes:
        raise ValueError("--bytes and --heads, --key-dim, --value-dim exclude each other")
    if any(given):
        return [(args.heads or 1, args.key_dim or KEY_DIM, args.value_dim or VALUE_DIM)]
    return [shape_of(num_bytes) for num_bytes in args.bytes] if args.bytes else None


def _read_included(paths: list[Path]) -> list[Measured]:
    points = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["bench"] != "all-scan":
                raise KeyError("all-scan")
            found = scans_measured(record["cases"])
        except (ValueError, KeyError, TypeError) as error:  # no JSON, or other JSON
            raise ValueError(
                f"--include {path} is no record of bench all-scan ({error!r}): give an "
                "all-scan.json that it wrote"
            ) from error
        if not record.get("complete", True):  # older records do not say
            raise ValueError(
                f"--include {path} is of a run that was cut off, whose fit would lack what it did "
                "not reach: give the record of a whole run"
            )
        points += found
    return points


def _bytes_of(shape: tuple[int, int, int]) -> int:
    heads, key_dim, value_dim = shape
    return heads * key_dim * value_dim * 4
