"""What a run of phases did, in one place: how much of the lost quality came back, and for what.

Each phase keeps its own record (`hybridsp.metrics`). Here they are laid end to end: held-out loss
over all tokens read since the conversion, beside the two losses it runs between, that of the raw
conversion and that of the teacher on the same held-out documents.

    recovered = (raw conversion - now) / (raw conversion - teacher)

`summary.json` holds the numbers, `recovery.png` the curve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridsp.metrics import RunLogger


class PhaseLogger(RunLogger):
    """A run's record with what its objective measured beside each logged step.

    Args:
        metrics: of the objective, called on every rank at each logged step; it may communicate.
        arguments, options: of `RunLogger`.
    """

    def __init__(
        self, metrics: Callable[[], dict[str, float]] | None, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._metrics = metrics

    def log_step(self, step: int, **measured: Any) -> None:
        """As `RunLogger.log_step`."""
        super().log_step(step, **measured)
        if self._metrics is not None:
            self.log_values(step, self._metrics())


def summarize(output_dir: str | Path, phases: Sequence[tuple[str, Path]]) -> dict[str, Any] | None:
    """Write `summary.json` and `recovery.png` from the records of the phases.

    Args:
        output_dir: of the run.
        phases: name and folder of each, in order; those without a record yet are left out.

    Returns:
        What is in `summary.json`: `teacher_loss`, `converted_loss`, and per phase its steps,
        tokens, minutes of steps, held-out loss at the end and the part `recovered`; None where
        nothing was evaluated.
    """
    curve: list[tuple[int, float, str]] = []
    rows, teacher, tokens = [], None, 0
    for name, folder in phases:
        record = Path(folder) / "metrics.jsonl"
        if not record.exists():
            continue
        logged = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        points, used = _curve(logged)
        judged = [row["teacher_eval_loss"] for row in logged if "teacher_eval_loss" in row]
        teacher = judged[0] if judged else teacher
        curve += [(tokens + at, loss, name) for at, loss in points]
        tokens += used["tokens"]
        rows.append({"phase": name, **used, "eval_loss": points[-1][1] if points else None})
    if not curve:
        return None
    start = curve[0][1]
    for row in rows:
        lost = None if teacher is None else start - teacher
        if lost and row["eval_loss"] is not None:
            row["recovered"] = (start - row["eval_loss"]) / lost
    summary = {"teacher_loss": teacher, "converted_loss": start, "tokens": tokens, "phases": rows}
    text = json.dumps(summary, indent=2)
    (Path(output_dir) / "summary.json").write_text(text + "\n", encoding="utf-8")
    _draw(curve, teacher, Path(output_dir) / "recovery.png")
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| after | steps | tokens | minutes | held-out loss | recovered |",
        "|---|---|---|---|---|---|",
        f"| conversion | | | | {summary['converted_loss']:.4f} | 0% |",
    ]
    for row in summary["phases"]:
        loss = "" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
        part = f"{row['recovered']:.1%}" if "recovered" in row else ""
        lines.append(
            f"| {row['phase']} | {row['steps']:,} | {row['tokens'] / 1e6:,.1f}M | "
            f"{row['seconds'] / 60:.1f} | {loss} | {part} |"
        )
    if summary["teacher_loss"] is not None:
        lines.append(f"| (teacher) | | | | {summary['teacher_loss']:.4f} | 100% |")
    return "\n".join(lines)


def _curve(rows: list[dict[str, Any]]) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Tokens read in a phase until each evaluation, with its loss; and what the phase used.

    Steps that were not logged count as the one logged after them: a stage's steps are alike, and
    its last one is always logged.
    """
    points, step, tokens, seconds = [], 0, 0, 0.0
    for row in rows:
        if "tokens" in row:
            tokens += (row["step"] - step) * row["tokens"]
            seconds += (row["step"] - step) * row["seconds"]
            step = row["step"]
        if "eval_loss" in row:
            points.append((tokens, row["eval_loss"]))
    return points, {"steps": step, "tokens": tokens, "seconds": seconds}


def _draw(curve: list[tuple[int, float, str]], teacher: float | None, path: Path) -> None:
    # The object interface, not pyplot: no global state, and no display is looked for.
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name in dict.fromkeys(phase for _, _, phase in curve):
            points = [(at / 1e6, loss) for at, loss, phase in curve if phase == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        if teacher is not None:
            axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
        axes.set(xlabel="tokens since the conversion (millions)", ylabel="held-out loss (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)


__all__ = ["PhaseLogger", "format_summary", "summarize"]
