"""What a run reports while it trains: a progress bar, two log files and a picture.

    metrics.jsonl   one JSON object per logged step or evaluation: the record of the run
    tensorboard/    the same numbers for `tensorboard --logdir`
    loss.png        training and evaluation loss over steps, drawn from the record

Only rank 0 writes; on the other ranks every method does nothing, so that callers need not ask.
A resumed run appends to the record. Rows behind the step it resumes from belong to steps that will
be taken again, so they are dropped first and no step appears twice.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hybridsp.files import write_atomically

GIB = 2**30


def peak_memory_gib() -> float:
    """Peak memory of this rank so far, in GiB: on its GPU, or resident in the host without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class RunLogger:
    """The progress bar and the log files of one run.

    Args:
        output_dir: directory for `metrics.jsonl`, `tensorboard/` and `loss.png`; created if needed.
        total_steps: optimizer steps of the whole run.
        is_main: whether this is rank 0, the one that writes.
        first_step: optimizer steps already taken: 0, or the step a run resumes from.

    Raises:
        ValueError: `metrics.jsonl` is there and cannot be read.
    """

    def __init__(
        self,
        output_dir: str | Path,
        total_steps: int,
        is_main: bool,
        first_step: int = 0,
    ) -> None:
        self.is_main = is_main
        if not is_main:
            return
        self.directory = Path(output_dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._rows = _rows_until(self.directory / "metrics.jsonl", first_step)
        lines = (json.dumps(row) + "\n" for row in self._rows)
        write_atomically(self.directory / "metrics.jsonl", "".join(lines))
        self._record = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        # TensorBoard hides events from this step on that earlier runs wrote, as we drop their rows.
        purge_step = first_step + 1 if first_step else 0
        self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=purge_step)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._setting: dict[str, int] = {}

    def enter_stage(self, number: int, seq_length: int) -> None:
        """Record with every row from here on which stage it belongs to, and its length."""
        if self.is_main:
            self._setting = {"stage": number, "seq_length": seq_length}

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        tokens: int,
        labels: int,
        seconds: float,
        learning_rate: float,
        grad_norm: float,
    ) -> None:
        """Record one optimizer step.

        Args:
            step: number of the step, from 1.
            loss: mean over the step's labels, in nats per token.
            tokens: tokens that all ranks together read in the step.
            labels: those of them that the loss counts.
            seconds: wall time of the step.
            learning_rate: the rate the step used.
            grad_norm: norm of the step's gradient before clipping.
        """
        if not self.is_main:
            return
        row = {
            "step": step,
            "loss": loss,
            "tokens": tokens,
            "labels": labels,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "memory_gib": peak_memory_gib(),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
        }
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['memory_gib']:.2f} GiB, lr {learning_rate:.2e}, |grad| {grad_norm:.3f}",
            refresh=False,
        )
        self._write(row)

    def log_evaluation(self, step: int, eval_loss: float) -> None:
        """Record an evaluation: mean loss in nats per token after `step` optimizer steps."""
        if not self.is_main:
            return
        self._bar.write(f"step {step}: eval loss {eval_loss:.4f}", file=sys.stderr)
        self._write({"step": step, "eval_loss": eval_loss})

    def has_evaluation(self, step: int) -> bool:
        """Whether one was recorded behind `step`, on the rank that records."""
        return any(row["step"] == step and "eval_loss" in row for row in self._rows)

    def log_values(self, step: int, values: Mapping[str, float]) -> None:
        """Record other numbers that belong to `step`, by their names."""
        if self.is_main:
            self._write({"step": step, **values})

    def advance(self) -> None:
        """Move the progress bar by one optimizer step, logged or not."""
        if self.is_main:
            self._bar.update()

    def draw(self) -> None:
        """Write `loss.png`: every loss recorded so far."""
        if self.is_main:
            _draw_losses(self._rows, self.directory / "loss.png")

    def summary(self) -> str:
        """One line: the first and the last evaluation, or training loss where there is none."""
        rows = self._rows if self.is_main else []
        for name, what in (("eval_loss", "evaluation loss"), ("loss", "training loss")):
            points = [f"{row[name]:.4f} at step {row['step']}" for row in rows if name in row]
            if points:
                return f"{what}: {points[0]}, {points[-1]}"
        return "no loss was recorded"

    def close(self) -> None:
        """Draw the losses a last time and close the files."""
        if not self.is_main:
            return
        self.draw()
        self._bar.close()
        self._events.close()
        self._record.close()

    def _write(self, row: dict[str, Any]) -> None:
        row = {**row, **self._setting}
        self._rows.append(row)
        self._record.write(json.dumps(row) + "\n")
        self._record.flush()
        for name, value in row.items():
            if name != "step":
                kind = "eval" if name == "eval_loss" else "train"
                self._events.add_scalar(f"{kind}/{name.removeprefix('eval_')}", value, row["step"])


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The recorded rows up to a step; 0 steps taken is a new run, which keeps none."""
    if step == 0 or not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # a run that was killed while it wrote this row
                break
            message = f"line {number} of {path} is no JSON object ({error}): repair or remove it"
            raise ValueError(message) from None
    return [row for row in rows if row["step"] <= step]


def _draw_losses(rows: list[dict[str, Any]], path: Path) -> None:
    # The object interface, not pyplot: no global state, and no display is looked for.
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, label, style in (
            ("loss", "training", {"linewidth": 1.5}),
            ("eval_loss", "evaluation", {"linestyle": "--", "marker": "o", "markersize": 5}),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(path, dpi=150)


__all__ = ["RunLogger", "peak_memory_gib"]
