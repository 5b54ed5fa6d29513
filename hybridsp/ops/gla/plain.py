"""Chunked gated linear attention (GLA) in plain PyTorch, on any device.

GLA keeps a state S [K, V] per head: each token decays it and adds an outer product,

    S_t = diag(a_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t        a_t = exp(g_t).

A chunk of C tokens does this in matrix products (GLA, arXiv:2312.06635, section 4). With b_i the
running sum of g inside the chunk,

    intra   o_i = sum_{j <= i} (q_i . k_j exp(b_i - b_j)) v_j            tokens of the chunk
    inter   o_i = (q_i exp(b_i)) S_in                                    what came before it
    S_out = diag(exp(b_C)) S_in + sum_j (k_j exp(b_C - b_j))^T v_j

`PlainForward` and `PlainBackward` put these pieces in the stages of `contract`. The gradient of the
state that enters is written out, because it travels before any other gradient is asked for; the
others are autograd's, of the same pieces recomputed.

exp(b_i - b_j) splits into exp(b_i) * exp(-b_j), and the sum over channels becomes one matrix
product, as long as exp(-b_j) stays well inside fp32; where a chunk decays more than that, it is
formed from the difference, so no decay is too strong. Documents packed in one row are told apart
by `segments` (`segment_ids`): masks cut every product that would cross a document's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.ops.gla.contract import Backend, Tokens

# Where a vector decay is too strong to split, a chunk needs a [C, C, K] tensor: keep it small.
CHUNK_VECTOR_DECAY = 16
CHUNK_SCALAR_DECAY = 64
# exp(-b_j) up to e^40 leaves fp32 (e^88) room for the products and sums behind it.
LARGEST_EXPONENT = 40.0


class PlainForward:
    """`contract.ForwardPass` in PyTorch."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._chunks = cut_chunks(tokens)

    def end_state(self) -> tuple[Tensor, Tensor]:
        """See the contract."""
        self._span = span_states(self._chunks)
        return self._span.end, self._span.decay

    def intra_chunk(self) -> None:
        """See the contract."""
        self._within = intra_chunk(self._chunks)

    def output(self, incoming: Tensor | None) -> Tensor:
        """See the contract."""
        between = inter_chunk(self._chunks, enter_span(self._span, incoming))
        out = _join((self._within + between) * self._tokens.scale, self._tokens.q.shape[1])
        return out.to(self._tokens.v.dtype)


class PlainBackward:
    """`contract.BackwardPass` in PyTorch.

    Gradients are taken with respect to the chunks, which are fp32 (b: fp64), and rounded once.
    """

    def __init__(self, tokens: Tokens, dout: Tensor, incoming: Tensor | None) -> None:
        self._tokens, self._incoming = tokens, incoming
        chunks = cut_chunks(tokens)
        self._leaves = [
            x.detach().requires_grad_() for x in (chunks.q, chunks.k, chunks.v, chunks.b)
        ]
        self._chunks = replace(chunks, **dict(zip("qkvb", self._leaves, strict=True)))
        self._dout = _cut(dout, chunks.q.shape[3]) * tokens.scale

    def start_gradient(self) -> tuple[Tensor, Tensor]:
        """See the contract."""
        with torch.no_grad():
            decays = chunk_decays(self._chunks)
            of_chunks = read_by(self._chunks).mT @ self._dout
            return (decays.to_chunk[..., None] * of_chunks).sum(dim=2), decays.of_span

    def intra_chunk(self) -> None:
        """See the contract."""
        with torch.enable_grad():
            within = intra_chunk(self._chunks)
        self._grads = self._gradients_of([within], [self._dout])

    def gradients(self, outgoing: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the contract."""
        with torch.enable_grad():
            span = span_states(self._chunks)
            between = inter_chunk(self._chunks, enter_span(span, self._incoming))
            leaving = span.end
            if self._incoming is not None:
                leaving = span.decay[..., None] * self._incoming + leaving
        if outgoing is None:
            others = self._gradients_of([between], [self._dout])
        else:
            others = self._gradients_of([between, leaving], [self._dout, outgoing])
        dq, dk, dv, db = (x + y for x, y in zip(self._grads, others, strict=True))
        dg = db.flip(3).cumsum(dim=3).flip(3)  # b_j holds g_i for every i <= j
        tokens, length = self._tokens, self._tokens.q.shape[1]
        return (
            _join(dq, length).to(tokens.q.dtype),
            _join(dk, length).to(tokens.k.dtype),
            _join(dv, length).to(tokens.v.dtype),
            _join(dg, length).to(tokens.g.dtype),
        )

    def _gradients_of(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        # An only chunk that nothing entered has outputs that k and v do not reach.
        return list(torch.autograd.grad(outputs, self._leaves, grads, materialize_grads=True))


BACKEND = Backend("plain", PlainForward, PlainBackward, why_not=lambda tokens: None)


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


@dataclass(frozen=True, kw_only=True)
class Decays:
    """What is left of a state, [B, H, N, K or 1] each: `across` a chunk, and from the start of the
    span `to_chunk` n; [B, H, K or 1] from the span's start to its end, `of_span`.
    """

    across: Tensor
    to_chunk: Tensor
    of_span: Tensor


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


def cut_chunks(tokens: Tokens) -> Chunks:
    """Cut the tokens into chunks and build the masks; see `Chunks`."""
    length = tokens.q.shape[1]
    size = min(length, CHUNK_SCALAR_DECAY if tokens.g.shape[-1] == 1 else CHUNK_VECTOR_DECAY)
    segments, device = tokens.segments, tokens.q.device
    if segments is None:
        segments = torch.zeros(length, dtype=torch.int64, device=device)
    # Padding continues the last document with k = 0 and no decay: it changes no state.
    padding = segments[-1:].expand(-length % size)
    segments = torch.cat([segments, padding]).unflatten(0, (-1, size))
    last = segments[:, -1]
    before = torch.cat([last.new_zeros(1), last[:-1]])
    causal = torch.ones(size, size, device=device).tril()
    return Chunks(
        q=_cut(tokens.q, size),
        k=_cut(tokens.k, size),
        v=_cut(tokens.v, size),
        b=_cut(tokens.g, size).cumsum(dim=3, dtype=torch.float64),
        pairs=causal * (segments[:, :, None] == segments[:, None, :]),
        enters=(segments == before[:, None]).float(),
        leaves=(segments == last[:, None]).float(),
        through=(last == before).float(),
    )


def chunk_decays(chunks: Chunks) -> Decays:
    """What the chunks leave of a state; see `Decays`."""
    across = chunks.b[:, :, :, -1].float().exp() * chunks.through[:, None]
    decay, to_chunk = torch.ones_like(across[:, :, 0]), []
    # unbind, not indexing: the gradient of an index is a zero tensor of the whole size, per chunk.
    for across_n in across.unbind(dim=2):
        to_chunk.append(decay)
        decay = across_n * decay
    return Decays(across=across, to_chunk=torch.stack(to_chunk, dim=2), of_span=decay)


def span_states(chunks: Chunks) -> SpanStates:
    """The recurrence over chunks, from zero; see `SpanStates`."""
    to_end = (chunks.b[:, :, :, -1:] - chunks.b).float().exp() * chunks.leaves[..., None]
    added = (chunks.k * to_end).mT @ chunks.v
    decays = chunk_decays(chunks)
    state, entering = torch.zeros_like(added[:, :, 0]), []
    for across_n, added_n in zip(decays.across.unbind(dim=2), added.unbind(dim=2), strict=True):
        entering.append(state)
        state = across_n[..., None] * state + added_n
    return SpanStates(
        entering=torch.stack(entering, dim=2),
        decay_to=decays.to_chunk,
        end=state,
        decay=decays.of_span,
    )


def enter_span(span: SpanStates, state: Tensor | None) -> Tensor:
    """The state before each chunk [B, H, N, K, V] once `state` [B, H, K, V] enters the span."""
    if state is None:
        return span.entering
    return span.entering + span.decay_to[..., None] * state[:, :, None]


def read_by(chunks: Chunks) -> Tensor:
    """With what each token reads the state before its chunk, [B, H, N, C, K]: q_i exp(b_i)."""
    return chunks.q * chunks.b.float().exp() * chunks.enters[..., None]


def inter_chunk(chunks: Chunks, entering: Tensor) -> Tensor:
    """What each token reads from the state before its chunk, unscaled [B, H, N, C, V]."""
    return read_by(chunks) @ entering


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


def _cut(x: Tensor, size: int) -> Tensor:
    """[B, L, H, D] -> fp32 [B, H, N, C, D], zeros behind the last token."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.transpose(1, 2).unflatten(2, (-1, size))


def _join(x: Tensor, length: int) -> Tensor:
    """[B, H, N, C, D] -> [B, L, H, D], padding dropped."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)
