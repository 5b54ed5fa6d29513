"""Errors of every backend and SP variant against plain attention in fp32, at a small length.

The exact results are those of the plain backend in fp32 on the same inputs, rounded to the dtype of
the run first, so that only an op's own rounding counts. A few documents of unequal lengths are
packed, so that every kind of block is met: a document's triangle and a ring's rectangles. An SP row
is the error of the rank that is worst.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from hybridsp.bench.job import attempt, meet
from hybridsp.bench.linear.check import relative_error
from hybridsp.bench.softmax.cases import PARALLEL, Way
from hybridsp.bench.softmax.ops import Inputs, Raw, Results, make_inputs
from hybridsp.bench.softmax.work import Work, document_bounds
from hybridsp.mesh import SPMesh

TOKENS_PER_RANK = 256
DOCUMENTS = 3
TENSORS = ("o", "dq", "dk", "dv")
TITLE = (
    "error against plain attention in fp32, |x - exact| / |exact| "
    f"({TOKENS_PER_RANK} tokens per rank, {DOCUMENTS} documents)"
)


def check_all(ways: Iterable[Way], work: Work, seed: int, mesh: SPMesh) -> list[dict[str, Any]]:
    """A row per way to compute. Collective.

    Args:
        ways: what is checked.
        work: heads, window and dtype of the run.
        seed: of the documents and of the inputs.
        mesh: the job.
    """
    tokens = TOKENS_PER_RANK * mesh.world_size
    few = replace(work, bounds=document_bounds(tokens, DOCUMENTS, seed))
    inputs = make_inputs(few, tokens, mesh.device, seed)
    exact = Raw(inputs.to(torch.float32), replace(few, dtype=torch.float32), "plain").results()
    rows = []
    for way in tqdm(list(ways), desc="check", disable=mesh.rank > 0):
        mine = slice(None)
        if way.method == PARALLEL:
            mine = slice(mesh.rank * TOKENS_PER_RANK, (mesh.rank + 1) * TOKENS_PER_RANK)
        right = tuple(x[:, mine] for x in exact)
        work_here = partial(_errors, way, inputs.rows(mine), few, right)
        errors, reason = attempt(work_here, mesh)
        rows.append({**way.columns, **(errors or {}), "reason": reason})
    return rows


def _errors(
    way: Way, inputs: Inputs, work: Work, exact: Iterable[torch.Tensor]
) -> dict[str, float]:
    """The worst rank's relative error of the output and each gradient."""
    results: Results = way.op(inputs, work).results()
    mine = [relative_error(x, right.double()) for x, right in zip(results, exact, strict=True)]
    # As a tensor, because Python's max hides a NaN.
    worst = torch.tensor(meet(mine), dtype=torch.float64).amax(dim=0).tolist()
    return dict(zip(TENSORS, worst, strict=True))
