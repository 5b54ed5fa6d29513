"""Errors of the linear layer against the naive recurrence: output and all four gradients.

One token at a time, in fp64, on the same inputs as the op (rounded to its dtype first, so only the
op's own rounding counts). Gates are of four kinds, because kernels that split exp(a - b) into
exp(a) * exp(-b) fail only where gates are strong or weak beside strong ones. `exact_results` and
`relative_error` are what the tests of the kernels go by too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hybridsp.bench.job import attempt
from hybridsp.bench.linear.ops import (
    DTYPES,
    FLA,
    Inputs,
    Shape,
    local_op,
    make_inputs,
)
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_gla

TOKENS = 256
# A naive recurrence of every head of a large layer takes long and says no more.
MOST_HEADS = 2
TENSORS = ("o", "dq", "dk", "dv", "dg")
RESULTS = ("o", "final state", "dq", "dk", "dv", "dg", "dstate")
TITLE = (
    "error against the naive fp64 recurrence, |x - exact| / |exact|, a state enters "
    f"(at most {TOKENS} tokens and {MOST_HEADS} heads)"
)
COLUMNS = {"backend": "backend", "gates": "gates", **{name: name for name in TENSORS}}


def ordinary(logits: Tensor) -> Tensor:
    """Gates of a fresh layer."""
    return F.logsigmoid(logits) / 16


def strong(logits: Tensor) -> Tensor:
    """A state is forgotten within a few tokens."""
    return 8 * F.logsigmoid(logits)


def all_at_one(logits: Tensor) -> Tensor:
    """Nothing is ever forgotten."""
    return torch.zeros_like(logits)


def mixed(logits: Tensor) -> Tensor:
    """Ordinary gates, one in sixteen of them at exp(-100)."""
    return torch.where(logits > 1.5341, -100.0, ordinary(logits))  # a normal's upper 1/16


GATES = {
    "ordinary": ordinary,
    "strong": strong,
    "all at 1": all_at_one,
    "mixed with -100": mixed,
}


def check_all(args: argparse.Namespace, mesh: SPMesh) -> list[dict[str, Any]]:
    """A row per backend and kind of gates. Every rank computes the same; collective."""
    shape = Shape(
        tokens=TOKENS,
        heads=min(args.heads, MOST_HEADS),
        key_dim=args.key_dim,
        value_dim=args.value_dim,
        decay=args.decay,
        dtype=DTYPES[args.dtype],
    )
    rows = []
    for gates in tqdm(GATES, desc="check", unit="gates", disable=mesh.rank > 0):
        inputs = inputs_with(shape, gates, mesh.device)
        scale = args.key_dim**-0.5
        exact = exact_results(inputs.leaves, inputs.dout, scale=scale, state=inputs.state)
        for backend in args.backends:
            work = partial(check, backend, inputs, exact)
            errors, reason = attempt(work, mesh, foreign=backend == FLA)
            rows.append({"backend": backend, "gates": gates, **(errors or {}), "reason": reason})
    return rows


def inputs_with(shape: Shape, gates: str, device: torch.device) -> Inputs:
    """The bench's inputs, with gates of one kind."""
    inputs = make_inputs(shape, device, seed=0)
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.randn(inputs.g.shape, generator=generator, device=device)
    return Inputs(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        g=GATES[gates](logits).requires_grad_(),
        state=inputs.state,
        dout=inputs.dout,
    )


def check(backend: str, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the output and each gradient; not finite where the result is not."""
    op = local_op(backend)
    out = op(inputs)
    results = (out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.dout))
    return {
        name: relative_error(result, exact[name])
        for name, result in zip(TENSORS, results, strict=True)
    }


def exact_results(
    tokens: Sequence[Tensor],
    dout: Tensor,
    *,
    scale: float,
    state: Tensor | None = None,
    dfinal: Tensor | None = None,
    bounds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """RESULTS of the naive recurrence, one token at a time in fp64.

    Args:
        tokens: q, k, v, g as `naive_gla` takes them.
        dout: gradient of o [B, L, H, V].
        scale: factor on q.
        state: that enters [B, H, K, V]; None for zero.
        dfinal: gradient of the last state [B, H, K, V]; None for zero.
        bounds: of packed documents, rising from 0 to L; None for one per row.
    """
    q, _, v, _ = tokens
    nothing = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state, dfinal = (nothing if x is None else x for x in (state, dfinal))
    leaves = [x.detach().double().requires_grad_() for x in (*tokens, state)]
    outs = naive_gla(*leaves[:4], scale=scale, cu_seqlens=bounds, initial_state=leaves[4])
    # A state that enters an empty first document reaches nothing.
    grads = torch.autograd.grad(
        outs, leaves, [dout.double(), dfinal.double()], materialize_grads=True
    )
    return dict(zip(RESULTS, (*(x.detach() for x in outs), *grads), strict=True))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|, as vectors; the plain norm where `exact` is zero."""
    scale = exact.norm()
    return ((result.double() - exact).norm() / (scale if scale > 0 else 1.0)).item()
