"""Cross-entropy of a language-model head without the logits of the whole sequence.

Logits are [tokens, vocabulary]: at a million tokens and 128,256 words they would take 512 GB in
fp32. They are made a tile of tokens at a time and thrown away. Loss and gradients come out of the
same pass, because a sum's gradient is known up to the upstream factor: the backward only scales
what is stored, so any upstream gradient and any tile size give the same answer.
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
    return TiledCrossEntropy.apply(hidden, weight, labels, tokens_per_tile, learns)


class TiledCrossEntropy(torch.autograd.Function):
    """Fused head and cross-entropy.

    forward   hidden [B, L, D], weight [N, D], labels [B, L] -> sum of losses
    backward  dloss -> dhidden [B, L, D], dweight [N, D]     computed forward, scaled here
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, tokens_per_tile, learns):  # noqa: D102
        wanted = [learns and needed for needed in ctx.needs_input_grad[:2]]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = None
        if wanted[0]:
            dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        dweight = None
        if wanted[1]:
            dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        tiles = [x.split(tokens_per_tile) for x in (hidden.flatten(0, 1), labels.flatten())]
        rows = 0
        for tokens, targets in zip(*tiles, strict=True):
            # By gathering and masking: an index made of booleans would wait for the GPU every tile.
            valid = (targets != IGNORED_LABEL)[:, None]
            picked = torch.where(valid, targets[:, None], 0)
            logp = F.log_softmax(tokens @ weight.T, dim=-1, dtype=torch.float32)
            # Chosen, not multiplied: what an ignored token has may be infinite.
            total -= torch.where(valid, logp.gather(1, picked), 0.0).sum()
            if any(wanted):
                dlogits = _logit_gradient(logp, picked, valid).to(hidden.dtype)
                if dhidden is not None:
                    dhidden.view(-1, hidden.shape[-1])[rows : rows + len(targets)] = (
                        dlogits @ weight
                    )
                if dweight is not None:
                    dweight += (dlogits.T @ tokens).float()
            rows += len(targets)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):  # noqa: D102
        dhidden, dweight = ctx.saved_tensors
        dhidden = (dhidden.float() * dloss).to(ctx.dtype) if dhidden is not None else None
        dweight = (dweight * dloss).to(ctx.dtype) if dweight is not None else None
        return dhidden, dweight, None, None, None


def _logit_gradient(logp: Tensor, picked: Tensor, valid: Tensor) -> Tensor:
    """Softmax - one_hot, zero where the label is ignored; overwrites logp [tokens, vocabulary]."""
    return logp.exp_().scatter_add_(1, picked, -valid.to(logp.dtype)).masked_fill_(~valid, 0.0)
