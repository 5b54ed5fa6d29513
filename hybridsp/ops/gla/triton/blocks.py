"""What every kernel does with a chunk: load it, sum its gates, tell its documents apart.

A chunk is C tokens of one head. Its gates arrive as natural logarithms and are summed in units of
log2, because the hardware's exponential is 2^x; b_i is the sum up to and with token i. A decay per
channel is a [C, K] block, a decay per head a [C, 1] one that broadcasts, so the kernels differ
only where q meets k inside the chunk (`intra.py`).

Tokens behind the end of the sequence read as k = v = 0 without decay and change nothing.
"""

import triton
import triton.language as tl

# Triton would compile a kernel again for each kind of number (1, multiples of 16) among these.
SIZES = [
    "length",
    "chunks",
    "stretch_chunks",
    "stretches",
    "first_bh",
    "first_stretch",
    "first_chunk",
    "part_chunks",
    "tokens",
]
# e^-200 is zero in fp32; a sum of stronger gates would only lose the digits of weak ones.
STRONGEST_GATE = tl.constexpr(-200.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_block(
    pointer,
    row_stride,
    rows_left,
    first_column,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows [0, C) and columns [first_column, first_column + BLOCK) of a [*, WIDTH] matrix."""
    rows = tl.arange(0, C)[:, None]
    columns = first_column + tl.arange(0, BLOCK)[None, :]
    mask = (rows < rows_left) & (columns < WIDTH)
    return tl.load(pointer + rows * row_stride + columns, mask=mask, other=0.0)


@triton.jit
def store_block(
    pointer,
    block,
    row_stride,
    rows_left,
    first_column,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The opposite of `load_block`, in the pointer's dtype."""
    rows = tl.arange(0, C)[:, None]
    columns = first_column + tl.arange(0, BLOCK)[None, :]
    mask = (rows < rows_left) & (columns < WIDTH)
    tl.store(pointer + rows * row_stride + columns, block.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_gates(
    pointer,
    row_stride,
    rows_left,
    first_column,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`load_block` for gates; of a decay per head [C], because Triton 3.6 cannot scan [C, 1]."""
    if WIDTH == 1:
        rows = tl.arange(0, C)
        return tl.load(pointer + rows * row_stride, mask=rows < rows_left, other=0.0)
    else:  # noqa: RET505 - Triton compiles one of the two
        return load_block(pointer, row_stride, rows_left, first_column, C, BLOCK, WIDTH)


@triton.jit
def in_log2(gates, SUM: tl.constexpr):
    """Logarithms to the base 2, dtype SUM."""
    return tl.maximum(gates.to(SUM), STRONGEST_GATE) * LOG2_E


@triton.jit
def running_sums(gates, SUM: tl.constexpr):
    """The sums b [C, BLOCK] of what `load_gates` gives, and their last, b_C [BLOCK]; dtype SUM."""
    gates = in_log2(gates, SUM)
    if len(gates.shape) == 1:
        return tl.cumsum(gates, axis=0)[:, None], tl.sum(gates[:, None], axis=0)
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.cumsum(gates, axis=0), tl.sum(gates, axis=0)


@triton.jit
def sums_around_half(gates, C: tl.constexpr):
    """What `running_sums` of [C, BLOCK] gives, as b - b_C / 2 and b_C, fp32.

    A token's gate counts half, added up to it and taken off behind it: a product with signs, of
    three bf16 that hold all bits of the gates. A scan would pass sums on from warp to warp.
    """
    gates = in_log2(gates, tl.float32)
    first, rest = leading_bits(gates)
    second, rest = leading_bits(rest)
    third = rest.to(tl.bfloat16)
    token = tl.arange(0, C)
    signs = tl.where(token[:, None] >= token[None, :], 0.5, -0.5).to(tl.bfloat16)
    around = tl.dot(signs, first, tl.dot(signs, second, tl.dot(signs, third)))
    return around, tl.sum(gates, axis=0)


@triton.jit
def leading_bits(block):
    """The first 8 bits of fp32 `block`, bf16, and the rest of it, fp32; exact."""
    high = (block.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), block - high


@triton.jit
def load_documents(pointer, first_token, length, C: tl.constexpr):
    """Ids of the chunk's documents [C], the id before the chunk and the id of its last token."""
    tokens = first_token + tl.arange(0, C)
    last = tl.minimum(first_token + C, length) - 1
    ids = tl.load(pointer + tl.minimum(tokens, last))
    before = tl.load(pointer + first_token - 1, mask=first_token > 0, other=0)
    return ids, before, tl.load(pointer + last)


@triton.jit
def in_two(block):
    """fp32 `block` as the sum of two bf16 that keep 16 of its bits.

    Rounded as an integer: a conversion to bf16 and back costs as much as an exponential.
    """
    bits = (block.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    high = bits.to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (block - high).to(tl.bfloat16)


@triton.jit
def nearest_tf32(block):
    """fp32 `block` for a product in tf32, to be rounded there.

    Tensor cores cut 13 bits off, which makes every factor too small, on average by 3.5e-4 of it,
    and a product by twice that. With half of the last bit that they keep added, the cut rounds.
    """
    rounded = (block.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    # All bits of a GPU's NaN but the sign are set: a carry would make -0 of it.
    return tl.where(tl.abs(block) < float("inf"), rounded, block)


@triton.jit
def exact_product(left, right, total, PRECISION: tl.constexpr):
    """Left @ right + total for fp32 `left`: beside bf16, in two parts that keep 16 of its bits."""
    if right.dtype == tl.bfloat16:
        high, low = in_two(left)
        return tl.dot(high, right, tl.dot(low, right, total))
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def sum_rows(chosen, block, total, IN_BF16: tl.constexpr, PRECISION: tl.constexpr):
    """Total + the rows of fp32 `block` that are chosen in each row; in bf16, with 16 bits of it."""
    ones = chosen.to(tl.float32)
    if IN_BF16:
        high, low = in_two(block)
        ones = ones.to(tl.bfloat16)
        return tl.dot(ones, high, tl.dot(ones, low, total))
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.dot(ones, block, total, input_precision=PRECISION)


@triton.jit
def tail_of(block):
    """What bf16 leaves of fp32 `block`, int8: the next 8 bits, to be added to its digits."""
    rounded = block.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    left = block.to(tl.int32, bitcast=True) - rounded
    return tl.minimum((left + 128) >> 8, 127).to(tl.int8)


@triton.jit
def with_tail(rounded, tail):
    """fp32 from bf16 and its `tail_of`."""
    bits = rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (bits + (tail.to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def power(exponent):
    """2 ** exponent in fp32."""
    return tl.exp2(exponent.to(tl.float32))


@triton.jit
def row_of(block, index, C: tl.constexpr):
    """Row `index` of a [C, N] block, as [N]."""
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == index, block, 0.0), axis=0)


@triton.jit
def rows_of_subchunks(block, index, C: tl.constexpr, SUB: tl.constexpr, N: tl.constexpr):
    """[C, N] whose rows all are row `index` of their own subchunk of SUB rows."""
    apart = tl.reshape(block, (C // SUB, SUB, N))
    chosen = tl.where(tl.arange(0, SUB)[None, :, None] == index, apart, 0.0)
    row = tl.sum(chosen, axis=1)
    return tl.reshape(tl.broadcast_to(row[:, None, :], (C // SUB, SUB, N)), (C, N))


@triton.jit
def sums_of_subchunks(block, C: tl.constexpr, SUB: tl.constexpr, N: tl.constexpr):
    """[C, N] whose rows all are the sum over their own subchunk of SUB rows."""
    row = tl.sum(tl.reshape(block, (C // SUB, SUB, N)), axis=1)
    return tl.reshape(tl.broadcast_to(row[:, None, :], (C // SUB, SUB, N)), (C, N))
