"""Softmax attention over the mesh: USP, Ulysses x ring (arXiv:2405.07719, algorithm 1).

One all-to-all over the SP group trades most heads for more tokens and puts those in an order that
gives every rank of the ring the same work; then K and V go around the ring, or to all of it at
once, while each rank computes attention of its queries over the keys it holds (`ring.py`); one
all-to-all goes back. In a layer that checkpointing computes twice, the part between the two
all-to-alls runs once (`keep.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple
from zlib import crc32

from torch import Tensor

from hybridsp.attention.ring import RingAttention
from hybridsp.attention.ring_choice import choose_variant
from hybridsp.attention.ring_plan import VARIANTS, RingPlan
from hybridsp.attention.ring_transport import transport_of
from hybridsp.collectives import heads_to_seq, seq_to_heads
from hybridsp.collectives.agreement import admit
from hybridsp.collectives.ring_links import ring_links, ring_ranks_per_host
from hybridsp.collectives.topology import hosts_of
from hybridsp.layout import Relayout, relayout
from hybridsp.mesh import SPMesh
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.ops.softmax import Backend, choose_backend


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
    ranks_per_host: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of a sequence cut over the mesh's SP ranks.

    The first call of a kind (shapes, L among them, dtypes, options) on a group compares it, and its
    documents, between the ranks and waits for them; later ones do not.

    Args:
        q: this rank's contiguous tokens [B, L, Hq, D], positions already applied; L is the same
            on every rank.
        k: [B, L, Hkv, D]; Hkv divides Hq.
        v: [B, L, Hkv, Dv].
        mesh: the grid of ranks; `mesh.ulysses` may not exceed Hq.
        causal: a token does not see what comes after it.
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1); None for one
            document per row. Keep it on the CPU, as `shard_batch` does: the host reads it in every
            layer and forward, and on CUDA waits for the GPU each time.
        scale: factor on the scores; None for D ** -0.5.
        window: a token sees itself and the window - 1 tokens before it; needs causal and a ring of
            one. None for all.
        variant: how K and V reach the other ranks of the ring: "ring", one neighbour at a time,
            "double_ring", so inside each host while they also travel from host to host,
            "allgather", all at once, or "auto", see `ring_choice.choose_variant`.
        ranks_per_host: consecutive ranks of the ring that a double ring takes for a host, a proper
            divisor of `mesh.ring`; None for what the hosts have.
        backend: of the blocks, see `ops.softmax`; None for the fastest that can.

    Returns:
        [B, L, Hq, Dv] in q's dtype.

    Raises:
        ValueError: tensors, heads, boundaries or options that do not fit. In the first call of a
            kind, also where they differ between the ranks: then every rank raises, before anything
            is sent. In later calls a refusal (of boundaries) is raised on its rank alone, and the
            others wait for the group's timeout and fail there.
    """
    call = _Call(q, k, v, causal, scale, window, variant, ranks_per_host, backend)
    route, chosen = _admit(call, mesh, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = seq_to_heads(q, k, v, route, mesh.sp_group)
    if variant == "auto":
        variant = choose_variant(
            route.layout,
            row_bytes=k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * q.element_size(),
            pair_flops=2 * q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]),
            causal=causal,
            links=ring_links(mesh),
        )
    if variant == "double_ring" and ranks_per_host is None:
        ranks_per_host = _found_ranks_per_host(mesh)
    plan = RingPlan(
        rank=mesh.ring_group.rank(),
        layout=route.layout,
        causal=causal,
        window=_reach(window, route.total),
        scale=scale,
        variant=variant,
        backend=chosen,
        ranks_per_host=ranks_per_host,
    )
    out = RingAttention.apply(q, k, v, plan, transport_of(plan, mesh))
    return heads_to_seq(out, route, mesh.sp_group)


class _Call(NamedTuple):
    """The arguments of a call, but for the mesh and the documents."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float | None
    window: int | None
    variant: str
    ranks_per_host: int | None
    backend: str | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]

    def kind(self, packed: bool) -> Hashable:
        """What must be the same on every rank, or the ranks' messages would not match.

        These are made of tokens, so L is part of it. But a kind is the group's, not a layer's: of a
        batch of a new length the first layer alone asks the other ranks.
        """
        tensors = [(x.shape, x.dtype) for x in self.tensors]
        return "softmax_attention", *tensors, self[3:], packed, self.q.device.type

    def words(self, packed: bool) -> str:
        """The kind, for people."""
        tensors = ", ".join(
            f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            for name, x in zip("qkv", self.tensors, strict=True)
        )
        return (
            f"softmax_attention({tensors}, cu_seqlens {'given' if packed else 'None'}, "
            f"causal={self.causal}, scale={self.scale}, window={self.window}, "
            f"variant={self.variant!r}, ranks_per_host={self.ranks_per_host}, "
            f"backend={self.backend!r}) on {self.q.device.type}"
        )


def _admit(call: _Call, mesh: SPMesh, cu_seqlens: Tensor | None) -> tuple[Relayout, Backend]:
    """Who computes what, and by which backend, in a call against which nothing speaks.

    On any rank if its kind is new; then the boundaries too are compared between the ranks.
    """
    packed = cu_seqlens is not None

    def look() -> tuple[Relayout, Backend]:
        route = _route(call, mesh, cu_seqlens)
        # One document is a length like any other; those of several will not come again.
        return route, _backend(call, route, mesh, lengths_vary=len(route.layout.bounds) > 2)

    def words(found: tuple[Relayout, Backend]) -> str:
        route, chosen = found
        # Who computes other heads than the rest may need another kernel for them.
        alike = len({(len(share.q), len(share.kv)) for share in route.shares}) == 1
        by = f", by backend {chosen.name!r}" if alike else ""
        return f"{call.words(packed)}, documents {_shown(route.layout.bounds)}{by}"

    found = admit(mesh.sp_group, call.kind(packed), look, words, name="softmax_attention")
    if call.variant == "double_ring" and call.ranks_per_host is None:
        _found_ranks_per_host(mesh)  # refuses on every rank alike, before anything is sent
    return found


def _route(call: _Call, mesh: SPMesh, cu_seqlens: Tensor | None) -> Relayout:
    _check_tensors(call)
    _check_options(call, mesh)
    total = call.q.shape[1] * mesh.sp
    bounds = [0, total]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.cpu()
        require_one_packed_row(call.q, cu_seqlens, total)
        bounds = cu_seqlens.tolist()
    heads = call.q.shape[2], call.k.shape[2]
    return relayout(total, mesh.ring, mesh.ulysses, *heads, tuple(bounds))


def _backend(call: _Call, route: Relayout, mesh: SPMesh, *, lengths_vary: bool) -> Backend:
    """Chosen for the heads that this rank computes; their grouping may differ from the call's."""
    q, k, v = call.tensors
    if mesh.ulysses > 1:
        share = route.share(mesh.sp_rank)
        q, k, v = (
            x[:, :, :1].expand(-1, -1, len(heads), -1)  # only shapes matter
            for x, heads in zip((q, k, v), (share.q, share.kv, share.kv), strict=True)
        )
    window = _reach(call.window, route.total)
    return choose_backend(q, k, v, window=window, name=call.backend, lengths_vary=lengths_vary)


def _found_ranks_per_host(mesh: SPMesh) -> int:
    """Of a double ring on the hosts that there are. Collective where it has not been asked before.

    Raises:
        ValueError: the ring's ranks lie on their hosts in a way that makes no double ring.
    """
    count = ring_ranks_per_host(hosts_of(mesh.sp_group), mesh.ulysses)
    reason = {
        None: "hosts do not hold equally many consecutive ranks of every ring",
        1: "every rank of a ring is alone on its host",
        mesh.ring: "every ring lies on one host",
    }.get(count)
    if count is None or reason is not None:
        raise ValueError(
            f"variant = 'double_ring' with ring = {mesh.ring}: {reason}; use 'ring', or 'auto', "
            "or say with ranks_per_host what shall count as a host"
        )
    return count


def _reach(window: int | None, total: int) -> int | None:
    """The window, or None if it hides nothing: not every backend has windows."""
    return None if window is None or window >= total else window


def _shown(bounds: tuple[int, ...]) -> str:
    """Few boundaries as they are; of many their number and what differs if any of them does."""
    if len(bounds) <= 8:
        return str(list(bounds))
    checksum = crc32(" ".join(map(str, bounds)).encode())
    return f"{len(bounds) - 1} (checksum {checksum:08x})"


def _check_tensors(call: _Call) -> None:
    q, k, v = call.tensors
    fits = q.dim() == k.dim() == v.dim() == 4 and all(x.numel() for x in (q, k, v))
    fits = fits and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: q is "
            "[B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv], none of them 0, and Hkv divides Hq"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: use one")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: move them to one")


def _check_options(call: _Call, mesh: SPMesh) -> None:
    window, count = call.window, call.ranks_per_host
    if call.variant not in VARIANTS:
        raise ValueError(f"variant = {call.variant!r} is unknown; use one of {VARIANTS}")
    if count is not None and call.variant != "double_ring":
        raise ValueError(
            f"ranks_per_host = {count} with variant = {call.variant!r}: only a double ring asks "
            "for it; use variant = 'double_ring', or None"
        )
    if count is not None and (not 1 < count < mesh.ring or mesh.ring % count):
        raise ValueError(
            f"ranks_per_host = {count} with ring = {mesh.ring}: a double ring is made of equal "
            "rings of 2 ranks or more, and of 2 or more of them; use a divisor between 1 and ring, "
            "or variant = 'ring'"
        )
    if window is None:
        return
    if window < 1 or not call.causal:
        raise ValueError(
            f"window = {window} with causal = {call.causal}: a window is at least 1, the token "
            "itself, and needs causal = True; None is no window"
        )
    if mesh.ring > 1:
        raise ValueError(
            f"window = {window} with ring = {mesh.ring}: windowed attention is not supported in a "
            f"ring; raise ulysses to {mesh.sp}, with ring = 1, or attend to everything (None)"
        )
