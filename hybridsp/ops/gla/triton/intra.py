"""Inside a chunk: scores of token pairs under a decay per channel, and their gradients.

    scores_ij = scale * sum over k of q_ik k_jk 2^(b_ik - b_jk),    j <= i, same document

With one decay per head the power comes out of the sum. With one per channel it has to be split,
(q_i 2^(b_i - r)) . (k_j 2^(r - b_j)), to become a matrix product, and the split must not leave
the range of fp32. Where half of a chunk's decay, b_C / 2, is not beyond LIMIT (gates of any trained
model), it serves all pairs as the reference r: the chunk is *mild*. Then 2^b and 2^(b_C - b), which
the states take, are the same two powers times 2^r, so a token's gate costs two exponentials in all.
A *strong* one is cut in subchunks:
pairs of different subchunks take r at the start of the later one, which makes both exponents
negative; pairs inside one are summed without a split. So no decay is too strong, and nothing is
clamped. The two are separate launches, each of which leaves the other's chunks alone: in one
kernel the rare case would take the registers from the common one.
"""

import triton
import triton.language as tl

from hybridsp.ops.gla.triton.blocks import (
    in_two,
    nearest_tf32,
    power,
    row_of,
    rows_of_subchunks,
    sums_of_subchunks,
)

# A pair that counts is a product of at most 1; both factors keep all their digits within 2^+-80.
LIMIT = tl.constexpr(80.0)
SUB = tl.constexpr(16)


@triton.jit
def pair_mask(ids, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """[C, C], whether token i may read token j."""
    token = tl.arange(0, C)
    mask = token[:, None] >= token[None, :]
    if DOCUMENTS:
        mask = mask & (ids[:, None] == ids[None, :])
    return mask


@triton.jit
def head_decay(b, mask, C: tl.constexpr):
    """2^(b_i - b_j) [C, C] for one decay per head, b [C, 1]; zero for pairs that do not count."""
    b = tl.reshape(b, (C,))
    difference = tl.where(mask, (b[:, None] - b[None, :]).to(tl.float32), 0.0)
    return tl.where(mask, power(difference), 0.0)


@triton.jit
def powers_around_half(b, b_end):
    """2^(b - r) and 2^(r' - b) [C, N], and 2^r [N]; r = r' = b_C / 2 in a mild chunk.

    2^r times the first is 2^b, and times the second 2^(b_C - b). That holds in strong chunks too:
    r is kept above -LIMIT, and r' = b_C - r, so that nothing overflows.
    """
    half = tl.maximum(b_end * 0.5, -LIMIT)
    return power(b - half[None, :]), power((b_end - half)[None, :] - b), power(half)


@triton.jit
def powers_of_mild(around, b_end):
    """`powers_around_half` of a mild chunk, from `sums_around_half`."""
    return power(around), power(-around), power(b_end * 0.5)


@triton.jit
def product_in_two(left_high, left_low, right, total):
    """(left_high + left_low) @ fp32 right + total in three bf16 products."""
    high, low = in_two(right)
    small = tl.dot(left_high, low, tl.dot(left_low, high, total))
    return tl.dot(left_high, high, small)


@triton.jit
def mild_scores(read, written, PRECISION: tl.constexpr):
    """[C, C] of q 2^(b - r) and k 2^(r - b), unscaled, whatever stands above the diagonal."""
    if PRECISION == "tf32":
        read, written = nearest_tf32(read), nearest_tf32(written)
    return tl.dot(read, tl.trans(written), input_precision=PRECISION)


@triton.jit
def strong_scores(q, k, b, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """`mild_scores` for decays of any strength."""
    token = tl.arange(0, C)
    sub = token // SUB
    scores = tl.zeros([C, C], dtype=tl.float32)
    for later in range(1, C // SUB):
        start = row_of(b, later * SUB - 1, C)[None, :]
        read = tl.where((sub == later)[:, None], q * power(tl.minimum(b - start, 0.0)), 0.0)
        written = tl.where((sub < later)[:, None], k * power(tl.minimum(start - b, 0.0)), 0.0)
        scores += mild_scores(read, written, PRECISION)
    for j in range(SUB):
        k_j = rows_of_subchunks(k, j, C, SUB, N)
        b_j = rows_of_subchunks(b, j, C, SUB, N)
        column = tl.sum(q * k_j * power(tl.minimum(b - b_j, 0.0)), axis=1)
        scores += tl.where(token[None, :] == (sub * SUB + j)[:, None], column[:, None], 0.0)
    return scores


@triton.jit
def strong_read_gradients(dscores, k, b, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """[C, N], the gradient of q, for decays of any strength; dscores [C, C], zero where masked."""
    token = tl.arange(0, C)
    sub = token // SUB
    dq = tl.zeros([C, N], dtype=tl.float32)
    for later in range(1, C // SUB):
        start = row_of(b, later * SUB - 1, C)[None, :]
        up = tl.where((sub == later)[:, None], power(tl.minimum(b - start, 0.0)), 0.0)
        written = tl.where((sub < later)[:, None], k * power(tl.minimum(start - b, 0.0)), 0.0)
        dq += up * tl.dot(dscores, written, input_precision=PRECISION)
    for j in range(SUB):
        chosen = token[None, :] == (sub * SUB + j)[:, None]
        column = tl.sum(tl.where(chosen, dscores, 0.0), axis=1)[:, None]
        k_j = rows_of_subchunks(k, j, C, SUB, N)
        b_j = rows_of_subchunks(b, j, C, SUB, N)
        dq += column * power(tl.minimum(b - b_j, 0.0)) * k_j
    return dq


@triton.jit
def strong_write_gradients(
    dscores, q, b, C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):
    """[C, N], the gradient of k."""
    token = tl.arange(0, C)
    sub, place = token // SUB, token % SUB
    dk = tl.zeros([C, N], dtype=tl.float32)
    for later in range(1, C // SUB):
        start = row_of(b, later * SUB - 1, C)[None, :]
        read = tl.where((sub == later)[:, None], q * power(tl.minimum(b - start, 0.0)), 0.0)
        down = tl.where((sub < later)[:, None], power(tl.minimum(start - b, 0.0)), 0.0)
        dk += down * tl.dot(tl.trans(dscores), read, input_precision=PRECISION)
    for j in range(SUB):
        chosen = token[None, :] == (sub * SUB + j)[:, None]
        column = tl.sum(tl.where(chosen, dscores, 0.0), axis=1)[:, None]
        b_j = rows_of_subchunks(b, j, C, SUB, N)
        total = sums_of_subchunks(column * power(tl.minimum(b - b_j, 0.0)) * q, C, SUB, N)
        dk += tl.where((place == j)[:, None], total, 0.0)
    return dk
