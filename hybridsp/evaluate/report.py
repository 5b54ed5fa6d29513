"""What `hybridsp eval` shows: a table for each question, one JSON file, a picture.

The record holds every figure with how sure it is; the tables hold what a reader compares, models
side by side. A model that could not answer (memory, say) has its reason where its figures would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybridsp.bench.options import human_bytes
from hybridsp.bench.report import finish_panel, format_table, new_figure

# model -> task -> what the task found: {"reason"}, or what its module's summary gives.
Results = Mapping[str, Mapping[str, Any]]

# Of one key, of the next number of keys and so on.
LINES = ("-", "--", ":", "-.")


def render(results: Results) -> str:
    """All tables of the tasks that were asked."""
    sections: list[tuple[str, Callable[[Results], str]]] = [
        ("text", _text_table),
        ("positions", _positions_table),
        ("context", _context_table),
        ("needle", _needle_table),
    ]
    asked = {task for tasks in results.values() for task in tasks}
    return "\n\n".join(table(results) for task, table in sections if task in asked)


def draw(path: Path, results: Results) -> None:
    """Write the curves as a picture: loss against position and context, needles against length."""
    asked = {task for tasks in results.values() for task in tasks}
    curves = [task for task in ("positions", "context") if task in asked]
    panels = len(curves) + ("needle" in asked)
    if not panels:
        return
    figure, axes = new_figure(panels)
    for axis, task in zip(axes, curves, strict=False):
        for model, tasks in results.items():
            points = tasks[task].get("points", [])
            at = [point["context"] for point in points]
            losses = [point["loss"] for point in points]
            axis.plot(at, losses, marker="o", markersize=3, label=model)
        what = "tokens before" if task == "positions" else "tokens in view of the same tokens"
        finish_panel(axis, what, "loss, nats per token", log_y=False)
    if "needle" in asked:
        _draw_needles(axes[-1], results)
    figure.savefig(path, dpi=130)


def _draw_needles(axis: Any, results: Results) -> None:
    for colour, (model, tasks) in enumerate(results.items()):
        cases = [case for case in tasks["needle"] if "reason" not in case]
        for line, keys in enumerate(dict.fromkeys(case["keys"] for case in cases)):
            some = [case for case in cases if case["keys"] == keys]
            shares = [case["share"] for case in some]
            below = [case["share"] - case["low"] for case in some]
            above = [case["high"] - case["share"] for case in some]
            label = f"{model}, {keys} key{'s' if keys > 1 else ''}"
            lengths = [case["length"] for case in some]
            axis.errorbar(
                lengths,
                shares,
                [below, above],
                color=f"C{colour}",
                linestyle=LINES[line % len(LINES)],
                marker="o",
                markersize=3,
                capsize=2,
                label=label,
            )
    axis.set_ylim(-0.02, 1.02)
    finish_panel(axis, "tokens", "needles found", log_y=False)


def _text_table(results: Results) -> str:
    rows = []
    for model, tasks in results.items():
        found = dict(tasks["text"])
        if "loss" in found:
            found["perplexity"] = math.exp(found["loss"])
            found["loss"] = _with_error(found["loss"], found["standard_error"])
        if "agreement" in found:
            found["divergence"] = _with_error(
                found["divergence"], found["divergence_standard_error"]
            )
            found["agreement"] = _share(found["agreement"])
        if "accuracy" in found:
            found["accuracy"] = _share(found["accuracy"])
        rows.append({"model": model, **found})
    columns = {
        "model": "model",
        "tokens": "tokens",
        "loss": "loss",
        "perplexity": "perplexity",
        "accuracy": "top-1",
        "divergence": "KL from teacher",
        "agreement": "same top-1",
    }
    return "Held-out text, packed (nats per token)\n" + format_table(columns, rows)


def _positions_table(results: Results) -> str:
    title = "Loss by position: tokens before, up to (nats per token)\n"
    return title + _curves(results, "positions")


def _context_table(results: Results) -> str:
    title = "Loss of the same tokens, by tokens in view (nats per token)\n"
    text = title + _curves(results, "context")
    rows = [
        {"model": model, **_change(change)}
        for model, tasks in results.items()
        for change in tasks["context"].get("changes", [])
    ]
    if rows:
        columns = {"model": "model", "from": "from", "to": "to", "change": "change of loss"}
        text += "\n\nWhat more context changes, window by window\n" + format_table(columns, rows)
    return text


def _curves(results: Results, task: str) -> str:
    """Rows are amounts of context, columns are models."""
    rows: dict[int, dict[str, Any]] = {}
    reasons = []
    for model, tasks in results.items():
        if "reason" in tasks[task]:
            reasons.append(f"{model} cannot run: {tasks[task]['reason']}")
        for point in tasks[task].get("points", []):
            row = rows.setdefault(
                point["context"],
                {"context": human_bytes(point["context"]), "tokens": point["tokens"]},
            )
            row[model] = _with_error(point["loss"], point["standard_error"])
    columns = {"context": "context", "tokens": "tokens"} | {model: model for model in results}
    return "\n".join([format_table(columns, list(rows.values())), *reasons])


def _needle_table(results: Results) -> str:
    rows = []
    for model, tasks in results.items():
        for case in tasks["needle"]:
            row = {"model": model, **case, "length": human_bytes(case["length"])}
            if "reason" not in case:
                row["found"] = f"{case['found']}/{case['asked']}"
                row["share"] = _share(case["share"])
                row["interval"] = f"{_share(case['low'])} .. {_share(case['high'])}"
                row["by_depth"] = " ".join(str(at["found"]) for at in case["by_depth"])
            rows.append(row)
    columns = {
        "model": "model",
        "length": "length",
        "keys": "keys",
        "found": "found",
        "share": "share",
        "interval": "95% interval",
        "log_probability": "log p per token",
        "by_depth": "found by depth, first to last",
    }
    return "Needles found, every answer token the first choice\n" + format_table(columns, rows)


def _change(change: Mapping[str, Any]) -> dict[str, str]:
    return {
        "from": human_bytes(change["from"]),
        "to": human_bytes(change["to"]),
        "change": _with_error(change["change"], change["standard_error"], sign="+"),
    }


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    known = "" if error is None else f" ± {error:.4f}"
    return f"{value:{sign}.4f}{known}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


__all__ = ["Results", "draw", "render"]
