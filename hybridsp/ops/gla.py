"""Chunked gated linear attention (GLA) on one device.

GLA keeps a state S [K, V] per head: each token decays it and adds an outer product,

    S_t = diag(a_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t        a_t = exp(g_t).

A chunk of C tokens does this in matrix products (GLA, arXiv:2312.06635, section 4). With b_i the
running sum of g inside the chunk,

    intra   o_i = sum_{j <= i} (q_i . k_j exp(b_i - b_j)) v_j            tokens of the chunk
    inter   o_i = (q_i exp(b_i)) S_in                                    what came before it
    S_out = diag(exp(b_C)) S_in + sum_j (k_j exp(b_C - b_j))^T v_j

The pieces are separate functions because sequence parallelism needs them apart: `span_states`
first (its end state and total decay go to the neighbour, see `collectives.all_scan`), then
`intra_chunk`, which needs nothing from other ranks, while the scan is in flight, then
`inter_chunk`, where the state that enters the rank is added to the states of the chunks.

exp(b_i - b_j) splits into exp(b_i) * exp(-b_j), and the sum over channels becomes one matrix
product, as long as exp(-b_j) stays well inside fp32; where a chunk decays more than that, it is
formed from the difference, so no decay is too strong. Documents packed in one row are told apart
by `segments` (`segment_ids`): masks cut every product that would cross a document's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Where a vector decay is too strong to split, a chunk needs a [C, C, K] tensor: keep it small.
CHUNK_VECTOR_DECAY = 16
CHUNK_SCALAR_DECAY = 64
# exp(-b_j) up to e^40 leaves fp32 (e^88) room for the products and sums behind it.
LARGEST_EXPONENT = 40.0


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A span of tokens cut into N chunks of C; tensors are fp32, padding tokens are zero.

    q, k [B, H, N, C, K]; v [B, H, N, C, V]; b [B, H, N, C, K or 1] the running sum of log decays
    inside each chunk, in fp64, because a weak decay behind a strong one is a small difference of
    large sums. The masks are 1.0 where something passes: `pairs` [N, C, C] from token j to
    token i, `enters` [N, C] from the chunk's incoming state to token i, `leaves` [N, C] from token
    j to the chunk's outgoing state, `through` [N] from incoming to outgoing state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    pairs: Tensor
    enters: Tensor
    leaves: Tensor
    through: Tensor
    length: int


@dataclass(frozen=True, kw_only=True)
class SpanStates:
    """What a span of tokens does to the recurrent state, computed as if zero entered it.

    entering [B, H, N, K, V]: the state before each chunk. decay_to [B, H, N, K or 1]: what is
    left, at the start of each chunk, of a state that enters the span. end [B, H, K, V] and decay
    [B, H, K or 1]: the same for the end of the span; these two are what All-Scan passes on.
    """

    entering: Tensor
    decay_to: Tensor
    end: Tensor
    decay: Tensor


def segment_ids(
    bounds: Sequence[int], start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """Number the documents of a span of the packed sequence.

    Id 0 is the document that continues from before the span, the only one that a state entering
    the span belongs to; where a document starts at the span's first token, ids begin with 1.

    Args:
        bounds: document boundaries of the whole packed sequence, rising from 0.
        start, stop: the span of tokens asked for.
        device: where the result lives.

    Returns:
        int64 [stop - start], non-decreasing.
    """
    # The sequence's own start is no cut: an initial state continues the first document.
    starts = torch.tensor([b for b in bounds[1:-1] if start <= b < stop], dtype=torch.int64)
    return torch.bucketize(torch.arange(start, stop), starts, right=True).to(device)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    segments: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention of a whole sequence on one device.

    Args:
        q, k: [B, L, H, K].
        v: [B, L, H, V].
        g: log decay <= 0, [B, L, H, K], or [B, L, H, 1] for one decay per head.
        scale: factor on q.
        segments: int [L] from `segment_ids`; None for one document.
        initial_state: [B, H, K, V], the state before the first token.

    Returns:
        o [B, L, H, V] in v's dtype and the state after the last token [B, H, K, V] fp32.
    """
    chunks = cut_chunks(q, k, v, g, segments)
    span = span_states(chunks)
    entering, end = span.entering, span.end
    if initial_state is not None:
        entering = enter_span(span, initial_state)
        end = span.decay[..., None] * initial_state.float() + end
    out = intra_chunk(chunks) + inter_chunk(chunks, entering)
    return join_chunks(chunks, out * scale).to(v.dtype), end


def cut_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, segments: Tensor | None) -> Chunks:
    """Cut [B, L, H, *] tensors into chunks and build the masks; see `Chunks`."""
    _check_shapes(q, k, v, g)
    length, size = q.shape[1], CHUNK_SCALAR_DECAY if g.shape[-1] == 1 else CHUNK_VECTOR_DECAY
    size = min(size, length)
    pad = -length % size
    if segments is None:
        segments = torch.zeros(length, dtype=torch.int64, device=q.device)
    # Padding continues the last document with k = 0 and no decay: it changes no state.
    segments = torch.cat([segments, segments[-1:].expand(pad)]).unflatten(0, (-1, size))

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x.float(), (0, 0, 0, 0, 0, pad))
        return x.transpose(1, 2).unflatten(2, (-1, size))

    last = segments[:, -1]
    before = torch.cat([last.new_zeros(1), last[:-1]])
    causal = torch.ones(size, size, device=q.device).tril()
    return Chunks(
        q=cut(q),
        k=cut(k),
        v=cut(v),
        b=cut(g).cumsum(dim=3, dtype=torch.float64),
        pairs=causal * (segments[:, :, None] == segments[:, None, :]),
        enters=(segments == before[:, None]).float(),
        leaves=(segments == last[:, None]).float(),
        through=(last == before).float(),
        length=length,
    )


def span_states(chunks: Chunks) -> SpanStates:
    """The recurrence over chunks, from zero; see `SpanStates`."""
    b_end = chunks.b[:, :, :, -1]
    to_end = (b_end[:, :, :, None] - chunks.b).float().exp() * chunks.leaves[..., None]
    added = (chunks.k * to_end).mT @ chunks.v
    kept = b_end.float().exp() * chunks.through[:, None]
    state, decay = torch.zeros_like(added[:, :, 0]), torch.ones_like(kept[:, :, 0])
    entering, decay_to = [], []
    # unbind, not indexing: the gradient of an index is a zero tensor of the whole size, per chunk.
    for kept_n, added_n in zip(kept.unbind(dim=2), added.unbind(dim=2), strict=True):
        entering.append(state)
        decay_to.append(decay)
        state = kept_n[..., None] * state + added_n
        decay = kept_n * decay
    return SpanStates(
        entering=torch.stack(entering, dim=2),
        decay_to=torch.stack(decay_to, dim=2),
        end=state,
        decay=decay,
    )


def enter_span(span: SpanStates, state: Tensor) -> Tensor:
    """The state before each chunk [B, H, N, K, V] once `state` [B, H, K, V] enters the span."""
    return span.entering + span.decay_to[..., None] * state.float()[:, :, None]


def intra_chunk(chunks: Chunks) -> Tensor:
    """What each token reads from its own chunk, unscaled [B, H, N, C, V]."""
    q, k, b, hidden = chunks.q, chunks.k, chunks.b, chunks.pairs == 0
    if b.shape[-1] == 1:
        decay = (b - b.mT).float().masked_fill(hidden, float("-inf")).exp()
        scores = (q @ k.mT) * decay
    elif b.min() > -LARGEST_EXPONENT:
        b = b.float()
        scores = ((q * b.exp()) @ (k * (-b).exp()).mT) * chunks.pairs
    else:
        difference = (b[:, :, :, :, None] - b[:, :, :, None]).float()
        decay = difference.masked_fill(hidden[..., None], float("-inf")).exp()
        scores = (q[:, :, :, :, None] * decay * k[:, :, :, None]).sum(dim=-1)
    return scores @ chunks.v


def inter_chunk(chunks: Chunks, entering: Tensor) -> Tensor:
    """What each token reads from the state before its chunk, unscaled [B, H, N, C, V]."""
    return (chunks.q * chunks.b.float().exp() * chunks.enters[..., None]) @ entering


def join_chunks(chunks: Chunks, x: Tensor) -> Tensor:
    """[B, H, N, C, V] -> [B, L, H, V], padding dropped."""
    return x.flatten(2, 3)[:, :, : chunks.length].transpose(1, 2)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    if q.shape != k.shape or q.shape[:3] != v.shape[:3] or q.shape[:3] != g.shape[:3]:
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g "
            f"{tuple(g.shape)} do not fit: q and k are [B, L, H, K], v [B, L, H, V], and g "
            "[B, L, H, K] or [B, L, H, 1]; clone KV heads to H before the call"
        )
    if g.shape[-1] not in (1, q.shape[-1]):
        raise ValueError(
            f"g has {g.shape[-1]} decays per head; give one per key channel ({q.shape[-1]}) or one"
        )
    if q.shape[1] == 0:
        raise ValueError("the sequence is empty: L = 0; give every rank at least one token")
