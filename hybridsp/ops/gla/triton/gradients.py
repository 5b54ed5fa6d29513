"""Gradients of q, k and the gates, chunk by chunk and all chunks at once.

With S the state before a chunk, D the gradient of the state behind it, and the sum over V of S D,
which needs S in fp32 (all from `walk_kernel`),

    dscores_ij = scale do_i . v_j                                          j <= i, same document
    dq_i = dscores x k (inside the chunk)  +  scale (do_i S^T) 2^b_i
    dk_j = dscores x q (inside the chunk)  +  (v_j D^T) 2^(b_C - b_j)
    db_i = q_i dq_i - k_i dk_i
    dg_t = sum over i >= t of db_i  +  sum over j < t of w_j  +  2^b_C sum over V of S D

where w_j = k_j (v_j D^T) 2^(b_C - b_j) is left out of db_j: what token j leaves behind the chunk is
decayed by the gates behind j alone. (GLA, arXiv:2312.06635, section 4, adds it to all gates and
takes it off again, a small difference of large numbers where gates are strong. One running sum over
the whole sequence would do without S D, and let rounding errors add up.)
"""

import triton
import triton.language as tl

from hybridsp.ops.gla.triton.blocks import (
    SIZES,
    in_two,
    load_block,
    load_documents,
    load_gates,
    power,
    running_sums,
    store_block,
    sum_rows,
    sums_around_half,
)
from hybridsp.ops.gla.triton.intra import (
    head_decay,
    pair_mask,
    powers_around_half,
    powers_of_mild,
    product_in_two,
    strong_read_gradients,
    strong_write_gradients,
)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, v, g, do, documents, strong, states, dstates, crossed, dq, dk, dg,
    scale, length, chunks, first_bh, first_chunk, part_chunks, tokens,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, V_PARTS: tl.constexpr,
    CHANNELS: tl.constexpr, STRONG: tl.constexpr, DOCUMENTS: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, L, H, K] and dg [B, L, H, K], or [K blocks, B, L, H] for one decay per head.

    states, dstates [heads, part_chunks, K, V] and crossed [V_PARTS, heads, part_chunks, K] are
    `walk_kernel`'s, of a part of the span; dstates hold the gradients, scale included; tokens =
    B * L. With a decay per channel one launch does the mild chunks, another (STRONG) the strong
    ones.
    """
    # Neighbours in the grid share v and do.
    k_blocks: tl.constexpr = tl.cdiv(K, BK)
    column, in_part = tl.program_id(0) % k_blocks * BK, tl.program_id(0) // k_blocks
    chunk, bh = first_chunk + in_part, first_bh + tl.program_id(1)
    first = chunk * C
    if CHANNELS:  # noqa: SIM102 - Triton would load on both sides of an `and`
        if tl.load(strong + bh.to(tl.int64) * chunks + chunk) != STRONG:
            return
    token = ((bh // H).to(tl.int64) * length + first) * H + bh % H
    left = length - first
    place = tl.program_id(1).to(tl.int64) * part_chunks + in_part
    ids, before, last = 0, 0, 0
    if DOCUMENTS:
        ids, before, last = load_documents(documents, first, length, C)
    # Needed behind the products over V, asked for before them: they arrive in the meantime.
    q_block = load_block(q + token * K, H * K, left, column, C, BK, K)
    k_block = load_block(k + token * K, H * K, left, column, C, BK, K)
    gates = load_gates(g + token * G, H * G, left, column if CHANNELS else 0, C, BG, G)
    tile = place * K * V + column * V
    dread = tl.zeros([C, BK], dtype=tl.float32)
    dwritten = tl.zeros([C, BK], dtype=tl.float32)
    dscores = tl.zeros([C, C], dtype=tl.float32)
    for v_column in range(0, V, BV):
        v_block = load_block(v + token * V, H * V, left, v_column, C, BV, V)
        do_block = load_block(do + token * V, H * V, left, v_column, C, BV, V)
        state = load_block(states + tile, V, K - column, v_column, BK, BV, V)
        dstate = load_block(dstates + tile, V, K - column, v_column, BK, BV, V)
        dscores = tl.dot(do_block, tl.trans(v_block), dscores, input_precision=PRECISION)
        dread = tl.dot(do_block, tl.trans(state), dread, input_precision=PRECISION)
        dwritten = tl.dot(v_block, tl.trans(dstate), dwritten, input_precision=PRECISION)
    finish(
        q_block, k_block, gates, dscores, dread, dwritten, crossed, dq, dk, dg,
        ids, before, last, token, left, place, column, scale, part_chunks, tokens,
        H, K, G, C, BK, V_PARTS, CHANNELS, STRONG, DOCUMENTS, SUM, PRECISION,
    )  # fmt: skip


@triton.jit
def finish(
    q_block, k_block, gates, dscores, dread, dwritten, crossed, dq, dk, dg,
    ids, before, last, token, left, place, column, scale, part_chunks, tokens,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    V_PARTS: tl.constexpr, CHANNELS: tl.constexpr, STRONG: tl.constexpr,
    DOCUMENTS: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of a block of K, from the sums over V: do . v, do S^T and v D^T."""
    mild: tl.constexpr = CHANNELS and not STRONG
    mild_bf16: tl.constexpr = mild and q_block.dtype == tl.bfloat16
    if mild_bf16:
        around, b_end = sums_around_half(gates, C)
        up, down, whole = powers_of_mild(around, b_end)
    else:
        b, b_end = running_sums(gates, SUM)
        if mild:
            up, down, whole = powers_around_half(b, b_end)
    mask = pair_mask(ids, C, DOCUMENTS)
    dscores = tl.where(mask, dscores * scale, 0.0)
    # A token reads itself without decay. Left to cancel in db, these pairs would leave their
    # rounding errors in dg, which are all there is of it where gates are strong.
    token_index = tl.arange(0, C)
    itself = token_index[:, None] == token_index[None, :]
    own = tl.sum(tl.where(itself, dscores, 0.0), axis=1)[:, None]
    dscores = tl.where(itself, 0.0, dscores)
    if not CHANNELS:
        dscores *= head_decay(b, mask, C)
    if mild_bf16:
        dscores_high, dscores_low = in_two(dscores)

    # First all of dq, then all of dk: together they would not fit the registers.
    k_values = k_block.to(tl.float32)
    if mild:  # 2^(b - r), the rest of 2^b, is taken together with that of the pairs
        dread *= (whole * scale)[None, :]
    else:
        dread *= power(b) * scale
    if DOCUMENTS:
        dread = tl.where((ids == before)[:, None], dread, 0.0)
    if STRONG:
        dread += strong_read_gradients(dscores, k_values, b, C, BK, PRECISION)
    elif mild_bf16:
        dread = up * product_in_two(dscores_high, dscores_low, k_values * down, dread)
    elif CHANNELS:
        dread = up * tl.dot(dscores, k_values * down, dread, input_precision=PRECISION)
    else:
        dread = tl.dot(dscores, k_values, dread, input_precision=PRECISION)
    q_values = q_block.to(tl.float32)
    db = q_values * dread
    store_block(dq + token * K, dread + own * k_values, H * K, left, column, C, BK, K)

    if mild:
        dwritten *= down * whole[None, :]
    else:
        dwritten *= power(b_end[None, :] - b)
    if DOCUMENTS:
        dwritten = tl.where((ids == last)[:, None], dwritten, 0.0)
    through = sum_of_parts(crossed, place, column, part_chunks, K, BK, V_PARTS) * power(b_end)
    if DOCUMENTS:
        through = tl.where(before == last, through, 0.0)
    leaving, behind = k_values * dwritten, dwritten
    if STRONG:
        dwritten = strong_write_gradients(dscores, q_values, b, C, BK, PRECISION)
    elif mild_bf16:
        nothing = tl.zeros([C, BK], dtype=tl.float32)
        turned_high, turned_low = tl.trans(dscores_high), tl.trans(dscores_low)
        dwritten = down * product_in_two(turned_high, turned_low, q_values * up, nothing)
    elif CHANNELS:
        dwritten = down * tl.dot(tl.trans(dscores), q_values * up, input_precision=PRECISION)
    else:
        dwritten = tl.dot(tl.trans(dscores), q_values, input_precision=PRECISION)
    db -= k_values * dwritten
    dwritten += behind + own * q_values
    store_block(dk + token * K, dwritten, H * K, left, column, C, BK, K)

    if CHANNELS:
        in_bf16: tl.constexpr = q_block.dtype == tl.bfloat16
        dgates = channel_gates(db, leaving, through, C, BK, in_bf16, mild_bf16, PRECISION)
        store_block(dg + token * K, dgates, H * K, left, column, C, BK, K)
    else:
        dg += (column // BK).to(tl.int64) * tokens * H + token
        dgates = head_gates(db, leaving, through, C)
        tl.store(dg + token_index * H, dgates, mask=token_index < left)


@triton.jit
def sum_of_parts(
    crossed, place, column, part_chunks, K: tl.constexpr, BK: tl.constexpr, V_PARTS: tl.constexpr
):
    """Sum over V of S D [BK], of which each walk had some columns."""
    rows = column + tl.arange(0, BK)
    through = tl.zeros([BK], dtype=tl.float32)
    for part in tl.static_range(V_PARTS):
        line = part * tl.num_programs(1).to(tl.int64) * part_chunks + place
        through += tl.load(crossed + line * K + rows, mask=rows < K, other=0.0)
    return through


@triton.jit
def channel_gates(
    db, leaving, through, C: tl.constexpr, BK: tl.constexpr, IN_BF16: tl.constexpr,
    BY_PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[C, BK], the three sums of dg; BY_PRODUCT: that over db is one with ones, as that over w."""
    token = tl.arange(0, C)
    earlier = token[:, None] > token[None, :]
    if BY_PRODUCT:
        dgates = tl.zeros([C, BK], dtype=tl.float32) + through[None, :]
        from_here = token[:, None] <= token[None, :]
        dgates = sum_rows(from_here, db, dgates, IN_BF16, PRECISION)
    else:
        dgates = tl.cumsum(db, axis=0, reverse=True) + through[None, :]
    return sum_rows(earlier, leaving, dgates, IN_BF16, PRECISION)


@triton.jit
def head_gates(db, leaving, through, C: tl.constexpr):
    """[C], the same for one decay that all channels of the block share."""
    token = tl.arange(0, C)
    earlier = token[:, None] > token[None, :]
    dgates = tl.cumsum(tl.sum(db, axis=1), axis=0, reverse=True) + tl.sum(through, axis=0)
    return dgates + tl.sum(tl.where(earlier, tl.sum(leaving, axis=1)[None, :], 0.0), axis=1)
