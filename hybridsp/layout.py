"""Who owns which token and which head. Pure: numbers in, numbers out, no communication.

Outside softmax attention rank p owns the contiguous tokens [pL, (p+1)L). Inside it the sequence is
cut in 2R half-chunks for a ring of R, and ring rank r owns half-chunks r and 2R-1-r ("zigzag"):
early tokens see few keys and late ones many, so each pair costs the same. A half-chunk is an
interval of global positions; which rank sends what to whom is a matter of intersecting intervals,
and no length has to divide anything.

Heads are cut over the Ulysses ranks by whole KV groups where there are enough KV heads, unevenly
if need be (9 query and 3 KV heads over 2 ranks: 6 + 3 and 2 + 1); where there are fewer, a KV head
goes to every rank that has queries for it.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def zigzag_spans(total: int, ring: int) -> list[tuple[Span, ...]]:
    """The two half-chunks of each ring rank, r and 2R-1-r of 2R; a ring of one has no halves."""
    if ring == 1:
        return [((0, total),)]
    halves = even_cuts(total, 2 * ring)
    return [(halves[r], halves[2 * ring - 1 - r]) for r in range(ring)]


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
        ValueError: the KV heads do not divide the query heads, or there are fewer query heads
            than ranks.
    """
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


@dataclass(frozen=True)
class Relayout:
    """The way into softmax attention and back: contiguous tokens, all heads <-> zigzag, some heads.

    Attributes:
        total: tokens of the whole sequence.
        ring, ulysses: degrees; SP rank p is (p // ulysses, p % ulysses).
        shares: heads of each Ulysses rank.
    """

    total: int
    ring: int
    ulysses: int
    shares: tuple[HeadShare, ...]

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

    def halves(self, rank: int) -> tuple[Span, ...]:
        """The half-chunks that SP rank `rank` computes in softmax attention."""
        return zigzag_spans(self.total, self.ring)[rank // self.ulysses]

    def sent(self, source: int, target: int) -> list[slice]:
        """The tokens of `source` that `target` computes: rising slices of source's own tokens."""
        start, _ = mine = self.owned(source)
        parts = [intersect(mine, half) for half in self.halves(target)]
        return [slice(part[0] - start, part[1] - start) for part in parts if part is not None]

    def num_sent(self, source: int, target: int) -> int:
        """How many tokens `sent` names."""
        return sum(part.stop - part.start for part in self.sent(source, target))


@lru_cache(maxsize=64)
def relayout(total: int, ring: int, ulysses: int, num_heads: int, num_kv_heads: int) -> Relayout:
    """The `Relayout` of a sequence of `total` tokens; errors as in `head_shares`."""
    assert total % (ring * ulysses) == 0, "shard_batch pads to a multiple of the SP degree"
    shares = tuple(head_shares(num_heads, num_kv_heads, ulysses))
    return Relayout(total=total, ring=ring, ulysses=ulysses, shares=shares)


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


def attention_blocks(
    q_halves: Sequence[Span], k_halves: Sequence[Span], bounds: Sequence[int], *, causal: bool
) -> list[Block]:
    """What must be computed of attention between two ranks' half-chunks.

    A token sees its own document, up to itself if causal. Two different half-chunks have at most
    one document in common, the one that spans everything between them, so packing needs no masks:
    a document inside one half-chunk is a causal block, and what a document has in an earlier
    half-chunk is a full rectangle. Empty work is never listed.

    Args:
        q_halves, k_halves: half-chunks of the rank that has the queries and of the one that has
            the keys, in the order in which their tokens lie in the local tensors.
        bounds: document boundaries of the whole sequence, rising from 0 to its length.
        causal: a token does not see what comes after it.

    Returns:
        The blocks; each query row's blocks cover exactly the keys that it sees.
    """
    blocks = []
    q_offset = 0
    for q_half in q_halves:
        k_offset = 0
        for k_half in k_halves:
            blocks += _half_blocks(q_half, q_offset, k_half, k_offset, bounds, causal)
            k_offset += k_half[1] - k_half[0]
        q_offset += q_half[1] - q_half[0]
    return blocks


def _half_blocks(
    q_half: Span, q_offset: int, k_half: Span, k_offset: int, bounds: Sequence[int], causal: bool
) -> list[Block]:
    def rows(span: Span, half: Span, offset: int) -> slice:
        return slice(span[0] - half[0] + offset, span[1] - half[0] + offset)

    if causal and k_half[0] > q_half[0]:
        return []
    blocks = []
    for document in pairwise(bounds):
        queries, keys = intersect(document, q_half), intersect(document, k_half)
        if queries is None or keys is None:
            continue
        block = Block(
            q=rows(queries, q_half, q_offset),
            k=rows(keys, k_half, k_offset),
            causal=causal and q_half == k_half,
        )
        blocks.append(block)
    return blocks
