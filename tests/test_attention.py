"""Attention over the mesh against one process on the whole sequence: outputs and every gradient.

One launch of ranks runs many cases; each is compared, and named if it fails, on its own.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import case
from distributed import run_ranks
from torch import Tensor

from hybridsp.attention import linear_attention, short_convolution, softmax_attention
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_attention, naive_causal_conv, naive_gla

# Worlds to test in: on the CPU, and on as many GPUs.
WORLDS = [
    *(("gloo", ranks) for ranks in (1, 2, 4, 8)),
    *(pytest.param("nccl", ranks, marks=pytest.mark.gpu) for ranks in (1, 2, 4)),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Boundaries for 48 tokens: on 4 ranks of 12 tokens one document is cut by a rank edge, one aligned
# with it, one spans three ranks, one is a single token, shorter than any convolution.
DOCUMENTS = {
    "one": None,
    "cut": [0, 5, 20, 48],
    "aligned": [0, 12, 24, 36, 48],
    "spanning": [0, 3, 4, 41, 48],
    "many": [0, 1, 2, 3, 12, 13, 24, 25, 30, 47, 48],
}
TOTAL = 48


@dataclass
class Case:
    """One call on a mesh: [dp * B, T, ...] inputs, and `shared` ones that every rank has whole."""

    attention: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    ring: int = 1
    ulysses: int = 1
    bounds: Sequence[int] | None = None
    shared: Sequence[Tensor] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dout: Tensor | None = None


def run_cases(cases):
    """Of this rank: its place, its part of the output and of the gradients, per case."""
    results = {}
    mesh_of = functools.cache(SPMesh)
    for name, one in cases.items():
        with case(name):
            mesh = mesh_of(one.ring, one.ulysses)

            def cut(x, mesh=mesh):
                row = x.chunk(mesh.dp)[mesh.dp_rank].to(mesh.device)
                return row.chunk(mesh.sp, dim=1)[mesh.sp_rank]

            options = dict(one.options)
            if one.bounds is not None:
                options["cu_seqlens"] = torch.tensor(one.bounds, dtype=torch.int32)
            parts = [cut(x).requires_grad_() for x in one.inputs]
            shared = [x.to(mesh.device).requires_grad_() for x in one.shared]
            out = one.attention(*parts, *shared, mesh=mesh, **options)
            grads = torch.autograd.grad(out, [*parts, *shared], cut(one.dout))
            tensors = out.detach(), *grads[: len(parts)]
            results[name] = mesh.dp_rank, tensors, grads[len(parts) :]
    return results


def check(ranks, cases, oracle, subtests, backend="gloo"):
    """Compare every case with `oracle(case)(*inputs in fp64)` on the whole sequence."""
    expected = {}
    for name, one in cases.items():
        exact = [x.double().requires_grad_() for x in (*one.inputs, *one.shared)]
        out = oracle(one)(*exact)
        one.dout = torch.randn(out.shape)
        expected[name] = out, *torch.autograd.grad(out, exact, one.dout.double())
    results = run_ranks(run_cases, ranks, cases, backend=backend)
    for name, right in expected.items():
        with subtests.test(name):
            of_rank = [result[name] for result in results]
            got = [*map(whole, itertools.repeat(of_rank), range(1 + len(cases[name].inputs)))]
            got += [sum(grads) for grads in zip(*(shared for *_, shared in of_rank), strict=True)]
            torch.testing.assert_close(got, [x.float() for x in right], **CLOSE)


def whole(of_rank, i):
    """Lay the ranks' parts of tensor i side by side, and data-parallel rows below each other."""
    rows = {}
    for dp_rank, tensors, _ in of_rank:
        rows.setdefault(dp_rank, []).append(tensors[i])
    return torch.cat([torch.cat(parts, dim=1) for parts in rows.values()])


def gla_inputs(batch, decays, key_dim=6, value_dim=5, heads=3):
    q, k = torch.randn(2, batch, TOTAL, heads, key_dim)
    v = torch.randn(batch, TOTAL, heads, value_dim)
    g = -2 * torch.rand(batch, TOTAL, heads, decays)
    return [q, k, v, g]


def right_gla(one):
    scale = one.options.get("scale", 6**-0.5)
    return lambda *x: naive_gla(*x, scale=scale, cu_seqlens=one.bounds)[0]


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_linear_attention(backend, ranks, subtests):
    cases = {}
    for name, bounds in DOCUMENTS.items():
        for algorithm in ("chain", "allgather"):
            cases[f"{algorithm}, documents {name}"] = Case(
                linear_attention,
                gla_inputs(2 if bounds is None else 1, decays=6),
                ring=ranks,
                bounds=bounds,
                options={"algorithm": algorithm},
            )
        cases[f"one decay per head, documents {name}"] = Case(
            linear_attention,
            gla_inputs(2 if bounds is None else 1, decays=1),
            ulysses=ranks,
            bounds=bounds,
            options={"scale": 0.3},
        )
    if ranks == 4:
        cases["data parallel"] = Case(linear_attention, gla_inputs(2, decays=6), ulysses=2)
    check(ranks, cases, right_gla, subtests, backend)


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


def in_bf16(attention, inputs, dout, degrees):
    """Output and gradients on a mesh of one rank, which has everything, and on the given meshes."""
    results = []
    for ring, ulysses in [(1, 1), *degrees]:
        mesh = SPMesh(ring=ring, ulysses=ulysses)
        parts = [x.chunk(mesh.sp, dim=1)[mesh.sp_rank].requires_grad_() for x in inputs]
        out = attention(*parts, mesh=mesh)
        grads = torch.autograd.grad(out, parts, dout.chunk(mesh.sp, dim=1)[mesh.sp_rank])
        assert {x.dtype for x in (out, *grads)} == {torch.bfloat16}
        results.append((out.detach(), *grads))
    return results


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_bf16_is_as_exact_on_four_ranks_as_on_one(attention, subtests):
    linear = attention is linear_attention
    inputs = gla_inputs(1, decays=6) if linear else attention_inputs(1, TOTAL, (8, 2))
    inputs = [x.bfloat16() for x in inputs]
    one = Case(attention, inputs)
    exact = [x.double().requires_grad_() for x in inputs]
    out = (right_gla(one) if linear else right_attention(one))(*exact)
    dout = torch.randn(out.shape).bfloat16()
    right = [out, *torch.autograd.grad(out, exact, dout.double())]
    degrees = [(4, 1), (2, 2), (1, 4)]
    results = run_ranks(in_bf16, 4, attention, inputs, dout, degrees)
    for number, degree in enumerate(degrees, start=1):
        for i, name in enumerate(["out", "dq", "dk", "dv", "dg"][: len(right)]):
            with subtests.test(f"{name} at {degree}"):
                got = torch.cat([result[number][i] for result in results], dim=1)
                error, error_of_one = (
                    (x.double() - right[i]).norm() for x in (got, results[0][0][i])
                )
                assert 0 < error <= 1.05 * error_of_one


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
        "from 0 to the sequence's 16 tokens": lambda: linear_attention(
            q, q, q, -q.abs(), mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
        "clone KV heads": lambda: linear_attention(q, k, v, q, mesh=mesh),
        "must rise from 0 to the sequence's 16 tokens": lambda: short_convolution(
            q[:, :, 0], torch.ones(6, 4), mesh=mesh, cu_seqlens=torch.tensor([0, 8])
        ),
    }
    for match, call in calls.items():
        with case(match), pytest.raises(ValueError, match=match):
            call()


def test_what_does_not_fit_is_refused():
    run_ranks(misfits, 2)
