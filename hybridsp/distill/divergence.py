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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hybridsp.ops.cross_entropy import IGNORED_LABEL, TOKENS_PER_TILE


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
    options = (temperature, ce_weight, tokens_per_tile, torch.is_grad_enabled())
    return TiledDivergence.apply(
        hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), labels, *options
    )


class TiledDivergence(torch.autograd.Function):
    """Two heads, KL divergence and cross-entropy in one.

    forward   hidden [B, L, D], weight [N, D], of the teacher too -> (loss, KL, CE), sums
    backward  dloss -> dhidden [B, L, D], dweight [N, D]     computed forward, scaled here
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        labels,
        temperature,
        ce_weight,
        tokens_per_tile,
        learns,
    ):
        wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        dhidden = dweight = None
        if wanted[0]:
            dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if wanted[1]:
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        flat = [x.flatten(0, 1).split(tokens_per_tile) for x in (hidden, teacher_hidden)]
        rows = 0
        for tokens, of_teacher, targets in zip(
            *flat, labels.flatten().split(tokens_per_tile), strict=True
        ):
            logits = (tokens @ weight.T).float()
            wished = (of_teacher @ teacher_weight.T).float()
            dlogits = _tile(logits, wished, targets, sums, temperature, ce_weight, any(wanted))
            if dlogits is not None:
                dlogits = dlogits.to(hidden.dtype)
                if dhidden is not None:
                    dhidden.view(-1, hidden.shape[-1])[rows : rows + len(targets)] = (
                        dlogits @ weight
                    )
                if dweight is not None:
                    dweight += (dlogits.T @ tokens).float()
            rows += len(targets)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        kl, ce = sums.unbind()
        loss = temperature**2 * kl + ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return loss, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dkl, _dce):
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden.float() * dloss).to(ctx.dtype) if dhidden is not None else None
        dweight = (dweight * dloss).to(ctx.dtype) if dweight is not None else None
        return dhidden, dweight, None, None, None, None, None, None, None


def _tile(
    logits: Tensor,
    wished: Tensor,
    targets: Tensor,
    sums: Tensor,
    temperature: float,
    ce_weight: float,
    learns: bool,
) -> Tensor | None:
    """Adds a tile's (KL, CE) to `sums` [2]; returns the gradient of its logits, if wanted.

    Args:
        logits: the student's, fp32 [tokens, vocabulary]; overwritten.
        wished: the teacher's, as `logits`.
        targets: labels [tokens].
    """
    # By gathering and masking: an index made of booleans would wait for the GPU every tile.
    valid = (targets != IGNORED_LABEL)[:, None]
    picked = torch.where(valid, targets[:, None], 0)
    log_q1 = F.log_softmax(logits, dim=-1)
    # Chosen, not multiplied: what an ignored token has may be infinite.
    sums[1] -= torch.where(valid, log_q1.gather(1, picked), 0.0).sum()
    log_q = log_q1 if temperature == 1 else F.log_softmax(logits / temperature, dim=-1)
    log_p = F.log_softmax(wished / temperature, dim=-1)
    p = log_p.exp()
    # A word that the teacher holds impossible costs nothing, whatever the student says of it.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1, keepdim=True)
    sums[0] += torch.where(valid, divergence, 0.0).sum()
    if not learns:
        return None
    dlogits = (log_q.exp() - p).mul_(temperature)
    if ce_weight:
        ones = torch.ones_like(picked, dtype=log_q1.dtype)
        dlogits += log_q1.exp().scatter_add_(1, picked, -ones).mul_(ce_weight)
    return dlogits.masked_fill_(~valid, 0.0)


__all__ = ["tiled_divergence"]
