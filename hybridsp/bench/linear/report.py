"""What `hybridsp bench linear` shows of its record: tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridsp.bench.linear import check, kernels
from hybridsp.bench.options import human_bytes
from hybridsp.bench.report import finish_panel, format_table, new_figure, scaled
from hybridsp.metrics import GIB

COLUMNS = {
    "method": "method",
    "scan": "scan",
    "backend": "backend",
    "tokens_shown": "tokens/rank",
    "forward_ms": "fwd ms",
    "forward_floor": "x floor",
    "training_ms": "fwd+bwd ms",
    "training_floor": "x floor",
    "floor_ms": "floor ms",
    "peak_gib": "peak GiB",
    "tokens_per_second": "tokens/s/rank",
    "sp_tax": "SP tax",
    "first_call_seconds": "first call s",
}


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `COLUMNS` shows of the record's rows; the last columns are of the widest pass."""
    shown = []
    for row in rows:
        forward_pass = row["passes"].get("fwd", {})
        training = row["passes"].get("fwd+bwd", {})
        widest = training or forward_pass
        shown.append(
            {
                "method": row["method"],
                "scan": row["algorithm"],
                "backend": row["backend"],
                "tokens_shown": human_bytes(row["tokens_per_rank"]),
                "forward_ms": scaled(forward_pass.get("seconds"), 1e3),
                "forward_floor": forward_pass.get("times_floor"),
                "training_ms": scaled(training.get("seconds"), 1e3),
                "training_floor": training.get("times_floor"),
                "floor_ms": scaled(widest.get("floor_seconds"), 1e3),
                "peak_gib": scaled(widest.get("peak_bytes"), 1 / GIB),
                "tokens_per_second": widest.get("tokens_per_second"),
                "sp_tax": widest.get("sp_tax"),
                "first_call_seconds": row["first_call_seconds"],
                "reason": row["reason"],
            }
        )
    return shown


def describe(record: dict[str, Any], folder: Path) -> str:
    """What is printed: the tables, the traces' lines, where the files are."""
    where, options = record["environment"], record["options"]
    queued = ", queued" if options["queued"] else ""
    title = (
        f"linear attention, {where['world']} x {where['chip']}, H {options['heads']} "
        f"K {options['key_dim']} V {options['value_dim']}, {options['decay']} decay, "
        f"{options['dtype']}{queued}; copy {record['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
    )
    parts = [title, format_table(COLUMNS, table_rows(record["cases"]))]
    if record["checks"]:
        parts += [check.TITLE, format_table(check.COLUMNS, record["checks"])]
    if record["kernels"]:
        parts += [kernels.TITLE, format_table(kernels.COLUMNS, record["kernels"])]
    parts += record["traces"]
    return "\n\n".join([*parts, f"written to {folder}"])


def draw(rows: list[dict[str, Any]], path: Path, where: dict[str, Any]) -> None:
    """Time over tokens of every method and backend, a panel per pass, with the memory floor."""
    measured = list(dict.fromkeys(name for row in rows for name in row["passes"]))
    figure, panels = new_figure(max(len(measured), 1))
    for axes, name in zip(panels, measured, strict=False):
        for label, points in _curves(rows, name):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        floors = {row["tokens_per_rank"]: row["passes"][name] for row in rows if row["passes"]}
        line = [(tokens, 1e3 * floors[tokens]["floor_seconds"]) for tokens in sorted(floors)]
        axes.plot(*zip(*line, strict=True), color="black", linestyle=":", label="memory floor")
        axes.set_title(name)
        finish_panel(axes, "tokens per rank", "ms")
    figure.suptitle(f"linear attention, {where['world']} x {where['chip']}")
    figure.savefig(path, dpi=150)


def _curves(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    kinds = [(row["method"], row["algorithm"], row["backend"]) for row in rows]
    for kind in dict.fromkeys(kinds):
        points = [
            (row["tokens_per_rank"], 1e3 * row["passes"][name]["seconds"])
            for row, of_row in zip(rows, kinds, strict=True)
            if of_row == kind and name in row["passes"]
        ]
        if points:
            yield ", ".join(filter(None, kind)), sorted(points)
