"""Which chunks the Triton kernels of a decay per channel take for mild, and that they may.

Half the sum of a chunk's gates decides, wherever in the chunk they are; in log2 the limit of the
sum is -160. Interpreted on the CPU, in fp32 and in bf16, where the running sums are products.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import strict
from fresh_interpreter import in_fresh_interpreter
from gla_cases import SCALE, errors, exact_results, make_inputs
from interpreter_bf16 import right_bf16
from triton_gla_cases import Case, run_passes

CHUNK, KEY_DIM = 64, 24
LIMIT = -160.0  # log2, of a chunk
NEAR = 0.01
LIMITS = {"float32": 1e-5, "bfloat16": 4e-3}


def even(total):
    return torch.full((CHUNK, KEY_DIM), total / CHUNK)


def alone_at(token):
    def gates(total):
        found = torch.zeros(CHUNK, KEY_DIM)
        found[token] = total
        return found

    return gates


def in_one_channel(total):
    gates = even(-1.0)
    gates[:, -1] = total / CHUNK
    return gates


# What a row's gates add up to in log2, in each chunk, and whether that makes the chunk strong.
ABOVE_BELOW = (LIMIT + NEAR, LIMIT - NEAR), [False, True]
ROWS = {
    "even": (even, *ABOVE_BELOW),
    "alone at the first token": (alone_at(0), *ABOVE_BELOW),
    "alone in the middle": (alone_at(31), *ABOVE_BELOW),
    "alone at the last token": (alone_at(-1), *ABOVE_BELOW),
    "in one channel": (in_one_channel, *ABOVE_BELOW),
    "a reset at the first token": (alone_at(0), (-1e4, -1e4), [True, True]),
    "a reset at the last token": (alone_at(-1), (-1e4, 0.0), [True, False]),
}


def rows_inputs():
    gates = [torch.cat([spread(total) for total in totals]) for spread, totals, _ in ROWS.values()]
    inputs = make_inputs(2 * CHUNK, KEY_DIM, 40, gates=["open"] * len(ROWS), heads=1)
    return replace(inputs, g=math.log(2) * torch.stack(gates)[:, :, None])


def interpret():
    """Per dtype which chunks of each row are strong, and the errors of each row."""
    torch.set_num_threads(1)
    found = {}
    for dtype in LIMITS:
        inputs = rows_inputs().to(getattr(torch, dtype))
        # Kernels for mild chunks overflow in strong ones, where others write over the result.
        with right_bf16(), strict(), np.errstate(over="ignore", invalid="ignore"):
            results = run_passes(inputs, Case(inputs={}))
            exact = {name: x.float() for name, x in exact_results(inputs).items()}  # 2^-160 is 0
            found[dtype] = strong_chunks(inputs), errors(results, exact)
    return found


def strong_chunks(inputs):
    from hybridsp.ops.gla.contract import Tokens
    from hybridsp.ops.gla.triton.passes import Prepared
    from hybridsp.ops.gla.triton.plan import Plan

    tokens = Tokens(q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, scale=SCALE, segments=None)
    prepared = Prepared(Plan(tokens))
    prepared.make(prepared.plan.all_chunks, pairs=True)
    return prepared.strong.squeeze(1).bool().tolist()


def test_half_the_sum_decides_and_both_sides_of_the_limit_are_right():
    pytest.importorskip("triton")
    found = in_fresh_interpreter(interpret, timeout=250, TRITON_INTERPRET="1")
    assert list(found) == list(LIMITS)
    for dtype, (strong, results) in found.items():
        expected = {name: flags for name, (_, _, flags) in ROWS.items()}
        assert dict(zip(ROWS, strong, strict=True)) == expected, dtype
        for result, rows in results.items():
            far = {name: e for name, e in zip(ROWS, rows, strict=True) if not e <= LIMITS[dtype]}
            assert far == {}, (dtype, result)
