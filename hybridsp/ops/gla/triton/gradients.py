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
    load_block,
    load_documents,
    load_gates,
    power,
    store_block,
    sum_rows,
)
from hybridsp.ops.gla.triton.intra import (
    head_decay,
    mild_read_gradients,
    mild_write_gradients,
    pair_mask,
    strong_read_gradients,
    strong_write_gradients,
)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, v, g, do, documents, strong, states, dstates, crossed, dq, dk, dg,
    scale, length, chunks, v_parts, first_bh, first_chunk, part_chunks, tokens,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, CHANNELS: tl.constexpr,
    STRONG: tl.constexpr, DOCUMENTS: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, L, H, K] and dg [B, L, H, K], or [K blocks, B, L, H] for one decay per head.

    states, dstates [heads, part_chunks, K, V] and crossed [v_parts, heads, part_chunks, K] are
    `walk_kernel`'s, of a part of the span; dstates hold the gradients, scale included; tokens =
    B * L. With a decay per channel one launch does the mild chunks, another (STRONG) the strong
    ones.
    """
    # Neighbours in the grid share v and do.
    k_blocks: tl.constexpr = tl.cdiv(K, BK)
    k_block, in_part = tl.program_id(0) % k_blocks, tl.program_id(0) // k_blocks
    chunk, bh = first_chunk + in_part, first_bh + tl.program_id(1)
    column, first = k_block * BK, chunk * C
    if CHANNELS:  # noqa: SIM102 - Triton would load on both sides of an `and`
        if tl.load(strong + bh.to(tl.int64) * chunks + chunk) != STRONG:
            return
    token = ((bh // H).to(tl.int64) * length + first) * H + bh % H
    left = length - first
    place = tl.program_id(1).to(tl.int64) * part_chunks + in_part
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

    ids, before, last = 0, 0, 0
    if DOCUMENTS:
        ids, before, last = load_documents(documents, first, length, C)
    g_column = column if CHANNELS else 0
    b, b_end = load_gates(g + token * G, H * G, left, g_column, C, BG, G, SUM)
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

    # First all of dq, then all of dk: together they would not fit the registers.
    k_values = load_block(k + token * K, H * K, left, column, C, BK, K).to(tl.float32)
    dread *= power(b) * scale
    if DOCUMENTS:
        dread = tl.where((ids == before)[:, None], dread, 0.0)
    if STRONG:
        dread += strong_read_gradients(dscores, k_values, b, C, BK, PRECISION)
    elif CHANNELS:
        dread += mild_read_gradients(dscores, k_values, b, C, PRECISION)
    else:
        dread = tl.dot(dscores, k_values, dread, input_precision=PRECISION)
    q_values = load_block(q + token * K, H * K, left, column, C, BK, K).to(tl.float32)
    db = q_values * dread
    store_block(dq + token * K, dread + own * k_values, H * K, left, column, C, BK, K)

    dwritten *= power(b_end[None, :] - b)
    if DOCUMENTS:
        dwritten = tl.where((ids == last)[:, None], dwritten, 0.0)
    rows = column + tl.arange(0, BK)
    through = tl.zeros([BK], dtype=tl.float32)
    for part in range(v_parts):
        line = part * tl.num_programs(1).to(tl.int64) * part_chunks + place
        through += tl.load(crossed + line * K + rows, mask=rows < K, other=0.0)
    through *= power(b_end)
    if DOCUMENTS:
        through = tl.where(before == last, through, 0.0)
    leaving, behind = k_values * dwritten, dwritten
    if STRONG:
        dwritten = strong_write_gradients(dscores, q_values, b, C, BK, PRECISION)
    elif CHANNELS:
        dwritten = mild_write_gradients(dscores, q_values, b, C, PRECISION)
    else:
        dwritten = tl.dot(tl.trans(dscores), q_values, input_precision=PRECISION)
    db -= k_values * dwritten
    dwritten += behind + own * q_values
    store_block(dk + token * K, dwritten, H * K, left, column, C, BK, K)

    earlier = token_index[:, None] > token_index[None, :]
    if CHANNELS:
        dgates = tl.cumsum(db, axis=0, reverse=True) + through[None, :]
        dgates = sum_rows(earlier, leaving, dgates, v.dtype.element_ty == tl.bfloat16, PRECISION)
        store_block(dg + token * K, dgates, H * K, left, column, C, BK, K)
    else:
        dgates = tl.cumsum(tl.sum(db, axis=1), axis=0, reverse=True) + tl.sum(through, axis=0)
        dgates += tl.sum(tl.where(earlier, tl.sum(leaving, axis=1)[None, :], 0.0), axis=1)
        dg += k_block.to(tl.int64) * tokens * H + token
        tl.store(dg + token_index * H, dgates, mask=token_index < left)
