"""Naive fp32 oracles: the definitions, one token at a time, that every op is tested against.

They are written for reading, not for speed, and share no code with what they check. Packed
documents are given as `cu_seqlens`, a list of boundaries rising from 0 to L.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def naive_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int] | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Recurrent gated linear attention (GLA, arXiv:2312.06635, eq. 3).

        S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    Args:
        q, k: [B, L, H, K].
        v: [B, L, H, V].
        g: log decay, [B, L, H, K] or [B, L, H, 1].
        scale: factor on q.
        cu_seqlens: document boundaries; the state is zero at each start but one at 0.
        initial_state: [B, H, K, V], the state before token 0 (continues the first document).

    Returns:
        o [B, L, H, V] and the state after the last token [B, H, K, V], both fp32 (or fp64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (x.to(wide) for x in (q, k, v, g))
    batch, length, heads, key_dim = q.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1])
    if initial_state is not None:
        state = state + initial_state.to(wide)
    starts = set(cu_seqlens[1:-1]) if cu_seqlens is not None else set()
    outputs = []
    for t in range(length):
        if t in starts:
            state = torch.zeros_like(state)
        state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = True,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Softmax attention over explicit scores; documents do not see each other.

    Args:
        q: [B, L, Hq, D].
        k: [B, L, Hkv, D], Hkv divides Hq.
        v: [B, L, Hkv, Dv].
        scale: factor on the scores.
        causal: a token sees itself and what came before.
        cu_seqlens: document boundaries.

    Returns:
        [B, L, Hq, Dv] in fp32 (or fp64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    position = torch.arange(length)
    hidden = torch.zeros(length, length, dtype=torch.bool)
    if causal:
        hidden |= position[None, :] > position[:, None]
    if cu_seqlens is not None:
        document = torch.bucketize(position, torch.tensor(list(cu_seqlens[1:])), right=True)
        hidden |= document[None, :] != document[:, None]
    scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)


def naive_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Depthwise causal convolution, tap by tap: y_t = sum_w weight[:, W-1-w] * x_{t-w}.

    Args:
        x: [B, L, D].
        weight: [D, W]; the last tap multiplies the token itself.
        bias: [D].
        activation: None or "silu".
        cu_seqlens: document boundaries; taps do not reach past a document's start.

    Returns:
        [B, L, D] in x's dtype.
    """
    length, width = x.shape[1], weight.shape[1]
    bounds = list(cu_seqlens) if cu_seqlens is not None else [0, length]
    rows = []
    for start, stop in pairwise(bounds):
        for t in range(start, stop):
            row = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
            for w in range(min(width, t - start + 1)):
                row = row + weight[:, width - 1 - w] * x[:, t - w]
            rows.append(row)
    y = torch.stack(rows, dim=1)
    return torch.nn.functional.silu(y) if activation == "silu" else y
