"""The convolution and softmax attention over the mesh; linear attention has a file of its own."""

import functools
import itertools
import random

import pytest
import torch
from cases import case
from distributed import run_ranks
from sp_cases import DOCUMENTS, TOTAL, WORLDS, Case, check, check_bf16, in_bf16

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


def right_windowed_attention(one):
    """A query sees the keys of its own document from window - 1 tokens before it."""
    position = torch.arange(TOTAL)
    document = torch.bucketize(position, torch.tensor(one.bounds or [0, TOTAL])[1:], right=True)
    age = position[:, None] - position
    seen = (age >= 0) & (age < one.options["window"]) & (document[:, None] == document)

    def attend(q, k, v):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 6**-0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    return attend


def splits(ranks):
    return [(ranks // u, u) for u in range(1, ranks + 1) if ranks % u == 0]


def skewed(total, documents):
    """Boundaries of documents of lognormal lengths, some of them empty."""
    drawn = random.Random(documents)
    lengths = [drawn.lognormvariate(0, 1.5) for _ in range(documents)]
    edges = itertools.accumulate(lengths, initial=0.0)
    return [round(total * edge / sum(lengths)) for edge in edges]


VARIANTS = ("ring", "allgather")
HEADS = [(9, 3), (32, 8), (8, 1), (6, 6)]


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_softmax_attention(backend, ranks, subtests):
    """Every split, in both variants where there is a ring to go around."""
    cases = {
        f"ring {ring}, ulysses {ulysses}, heads {q_kv}, documents {name}, {variant}": Case(
            softmax_attention,
            attention_inputs(2 if bounds is None else 1, TOTAL, q_kv),
            ring=ring,
            ulysses=ulysses,
            bounds=bounds,
            options={"variant": variant},
        )
        for (ring, ulysses), q_kv in itertools.product(splits(ranks), HEADS)
        for name, bounds in DOCUMENTS.items()
        for variant in (VARIANTS if ring > 1 else ["auto"])
        # The variants differ in tokens, not in heads: the gather need not see all of them.
        if ulysses <= q_kv[0] and (variant != "allgather" or q_kv in HEADS[:1])
    }
    check(ranks, cases, right_attention, subtests, backend)


def heads_in_turn(number, ulysses):
    """Another of HEADS for every number, of those that so many ranks can share."""
    fitting = [heads for heads in HEADS if ulysses <= heads[0]]
    return fitting[number % len(fitting)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_softmax_attention_of_skewed_documents(ranks, subtests):
    """Some are cut over the ring, some whole on a rank; of 120 equal ones none is cut."""
    total = 240
    documents = {n: skewed(total, n) for n in (1, 5, 20, 50)}
    documents["120 equal"] = list(range(0, total + 1, 2))
    cases = {}
    for (ring, ulysses), (number, name) in itertools.product(splits(ranks), enumerate(documents)):
        heads = heads_in_turn(number + ring, ulysses)
        for variant in VARIANTS if ring > 1 else ["auto"]:
            label = f"ring {ring}, ulysses {ulysses}, heads {heads}, {name} documents, {variant}"
            cases[label] = Case(
                softmax_attention,
                attention_inputs(1, total, heads),
                ring=ring,
                ulysses=ulysses,
                bounds=documents[name],
                options={"variant": variant},
            )
    check(ranks, cases, right_attention, subtests)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_softmax_attention_in_a_window(ranks, subtests):
    documents = {**DOCUMENTS, "skewed": skewed(TOTAL, 50)}
    cases = {}
    for number, (window, name) in enumerate(itertools.product((1, 5, 1000), documents)):
        bounds, heads = documents[name], heads_in_turn(number, ranks)
        cases[f"window {window}, heads {heads}, documents {name}"] = Case(
            softmax_attention,
            attention_inputs(2 if bounds is None else 1, TOTAL, heads),
            ulysses=ranks,
            bounds=bounds,
            options={"window": window},
        )
    check(ranks, cases, right_windowed_attention, subtests)


@pytest.mark.parametrize("ranks", [3, 4])
def test_softmax_attention_of_lengths_that_no_half_chunk_divides(ranks, subtests):
    cases = {}
    for (ring, ulysses), length in itertools.product(splits(ranks), [1, 3]):
        total = length * ranks
        # Of single tokens the ring's first rank gets all, and the others none.
        alone = list(range(total + 1))
        for name, bounds, batch in [
            ("one", None, 2),
            ("two", [0, 1, total], 1),
            ("alone", alone, 1),
        ]:
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
        f"ring {ring}, ulysses {ulysses}, documents {name}, {variant}": Case(
            softmax_attention,
            attention_inputs(4 if bounds is None else 1, TOTAL, (4, 2)),
            ring=ring,
            ulysses=ulysses,
            bounds=bounds,
            options={"causal": False, "variant": variant},
        )
        for ring, ulysses, name, bounds in [
            (2, 1, "one", None),  # two data-parallel rows
            (1, 1, "one", None),  # four
            (4, 1, "cut", DOCUMENTS["cut"]),
            (2, 2, "spanning", DOCUMENTS["spanning"]),
        ]
        for variant in VARIANTS
    }
    check(4, cases, right_attention, subtests)


def test_bf16_is_as_exact_on_four_ranks_as_on_one(subtests):
    inputs = [x.bfloat16() for x in attention_inputs(1, TOTAL, (8, 2))]
    check_bf16(softmax_attention, inputs, right_attention(Case(softmax_attention, ())), subtests)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_error_does_not_grow_with_the_ring(variant, subtests):
    """A ring of 8 rounds as often as a ring of one: what crosses ranks is fp32."""
    inputs = [x.bfloat16() for x in attention_inputs(1, 8 * TOTAL, (8, 2))]
    exact = [x.double().requires_grad_() for x in inputs]
    out = right_attention(Case(softmax_attention, ()))(*exact)
    dout = torch.randn(out.shape).bfloat16()
    right = [out, *torch.autograd.grad(out, exact, dout.double())]
    rings = [1, 2, 4, 8]
    attention = functools.partial(softmax_attention, variant=variant)
    results = run_ranks(in_bf16, 8, attention, inputs, dout, [(r, 1) for r in rings[1:]])
    for i, name in enumerate(["out", "dq", "dk", "dv"]):
        parts = [[results[p][n][i] for p in range(ring)] for n, ring in enumerate(rings)]
        errors = [(torch.cat(of_ring, dim=1).double() - right[i]).norm() for of_ring in parts]
        with subtests.test(name):
            assert 0 < max(errors) <= 1.02 * errors[0], errors


def misfits():
    mesh = SPMesh(ring=2)
    q, k, v = attention_inputs(1, 8, (4, 2))
    calls = {
        "Hkv divides Hq": lambda: softmax_attention(q[:, :, :3], k, v, mesh=mesh),
        r"v \(1, 7, 2, 5\) do not fit": lambda: softmax_attention(q, k, v[:, :7], mesh=mesh),
        r"q \(1, 8, 4\).* do not fit": lambda: softmax_attention(q[..., 0], k, v, mesh=mesh),
        "none of them 0": lambda: softmax_attention(q[:, :0], k[:, :0], v[:, :0], mesh=mesh),
        "on cpu, meta, cpu": lambda: softmax_attention(q, k.to("meta"), v, mesh=mesh),
        "q, k, v have dtypes": lambda: softmax_attention(q, k, v.double(), mesh=mesh),
        "from 0 to the sequence's 16": lambda: softmax_attention(
            q, k, v, mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
        r"variant = 'star' is unknown; use one of \('auto', 'ring'": lambda: softmax_attention(
            q, k, v, mesh=mesh, variant="star"
        ),
        "window = 4 with ring = 2: .* raise ulysses to 2": lambda: softmax_attention(
            q, k, v, mesh=mesh, window=4
        ),
        "window = 0 with causal = True: a window is at least 1": lambda: softmax_attention(
            q, k, v, mesh=mesh, window=0
        ),
        "window = 4 with causal = False: .* needs causal": lambda: softmax_attention(
            q, k, v, mesh=mesh, window=4, causal=False
        ),
        "cudnn": lambda: softmax_attention(q, k, v, mesh=mesh, backend="cudnn"),
        "must rise from 0 to the sequence's 16 tokens": lambda: short_convolution(
            q[:, :, 0], torch.ones(6, 4), mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
    }
    for match, call in calls.items():
        with case(match), pytest.raises(ValueError, match=match):
            call()


def test_what_does_not_fit_is_refused():
    run_ranks(misfits, 2)
