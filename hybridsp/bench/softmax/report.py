"""What `hybridsp bench softmax` shows of its record: tables and a picture.

In the picture a measurement is a marker. The dashed lines are the cost model's (`model`)
and say so; they are drawn where a link is known, measured between ranks or given with --link.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridsp.bench.options import human_bytes
from hybridsp.bench.report import finish_panel, format_table, new_figure, scaled
from hybridsp.bench.softmax import check
from hybridsp.bench.softmax.work import BALANCE_COLUMNS, BALANCE_TITLE, FORWARDS
from hybridsp.metrics import GIB

COLUMNS = {
    "method": "method",
    "backend": "backend",
    "split": "R x U",
    "variant": "variant",
    "tokens_shown": "tokens/rank",
    "documents": "docs",
    "forward_ms": "fwd ms",
    "forward_tflops": "TFLOP/s",
    "forward_percent": "% kernel",
    "training_ms": "fwd+bwd ms",
    "training_tflops": "TFLOP/s",
    "training_percent": "% kernel",
    "times_local": "x local",
    "peak_gib": "peak GiB",
}
CHECK_COLUMNS = {
    **{name: COLUMNS[name] for name in ("method", "backend", "split", "variant")},
    **{name: name for name in check.TENSORS},
}


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `COLUMNS` shows of the record's rows; the last columns are of the widest pass.

    What can never run is told once, without a length.
    """
    shown, told = [], set()
    for row in rows:
        way = (*_named(row).values(), row["reason"])
        if row["reason"] is not None:
            if way not in told:
                shown.append({**_named(row), "reason": row["reason"]})
            told.add(way)
            continue
        forward, training = (row["passes"].get(name, {}) for name in FORWARDS)
        widest = training or forward
        shown.append(
            {
                **_named(row),
                "tokens_shown": human_bytes(row["tokens_per_rank"]),
                "documents": row["documents"],
                "forward_ms": scaled(forward.get("seconds"), 1e3),
                "forward_tflops": scaled(forward.get("flops_per_second"), 1e-12),
                "forward_percent": scaled(forward.get("fraction_of_kernel"), 100),
                "training_ms": scaled(training.get("seconds"), 1e3),
                "training_tflops": scaled(training.get("flops_per_second"), 1e-12),
                "training_percent": scaled(training.get("fraction_of_kernel"), 100),
                "times_local": widest.get("times_local"),
                "peak_gib": scaled(widest.get("peak_bytes"), 1 / GIB),
            }
        )
    return shown


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Method, backend, split and variant as tables show them."""
    split = None if row["ring"] is None else f"{row['ring']} x {row['ulysses'] or 1}"
    chosen = row.get("chosen_variant")
    variant = row["variant"] if chosen is None else f"auto ({chosen})"
    return {
        "method": row["method"],
        "backend": row["backend"],
        "split": split,
        "variant": variant,
    }


def describe(record: dict[str, Any], folder: Path) -> str:
    """What is printed: the tables, the traces' lines, where the files are."""
    where, options = record["environment"], record["options"]
    window = f", window {options['window']}" if options["window"] else ""
    title = (
        f"softmax attention, {where['world']} x {where['chip']}, {options['heads']} heads, "
        f"{options['kv_heads']} KV heads of {options['head_dim']}, {options['dtype']}, causal"
        f"{window}; FLOPs per pair and head: 4 D forward, 3.5 times that with the backward"
    )
    parts = [title, format_table(COLUMNS, table_rows(record["cases"]))]
    if record["balance"]:
        parts += [BALANCE_TITLE, format_table(BALANCE_COLUMNS, record["balance"])]
    if record["checks"]:
        rows = [{**row, **_named(row)} for row in record["checks"]]
        parts += [check.TITLE, format_table(CHECK_COLUMNS, rows)]
    if record["model"] is not None:
        parts += _told_model(record["model"])
    parts += record["traces"]
    return "\n\n".join([*parts, f"written to {folder}"])


def _told_model(model: dict[str, Any]) -> list[str]:
    """The model's lines as a table."""
    between = model["host_bytes_per_second"]
    hosts = "" if between is None else f", {between / 1e9:,.3g} GB/s between hosts"
    title = (
        f"model, not measured: % of the kernel's rate at P ranks, {model['passes']}, one document, "
        f"{human_bytes(model['tokens_per_rank'])} tokens per rank; kernel "
        f"{model['flops_per_second'] / 1e12:,.3g} TFLOP/s, link "
        f"{model['bytes_per_second'] / 1e9:,.3g} GB/s{hosts}"
    )
    lines = model["lines"]
    ranks = [str(ranks) for ranks, _ in next(iter(lines.values()))]
    rows = [
        {"way": label, **{str(ranks): 100 * share for ranks, share in line}}
        for label, line in lines.items()
    ]
    return [title, format_table({"way": "P", **{count: count for count in ranks}}, rows)]


def draw(record: dict[str, Any], path: Path) -> None:
    """Three panels of a record's widest pass: time and percent over tokens, percent over ranks."""
    rows = record["cases"]
    passes = max((name for row in rows for name in row["passes"]), key=len, default="")
    figure, (times, percent, ranks) = new_figure(3)
    for label, points in _curves(rows, passes, "tokens_per_rank", "seconds"):
        times.plot(*_columns(points, 1e3), marker="o", markersize=4, label=label)
    for label, points in _curves(rows, passes, "tokens_per_rank", "fraction_of_kernel"):
        percent.plot(*_columns(points, 100), marker="o", markersize=4, label=label)
    _draw_ranks(ranks, rows, passes, record["model"])
    times.set_title(f"{passes}, measured")
    percent.set_title(f"{passes}, measured")
    finish_panel(times, "tokens per rank", "ms")
    finish_panel(percent, "tokens per rank", "% of the kernel's rate", log_y=False)
    finish_panel(ranks, "ranks", "% of the kernel's rate", log_y=False)
    where = record["environment"]
    figure.suptitle(f"softmax attention, {where['world']} x {where['chip']}", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_ranks(
    axes: Any, rows: list[dict[str, Any]], passes: str, model: dict[str, Any] | None
) -> None:
    longest = max((row["tokens_per_rank"] for row in rows), default=0)
    axes.set_title(f"{passes}, {longest:,} tokens per rank, one document")
    here = [r for r in rows if r["tokens_per_rank"] == longest and r["documents"] == 1]
    parallel = [row for row in here if row["method"] == "sp"]
    for label, points in _curves(parallel, passes, "ranks", "fraction_of_kernel"):
        axes.plot(*_columns(points, 100), linestyle="none", marker="o", label=f"{label}, measured")
    for label, points in ({} if model is None else model["lines"]).items():
        axes.plot(*_columns(points, 100), linestyle="--", linewidth=1, label=f"{label}: model")
    axes.set_ylim(bottom=0)


def _curves(
    rows: list[dict[str, Any]], passes: str, x: str, y: str
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """(x, y) of each way to compute, by its name; ways without a figure are left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        figures = row["passes"].get(passes, {})
        if figures.get(y) is not None:
            curves.setdefault(name_of(row), []).append((row[x], figures[y]))
    for label, points in curves.items():
        yield label, sorted(points)


def name_of(row: dict[str, Any]) -> str:
    """A row's way to compute, in a few words."""
    words = [row["method"], row["backend"]]
    if row["ring"] is not None:
        words.append(f"R{row['ring']}" + (f" U{row['ulysses']}" if row["ulysses"] else ""))
    if row["variant"] is not None:
        words.append(row["variant"])
    if row["documents"] > 1:
        words.append(f"{row['documents']} documents")
    return " ".join(words)


def _columns(points: list[tuple[int, float]], factor: float) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [factor * y for _, y in points]
