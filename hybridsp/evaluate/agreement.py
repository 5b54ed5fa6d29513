"""Held-out loss, and how often a model says what its teacher says.

Both are read off the same pass: the loss of each held-out token, and, where there is a teacher,
KL(teacher || student) and whether the two would choose the same next token. The pair of logits is
only ever there for a tile of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridsp.evaluate.scores import disagreement, label_scores
from hybridsp.evaluate.statistics import clustered_mean
from hybridsp.evaluate.subject import Subject
from hybridsp.evaluate.text import Packed
from hybridsp.ops.cross_entropy import IGNORED_LABEL


@dataclass(frozen=True)
class TextScores:
    """Sums over the scored tokens of each row, float64 [n]; the last two None without a teacher.

    Attributes:
        tokens: how many are scored.
        loss: in nats.
        hits: how often the next token was the first choice.
        divergence: KL(teacher || student), in nats.
        same: how often teacher and student had the same first choice.
    """

    tokens: Tensor
    loss: Tensor
    hits: Tensor
    divergence: Tensor | None = None
    same: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        """Means per token; standard errors over rows."""
        loss, error = self._mean(self.loss)
        found: dict[str, Any] = {
            "tokens": int(self.tokens.sum()),
            "loss": loss,
            "standard_error": error,
            "accuracy": self._mean(self.hits)[0],
        }
        if self.divergence is not None and self.same is not None:
            found["divergence"], found["divergence_standard_error"] = self._mean(self.divergence)
            found["agreement"], found["agreement_standard_error"] = self._mean(self.same)
        return found

    def _mean(self, sums: Tensor) -> tuple[float, float | None]:
        rows = torch.arange(len(sums))
        return clustered_mean(sums / self.tokens, self.tokens, rows)


def score_text(subject: Subject, packed: Packed, teacher: Subject | None = None) -> TextScores:
    """Score a model on packed documents. Collective.

    Args:
        subject: the model.
        packed: what it reads.
        teacher: whom to compare it with; may be the model itself.

    Raises:
        ValueError: the vocabularies are not of one size.
    """
    if teacher is not None and teacher.head.shape[0] != subject.head.shape[0]:
        raise ValueError(
            f"teacher {teacher.name!r} has a vocabulary of {teacher.head.shape[0]}, "
            f"{subject.name!r} of {subject.head.shape[0]}: compare models of one vocabulary, or "
            "leave --teacher out"
        )
    count, length = packed.tokens.shape
    step = subject.rows_per_batch(length)
    parts = []
    for first in range(0, count, step):
        batch = packed.batch(slice(first, first + step))
        # Packed rows come back as one: position // length is the row again, on every rank.
        hidden, labels, _ = subject.hidden(batch)
        losses, hits = label_scores(hidden, subject.head, labels)
        scores = [labels != IGNORED_LABEL, losses, hits]
        if teacher is not None:
            seen, _, _ = (hidden, None, None) if teacher is subject else teacher.hidden(batch)
            scores += disagreement((seen, teacher.head), (hidden, subject.head), labels)
        parts.append(_by_row(subject, torch.cat(scores).double(), length, len(batch["input_ids"])))
    totals = subject.total(torch.cat(parts, dim=1))
    return TextScores(*totals)


def _by_row(subject: Subject, scores: Tensor, length: int, rows: int) -> Tensor:
    """Scores [kinds, L] of this rank's tokens summed by the packed row they lie in, [kinds, n]."""
    mesh = subject.mesh
    own = scores.shape[1]
    row = (mesh.sp_rank * own + torch.arange(own, device=scores.device)) // length
    zeros = torch.zeros(len(scores), rows, dtype=torch.float64, device=scores.device)
    # What lies past the last row is padding, which scores nothing.
    return zeros.scatter_add(1, row.clamp(max=rows - 1).expand_as(scores), scores)


__all__ = ["TextScores", "score_text"]
