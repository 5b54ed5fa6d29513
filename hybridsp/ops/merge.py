"""Merging attention over parts of the keys: the step that makes ring attention exact.

Attention over a set of keys is summarised by its output and the log of its softmax denominator
(`lse`). Two summaries over disjoint keys merge into one:

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b     the weights add up to one:
        = (1 - w) out_a + w out_b,   w = sigmoid(lse_b - lse_a)

Both stay in fp32, so the error does not grow with the number of parts (FlashAttention,
arXiv:2205.14135; Ring Attention, arXiv:2310.01889).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge attention over other keys into `out` and `lse`, in place.

    One sigmoid of the difference is both weights, so the large tensor is read and written once.

    Args:
        out: [B, L, H, D] fp32.
        block_out: [B, L, H, D], any dtype.
        lse, block_lse: [B, L, H] fp32; -inf where a token has seen no key yet.
    """
    weight = (block_lse - lse).nan_to_num_(nan=0.0).sigmoid_()  # NaN: neither side saw a key
    torch.logaddexp(lse, block_lse, out=lse)
    out.lerp_(block_out.float(), weight[..., None])
