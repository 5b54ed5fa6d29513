"""Layers over the mesh against one process on the whole sequence: outputs and every gradient.

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

from hybridsp.mesh import SPMesh

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


def in_bf16(attention, inputs, dout, degrees):
    """Output and gradients on a mesh of one rank, which has everything, and on the given meshes."""
    results = []
    for ring, ulysses in [(1, 1), *degrees]:
        mesh = SPMesh(ring=ring, ulysses=ulysses)
        parts = [x.chunk(mesh.sp, dim=1)[mesh.sp_rank].requires_grad_() for x in inputs]
        out = attention(*parts, mesh=mesh)
        grads = torch.autograd.grad(out, parts, dout.chunk(mesh.sp, dim=1)[mesh.sp_rank])
        assert [x.dtype for x in (out, *grads)] == [torch.bfloat16, *(x.dtype for x in inputs)]
        results.append((out.detach(), *grads))
    return results


def check_bf16(attention, inputs, oracle, subtests):
    """The error against `oracle(*inputs in fp64)` is no larger on four ranks than on one."""
    exact = [x.double().requires_grad_() for x in inputs]
    out = oracle(*exact)
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
