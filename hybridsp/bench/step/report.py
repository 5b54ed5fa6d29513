"""What `hybridsp bench step` shows of its record: a table, and a picture.

Beside each figure of a step stands the planner's, and by how much that is off. In the picture a
measurement is a marker and the planner a dashed line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from hybridsp.bench.options import human_bytes
from hybridsp.bench.report import finish_panel, format_table, new_figure, scaled
from hybridsp.bench.step.case import Case
from hybridsp.metrics import GIB
from hybridsp.planner import GPUS

COLUMNS = {
    "model": "model",
    "layers": "softmax",
    "degrees": "dp x ring x Ulysses",
    "tokens_shown": "tokens",
    "zero": "ZeRO",
    "checkpoints": "checkpoints",
    "tiles": "MLP",
    "num_documents": "documents",
    "seconds": "s/step",
    "predicted_seconds": "plan",
    "seconds_off": "off %",
    "tokens_per_second": "tokens/s",
    "mfu_percent": "MFU %",
    "peak_gib": "GPU GiB",
    "predicted_gib": "plan",
    "peak_off": "off %",
    "reserved_gib": "reserved",
    "resident_gib": "host GiB",
    "pinned_gib": "pinned",
    "predicted_host_gib": "plan",
    "loss": "loss",
    "grad_norm": "gradient",
}
PROFILE_COLUMNS = {"kind": "kind", "milliseconds": "ms", "share": "% of it", "calls": "calls"}
# What tells one way to run from another.
NAMING = ("model", "layers", "degrees", "zero", "checkpoints", "tiles")
LEGEND_COLUMNS, LEGEND_INCHES = 2, 0.15
NOTE = (
    "GPU GiB: allocated by PyTorch, without CUDA's context and NCCL's buffers; host GiB: resident "
    "memory of a process, pinned: page-locked; all of the rank that has most. plan: the planner's; "
    "off %: of what was measured; loss: the first step's, before its update; gradient: its norm, "
    "before it is clipped"
)


def row_of(
    case: Case,
    figures: dict[str, Any],
    predicted: dict[str, float],
    gpu: str | None,
    reason: str | None,
) -> dict[str, Any]:
    """A case's entry in the record.

    Args:
        case: what ran.
        figures: what was measured; empty where it could not run.
        predicted: what the planner says.
        gpu: its name for the chip; of the peak of an unknown one nobody knows the share (MFU).
        reason: why it could not run.
    """
    row = {**case.columns, **figures, **predicted, "reason": reason}
    if figures and gpu is not None:
        possible = case.setting.gpus * GPUS[gpu].peak * figures["seconds"]
        row["mfu"] = figures["flops"] / possible
    for name in ("seconds", "peak_bytes"):
        if row.get(name) is not None and f"predicted_{name}" in row:
            row[f"{name}_error"] = row[f"predicted_{name}"] / row[name] - 1
    return row


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """What `COLUMNS` shows of a row of the record."""
    tile, reason = row["tiled_mlp"], row["reason"]
    return {
        "model": Path(row["model"]).name or row["model"],
        "layers": row["softmax_layers"] or "as it is",
        "degrees": " x ".join(str(row[name]) for name in ("dp", "ring", "ulysses")),
        "tokens_shown": human_bytes(row["tokens"]),
        "zero": f"{row['stage']}" + (", host" if row["offload_optimizer"] else ""),
        "checkpoints": checkpoints(row),
        "tiles": "whole" if tile is None else f"tiles of {human_bytes(tile)}",
        "seconds": row.get("seconds"),
        "predicted_seconds": row.get("predicted_seconds"),
        "seconds_off": scaled(row.get("seconds_error"), 100),
        "tokens_per_second": row.get("tokens_per_second"),
        "mfu_percent": scaled(row.get("mfu"), 100),
        "peak_gib": scaled(row.get("peak_bytes"), 1 / GIB),
        "predicted_gib": scaled(row.get("predicted_peak_bytes"), 1 / GIB),
        "peak_off": scaled(row.get("peak_bytes_error"), 100),
        "reserved_gib": scaled(row.get("reserved_bytes"), 1 / GIB),
        "resident_gib": scaled(row.get("resident_bytes"), 1 / GIB),
        "pinned_gib": scaled(row.get("pinned_bytes"), 1 / GIB),
        "predicted_host_gib": scaled(row.get("predicted_host_bytes"), 1 / GIB),
        "num_documents": row.get("num_documents"),
        "loss": row.get("loss"),
        "grad_norm": row.get("grad_norm"),
        **({} if reason is None else {"reason": reason}),
    }


def checkpoints(row: dict[str, Any]) -> str:
    """Where activation checkpoints are, and whether attention is among them."""
    if not row["checkpointing"]:
        return "off"
    where = "host" if row["offload_activations"] else "GPU"
    return where if row["keep_attention"] else f"{where}, attention again"


def describe(record: dict[str, Any], folder: Path) -> str:
    """What is printed: the table, and where the files are."""
    where = record["environment"]
    options = record["options"]
    weights = "weights of checkpoints" if options["checkpoint"] else "random weights"
    tokens = f"tokens of {options['text']}" if options["text"] else "random tokens"
    title = (
        f"one training step, {where['world']} x {where['chip']}, {options['dtype']}, {weights}, "
        f"{tokens}; planned as {record['gpu'] or 'nothing that is known'}"
    )
    rows = record["cases"]
    sections = [title, format_table(COLUMNS, [table_row(row) for row in rows]), NOTE]
    parts = _ratios(rows), _against_dp(rows), _longest(record["longest"])
    sections += ["\n".join(part) for part in parts if part]
    sections += [_profile(row) for row in rows if "profile" in row]
    return "\n\n".join([*sections, f"written to {folder}"])


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Models run alike, compared with the first of them."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("seconds") is not None:
            shown = table_row(row)
            way = tuple(shown[name] for name in ("zero", "checkpoints", "tiles"))
            alike.setdefault((row["tokens"], row["dp"], row["documents"], *way), []).append(row)
    return [
        f"{human_bytes(first['tokens'])} tokens: a step of {_name(other)} takes "
        f"{other['seconds'] / first['seconds']:.2f} times as long as one of {_name(first)}"
        for first, *others in alike.values()
        for other in others
    ]


def _against_dp(rows: list[dict[str, Any]]) -> list[str]:
    """Rows whose ranks share sequences, beside those with a sequence for each rank."""
    ran = [row for row in rows if row.get("seconds") is not None]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in ran:
        sp = row["ring"] * row["ulysses"]
        shown = table_row(row)
        way = tuple(shown[name] for name in ("model", "layers", "zero", "checkpoints", "tiles"))
        alike.setdefault((*way, row["tokens"] // sp), []).append({**row, "sp": sp})
    return [
        f"{human_bytes(tokens)} tokens per GPU: {_name(row)} at SP {row['sp']} trains "
        f"{100 * row['tokens_per_second'] / base['tokens_per_second']:.1f}% of the tokens/s of "
        "data parallelism"
        for (*_, tokens), group in alike.items()
        for base in [row for row in group if row["sp"] == 1][:1]
        for row in group
        if row["sp"] > 1
    ]


def _longest(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for each in found:
        fits = "none ran" if each["fits"] is None else f"{each['fits']:,} tokens ran"
        fails = "" if each["fails"] is None else f", {each['fails']:,} did not ({each['reason']})"
        plan = "" if each["planned"] is None else f"; planned {each['planned']:,}"
        lines.append(f"longest, {_name(each)}, {each['setting']}: {fits}{fails}{plan}")
    return lines


def _profile(row: dict[str, Any]) -> str:
    *_, whole = row["profile"]
    shown = [
        {
            **each,
            "milliseconds": each["seconds"] * 1e3,
            "share": 100 * each["seconds"] / whole["seconds"],
        }
        for each in row["profile"]
    ]
    table = format_table(PROFILE_COLUMNS, shown)
    return f"what a step of {_name(row)} at {human_bytes(row['tokens'])} tokens goes into\n{table}"


def _name(row: dict[str, Any]) -> str:
    shown = Path(row["model"]).name or row["model"]
    return shown if row["softmax_layers"] is None else f"{shown} {row['softmax_layers']}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Two panels over the length: seconds, and memory of a GPU."""
    figure, (times, peaks) = new_figure(2)
    ways = _ways(record["cases"])
    for axes, name, factor in ((times, "seconds", 1.0), (peaks, "peak_bytes", 1 / GIB)):
        for number, rows in enumerate(ways.values()):
            style = {"color": f"C{number % 10}"}
            _plot(axes, rows, name, factor, marker="o", **style)
            _plot(axes, rows, f"predicted_{name}", factor, linestyle="--", **style)
    finish_panel(times, "tokens", "seconds per step")
    finish_panel(peaks, "tokens", "GiB allocated on a GPU")
    # Of both panels, and as tall as it needs to be.
    handles = [Line2D([], [], color=f"C{number % 10}", marker="o") for number in range(len(ways))]
    figure.set_figheight(figure.get_figheight() + LEGEND_INCHES * len(ways) / LEGEND_COLUMNS)
    figure.legend(handles, list(ways), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    where = record["environment"]
    figure.suptitle(
        f"one training step, {where['world']} x {where['chip']}; dashed: planned", fontsize=11
    )
    figure.savefig(path, dpi=150)


def _ways(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in length alone, by a name for them, made of what not all have in common."""
    shown = [table_row(row) for row in rows]
    differing = [name for name in NAMING if len({each[name] for each in shown}) > 1] or NAMING[:1]
    found: dict[str, list[dict[str, Any]]] = {}
    for row, each in zip(rows, shown, strict=True):
        label = ", ".join(f"{COLUMNS[name]} {each[name]}" for name in differing)
        found.setdefault(label, []).append(row)
    return found


def _plot(axes: Any, rows: list[dict[str, Any]], name: str, factor: float, **style: Any) -> None:
    """Draw one figure of some rows, those that have it."""
    points = sorted((r["tokens"], factor * r[name]) for r in rows if r.get(name) is not None)
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, **style)
