"""How far a student's next-token distribution is from its teacher's, without either's logits.

What a student can learn from a teacher at one token is a whole distribution over the vocabulary,
not one label (arXiv:1503.02531). Two sets of logits [tokens, vocabulary] would take twice the
memory that already a loss does not have, so both are made a tile of tokens at a time from the
hidden states and thrown away, and the gradient comes out of the same pass (as in `hybridsp.ops`'
tiled cross-entropy):

    p, q    softmax of the teacher's and the student's logits, both over the temperature T
    loss    T^2 sum over tokens of KL(p || q)  +  ce_weight * cross-entropy of the label
    dlogits T (q - p)  +  ce_weight * (softmax(logits) - one_hot)

T^2 keeps the size of the gradient, which falls as 1 / T^2, what it is at T = 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.ops.cross_entropy import TOKENS_PER_TILE, TiledHead, cross_entropy_gradient


def tiled_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    tokens_per_tile: int = TOKENS_PER_TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens whose label counts: what is learnt from, KL(teacher || student), CE.

    Args:
        hidden: the student's, [B, L, D].
        weight: the student's head, [vocabulary, D], of hidden's dtype.
        teacher_hidden: [B, L, E]; nothing flows back into the teacher.
        teacher_weight: the teacher's head, [vocabulary, E], of teacher_hidden's dtype.
        labels: int64 [B, L], already shifted; a token whose label is -100 contributes nothing, to
            the divergence neither.
        temperature: T > 0; more shows more of what the teacher holds unlikely.
        ce_weight: of the cross-entropy of the labels, at least 0.
        tokens_per_tile: logits of so many tokens are held at once.

    Returns:
        fp32 scalars: T^2 * KL at temperature T + ce_weight * cross-entropy, through which gradients
        flow to `hidden` and `weight`; KL at temperature T; cross-entropy. Of the last two the
        gradient is not taken.

    Raises:
        ValueError: shapes that do not fit, or an option out of its range.
    """
    if not hidden.shape[:2] == teacher_hidden.shape[:2] == labels.shape:
        raise ValueError(
            f"hidden states are {tuple(hidden.shape)}, the teacher's {tuple(teacher_hidden.shape)} "
            f"and labels {tuple(labels.shape)}: all need the same [B, L]"
        )
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student has {len(weight)} words, the teacher {len(teacher_weight)}: their "
            "distributions cannot be compared; take a teacher with the student's vocabulary"
        )
    if not temperature > 0 or not ce_weight >= 0 or tokens_per_tile < 1:
        raise ValueError(
            f"temperature = {temperature} must be positive, ce_weight = {ce_weight} not negative, "
            f"tokens_per_tile = {tokens_per_tile} at least 1"
        )
    losses_of = functools.partial(
        _divergence,
        teacher_tokens=teacher_hidden.flatten(0, 1),
        teacher_weight=teacher_weight,
        temperature=temperature,
        ce_weight=ce_weight,
    )
    learns = torch.is_grad_enabled()
    return TiledHead.apply(hidden, weight, labels, losses_of, tokens_per_tile, learns)


def _divergence(
    logits: Tensor,
    picked: Tensor,
    rows: slice,
    learns: bool,
    *,
    teacher_tokens: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor | None]:
    """(loss, KL, CE) of a tile's tokens and the gradient of its logits, as `TiledHead` asks."""
    log_q1 = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    ce = -log_q1.gather(1, picked)
    log_q = log_q1 if temperature == 1 else F.log_softmax(log_q1 / temperature, dim=-1)
    wished = (teacher_tokens[rows] @ teacher_weight.T).float()
    log_p = F.log_softmax(wished / temperature, dim=-1)
    p = log_p.exp()
    # A word that the teacher holds impossible costs nothing, whatever the student says of it.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1, keepdim=True)
    losses = torch.cat([temperature**2 * kl + ce_weight * ce, kl, ce], dim=1)
    if not learns:
        return losses, None
    dlogits = (log_q.exp() - p).mul_(temperature)
    if ce_weight:
        dlogits.add_(cross_entropy_gradient(log_q1, picked), alpha=ce_weight)
    return losses, dlogits


__all__ = ["tiled_divergence"]
