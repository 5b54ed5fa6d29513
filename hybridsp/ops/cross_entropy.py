"""Cross-entropy of a language-model head without the logits of the whole sequence.

Logits are [tokens, vocabulary]: at a million tokens and 128,256 words they would take 512 GB in
fp32. They are made a tile of tokens at a time and thrown away. Loss and gradients come out of the
same pass, because a sum's gradient is known up to the upstream factor: the backward only scales
what is stored, so any upstream gradient and any tile size give the same answer.

`TiledHead` does this for whatever a tile's loss is; distillation has another one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED_LABEL = -100
TOKENS_PER_TILE = 1024


def tiled_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, tokens_per_tile: int = TOKENS_PER_TILE
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[label].

    Args:
        hidden: [B, L, D].
        weight: [vocabulary, D], of hidden's dtype.
        labels: int64 [B, L], already shifted; -100 contributes nothing.
        tokens_per_tile: logits of so many tokens are held at once.

    Returns:
        A scalar, fp32; 0 where no label is valid.

    Raises:
        ValueError: shapes that do not fit, or no tokens in a tile.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but hidden states are "
            f"{tuple(hidden.shape)}: give one label per token, -100 where there is none"
        )
    if tokens_per_tile < 1:
        raise ValueError(f"tokens_per_tile = {tokens_per_tile} must be at least 1")
    learns = torch.is_grad_enabled()
    (loss,) = TiledHead.apply(hidden, weight, labels, _cross_entropy, tokens_per_tile, learns)
    return loss


class TiledHead(torch.autograd.Function):
    """A head and losses of its logits, the first of which is learnt from.

    forward   hidden [B, L, D], weight [N, D], labels [B, L] -> sum of each loss over valid labels
    backward  d(first sum) -> dhidden [B, L, D], dweight [N, D]     computed forward, scaled here

    `losses_of(logits, picked, rows, learns)` is given the logits [tokens, N] of a tile, the tokens'
    labels int64 [tokens, 1], 0 where there is none, which of all the B * L tokens they are, and
    whether to learn. It returns fp32 [tokens, losses], and the first loss's gradient by the logits,
    or None if it is not to be learnt from.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, losses_of, tokens_per_tile, learns):  # noqa: D102
        wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
        dhidden = dweight = None
        if wanted[0]:
            dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if wanted[1]:
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        sums = torch.zeros((), dtype=torch.float32, device=hidden.device)
        tiles = [x.split(tokens_per_tile) for x in (hidden.flatten(0, 1), labels.reshape(-1, 1))]
        for index, (tokens, targets) in enumerate(zip(*tiles, strict=True)):
            rows = slice(index * tokens_per_tile, (index + 1) * tokens_per_tile)
            # By gathering and masking: an index made of booleans would wait for the GPU every tile.
            valid = targets != IGNORED_LABEL
            picked = torch.where(valid, targets, 0)
            losses, dlogits = losses_of(tokens @ weight.T, picked, rows, any(wanted))
            # Chosen, not multiplied: what an ignored token has may be infinite.
            sums = sums + torch.where(valid, losses, 0.0).sum(dim=0)
            if dlogits is not None:
                dlogits = dlogits.masked_fill_(~valid, 0.0).to(hidden.dtype)
            if dhidden is not None:
                dhidden.view(-1, hidden.shape[-1])[rows] = dlogits @ weight
            if dweight is not None:
                dweight += (dlogits.T @ tokens).float()
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        loss, *others = map(torch.clone, sums)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):  # noqa: D102
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden.float() * dloss).to(ctx.dtype) if dhidden is not None else None
        dweight = (dweight * dloss).to(ctx.dtype) if dweight is not None else None
        return dhidden, dweight, None, None, None, None


def _cross_entropy(
    logits: Tensor, picked: Tensor, _rows: slice, learns: bool
) -> tuple[Tensor, Tensor | None]:
    logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = -logp.gather(1, picked)
    return losses, cross_entropy_gradient(logp, picked) if learns else None


def cross_entropy_gradient(logp: Tensor, picked: Tensor) -> Tensor:
    """Softmax - one_hot; overwrites `logp` fp32 [tokens, vocabulary]. `picked`: [tokens, 1]."""
    return logp.exp_().scatter_add_(1, picked, -torch.ones_like(picked, dtype=logp.dtype))
