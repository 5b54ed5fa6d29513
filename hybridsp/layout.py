"""Who owns which token and which head. Pure: numbers in, numbers out, no communication.

Outside softmax attention rank p owns the contiguous tokens [pL, (p+1)L). Inside it each *document*
is cut in 2R pieces for a ring of R, and ring rank r owns pieces r and 2R-1-r ("zigzag"): early
tokens see few keys and late ones many, so each pair costs the same. (Cutting the sequence rather
than its documents balances one document only: of 50 skewed ones a rank can get four times its
share.) Short documents are not cut but dealt out whole, so their keys need not travel.

A rank's tokens lie in the order of their positions, so what it holds of a document is one slice of
its tensors, whichever pieces that is. Pieces are intervals of global positions; which rank sends
what to whom is a matter of intersecting intervals, and no length has to divide anything.

Heads are cut over the Ulysses ranks by whole KV groups where there are enough KV heads, unevenly
if need be (9 query and 3 KV heads over 2 ranks: 6 + 3 and 2 + 1); where there are fewer, a KV head
goes to every rank that has queries for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

Span = tuple[int, int]
"""Global token positions [start, stop)."""


def even_cuts(total: int, parts: int) -> list[Span]:
    """Cut [0, total) into consecutive spans whose sizes differ by at most one, large ones first."""
    size, extra = divmod(total, parts)
    edges = [part * size + min(part, extra) for part in range(parts + 1)]
    return [(edges[part], edges[part + 1]) for part in range(parts)]


# A document stays whole if it has at most these parts of a rank's fair share of the tokens and of
# the query-key pairs. With 50 documents of lognormal lengths in rings of 2 to 8 the busiest rank
# then has 3% more than the mean to compute and 6% more tokens at worst.
WHOLE_TOKENS = 0.1
WHOLE_WORK = 0.05


def ring_spans(bounds: Sequence[int], ring: int) -> list[tuple[Span, ...]]:
    """The tokens that each ring rank computes in softmax attention.

    Args:
        bounds: document boundaries, rising from 0 to the sequence's length.
        ring: ring degree R.

    Returns:
        Per ring rank, rising spans that do not touch: zigzag pieces of the long documents, and
        short documents whole.
    """
    if ring == 1:
        return [((0, bounds[-1]),)]
    documents = [(start, stop) for start, stop in pairwise(bounds) if start < stop]
    work = sum((stop - start) ** 2 for start, stop in documents)
    spans: list[list[Span]] = [[] for _ in range(ring)]
    whole = []
    for start, stop in documents:
        length = stop - start
        few_tokens = length * ring <= WHOLE_TOKENS * bounds[-1]
        if few_tokens and length**2 * ring <= WHOLE_WORK * work:
            whole.append((start, stop))
            continue
        pieces = [(start + a, start + b) for a, b in even_cuts(length, 2 * ring)]
        for rank in range(ring):
            spans[rank] += pieces[rank], pieces[-1 - rank]
    tokens = [sum(stop - start for start, stop in of_rank) for of_rank in spans]
    # The longest first, each to the rank that has least: what remains uneven is a short document.
    for start, stop in sorted(whole, key=lambda document: document[0] - document[1]):
        rank = tokens.index(min(tokens))
        spans[rank].append((start, stop))
        tokens[rank] += stop - start
    return [_joined(of_rank) for of_rank in spans]


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same tokens as rising spans that do not touch."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def intersect(a: Span, b: Span) -> Span | None:
    """The common part of two spans, or None."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


@dataclass(frozen=True)
class HeadShare:
    """The heads one Ulysses rank computes: query heads, and the KV head each group of them reads.

    `kv` may repeat heads that other ranks also have, and lists one entry per equal-sized group of
    `q`, so that group g of the share's queries reads its g-th KV head.
    """

    q: tuple[int, ...]
    kv: tuple[int, ...]


def head_shares(num_heads: int, num_kv_heads: int, ulysses: int) -> list[HeadShare]:
    """Cut the heads over the Ulysses ranks.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads; query head h reads KV head h // (num_heads / num_kv_heads).
        ulysses: Ulysses degree.

    Returns:
        One share per Ulysses rank, in order.

    Raises:
        ValueError: a number is not positive, the KV heads do not divide the query heads, or there
            are fewer query heads than ranks.
    """
    if min(num_heads, num_kv_heads, ulysses) < 1:
        raise ValueError(
            f"{num_heads} query heads, {num_kv_heads} KV heads and ulysses = {ulysses} must all be "
            "at least 1"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads do not divide {num_heads} query heads")
    if ulysses > num_heads:
        raise ValueError(
            f"ulysses = {ulysses} is more than the {num_heads} query heads: lower ulysses and "
            "raise ring, which heads do not limit"
        )
    group = num_heads // num_kv_heads
    if ulysses <= num_kv_heads:
        kv_spans = even_cuts(num_kv_heads, ulysses)
        return [
            HeadShare(tuple(range(a * group, b * group)), tuple(range(a, b))) for a, b in kv_spans
        ]
    return [_replicated_share(range(a, b), group) for a, b in even_cuts(num_heads, ulysses)]


def _replicated_share(heads: range, group: int) -> HeadShare:
    readers: dict[int, int] = {}
    for head in heads:
        readers[head // group] = readers.get(head // group, 0) + 1
    if len(set(readers.values())) == 1:
        return HeadShare(tuple(heads), tuple(readers))
    # The share's queries read its KV heads unevenly: give each query head a KV head of its own.
    return HeadShare(tuple(heads), tuple(head // group for head in heads))


@dataclass(frozen=True, eq=False)
class RingLayout:
    """Where the tokens of a packed sequence are computed in a ring; made by `ring_layout`.

    Attributes:
        bounds: document boundaries of the whole sequence.
        spans: the tokens of each ring rank.
        shared: those of them whose keys other ranks need: the documents that are cut.
    """

    bounds: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    shared: tuple[tuple[Span, ...], ...]

    def shared_rows(self, rank: int) -> list[slice]:
        """Where the shared tokens lie among the rank's own."""
        rows, row = [], 0
        for span in self.spans[rank]:
            parts = (intersect(span, part) for part in self.shared[rank])
            rows += [(row + part[0] - span[0], row + part[1] - span[0]) for part in parts if part]
            row += span[1] - span[0]
        return [slice(*part) for part in _joined(rows)]


@lru_cache(maxsize=16)
def ring_layout(bounds: tuple[int, ...], ring: int) -> RingLayout:
    """The `RingLayout` of a sequence with these document boundaries."""
    spans = tuple(ring_spans(bounds, ring))
    pieces = [_pieces(of_rank, bounds) for of_rank in spans]
    ranks = Counter(document for of_rank in pieces for document in of_rank)
    shared = tuple(
        _joined(
            (piece.start, piece.stop)
            for document, its_pieces in of_rank.items()
            if ranks[document] > 1
            for piece in its_pieces
        )
        for of_rank in pieces
    )
    return RingLayout(bounds=bounds, spans=spans, shared=shared)


@dataclass(frozen=True, eq=False)
class Relayout:
    """The way into softmax attention and back: contiguous tokens, all heads <-> zigzag, some heads.

    Attributes:
        total: tokens of the whole sequence.
        ring, ulysses: degrees; SP rank p is (p // ulysses, p % ulysses).
        shares: heads of each Ulysses rank.
        layout: tokens of each ring rank.
    """

    total: int
    ring: int
    ulysses: int
    shares: tuple[HeadShare, ...]
    layout: RingLayout

    @property
    def sp(self) -> int:
        """Sequence-parallel degree."""
        return self.ring * self.ulysses

    @property
    def replicates(self) -> bool:
        """Whether a KV head is computed in more than one place."""
        heads = [head for share in self.shares for head in share.kv]
        return len(set(heads)) < len(heads)

    def owned(self, rank: int) -> Span:
        """The contiguous tokens of SP rank `rank`."""
        length = self.total // self.sp
        return rank * length, (rank + 1) * length

    def share(self, rank: int) -> HeadShare:
        """The heads that SP rank `rank` computes in softmax attention."""
        return self.shares[rank % self.ulysses]

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The tokens that SP rank `rank` computes in softmax attention."""
        return self.layout.spans[rank // self.ulysses]

    def sent(self, source: int, target: int) -> list[slice]:
        """The tokens of `source` that `target` computes: rising slices of source's own tokens."""
        return _sent(self, source, target)

    def num_sent(self, source: int, target: int) -> int:
        """How many tokens `sent` names."""
        return sum(part.stop - part.start for part in self.sent(source, target))


@lru_cache(maxsize=4096)
def _sent(relayout: Relayout, source: int, target: int) -> list[slice]:
    start, _ = mine = relayout.owned(source)
    parts = [intersect(mine, span) for span in relayout.spans(target)]
    return [slice(part[0] - start, part[1] - start) for part in parts if part is not None]


@lru_cache(maxsize=16)
def relayout(
    total: int,
    ring: int,
    ulysses: int,
    num_heads: int,
    num_kv_heads: int,
    bounds: tuple[int, ...] | None = None,
) -> Relayout:
    """The `Relayout` of `total` tokens, one document or `bounds`; errors as in `head_shares`."""
    assert total % (ring * ulysses) == 0, "shard_batch pads to a multiple of the SP degree"
    return Relayout(
        total=total,
        ring=ring,
        ulysses=ulysses,
        shares=tuple(head_shares(num_heads, num_kv_heads, ulysses)),
        layout=ring_layout(bounds or (0, total), ring),
    )


@dataclass(frozen=True)
class Block:
    """A rectangle of softmax attention that needs no mask but, on the diagonal, the causal one.

    Attributes:
        q, k: rows of the local query and key tensors.
        causal: query i of the block sees keys 0..i; otherwise all of them.
    """

    q: slice
    k: slice
    causal: bool

    @property
    def area(self) -> int:
        """Pairs of a query and a key that it sees: what the block costs."""
        queries, keys = self.q.stop - self.q.start, self.k.stop - self.k.start
        return queries * (queries + 1) // 2 if self.causal else queries * keys


def attention_blocks(
    q_spans: Sequence[Span], k_spans: Sequence[Span], bounds: Sequence[int], *, causal: bool
) -> list[Block]:
    """What must be computed of attention between two sets of tokens.

    A token sees its own document, up to itself if causal. Of one rank's own tokens each document
    is one block: its pieces lie side by side and in order, so the causal mask is the usual one.
    Pieces of different ranks do not overlap, so a piece of queries sees whole pieces of keys, those
    before it, and these too lie side by side: rectangles, and no mask. Empty work is never listed.

    Args:
        q_spans, k_spans: rising spans of the tokens in the local query and key tensors: the same,
            or without a common token.
        bounds: document boundaries of the whole sequence, rising from 0 to its length.
        causal: a token does not see what comes after it.

    Returns:
        The blocks; each query row's blocks cover exactly the keys that it sees. Where the spans are
        the same the blocks cover every row once.
    """
    queries = _pieces(q_spans, bounds)
    if q_spans == k_spans:
        whole = [slice(pieces[0].row, pieces[-1].end) for pieces in queries.values()]
        return [Block(q=rows, k=rows, causal=causal) for rows in whole]
    keys = _pieces(k_spans, bounds)
    return [
        block
        for document, pieces in queries.items()
        if document in keys
        for block in _rectangles(pieces, keys[document], causal)
    ]


def attention_areas(layout: RingLayout, *, causal: bool) -> list[int]:
    """The query-key pairs that each ring rank computes: how even the work is."""
    return [
        sum(
            block.area
            for theirs in layout.spans
            for block in attention_blocks(mine, theirs, layout.bounds, causal=causal)
        )
        for mine in layout.spans
    ]


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, stop) of one document, in a local tensor from row `row` on."""

    start: int
    stop: int
    row: int

    @property
    def end(self) -> int:
        return self.row + self.stop - self.start


def _pieces(spans: Sequence[Span], bounds: Sequence[int]) -> dict[int, list[_Piece]]:
    """Cut rising spans at the documents' boundaries; by document, in order."""
    pieces: dict[int, list[_Piece]] = {}
    row = 0
    for start, stop in spans:
        while start < stop:
            document = bisect_right(bounds, start) - 1
            cut = min(stop, bounds[document + 1])
            pieces.setdefault(document, []).append(_Piece(start, cut, row))
            row, start = row + cut - start, cut
    return pieces


def _rectangles(queries: list[_Piece], keys: list[_Piece], causal: bool) -> list[Block]:
    """One document: queries against other ranks' keys. Pieces that see the same are one block."""
    blocks: list[Block] = []
    for piece in queries:
        seen = [key for key in keys if key.start < piece.start or not causal]
        if not seen:
            continue
        rows, columns = slice(piece.row, piece.end), slice(keys[0].row, seen[-1].end)
        if blocks and blocks[-1].k == columns:
            rows = slice(blocks.pop().q.start, piece.end)
        blocks.append(Block(q=rows, k=columns, causal=False))
    return blocks
