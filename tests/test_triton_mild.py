"""Which chunks the Triton kernels of a decay per channel take for mild, and that they may.

Half the sum of a chunk's gates decides, wherever in the chunk they are; in log2 the limit of the
sum is -160. Interpreted on the CPU, in fp32 and in bf16, where the running sums are products. And
that the scores of pairs, which bf16 leaves to tf32, are not too small, in mild chunks or strong.
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

from hybridsp.bench.linear.check import relative_error

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


def prepared_pairs(inputs):
    from hybridsp.ops.gla.contract import Tokens
    from hybridsp.ops.gla.triton.passes import Prepared
    from hybridsp.ops.gla.triton.plan import Plan

    tokens = Tokens(q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, scale=SCALE, segments=None)
    prepared = Prepared(Plan(tokens))
    prepared.make(prepared.plan.all_chunks, pairs=True)
    return prepared


def strong_chunks(inputs):
    return prepared_pairs(inputs).strong.squeeze(1).bool().tolist()


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


def interpret_pairs():
    """Of mild and of strong chunks in bf16: how much too large pairs are, and their errors."""
    torch.set_num_threads(1)
    with right_bf16(), strict(), np.errstate(over="ignore", invalid="ignore"):
        inputs = make_inputs(CHUNK, 64, 40, gates=["mild", "mixed"], heads=4).to(torch.bfloat16)
        prepared = prepared_pairs(inputs)
        strong = prepared.strong.bool()
        assert [row.any().item() for row in strong] == [row.all().item() for row in strong]
        prepared.mend_strong()
    found = []
    for got, exact in zip(prepared.pairs.double(), exact_pairs(inputs), strict=True):
        too_large = (got * exact).sum() / exact.square().sum() - 1
        found.append((too_large.item(), relative_error(got, exact)))
    return strong[:, 0, 0].tolist(), found


def exact_pairs(inputs):
    q, k, g = (x.double().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.g))
    b = g.cumsum(dim=2)
    decays = (b[..., :, None, :] - b[..., None, :, :]).clamp(max=0).exp()
    pairs = SCALE * torch.einsum("bhik,bhjk,bhijk->bhij", q, k, decays).tril()
    return pairs.unsqueeze(2)  # the only chunk


def test_pairs_of_bf16_are_rounded_not_cut():
    """Cut off at 11 bits, mild ones would be too small by 7e-4, which made dv 6% less exact."""
    pytest.importorskip("triton")
    strong, found = in_fresh_interpreter(interpret_pairs, timeout=120, TRITON_INTERPRET="1")
    assert strong == [False, True]
    for too_large, error in found:
        assert abs(too_large) < 1e-4
        assert error < 3.5e-4


# Of a NaN as GPUs make it, infinities, and a number between two of 11 bits, nearer to the upper.
BITS = [0x7FFFFFFF, 0x7F800000, -0x800000, 0x3F801FFF]


def round_bits():
    global nearest_tf32  # the interpreter looks a kernel's names up in its module
    import triton
    import triton.language as tl

    from hybridsp.ops.gla.triton.blocks import nearest_tf32

    @triton.jit
    def kernel(numbers, rounded):
        at = tl.arange(0, 4)
        tl.store(rounded + at, nearest_tf32(tl.load(numbers + at)))

    numbers = torch.tensor(BITS, dtype=torch.int32).view(torch.float32)
    rounded = torch.empty_like(numbers)
    kernel[(1,)](numbers, rounded)
    return (rounded.view(torch.int32) & -0x2000).view(torch.float32).tolist()  # and cut


def test_what_is_not_finite_stays_so():
    pytest.importorskip("triton")
    nan, above, below, number = in_fresh_interpreter(round_bits, timeout=60, TRITON_INTERPRET="1")
    assert math.isnan(nan)
    assert (above, below) == (math.inf, -math.inf)
    assert number == 1 + 2**-10
