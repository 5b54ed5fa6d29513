"""Merging attention over parts of the keys: the step that makes ring attention exact.

Attention over a set of keys is summarised by its output and the log of its softmax denominator
(`lse`). Two summaries over disjoint keys merge into one:

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

Both stay in fp32, so the error does not grow with the number of parts (FlashAttention,
arXiv:2205.14135; Ring Attention, arXiv:2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two attention summaries over disjoint keys.

    Args:
        out, block_out: [B, L, H, D] fp32.
        lse, block_lse: [B, L, H] fp32; -inf where a token has seen no key yet.

    Returns:
        The merged (out, lse), new tensors.
    """
    merged = torch.logaddexp(lse, block_lse)
    # Where neither side saw a key both weights are exp(-inf - -inf): keep them at zero.
    seen = merged > float("-inf")
    weight = torch.where(seen, (lse - merged).exp(), 0.0)
    block_weight = torch.where(seen, (block_lse - merged).exp(), 0.0)
    return out * weight[..., None] + block_out * block_weight[..., None], merged
