"""Layout by brute force: every small sequence, ring and set of documents."""

import bisect
import itertools
import random
from collections import Counter

import pytest

from hybridsp.layout import (
    attention_areas,
    attention_blocks,
    even_cuts,
    head_shares,
    intersect,
    relayout,
    ring_layout,
    ring_spans,
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


def drawn_bounds(total):
    """Documents of any length, empty ones among them."""
    return [0, *sorted(random.choices(range(total + 1), k=random.randint(0, 8))), total]


def skewed_bounds(seed, sigma, total=2**20, documents=50):
    """Documents of lognormal lengths."""
    drawn = random.Random(seed)
    lengths = [drawn.lognormvariate(0, sigma) for _ in range(documents)]
    edges = itertools.accumulate(lengths, initial=0.0)
    return tuple(round(total * edge / sum(lengths)) for edge in edges)


def test_ring_spans_partition_the_tokens():
    for total, ring in itertools.product(range(25), range(1, 7)):
        for bounds in ([0, total], drawn_bounds(total)):
            spans = ring_spans(bounds, ring)
            assert len(spans) == ring
            assert sorted(tokens(itertools.chain(*spans))) == list(range(total))
            for of_rank in spans:
                assert tokens(of_rank) == sorted(tokens(of_rank)), "tokens lie in order"


def test_one_document_is_cut_in_zigzag():
    assert ring_spans([0, 8], 2) == [((0, 2), (6, 8)), ((2, 6),)]
    assert ring_spans([0, 13], 3) == [((0, 3), (11, 13)), ((3, 5), (9, 11)), ((5, 9),)]


def test_short_documents_stay_whole_and_are_not_shared():
    layout = ring_layout((0, 1000, 1010, 1030, 1060), 2)
    assert layout.spans == (((0, 250), (750, 1000), (1030, 1060)), ((250, 750), (1000, 1030)))
    assert layout.shared == (((0, 250), (750, 1000)), ((250, 750),))
    assert layout.shared_rows(0) == [slice(0, 500)]
    layout = ring_layout((0, 10, 1010), 2)
    assert layout.spans[0] == ((0, 260), (760, 1010))
    assert layout.shared_rows(0) == [slice(10, 510)]
    layout = ring_layout(tuple(range(101)), 2)
    assert layout.shared == ((), ())
    assert layout.shared_rows(0) == []


def areas_by_brute_force(layout):
    return [
        sum(t + 1 - max(b for b in layout.bounds if b <= t) for t in tokens(spans))
        for spans in layout.spans
    ]


def test_areas_are_what_the_queries_see():
    for _ in range(30):
        layout = ring_layout(tuple(drawn_bounds(random.randint(1, 60))), random.randint(1, 5))
        assert attention_areas(layout, causal=True) == areas_by_brute_force(layout)


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_every_rank_has_the_same_work(ring):
    areas = attention_areas(ring_layout((0, 2**20), ring), causal=True)
    assert max(areas) < 1.0001 * min(areas)


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_work_and_tokens_of_skewed_documents_are_even(ring, sigma):
    """Zigzag over the whole sequence gives a rank up to four times its share of this work."""
    for seed in range(10):
        layout = ring_layout(skewed_bounds(seed, sigma), ring)
        areas = attention_areas(layout, causal=True)
        lengths = [sum(stop - start for start, stop in spans) for spans in layout.spans]
        for shares, most in (areas, 1.05), (lengths, 1.05):
            assert max(shares) * ring < most * sum(shares), (seed, shares)


def seen_pairs(bounds, causal):
    pairs = Counter()
    for start, stop in itertools.pairwise(bounds):
        for query, key in itertools.product(range(start, stop), repeat=2):
            if key <= query or not causal:
                pairs[query, key] += 1
    return pairs


def covered_pairs(total, ring, bounds, causal):
    """Count the (query, key) pairs of all blocks, local rows turned back to tokens."""
    layout = ring_layout(tuple(bounds), ring)
    pairs = Counter()
    for queries, keys in itertools.product(range(ring), repeat=2):
        pairs += pairs_between(layout, layout.spans[queries], layout.spans[keys], causal)
    return pairs


def pairs_between(layout, q_spans, k_spans, causal):
    pairs = Counter()
    q_tokens, k_tokens = tokens(q_spans), tokens(k_spans)
    blocks = attention_blocks(q_spans, k_spans, layout.bounds, causal=causal)
    for block in blocks:
        rows, columns = q_tokens[block.q], k_tokens[block.k]
        assert rows, "empty work is never listed"
        assert columns, "empty work is never listed"
        assert block.q.stop <= len(q_tokens)
        assert block.k.stop <= len(k_tokens)
        seen = [
            (query, key)
            for (i, query), (j, key) in itertools.product(enumerate(rows), enumerate(columns))
            if not block.causal or j <= i
        ]
        assert block.area == len(seen)
        pairs.update(seen)
        if block.causal:
            assert rows == columns, "a causal block lies on the diagonal"
    documents = {bisect.bisect_right(layout.bounds, t) for t in q_tokens}
    if q_spans == k_spans:
        assert len(blocks) == len(documents), "one call per document"
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
    """Drawn documents, empty ones among them, and lengths that nothing divides."""
    for _ in range(60):
        total, ring = random.randint(10, 80), random.randint(1, 6)
        bounds = drawn_bounds(total)
        got = covered_pairs(total, ring, bounds, causal)
        assert got == seen_pairs(bounds, causal), (total, ring, bounds)


def test_a_step_of_the_ring_is_one_rectangle_per_document():
    layout = ring_layout((0, 100, 260), 4)
    for mine, theirs in itertools.permutations(layout.spans, 2):
        assert len(attention_blocks(mine, theirs, layout.bounds, causal=True)) == 2


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
        total = length * ring * ulysses
        bounds = random.choice([None, tuple(drawn_bounds(total))])
        route = relayout(total, ring, ulysses, 6, 3, bounds)
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
            spans = ring_spans(route.layout.bounds, ring)[target // ulysses]
            assert arrived == tokens(spans), (length, ring, ulysses, target)
