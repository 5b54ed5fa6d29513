"""What a chunk's gates make of q and k, computed once and read by every kernel behind.

    read_i     q_i 2^b_i                  what token i reads from the state before its chunk
    written_j  k_j 2^(b_C - b_j)          what token j leaves in the state after its chunk
    kept       2^b_C                      what the chunk leaves of the state before it
    pairs_ij   scale q_i . k_j 2^(b_i - b_j)   what token i reads from token j (`intra.py`)

With these the recurrence is products of matrices and no gate is looked at again: one pass over q,
k and g buys several passes without exponentials. Where a document starts, what would cross its
start is zero. read and written are rounded to the inputs' dtype, so `scale` is left out of them: a
gate at 1 then rounds nothing. pairs stay in fp32.
"""

import triton
import triton.language as tl

from hybridsp.ops.gla.triton.blocks import (
    SIZES,
    load_block,
    load_documents,
    load_gates,
    power,
    running_sums,
    store_block,
)
from hybridsp.ops.gla.triton.intra import (
    LIMIT,
    head_decay,
    mild_scores,
    pair_mask,
    powers_around_half,
    strong_scores,
)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    q, k, g, documents, read, written, kept, pairs, strong, scale, length, chunks, first_chunk,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, CHANNELS: tl.constexpr,
    STATES: tl.constexpr, PAIRS: tl.constexpr, STRONG: tl.constexpr, DOCUMENTS: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """STATES: read, written [B, L, H, K] and kept [B, H, chunks, G]. PAIRS: [B, H, chunks, C, C].

    Of the chunks from first_chunk on, as many as the grid has.
    With a decay per channel two launches make the pairs: the first marks the strong chunks in
    strong [B, H, chunks], the second (STRONG) does those again.
    """
    chunk, bh = first_chunk + tl.program_id(0), tl.program_id(1)
    place = bh.to(tl.int64) * chunks + chunk
    if STRONG:  # noqa: SIM102 - Triton would load on both sides of an `and`
        if tl.load(strong + place) == 0:
            return
    first = chunk * C
    token = ((bh // H).to(tl.int64) * length + first) * H + bh % H
    left = length - first
    ids, before, last = 0, 0, 0
    if DOCUMENTS:
        ids, before, last = load_documents(documents, first, length, C)
    total = tl.zeros([C, C], dtype=tl.float32)
    spread = 0.0
    for column in tl.static_range(0, K, BK):
        g_column = column if CHANNELS else 0
        q_block = load_block(q + token * K, H * K, left, column, C, BK, K)
        k_block = load_block(k + token * K, H * K, left, column, C, BK, K)
        gates = load_gates(g + token * G, H * G, left, g_column, C, BG, G)
        b, b_end = running_sums(gates, SUM)
        if not STRONG:
            up, down, whole = powers_around_half(b, b_end)
            reader, writer = q_block.to(tl.float32) * up, k_block.to(tl.float32) * down
        if STATES:
            read_block, written_block = reader * whole[None, :], writer * whole[None, :]
            passing = power(b_end)
            if DOCUMENTS:
                read_block = tl.where((ids == before)[:, None], read_block, 0.0)
                written_block = tl.where((ids == last)[:, None], written_block, 0.0)
                passing = tl.where(before == last, passing, 0.0)
            store_block(read + token * K, read_block, H * K, left, column, C, BK, K)
            store_block(written + token * K, written_block, H * K, left, column, C, BK, K)
            channels = g_column + tl.arange(0, BG)
            tl.store(kept + place * G + channels, passing, mask=channels < G)
        if PAIRS:
            if STRONG:
                total += strong_scores(
                    q_block.to(tl.float32), k_block.to(tl.float32), b, C, BK, PRECISION
                )
            elif CHANNELS:
                total += mild_scores(reader, writer, PRECISION)
                spread = tl.maximum(spread, tl.max(-b_end, axis=0).to(tl.float32) * 0.5)
            else:
                total += tl.dot(q_block, tl.trans(k_block), input_precision=PRECISION)
    if PAIRS:
        mask = pair_mask(ids, C, DOCUMENTS)
        if not CHANNELS:
            b, _ = running_sums(load_gates(g + token, H, left, 0, C, 1, 1), SUM)
            total *= head_decay(b, mask, C)
        elif not STRONG:
            tl.store(strong + place, (spread > LIMIT).to(tl.int8))
        rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        total = tl.where(mask, total * scale, 0.0)
        tl.store(pairs + place * C * C + rows * C + columns, total)
