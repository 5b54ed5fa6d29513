"""Block attention: softmax attention of some queries over some keys, and its gradients.

The contract every backend keeps, and the only one ring attention needs:

    forward    (q, k, v)                 -> (out, lse)   over these keys alone
    backward   (dout, out, lse global)   -> dq, dk, dv   of these keys' share

In the backward `out` and `lse` are those of the *whole* softmax, merged over all blocks, so
`exp(score - lse)` is the true probability and the shares of the blocks add up exactly. This file
holds the plain PyTorch backend, which walks the queries in tiles so that no score matrix over the
whole length is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_TILE = 512


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of q over k, v.

    Args:
        q: [B, Lq, Hq, D].
        k: [B, Lk, Hkv, D]; Hkv divides Hq (GQA, not materialised).
        v: [B, Lk, Hkv, Dv].
        scale: factor on the scores.
        causal: query i sees keys 0..i (then Lq == Lk); otherwise every key.

    Returns:
        out [B, Lq, Hq, Dv] fp32 and lse [B, Lq, Hq] fp32.
    """
    keys, values = _by_kv_head(k), _by_kv_head(v)
    outs, lses = [], []
    for rows, queries in _query_tiles(q, k.shape[2]):
        scores = _scores(queries, keys, rows, scale, causal)
        lse = scores.logsumexp(dim=-1)
        outs.append((scores - lse[..., None]).exp() @ values)
        lses.append(lse)
    return _by_token(torch.cat(outs, dim=3)), _by_token(torch.cat(lses, dim=3)[..., None])[..., 0]


def block_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's share of a merged attention.

    Args:
        dout: [B, Lq, Hq, Dv], gradient of the merged output.
        q, k, v: as in `block_attention`.
        out: [B, Lq, Hq, Dv], the merged output.
        lse: [B, Lq, Hq] fp32, the merged log-sum-exp.
        scale, causal: as in `block_attention`.

    Returns:
        dq, dk, dv in fp32, shaped as q, k, v.
    """
    keys, values = _by_kv_head(k), _by_kv_head(v)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    delta = (dout.float() * out.float()).sum(dim=-1, keepdim=True)
    dqs = []
    tiles = (_query_tiles(x, k.shape[2]) for x in (q, dout, lse[..., None], delta))
    for (rows, queries), (_, douts), (_, lses), (_, deltas) in zip(*tiles, strict=True):
        probabilities = (_scores(queries, keys, rows, scale, causal) - lses).exp()
        dv += (probabilities.mT @ douts).sum(dim=2, keepdim=True)
        dscores = probabilities * (douts @ values.mT - deltas) * scale
        dqs.append(dscores @ keys)
        dk += (dscores.mT @ queries).sum(dim=2, keepdim=True)
    return _by_token(torch.cat(dqs, dim=3)), _by_token(dk), _by_token(dv)


def _by_kv_head(x: Tensor) -> Tensor:
    """[B, L, Hkv, D] -> fp32 [B, Hkv, 1, L, D]."""
    return x.float().transpose(1, 2)[:, :, None]


def _by_token(x: Tensor) -> Tensor:
    """[B, Hkv, G, L, D] -> [B, L, Hkv * G, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def _query_tiles(x: Tensor, num_kv_heads: int) -> list[tuple[slice, Tensor]]:
    """Cut [B, L, Hq, D] into fp32 tiles [B, Hkv, G, tile, D], each with its rows."""
    grouped = x.float().transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    spans = [slice(a, a + QUERY_TILE) for a in range(0, x.shape[1], QUERY_TILE)]
    return [(rows, grouped[:, :, :, rows]) for rows in spans]


def _scores(queries: Tensor, keys: Tensor, rows: slice, scale: float, causal: bool) -> Tensor:
    scores = (queries @ keys.mT) * scale
    if not causal:
        return scores
    row = torch.arange(rows.start, rows.start + queries.shape[3], device=queries.device)
    column = torch.arange(keys.shape[3], device=queries.device)
    return scores.masked_fill(column[None, :] > row[:, None], float("-inf"))
