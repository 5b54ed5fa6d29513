"""Layout by brute force: every small sequence, ring and set of documents."""

import itertools
import random
from collections import Counter

import pytest

from hybridsp.layout import (
    attention_blocks,
    even_cuts,
    head_shares,
    intersect,
    relayout,
    zigzag_spans,
)


def tokens(spans):
    return [t for start, stop in spans for t in range(start, stop)]


def test_even_cuts():
    for total, parts in itertools.product(range(20), range(1, 8)):
        cuts = even_cuts(total, parts)
        sizes = [stop - start for start, stop in cuts]
        assert tokens(cuts) == list(range(total))
        assert len(cuts) == parts
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


def test_intersect():
    for a, b in itertools.product(itertools.combinations_with_replacement(range(5), 2), repeat=2):
        common = sorted(set(range(*a)) & set(range(*b)))
        part = intersect(a, b)
        assert (list(range(*part)) if part else []) == common


def test_zigzag_spans_partition_the_tokens():
    for total, ring in itertools.product(range(25), range(1, 7)):
        spans = zigzag_spans(total, ring)
        assert len(spans) == ring
        assert sorted(tokens(itertools.chain(*spans))) == list(range(total))
        for halves in spans:
            assert tokens(halves) == sorted(tokens(halves)), "the early half-chunk comes first"


def test_zigzag_gives_every_rank_the_same_work():
    for ring in range(2, 7):
        pairs = [sum(t + 1 for t in tokens(halves)) for halves in zigzag_spans(4 * ring, ring)]
        assert len(set(pairs)) == 1


def seen_pairs(bounds, causal):
    pairs = Counter()
    for start, stop in itertools.pairwise(bounds):
        for query, key in itertools.product(range(start, stop), repeat=2):
            if key <= query or not causal:
                pairs[query, key] += 1
    return pairs


def covered_pairs(total, ring, bounds, causal):
    """Count the (query, key) pairs of all blocks, local rows turned back to tokens."""
    halves = zigzag_spans(total, ring)
    pairs = Counter()
    for queries, keys in itertools.product(range(ring), repeat=2):
        q_tokens, k_tokens = tokens(halves[queries]), tokens(halves[keys])
        for block in attention_blocks(halves[queries], halves[keys], bounds, causal=causal):
            rows, columns = q_tokens[block.q], k_tokens[block.k]
            assert rows, "empty work is never listed"
            assert columns, "empty work is never listed"
            assert block.q.stop <= len(q_tokens)
            assert block.k.stop <= len(k_tokens)
            for (i, query), (j, key) in itertools.product(enumerate(rows), enumerate(columns)):
                if not block.causal or j <= i:
                    pairs[query, key] += 1
            if block.causal:
                assert rows == columns, "a causal block lies on the diagonal"
    return pairs


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_cover_exactly_the_allowed_pairs(causal):
    for total in range(1, 9):
        for cuts in range(total):
            for inner in itertools.combinations(range(1, total), cuts):
                bounds = [0, *inner, total]
                expected = seen_pairs(bounds, causal)
                for ring in range(1, 5):
                    got = covered_pairs(total, ring, bounds, causal)
                    assert got == expected, (total, ring, bounds)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_cover_exactly_the_allowed_pairs_of_longer_sequences(causal):
    """Drawn documents, empty ones among them, and lengths that no half-chunk divides."""
    for _ in range(60):
        total, ring = random.randint(10, 30), random.randint(1, 6)
        inner = random.choices(range(total + 1), k=random.randint(0, 8))
        bounds = [0, *sorted(inner), total]
        got = covered_pairs(total, ring, bounds, causal)
        assert got == seen_pairs(bounds, causal), (total, ring, bounds)


HEADS = [(9, 3), (32, 8), (8, 1), (6, 6), (8, 2), (12, 4)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_query_head_is_computed_once_with_its_own_kv_head(heads):
    num_heads, num_kv_heads = heads
    for ulysses in range(1, min(8, num_heads) + 1):
        shares = head_shares(num_heads, num_kv_heads, ulysses)
        assert len(shares) == ulysses
        assert [head for share in shares for head in share.q] == list(range(num_heads))
        for share in shares:
            group = len(share.q) // len(share.kv)
            assert group * len(share.kv) == len(share.q) > 0
            for i, head in enumerate(share.q):
                assert share.kv[i // group] == head // (num_heads // num_kv_heads), (ulysses, share)


def test_kv_heads_are_replicated_only_where_they_are_fewer_than_ranks():
    for (num_heads, num_kv_heads), ulysses in itertools.product(HEADS, range(1, 7)):
        sent = [kv for share in head_shares(num_heads, num_kv_heads, ulysses) for kv in share.kv]
        if ulysses <= num_kv_heads:
            assert sorted(sent) == list(range(num_kv_heads))
    # Shares that read their KV heads evenly take each of them once.
    assert [share.kv for share in head_shares(8, 1, 4)] == [(0,)] * 4
    assert [share.kv for share in head_shares(8, 2, 4)] == [(0,), (0,), (1,), (1,)]


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 KV heads do not divide 9 query heads"):
        head_shares(9, 2, 1)
    with pytest.raises(ValueError, match=r"ulysses = 7 is more than the 6 query heads.*raise ring"):
        head_shares(6, 2, 7)
    with pytest.raises(ValueError, match="ulysses = 4 is more than the 3 query heads"):
        relayout(8, 1, 4, 3, 3)


def test_relayout_sends_each_token_to_whoever_computes_it():
    for length, ring, ulysses in itertools.product(range(1, 6), range(1, 6), range(1, 4)):
        route = relayout(length * ring * ulysses, ring, ulysses, 6, 3)
        ranks = range(route.sp)
        assert tokens(map(route.owned, ranks)) == list(range(route.total))
        for target in ranks:
            assert route.share(target) == route.shares[target % ulysses]
            arrived = []
            for source in ranks:
                start, _ = route.owned(source)
                parts = route.sent(source, target)
                rows = [start + i for part in parts for i in range(length)[part]]
                assert len(rows) == route.num_sent(source, target)
                arrived += rows
            halves = zigzag_spans(route.total, ring)[target // ulysses]
            assert arrived == tokens(halves), (length, ring, ulysses, target)
