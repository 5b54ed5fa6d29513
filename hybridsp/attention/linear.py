"""Linear attention over the mesh (ZeCO, arXiv:2507.01004, algorithms 1 and 3).

Each rank scans its own tokens as if zero entered it, and hands its end state and total decay to
All-Scan. The products inside the chunks need no other rank. The state that entered is added to the
states of the chunks, and one product reads them. (The scan is awaited before those products: they
do not overlap yet.)

The backward needs nothing of its own: autograd runs All-Scan's transpose, the reverse scan.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hybridsp.collectives import all_scan, left_halo
from hybridsp.collectives.all_scan import Algorithm
from hybridsp.mesh import SPMesh
from hybridsp.ops.conv import causal_conv, document_offsets
from hybridsp.ops.gla import (
    cut_chunks,
    enter_span,
    inter_chunk,
    intra_chunk,
    join_chunks,
    segment_ids,
    span_states,
)
from hybridsp.ops.interfaces import require_one_packed_row


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    mesh: SPMesh,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """Gated linear attention of a sequence cut over the mesh's SP ranks.

    Args:
        q, k: this rank's contiguous tokens [B, L, H, K]; L is the same on every rank.
        v: [B, L, H, V].
        g: log decay <= 0, [B, L, H, K], or [B, L, H, 1] for one decay per head.
        mesh: the grid of ranks.
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1); None for one
            document per row.
        scale: factor on q; None for K ** -0.5.
        algorithm: of All-Scan, see `collectives.all_scan`.

    Returns:
        [B, L, H, V] in v's dtype.

    Raises:
        ValueError: shapes, boundaries or options that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunks = cut_chunks(q, k, v, g, _segments(q, mesh, cu_seqlens))
    span = span_states(chunks)
    incoming = all_scan(span.end, span.decay, mesh.sp_group, algorithm=algorithm)
    within = intra_chunk(chunks)
    out = within + inter_chunk(chunks, enter_span(span, incoming))
    return join_chunks(chunks, out * scale).to(v.dtype)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mesh: SPMesh,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution of a sequence cut over the mesh's SP ranks.

    Args:
        x: this rank's contiguous tokens [B, L, D].
        weight: [D, W].
        bias: [D] or None.
        mesh: the grid of ranks.
        activation: None or "silu".
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1).

    Returns:
        [B, L, D] in x's dtype.

    Raises:
        ValueError: boundaries or options that do not fit.
    """
    offsets = None
    if cu_seqlens is not None:
        start, stop = _owned(x, mesh)
        require_one_packed_row(x, cu_seqlens, x.shape[1] * mesh.sp)
        offsets = _offsets_of(tuple(cu_seqlens.tolist()), start, stop, x.device)
    halo = left_halo(x, weight.shape[1] - 1, mesh.sp_group)
    return causal_conv(x, weight, bias, activation=activation, offsets=offsets, left_context=halo)


def _owned(x: Tensor, mesh: SPMesh) -> tuple[int, int]:
    start = mesh.sp_rank * x.shape[1]
    return start, start + x.shape[1]


def _segments(q: Tensor, mesh: SPMesh, cu_seqlens: Tensor | None) -> torch.Tensor | None:
    if cu_seqlens is None:
        return None
    require_one_packed_row(q, cu_seqlens, q.shape[1] * mesh.sp)
    return _segments_of(tuple(cu_seqlens.tolist()), *_owned(q, mesh), q.device)


# All layers of a model ask the same of a batch.
_offsets_of = lru_cache(maxsize=4)(document_offsets)
_segments_of = lru_cache(maxsize=4)(segment_ids)
