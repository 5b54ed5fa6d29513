"""Loss against context: does a model use what lies far back?

`loss_by_position` averages the losses of a long window by how many tokens come before: buckets
(0, 256], (256, 512], (512, 1024] and so on. Its curve is what papers draw, but later tokens are
other tokens. `loss_by_context` holds the tokens fixed: the last ones of each window, scored with
2K, 4K, ... tokens of the window in view. Whatever falls there falls because of context, and
differences are taken window by window, so that they are sure where the losses themselves are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridsp.evaluate.scores import label_scores
from hybridsp.evaluate.statistics import clustered_mean
from hybridsp.evaluate.subject import Subject
from hybridsp.evaluate.text import Windows
from hybridsp.ops.cross_entropy import IGNORED_LABEL

FIRST_EDGE = 256
SCORED_TOKENS = 1024


@dataclass(frozen=True)
class CurveOfLoss:
    """Losses of windows at rising amounts of context.

    Attributes:
        edges: the most tokens in view, rising.
        sums: float64 [n, len(edges)], summed losses of each window.
        counts: int64 [n, len(edges)], the tokens in each sum.
        documents: int64 [n], which document each window is of.
    """

    edges: list[int]
    sums: Tensor
    counts: Tensor
    documents: Tensor

    def point(self, index: int) -> dict[str, Any]:
        """Mean loss at one amount of context, with its standard error over documents."""
        loss, error = clustered_mean(*self._means(index), self.documents)
        return {
            "context": self.edges[index],
            "tokens": int(self.counts[:, index].sum()),
            "loss": loss,
            "standard_error": error,
        }

    def points(self) -> list[dict[str, Any]]:
        """`point` of every edge."""
        return [self.point(index) for index in range(len(self.edges))]

    def change(self, start: int, stop: int) -> dict[str, Any]:
        """Loss at edge `stop` less that at edge `start`, paired window by window.

        Args:
            start, stop: two of the edges.
        """
        one, two = self.edges.index(start), self.edges.index(stop)
        (before, _), (after, weights) = self._means(one), self._means(two)
        change, error = clustered_mean(after - before, weights, self.documents)
        return {"from": start, "to": stop, "change": change, "standard_error": error}

    def _means(self, index: int) -> tuple[Tensor, Tensor]:
        counts = self.counts[:, index]
        return self.sums[:, index] / counts, counts


def edges_up_to(length: int, first: int) -> list[int]:
    """`first`, twice that and so on, below `length`; and `length`."""
    edges = [min(first, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return edges


def loss_by_position(subject: Subject, windows: Windows) -> CurveOfLoss:
    """Losses by how many tokens come before, in buckets whose ends double. Collective.

    Args:
        subject: the model.
        windows: what it reads.
    """
    length = windows.tokens.shape[1]
    edges = edges_up_to(length, FIRST_EDGE)
    ends = torch.tensor(edges, device=subject.mesh.device)
    sums, counts = [], []
    for tokens in windows.tokens.split(subject.rows_per_batch(length)):
        hidden, labels, positions = subject.hidden({"input_ids": tokens})
        losses, _ = label_scores(hidden, subject.head, labels)
        # The token at position i predicts with i + 1 in view. Padding may lie past the last edge.
        bucket = torch.bucketize(positions + 1, ends).clamp(max=len(edges) - 1)
        zeros = torch.zeros(len(tokens), len(edges), dtype=torch.float64, device=hidden.device)
        sums.append(zeros.scatter_add(1, bucket, losses.double()))
        counts.append(zeros.scatter_add(1, bucket, (labels != IGNORED_LABEL).double()))
    return _curve(subject, edges, torch.cat(sums), torch.cat(counts), windows)


def loss_by_context(subject: Subject, windows: Windows) -> CurveOfLoss:
    """Losses of each window's last tokens, by how much of the window the model sees. Collective.

    The last `SCORED_TOKENS`, or a quarter of the window if that is less, are read with the last
    2, 4, 8 ... times as many tokens in view, themselves included.

    Args:
        subject: the model.
        windows: what it reads, at least 4 tokens each.
    """
    length = windows.tokens.shape[1]
    scored = min(SCORED_TOKENS, length // 4)
    edges = edges_up_to(length, 2 * scored)
    sums, counts = [], []
    for edge in edges:
        of_edge = []
        for tokens in windows.tokens[:, -edge:].split(subject.rows_per_batch(edge)):
            labels = tokens.clone()
            labels[:, :-scored] = IGNORED_LABEL
            hidden, shifted, _ = subject.hidden({"input_ids": tokens, "labels": labels})
            losses, _ = label_scores(hidden, subject.head, shifted)
            of_edge.append(torch.stack([losses, shifted != IGNORED_LABEL]).double().sum(dim=2))
        both = torch.cat(of_edge, dim=1)
        sums.append(both[0])
        counts.append(both[1])
    return _curve(subject, edges, torch.stack(sums, dim=1), torch.stack(counts, dim=1), windows)


def _curve(
    subject: Subject, edges: list[int], sums: Tensor, counts: Tensor, windows: Windows
) -> CurveOfLoss:
    """The curve of what all ranks have summed."""
    sums, counts = subject.total(torch.stack([sums, counts]))
    return CurveOfLoss(edges, sums, counts.round().long(), windows.documents)


__all__ = ["CurveOfLoss", "edges_up_to", "loss_by_context", "loss_by_position"]
