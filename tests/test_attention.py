"""Attention over the mesh against one process on the whole sequence: outputs and every gradient."""

import pytest
import torch
from distributed import run_ranks

from hybridsp.attention import linear_attention, short_convolution, softmax_attention
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_attention, naive_causal_conv, naive_gla

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


def cut(x, mesh):
    """This rank's sequence and tokens of [dp * B, T, ...]."""
    row = x.chunk(mesh.dp)[mesh.dp_rank]
    return row.chunk(mesh.sp, dim=1)[mesh.sp_rank].detach().requires_grad_(x.requires_grad)


def on_mesh(attention, ring, ulysses, inputs, dout, shared, options):
    """Run attention on this rank's part; return its output and gradients."""
    mesh = SPMesh(ring=ring, ulysses=ulysses)
    parts = [cut(x, mesh) for x in inputs]
    shared = [x.detach().requires_grad_() for x in shared]
    out = attention(*parts, *shared, mesh=mesh, **options)
    grads = torch.autograd.grad(out, [*parts, *shared], cut(dout, mesh))
    return mesh.dp_rank, out.detach(), grads[: len(parts)], grads[len(parts) :]


def check(attention, oracle, ring, ulysses, dp, inputs, cu, shared=(), **options):
    inputs = [x.requires_grad_() for x in inputs]
    shared = [x.requires_grad_() for x in shared]
    expected = oracle(*[x.double() for x in [*inputs, *shared]], cu_seqlens=cu)
    dout = torch.randn(expected.shape)
    expected_grads = torch.autograd.grad(expected, [*inputs, *shared], dout.double())
    if cu is not None:
        options["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    arguments = [x.detach() for x in inputs]
    for x in arguments:
        x.requires_grad_()
    results = run_ranks(
        on_mesh, dp * ring * ulysses, attention, ring, ulysses, arguments, dout, shared, options
    )

    def whole(parts):
        rows = [torch.cat([x for d, x in parts if d == row], dim=1) for row in range(dp)]
        return torch.cat(rows)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(whole([(r[0], r[1]) for r in results]), expected.float(), **close)
    for i in range(len(inputs)):
        got = whole([(r[0], r[2][i]) for r in results])
        torch.testing.assert_close(got, expected_grads[i].float(), **close)
    for i in range(len(shared)):
        got = sum(r[3][i] for r in results)
        torch.testing.assert_close(got, expected_grads[len(inputs) + i].float(), **close)


def gla_inputs(batch, decays, key_dim=6, value_dim=5, heads=3):
    q, k = torch.randn(2, batch, TOTAL, heads, key_dim)
    v = torch.randn(batch, TOTAL, heads, value_dim)
    g = -2 * torch.rand(batch, TOTAL, heads, decays)
    return [q, k, v, g]


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("algorithm", ["chain", "allgather"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_linear_attention(ranks, algorithm, documents):
    batch = 2 if DOCUMENTS[documents] is None else 1
    check(
        linear_attention,
        lambda *x, cu_seqlens: naive_gla(*x, scale=6**-0.5, cu_seqlens=cu_seqlens)[0],
        *(ranks, 1, 1),
        gla_inputs(batch, decays=6),
        DOCUMENTS[documents],
        algorithm=algorithm,
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_linear_attention_with_one_decay_per_head(ranks):
    check(
        linear_attention,
        lambda *x, cu_seqlens: naive_gla(*x, scale=0.3, cu_seqlens=cu_seqlens)[0],
        *(ranks, 1, 1),
        gla_inputs(1, decays=1),
        DOCUMENTS["spanning"],
        scale=0.3,
    )


def test_linear_attention_in_data_parallel():
    check(
        linear_attention,
        lambda *x, cu_seqlens: naive_gla(*x, scale=6**-0.5)[0],
        *(1, 2, 2),
        gla_inputs(2, decays=6),
        None,
    )


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("width", [4, 30])
def test_short_convolution(width, ranks, documents):
    """A kernel of 30 taps is wider than a rank's 12 tokens."""
    batch = 2 if DOCUMENTS[documents] is None else 1
    check(
        silu_convolution,
        lambda *x, cu_seqlens: naive_causal_conv(*x, activation="silu", cu_seqlens=cu_seqlens),
        *(ranks, 1, 1),
        [torch.randn(batch, TOTAL, 7)],
        DOCUMENTS[documents],
        shared=[torch.randn(7, width), torch.randn(7)],
    )


def silu_convolution(x, weight, bias, **options):
    return short_convolution(x, weight, bias, activation="silu", **options)


def splits(ranks):
    return [(ranks // u, u) for u in range(1, ranks + 1) if ranks % u == 0]


HEADS = {"9:3": (9, 3), "8:1": (8, 1), "4:4": (4, 4)}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("ring", "ulysses"), [*splits(1), *splits(2), *splits(4)])
def test_softmax_attention(ring, ulysses, heads, documents):
    num_heads, num_kv_heads = HEADS[heads]
    batch = 2 if DOCUMENTS[documents] is None else 1
    q = torch.randn(batch, TOTAL, num_heads, 6)
    k = torch.randn(batch, TOTAL, num_kv_heads, 6)
    v = torch.randn(batch, TOTAL, num_kv_heads, 5)
    check(
        softmax_attention,
        lambda *x, cu_seqlens: naive_attention(*x, scale=6**-0.5, cu_seqlens=cu_seqlens),
        *(ring, ulysses, 1),
        [q, k, v],
        DOCUMENTS[documents],
    )


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2), (3, 1)])
def test_softmax_attention_of_lengths_that_no_half_chunk_divides(ring, ulysses, length):
    total = length * ring * ulysses
    q, k, v = torch.randn(1, total, 2, 4), torch.randn(1, total, 2, 4), torch.randn(1, total, 2, 4)
    check(
        softmax_attention,
        lambda *x, cu_seqlens: naive_attention(*x, scale=0.5, cu_seqlens=cu_seqlens),
        *(ring, ulysses, 1),
        [q, k, v],
        [0, 1, total],
    )


def test_softmax_attention_without_causality_in_data_parallel():
    q, k, v = torch.randn(3, 2, TOTAL, 4, 6)
    check(
        softmax_attention,
        lambda *x, cu_seqlens: naive_attention(*x, scale=6**-0.5, causal=False),
        *(2, 1, 2),
        [q, k, v],
        None,
        causal=False,
    )
