"""Steps without a finite loss or gradient: they are left out and counted, and too many end the run.

`hybridsp.train_step` leaves weights, optimizer state and the place in the learning rate's schedule
as they were. One such step in a month is a spike or a flipped bit; several in a row mean that the
weights are lost or the rate is too high, and every further step is wasted. The batch of each is
kept, so that it can be looked at and played again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hybridsp.engine import StepResult
from hybridsp.mesh import SPMesh

logger = logging.getLogger(__name__)


class BadSteps:
    """Counts them on behalf of a run.

    Args:
        mesh: the grid of ranks.
        output_dir: of the run; batches go to `bad_steps/step-NNNNNN/` in it.
        most: how many may follow each other before the run ends.

    Attributes:
        in_a_row: how many there were since the last good step.
        total: how many there were since the process began.
    """

    def __init__(self, mesh: SPMesh, output_dir: str | Path, most: int) -> None:
        self._mesh, self._root, self._most = mesh, Path(output_dir) / "bad_steps", most
        self.in_a_row = self.total = 0

    def note(
        self,
        step: int,
        result: StepResult,
        micro_batches: Sequence[Mapping[str, Any]],
        *,
        learning_rate: float,
    ) -> None:
        """Take notice of a step. If it was bad, keep its batch; collective over all ranks then.

        Args:
            step: its number.
            result: the same on every rank.
            micro_batches: this rank's parts.
            learning_rate: the rate that it was to use.

        Raises:
            ValueError: there have been too many in a row, or a batch cannot be written.
        """
        if not result.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        folder = self._root / f"step-{step:06d}"
        facts = {
            "step": step,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "labels": result.num_labels,
            "learning_rate": learning_rate,
            "mesh": {k: getattr(self._mesh, k) for k in ("dp", "ring", "ulysses")},
        }
        self._mesh.on_every_rank(_write, folder, self._mesh.rank, micro_batches, facts)
        what = f"step {step} has loss {result.loss} and a gradient of norm {result.grad_norm}"
        if self.in_a_row >= self._most:
            raise ValueError(
                f"{what}; so had all of the last {self.in_a_row} (max_bad_steps), none of which "
                f"changed the weights: look at the batches in {self._root}, lower learning_rate, "
                "or go on from an earlier checkpoint"
            )
        if self._mesh.rank == 0:
            logger.warning(
                "%s: left out (%d in a row, %d in all); its batch is in %s",
                *(what, self.in_a_row, self.total, folder),
            )


def _write(
    folder: Path, rank: int, micro_batches: Sequence[Mapping[str, Any]], facts: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for index, batch in enumerate(micro_batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor | int | float)
    }
    save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
    if rank == 0:
        (folder / "step.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


__all__ = ["BadSteps"]
