"""What a benchmark shows of its record: tables on the screen, and a picture.

Both are for reading: figures are rounded, and in the units that people think in. Those to count
with are in the record (`hybridsp.bench.record`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybridsp.bench.options import human_bytes

ABSENT = "-"


def format_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text: names to the left, numbers to the right, reasons below.

    Args:
        columns: key -> heading.
        rows: values by key; a missing one or None is shown as "-". A row with a "reason" is marked
            with the number under which the reason stands below the table.
    """
    cells = [{key: _cell(row.get(key)) for key in columns} for row in rows]
    widths = {
        key: max([len(head), *(len(texts[key]) for texts in cells)])
        for key, head in columns.items()
    }
    numeric = {
        key for key in columns if any(isinstance(row.get(key), (int, float)) for row in rows)
    }

    def line(texts: Mapping[str, str]) -> str:
        parts = (
            text.rjust(widths[key]) if key in numeric else text.ljust(widths[key])
            for key, text in texts.items()
        )
        return "  ".join(parts).rstrip()

    reasons = list(dict.fromkeys(row["reason"] for row in rows if row.get("reason")))
    lines = [line(columns), "  ".join("-" * width for width in widths.values())]
    for row, texts in zip(rows, cells, strict=True):
        mark = f"  [{1 + reasons.index(row['reason'])}]" if row.get("reason") else ""
        lines.append(line(texts) + mark)
    lines += [f"[{n}] cannot run: {reason}" for n, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def new_figure(panels: int) -> tuple[Figure, list[Any]]:
    """An empty picture of some panels side by side, and its axes.

    The object interface, not pyplot: no global state, and no display is looked for.
    """
    figure = Figure(figsize=(6.5 * panels, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def finish_panel(axes: Any, x_label: str, y_label: str, *, log_y: bool = True) -> None:
    """Logarithmic axes, the lower one in powers of two; the legend below, where it hides nothing.

    Call it when everything is drawn. Percentages want `log_y = False`.
    """
    axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def scaled(value: float | None, factor: float) -> float | None:
    """A figure in another unit, or None where there is none."""
    return None if value is None else value * factor


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = 3 - max(0, math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"
