"""The convolution and softmax attention over the mesh; linear attention has a file of its own."""

import itertools

import pytest
import torch
from cases import case
from distributed import run_ranks
from sp_cases import DOCUMENTS, TOTAL, WORLDS, Case, check, check_bf16

from hybridsp.attention import short_convolution, softmax_attention
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_attention, naive_causal_conv


def silu_convolution(x, weight, bias, **options):
    return short_convolution(x, weight, bias, activation="silu", **options)


def right_convolution(one):
    return lambda *x: naive_causal_conv(*x, activation="silu", cu_seqlens=one.bounds)


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_short_convolution(backend, ranks, subtests):
    """A kernel of 30 taps is wider than a rank's 12 tokens."""
    cases = {
        f"{width} taps, documents {name}": Case(
            silu_convolution,
            [torch.randn(2 if bounds is None else 1, TOTAL, 7)],
            ring=ranks,
            bounds=bounds,
            shared=[torch.randn(7, width), torch.randn(7)],
        )
        for width in (4, 30)
        for name, bounds in DOCUMENTS.items()
    }
    check(ranks, cases, right_convolution, subtests, backend)


def attention_inputs(batch, total, heads):
    num_heads, num_kv_heads = heads
    return [
        torch.randn(batch, total, num_heads, 6),
        torch.randn(batch, total, num_kv_heads, 6),
        torch.randn(batch, total, num_kv_heads, 5),
    ]


def right_attention(one):
    causal = one.options.get("causal", True)
    return lambda *x: naive_attention(*x, scale=6**-0.5, causal=causal, cu_seqlens=one.bounds)


def splits(ranks):
    return [(ranks // u, u) for u in range(1, ranks + 1) if ranks % u == 0]


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_softmax_attention(backend, ranks, subtests):
    heads = [(9, 3), (8, 1), (4, 4)]
    cases = {
        f"ring {ring}, ulysses {ulysses}, heads {q_kv}, documents {name}": Case(
            softmax_attention,
            attention_inputs(2 if bounds is None else 1, TOTAL, q_kv),
            ring=ring,
            ulysses=ulysses,
            bounds=bounds,
        )
        for (ring, ulysses), q_kv in itertools.product(splits(ranks), heads)
        for name, bounds in DOCUMENTS.items()
        if ulysses <= q_kv[0]
    }
    check(ranks, cases, right_attention, subtests, backend)


@pytest.mark.parametrize("ranks", [3, 4])
def test_softmax_attention_of_lengths_that_no_half_chunk_divides(ranks, subtests):
    cases = {}
    for (ring, ulysses), length in itertools.product(splits(ranks), [1, 3]):
        total = length * ranks
        for name, bounds, batch in [("one", None, 2), ("two", [0, 1, total], 1)]:
            cases[f"ring {ring}, ulysses {ulysses}, {length} tokens, documents {name}"] = Case(
                softmax_attention,
                attention_inputs(batch, total, (4, 2)),
                ring=ring,
                ulysses=ulysses,
                bounds=bounds,
            )
    check(ranks, cases, right_attention, subtests)


def test_softmax_attention_without_causality(subtests):
    cases = {
        f"ring {ring}, ulysses {ulysses}, documents {name}": Case(
            softmax_attention,
            attention_inputs(4 if bounds is None else 1, TOTAL, (4, 2)),
            ring=ring,
            ulysses=ulysses,
            bounds=bounds,
            options={"causal": False},
        )
        for ring, ulysses, name, bounds in [
            (2, 1, "one", None),  # two data-parallel rows
            (1, 1, "one", None),  # four
            (4, 1, "cut", DOCUMENTS["cut"]),
            (2, 2, "spanning", DOCUMENTS["spanning"]),
        ]
    }
    check(4, cases, right_attention, subtests)


def test_bf16_is_as_exact_on_four_ranks_as_on_one(subtests):
    inputs = [x.bfloat16() for x in attention_inputs(1, TOTAL, (8, 2))]
    check_bf16(softmax_attention, inputs, right_attention(Case(softmax_attention, ())), subtests)


def misfits():
    mesh = SPMesh(ring=2)
    q, k, v = attention_inputs(1, 8, (4, 2))
    calls = {
        "Hkv divides Hq": lambda: softmax_attention(q[:, :, :3], k, v, mesh=mesh),
        r"v \(1, 7, 2, 5\) do not fit": lambda: softmax_attention(q, k, v[:, :7], mesh=mesh),
        "q, k, v have dtypes": lambda: softmax_attention(q, k, v.double(), mesh=mesh),
        "from 0 to the sequence's 16": lambda: softmax_attention(
            q, k, v, mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
        "must rise from 0 to the sequence's 16 tokens": lambda: short_convolution(
            q[:, :, 0], torch.ones(6, 4), mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
    }
    for match, call in calls.items():
        with case(match), pytest.raises(ValueError, match=match):
            call()


def test_what_does_not_fit_is_refused():
    run_ranks(misfits, 2)
