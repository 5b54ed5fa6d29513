"""Steps of a ring: both variants cover what queries may see, and auto takes the cheaper one."""

import itertools
import random

import pytest
from test_layout import drawn_bounds, pairs_between, seen_pairs, skewed_bounds, tokens

from hybridsp.attention.ring_choice import MAX_GATHERED_BYTES, choose_variant
from hybridsp.attention.ring_plan import num_steps, others_shared, step_blocks
from hybridsp.collectives.ring_links import ONE_HOST
from hybridsp.layout import ring_layout


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["ring", "allgather"])
def test_steps_cover_exactly_the_allowed_pairs_once(variant, causal):
    """Own keys at step 0, of the others' only those of documents that are cut."""
    for _ in range(60):
        total, ring = random.randint(10, 120), random.randint(1, 6)
        layout = ring_layout(tuple(drawn_bounds(total)), ring)
        pairs = []
        for rank in range(ring):
            mine = layout.spans[rank]
            visited = [mine]
            if num_steps(layout, variant) > 1 and variant == "ring":
                visited += [layout.shared[r] for r in range(ring) if r != rank]
            elif num_steps(layout, variant) > 1:
                visited.append(tuple(span for _, span in others_shared(layout, rank)))
            for spans in visited:
                pairs += pairs_between(layout, mine, spans, causal).elements()
        assert sorted(pairs) == sorted(seen_pairs(layout.bounds, causal).elements()), layout


def test_steps_of_both_variants_have_the_same_work():
    layout = ring_layout(skewed_bounds(seed=0, sigma=1.0), 4)
    for rank in range(4):
        gathered = step_blocks(layout, rank, None, True)
        rings = [step_blocks(layout, rank, other, True) for other in range(4) if other != rank]
        in_ring = sum(block.area for block in itertools.chain(*rings))
        assert sum(block.area for block in gathered) == in_ring


def test_others_keys_lie_in_the_order_of_their_positions():
    layout = ring_layout((0, 30, 70, 100), 3)
    for rank in range(3):
        spans = [span for _, span in others_shared(layout, rank)]
        assert tokens(spans) == sorted(set(range(100)) - set(tokens(layout.spans[rank])))


def test_nothing_travels_where_no_document_is_cut():
    layout = ring_layout(tuple(range(101)), 4)
    assert num_steps(layout, "ring") == num_steps(layout, "allgather") == 1
    assert num_steps(ring_layout((0, 100), 4), "ring") == 4
    assert num_steps(ring_layout((0, 100), 4), "allgather") == 2


HEADS, DIM = 4, 128  # on one rank, with one KV head in bf16


def chosen(bounds, ring):
    return choose_variant(
        ring_layout(tuple(bounds), ring),
        row_bytes=2 * DIM * 2,
        pair_flops=4 * HEADS * DIM,
        causal=True,
        links=ONE_HOST,
    )


@pytest.mark.parametrize("ring", [4, 8])
def test_short_sequences_and_heavy_packing_are_gathered(ring):
    assert chosen([0, 4096], ring) == "allgather"
    assert chosen(range(0, 16384 + 1, 2048), ring) == "allgather"
    assert chosen(skewed_bounds(seed=0, sigma=0.5, total=2**16), ring) == "allgather"


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_long_sequences_go_around(ring):
    """What the ring hides behind its blocks costs more than its steps, or is too much to hold."""
    assert chosen([0, 2**18], ring) == "ring"
    shared = 2 * MAX_GATHERED_BYTES // (2 * DIM * 2) * ring // (ring - 1)
    free = choose_variant(
        ring_layout((0, shared), ring),
        row_bytes=2 * DIM * 2,
        pair_flops=1,
        causal=True,
        links=ONE_HOST,
    )
    assert free == "ring"


def test_a_ring_of_two_gains_nothing_from_a_gather():
    """Its one step brings all there is, and its gradients need not be summed on the way."""
    assert chosen([0, 4096], 2) == "ring"


def test_no_gather_where_nothing_travels():
    assert chosen(range(101), 4) == chosen([0, 4096], 1) == "ring"
