"""What a head says of chosen tokens: their losses, and how two heads differ. A tile at a time.

Logits are made in fp32 whatever the model's dtype: rounded to bf16, two words of nearly the same
score are one in sixty-four apart or equal, which is noise in a divergence and a coin toss in an
argmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.ops.cross_entropy import IGNORED_LABEL

TOKENS_PER_TILE = 1024


@torch.no_grad()
def label_scores(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each labelled token, and whether the label was the first choice.

    Args:
        hidden: [B, L, D].
        head: [vocabulary, D].
        labels: int64 [B, L], already shifted; -100 where nothing is scored.

    Returns:
        losses, fp32 [B, L], and hits, bool [B, L]; 0 and False where nothing is scored.
    """
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
    for where, tokens in _tiles(labels, hidden):
        logits = _logits(tokens, head)
        losses.view(-1)[where] = F.cross_entropy(logits, labels.view(-1)[where], reduction="none")
        hits.view(-1)[where] = logits.argmax(dim=-1) == labels.view(-1)[where]
    return losses, hits


@torch.no_grad()
def disagreement(
    teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a student's next-token distribution is from its teacher's.

    Args:
        teacher: hidden [B, L, D] and head [vocabulary, D].
        student: the same; D may be another, the vocabulary may not.
        labels: int64 [B, L]; -100 where nothing is scored.

    Returns:
        KL(teacher || student) in nats, fp32 [B, L], and whether their first choices are the same,
        bool [B, L]; 0 and False where nothing is scored.
    """
    divergence = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    same = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    for where, tokens, tokens_of_student in _tiles(labels, teacher[0], student[0]):
        theirs = _logits(tokens, teacher[1]).log_softmax(dim=-1)
        ours = _logits(tokens_of_student, student[1]).log_softmax(dim=-1)
        kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
        divergence.view(-1)[where] = kl
        same.view(-1)[where] = theirs.argmax(dim=-1) == ours.argmax(dim=-1)
    return divergence, same


def _tiles(labels: Tensor, *hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Indices into the flattened labels that count, a tile at a time, with their hidden states."""
    scored = (labels.reshape(-1) != IGNORED_LABEL).nonzero()[:, 0]
    for where in scored.split(TOKENS_PER_TILE):
        yield where, *(states.flatten(0, 1)[where] for states in hidden)


def _logits(tokens: Tensor, head: Tensor) -> Tensor:
    return tokens.float() @ head.float().T


__all__ = ["disagreement", "label_scores"]
