"""Block attention in plain PyTorch: any device, any dtype, any head dim, computed in fp32.

The queries go in tiles, so that no score matrix over the whole length is ever held, and each tile
meets only the keys that it can see: half of them under a causal mask, `window` and a tile's worth
under a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridsp.ops.softmax.contract import Backend, Packing, Varlen, check_block

QUERY_TILE = 512


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`BlockForward`; out and lse come in fp32."""
    check_block(q, k, causal, window)
    outs, lses = [], []
    with _in_fp32(q):
        keys, values = _by_kv_head(k), _by_kv_head(v)
        for rows, columns in _tiles(q.shape[1], k.shape[1], causal, window):
            queries = _by_query_group(q[:, rows], k.shape[2])
            scores = _scores(queries, keys[..., columns, :], rows, columns, scale, causal, window)
            lse = scores.logsumexp(dim=-1, keepdim=True)
            outs.append(_by_token((scores - lse).exp() @ values[..., columns, :]))
            lses.append(_by_token(lse)[..., 0])
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


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
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockBackward`; the gradients come in fp32."""
    check_block(q, k, causal, window)
    dqs = []
    with _in_fp32(q):
        keys, values = _by_kv_head(k), _by_kv_head(v)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, columns in _tiles(q.shape[1], k.shape[1], causal, window):
            queries, douts, outs, lses = (
                _by_query_group(x[:, rows], k.shape[2]) for x in (q, dout, out, lse[..., None])
            )
            seen = keys[..., columns, :]
            scores = _scores(queries, seen, rows, columns, scale, causal, window)
            probabilities = (scores - lses).exp()
            delta = (douts * outs).sum(dim=-1, keepdim=True)
            dprobabilities = douts @ values[..., columns, :].mT
            dscores = probabilities * (dprobabilities - delta) * scale
            dqs.append(_by_token(dscores @ seen))
            dk[..., columns, :] += (dscores.mT @ queries).sum(dim=2, keepdim=True)
            dv[..., columns, :] += (probabilities.mT @ douts).sum(dim=2, keepdim=True)
    return torch.cat(dqs, dim=1), _by_token(dk), _by_token(dv)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`VarlenForward`; out and lse come in fp32. One block after another: it has no GPU to fill."""
    check_block(q, k, causal, window, packing)
    results = [
        block_attention(
            q[:, rows], k[:, keys], v[:, keys], scale=scale, causal=causal, window=window
        )
        for rows, keys in packing.blocks()
    ]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`VarlenBackward`; the gradients come in fp32."""
    check_block(q, k, causal, window, packing)
    gradients = []
    for rows, keys in packing.blocks():
        tensors = dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, rows]
        gradients.append(
            block_attention_backward(*tensors, scale=scale, causal=causal, window=window)
        )
    dq, dk, dv = (torch.cat(parts, dim=1) for parts in zip(*gradients, strict=True))
    return dq, dk, dv


def _in_fp32(q: Tensor) -> torch.autocast:
    """Autocast would turn the matrix products back to bf16."""
    return torch.autocast(q.device.type, enabled=False)


def _by_kv_head(x: Tensor) -> Tensor:
    """[B, L, Hkv, D] -> fp32 [B, Hkv, 1, L, D]."""
    return x.float().transpose(1, 2)[:, :, None]


def _by_query_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, L, Hq, D] -> fp32 [B, Hkv, G, L, D]; query heads of one group share a KV head."""
    return x.float().transpose(1, 2).unflatten(1, (num_kv_heads, -1))


def _by_token(x: Tensor) -> Tensor:
    """[B, Hkv, G, L, D] -> [B, L, Hkv * G, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def _tiles(
    queries: int, keys: int, causal: bool, window: int | None
) -> Iterator[tuple[slice, slice]]:
    """Tiles of queries, each with the span of keys that some query of it sees."""
    for start in range(0, queries, QUERY_TILE):
        stop = min(start + QUERY_TILE, queries)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop if causal else keys)


def _scores(
    queries: Tensor,
    keys: Tensor,
    rows: slice,
    columns: slice,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Scaled scores of a tile, -inf where a query does not see a key."""
    scores = (queries @ keys.mT) * scale
    if not causal:
        return scores
    row = torch.arange(rows.start, rows.stop, device=queries.device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=queries.device)
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    return scores.masked_fill(hidden, float("-inf"))


BACKEND = Backend(
    name="plain",
    forward=block_attention,
    backward=block_attention_backward,
    why_not=lambda q, k, v, window: None,
)
VARLEN = Varlen(packed_attention, packed_attention_backward)
