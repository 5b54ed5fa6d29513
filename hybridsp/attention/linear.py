"""Linear attention over the mesh: ZeCO (arXiv:2507.01004, algorithms 1 and 3) and its alternatives.

Each rank works out what its own tokens do to the recurrent state, as if zero entered it; a scan
over the ranks turns that into the state that does enter, and while it is in flight the ranks do
what needs no other rank. The backward is the same from the other end, with the gradient of the
state. Which state crosses how, and what is done meanwhile, is the method:

    method      what crosses the ranks                               in flight during
    zeco        All-Scan of the state, by `algorithm`                the products inside chunks
    lasp1       the whole state, rank by rank (arXiv:2404.02882)     the products inside chunks
    lasp2       every rank's state, to all (arXiv:2502.07563)        the products inside chunks
    allgather   every rank's state, to all                           nothing (FLA's parallelism)
    ulysses     tokens for heads, and back (arXiv:2309.14509)        nothing

All give the same answer. The bytes a rank sends do not grow with the tokens but under ulysses, nor
with the ranks but under lasp2 and allgather. What the backward keeps is q, k, v, g and the one
state that entered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridsp.collectives import ALGORITHMS, left_halo, start_all_scan
from hybridsp.collectives.agreement import admit
from hybridsp.collectives.all_scan import Algorithm
from hybridsp.collectives.head_exchange import heads_to_tokens, tokens_to_heads
from hybridsp.mesh import SPMesh
from hybridsp.ops.conv import causal_conv, document_offsets
from hybridsp.ops.gla import (
    Backend,
    Tokens,
    check_tokens,
    choose_backend,
    gated_linear_attention,
    segment_ids,
    without_autocast,
)
from hybridsp.ops.interfaces import require_one_packed_row


@dataclass(frozen=True)
class StateScan:
    """How the state crosses the ranks: All-Scan's algorithm and blocks, and when it is awaited."""

    algorithm: Algorithm
    num_blocks: int | None = None
    overlaps: bool = True


_SCANS: dict[str, StateScan] = {
    "lasp1": StateScan("chain", num_blocks=1),
    "lasp2": StateScan("allgather"),
    "allgather": StateScan("allgather", overlaps=False),
}

Method = Literal["zeco", "lasp1", "lasp2", "allgather", "ulysses"]
METHODS: tuple[str, ...] = get_args(Method)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    mesh: SPMesh,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    method: Method = "zeco",
    algorithm: Algorithm = "auto",
    backend: str | None = None,
) -> Tensor:
    """Gated linear attention of a sequence cut over the mesh's SP ranks.

    The first call of a kind (shapes, under "ulysses" L among them, dtypes, scale, options) on a
    group compares it between the ranks and waits for them; later ones do not.

    Args:
        q, k: this rank's contiguous tokens [B, L, H, K]; L is the same on every rank.
        v: [B, L, H, V].
        g: log decay <= 0, [B, L, H, K], or [B, L, H, 1] for one decay per head.
        mesh: the grid of ranks.
        cu_seqlens: int32 boundaries of the whole packed sequence (then B == 1); None for one
            document per row. Keep it on the CPU, as `shard_batch` does: the host reads it in every
            layer and forward, and on CUDA waits for the GPU each time.
        scale: factor on q; None for K ** -0.5.
        method: one of METHODS.
        algorithm: of the All-Scan under "zeco", see `collectives.all_scan`.
        backend: "plain", "triton", or None for the fastest that can, see `ops.gla`.

    Returns:
        [B, L, H, V] in v's dtype.

    Raises:
        ValueError: tensors, boundaries or options that do not fit. In the first call of a kind,
            also where they differ between the ranks: then every rank raises, before anything is
            sent. In later calls a refusal (of boundaries, of g) is raised on its rank alone, and
            the others wait for the group's timeout and fail there.
    """
    call = _Call(q, k, v, g, scale, method, algorithm, backend)
    tokens, chosen = _admit(call, mesh, cu_seqlens)
    scale = tokens.scale
    if method == "ulysses":
        return _by_heads(tokens, mesh, cu_seqlens, chosen)
    segments = _segments(q, cu_seqlens, *_owned(q, mesh))
    if mesh.sp == 1:
        return gated_linear_attention(
            q, k, v, g, scale=scale, segments=segments, backend=chosen.name
        )[0]
    scan = _SCANS.get(method) or StateScan(algorithm)
    return LinearAttention.apply(q, k, v, g, scale, segments, mesh.sp_group, scan, chosen)


class LinearAttention(torch.autograd.Function):
    """Linear attention of a span whose state comes from the left and goes on to the right.

    forward   q, k [B, L, H, K], v [B, L, H, V], g [B, L, H, K or 1] -> o [B, L, H, V]
              scan of (end state, decay)         saves its inputs and the state that entered
    backward  do -> dq, dk, dv, dg
              reverse scan of (gradient of the state that entered, decay)
    """

    @staticmethod
    def forward(ctx, q, k, v, g, scale, segments, group, scan, backend):  # noqa: D102
        tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=segments)
        with without_autocast(tokens):
            forward = backend.forward(tokens)
            incoming = _scan_beside(forward.end_state(), forward.intra_chunk, group, scan)
            out = forward.output(incoming)
        ctx.save_for_backward(q, k, v, g, incoming)
        ctx.options = scale, segments, group, scan, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: D102
        q, k, v, g, incoming = ctx.saved_tensors
        scale, segments, group, scan, backend = ctx.options
        tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=segments)
        with without_autocast(tokens):
            backward = backend.backward(tokens, dout, incoming)
            start = backward.start_gradient()
            outgoing = _scan_beside(start, backward.intra_chunk, group, scan, reverse=True)
            grads = backward.gradients(outgoing)
        return *grads, None, None, None, None, None


def _scan_beside(
    state_and_decay: tuple[Tensor, Tensor],
    work: Callable[[], None],
    group: dist.ProcessGroup,
    scan: StateScan,
    reverse: bool = False,
) -> Tensor:
    """Do `work` while the state crosses the ranks (or after, if the method does not overlap)."""
    pending = start_all_scan(
        *state_and_decay,
        group,
        reverse=reverse,
        algorithm=scan.algorithm,
        num_blocks=scan.num_blocks,
    )
    if scan.overlaps:
        work()
        return pending.wait()
    crossed = pending.wait()
    work()
    return crossed


def _by_heads(tokens: Tokens, mesh: SPMesh, cu_seqlens: Tensor | None, backend: Backend) -> Tensor:
    """Ulysses: this rank's share of the heads over the whole sequence."""
    shared = (tokens.q, tokens.k, tokens.v, tokens.g)
    q, k, v, g = tokens_to_heads(*shared, group=mesh.sp_group)
    segments = _segments(q, cu_seqlens, 0, q.shape[1])
    out, _ = gated_linear_attention(
        q, k, v, g, scale=tokens.scale, segments=segments, backend=backend.name
    )
    return heads_to_tokens(out, num_heads=tokens.q.shape[2], group=mesh.sp_group)


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
        ValueError: boundaries or options that do not fit; on this rank alone, so that where they
            fit on another it waits for this one.
    """
    offsets = None
    if cu_seqlens is not None:
        start, stop = _owned(x, mesh)
        require_one_packed_row(x, cu_seqlens, x.shape[1] * mesh.sp)
        offsets = _offsets_of(tuple(cu_seqlens.tolist()), start, stop, x.device)
    halo = left_halo(x, weight.shape[1] - 1, mesh.sp_group)
    return causal_conv(x, weight, bias, activation=activation, offsets=offsets, left_context=halo)


class _Call(NamedTuple):
    """The arguments of a call, but for the mesh and the documents."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    scale: float | None
    method: str
    algorithm: str
    backend: str | None

    def kind(self, packed: bool) -> Hashable:
        """What must be the same on every rank, or the ranks' messages would not match.

        L is here only under ulysses, whose messages are made of tokens. A state is as large
        whatever L is, so under the other methods a new length is no new kind. And a kind is the
        group's, not a layer's: of a batch of a new length under ulysses the first layer alone asks
        the other ranks. (Lengths that were all agreed on before and now differ between ranks are
        not noticed.)
        """
        tensors = [(x.shape, x.dtype) for x in self[:4]]
        if self.method != "ulysses":
            tensors = [(shape[:1] + shape[2:], dtype) for shape, dtype in tensors]
        return "linear_attention", *tensors, self[4:], packed, self.q.device.type

    def words(self, packed: bool, found: Tokens, backend: Backend) -> str:
        """The kind, for people, and what was found for the options that were left open."""

        def shown(x: Tensor) -> str:
            sizes = [str(size) for size in x.shape]
            if self.method != "ulysses":
                sizes[1:2] = ["L"]
            return f"({', '.join(sizes)}) {str(x.dtype).removeprefix('torch.')}"

        tensors = ", ".join(f"{name} {shown(getattr(self, name))}" for name in "qkvg")
        return (
            f"linear_attention({tensors}, cu_seqlens {'given' if packed else 'None'}, "
            f"scale={found.scale}, method={self.method!r}, algorithm={self.algorithm!r}) "
            f"on {self.q.device.type} by backend {backend.name!r}"
        )


def _admit(call: _Call, mesh: SPMesh, cu_seqlens: Tensor | None) -> tuple[Tokens, Backend]:
    """The tokens and backend of a call against which nothing speaks, on any rank if it is new."""
    packed = cu_seqlens is not None

    def look() -> tuple[Tokens, Backend]:
        q, k, v, g = call[:4]
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        tokens = Tokens(q=q, k=k, v=v, g=g, scale=scale, segments=None)
        check_tokens(tokens)
        _check_method(call.method, call.algorithm, q.shape[2], mesh.sp)
        chosen = choose_backend(tokens, call.backend)
        if cu_seqlens is not None:
            require_one_packed_row(q, cu_seqlens, q.shape[1] * mesh.sp)
        return tokens, chosen

    def words(found: tuple[Tokens, Backend]) -> str:
        return call.words(packed, *found)

    return admit(mesh.sp_group, call.kind(packed), look, words, name="linear_attention")


def _check_method(method: str, algorithm: str, num_heads: int, ranks: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; use one of {METHODS}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm = {algorithm!r} is unknown; use one of {ALGORITHMS}")
    if method != "zeco" and algorithm != "auto":
        raise ValueError(
            f"algorithm = {algorithm!r} has no effect under method = {method!r}, which fixes how "
            "the state crosses the ranks; leave it 'auto', or use method = 'zeco'"
        )
    if method == "ulysses" and num_heads < ranks:
        raise ValueError(
            f"method = 'ulysses' cannot cut H = {num_heads} heads over P = {ranks} ranks; use "
            f"method = 'zeco', which heads do not limit, or at most {num_heads} ranks per sequence"
        )


def _owned(x: Tensor, mesh: SPMesh) -> tuple[int, int]:
    start = mesh.sp_rank * x.shape[1]
    return start, start + x.shape[1]


def _segments(x: Tensor, cu_seqlens: Tensor | None, start: int, stop: int) -> Tensor | None:
    if cu_seqlens is None:
        return None
    return _segments_of(tuple(cu_seqlens.tolist()), start, stop, x.device)


# All layers of a model ask the same of a batch.
_offsets_of = lru_cache(maxsize=4)(document_offsets)
_segments_of = lru_cache(maxsize=4)(segment_ids)
