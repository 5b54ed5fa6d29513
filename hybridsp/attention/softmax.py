"""Softmax attention over the mesh: USP, Ulysses x ring (arXiv:2405.07719, algorithm 1).

One all-to-all over the SP group trades most heads for more tokens and puts those in an order that
gives every rank of the ring the same work; then K and V go around the ring, or to all of it at
once, while each rank computes attention of its queries over the keys it holds (`ring.py`); one
all-to-all goes back. In a layer that checkpointing computes twice, the part between the two
all-to-alls runs once (`keep.py`).
"""

from __future__ import annotations

from torch import Tensor

from hybridsp.attention.ring import RingAttention
from hybridsp.attention.ring_plan import VARIANTS, RingPlan, choose_variant
from hybridsp.collectives import heads_to_seq, seq_to_heads
from hybridsp.layout import relayout
from hybridsp.mesh import SPMesh
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.ops.softmax import choose_backend


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: SPMesh,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    variant: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of a sequence cut over the mesh's SP ranks.

    Args:
        q: this rank's contiguous tokens [B, L, Hq, D], positions already applied; L is the same
            on every rank.
        k: [B, L, Hkv, D]; Hkv divides Hq.
        v: [B, L, Hkv, Dv].
        mesh: the grid of ranks; `mesh.ulysses` may not exceed Hq.
        causal: a token does not see what comes after it.
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1); None for one
            document per row.
        scale: factor on the scores; None for D ** -0.5.
        window: a token sees itself and the window - 1 tokens before it; needs causal and a ring of
            one. None for all.
        variant: how K and V reach the other ranks of the ring: "ring", one neighbour at a time,
            "allgather", all at once, or "auto", see `ring_plan.choose_variant`.
        backend: of the blocks, see `ops.softmax`; None for the fastest that can.

    Returns:
        [B, L, Hq, Dv] in q's dtype.

    Raises:
        ValueError: shapes, heads, boundaries or options that do not fit, before anything is sent.
    """
    _check_shapes(q, k, v)
    _check_options(mesh, causal, window, variant)
    total = q.shape[1] * mesh.sp
    if window is not None and window >= total:
        window = None  # it hides nothing, and not every backend has windows
    packed = cu_seqlens is not None
    chosen = choose_backend(q, k, v, window=window, name=backend, lengths_vary=packed)
    bounds = [0, total]
    if cu_seqlens is not None:
        require_one_packed_row(q, cu_seqlens, total)
        bounds = cu_seqlens.tolist()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    route = relayout(total, mesh.ring, mesh.ulysses, q.shape[2], k.shape[2], tuple(bounds))
    q, k, v = seq_to_heads(q, k, v, route, mesh.sp_group)
    if variant == "auto":
        variant = choose_variant(
            route.layout,
            row_bytes=k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * q.element_size(),
            pair_flops=2 * q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]),
            causal=causal,
        )
    plan = RingPlan(
        group=mesh.ring_group,
        layout=route.layout,
        causal=causal,
        window=window,
        scale=scale,
        variant=variant,
        backend=chosen,
    )
    out = RingAttention.apply(q, k, v, plan)
    return heads_to_seq(out, route, mesh.sp_group)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: q is "
            "[B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv], and Hkv divides Hq"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: use one")


def _check_options(mesh: SPMesh, causal: bool, window: int | None, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant = {variant!r} is unknown; use one of {VARIANTS}")
    if window is None:
        return
    if window < 1 or not causal:
        raise ValueError(
            f"window = {window} with causal = {causal}: a window is at least 1, the token itself, "
            "and needs causal = True; None is no window"
        )
    if mesh.ring > 1:
        raise ValueError(
            f"window = {window} with ring = {mesh.ring}: windowed attention is not supported in a "
            f"ring; raise ulysses to {mesh.sp}, with ring = 1, or attend to everything (None)"
        )
