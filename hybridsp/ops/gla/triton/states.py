"""The recurrent state along a span: two kernels that run in both directions.

    forward   S <- kept S + written^T v          from left to right
    reverse   D <- kept D + read^T do            from right to left

with read, written and kept of each chunk from `prepare.py`. scale x D is the gradient of the loss
in the state, so the backward pass is the forward pass with read and written, v and do, left and
right exchanged. A batch of one has too few heads to fill a GPU if each is walked from end to end,
so a span is cut in *stretches* of some chunks:

    walk_kernel   each stretch from zero: what it does to a state
    scan_kernel   those, one behind the other: what enters each stretch, and the span as a whole
    walk_kernel   each stretch again, now with what enters it: outputs, or the state of each chunk

The state that enters the span from another rank joins at the head of each stretch of the second
walk, as decay x state, and so costs no pass of its own.
"""

import triton
import triton.language as tl

from hybridsp.ops.gla.triton.blocks import (
    SIZES,
    exact_product,
    load_block,
    store_block,
    tail_of,
    with_tail,
)

# End states of stretches that a scan has on their way: it does nothing but wait for memory.
SCAN_STAGES = tl.constexpr(4)


@triton.jit(do_not_specialize=SIZES)
def walk_kernel(
    read, written, kept, y, pairs, entering, until, incoming, out, chunk_states, dstates, dtails,
    crossed, ends, decays, scale, length, chunks, stretch_chunks, stretches, first_bh,
    first_stretch, part_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    ENTER: tl.constexpr, INCOMING: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
    CROSS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry a block of the state through a stretch, chunk by chunk. Four ways of it are used:

        from zero                              what each stretch does       both directions
        ENTER OUTPUT                           o                            forward
        ENTER OUTPUT KEEP REVERSE              dv, dstates                  backward
        ENTER KEEP CROSS                       states, crossed              backward

    Without ENTER the stretch's end state goes to ends [B, H, stretches, K, V] and its decay to
    decays [B, H, stretches, G]. ENTER: begin with what enters the stretch, and with INCOMING also
    with what of the state that enters the span is left there.
    OUTPUT (BK holds all of K): o = pairs v + scale read S; in reverse dv = pairs^T do + scale
    written D.
    KEEP: the state before each chunk, in reverse scale x D behind it, to chunk_states
    [heads, part_chunks, K, V] of the part of the span from first_bh and first_stretch on.
    CROSS: with dstates, what KEEP left in reverse, the sum over the block's columns of S dS to
    crossed [blocks of V, heads, part_chunks, K]. With gates at 1 it is nearly all there is of dg,
    and rounding dS to bf16 would be nearly all of dg's error: where dstates are bf16, KEEP leaves
    their tails beside them.
    """
    block, bh = tl.program_id(0), first_bh + tl.program_id(2)
    stretch = first_stretch + tl.program_id(1)
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    v_block = block % v_blocks
    column, v_column = block // v_blocks * BK, v_block * BV
    g_column = column if G == K else 0
    gates = g_column + tl.arange(0, BG)
    start = (bh // H).to(tl.int64) * length
    head = bh % H
    place = bh.to(tl.int64) * stretches + stretch
    inner = column * V
    # Gradients that come in or go out are scale x D.
    unit = scale if REVERSE else 1.0
    if ENTER:
        state = load_block(entering + place * K * V + inner, V, K - column, v_column, BK, BV, V)
        if INCOMING:
            left_over = tl.load(until + place * G + gates, mask=gates < G, other=0.0) / unit
            whole = incoming + bh.to(tl.int64) * K * V + inner
            state += left_over[:, None] * load_block(whole, V, K - column, v_column, BK, BV, V)
    else:
        state = tl.zeros([BK, BV], dtype=tl.float32)
    decay = tl.full([BG], 1.0, dtype=tl.float32)
    here = tl.minimum(stretch_chunks, chunks - stretch * stretch_chunks)
    for step in range(here):
        chunk = stretch * stretch_chunks + (here - 1 - step if REVERSE else step)
        first = chunk * C
        token, left = (start + first) * H + head, length - first
        in_part = chunk - first_stretch * stretch_chunks
        chunk_place = tl.program_id(2).to(tl.int64) * part_chunks + in_part
        y_block = load_block(y + token * V, H * V, left, v_column, C, BV, V)
        w_block = load_block(written + token * K, H * K, left, column, C, BK, K)
        crossing = w_block
        if REVERSE:
            crossing = load_block(read + token * K, H * K, left, column, C, BK, K)
        gate_tile = kept + (bh.to(tl.int64) * chunks + chunk) * G
        passing = tl.load(gate_tile + gates, mask=gates < G, other=1.0)
        tile = chunk_place * K * V + inner
        if KEEP:
            before = state * unit
            store_block(chunk_states + tile, before, V, K - column, v_column, BK, BV, V)
            if REVERSE and dtails is not None:
                tail = tail_of(before)
                store_block(dtails + tile, tail, V, K - column, v_column, BK, BV, V)
        if CROSS:
            dstate = load_block(dstates + tile, V, K - column, v_column, BK, BV, V)
            if dtails is not None:
                tail = load_block(dtails + tile, V, K - column, v_column, BK, BV, V)
                dstate = with_tail(dstate, tail)
            rows = column + tl.arange(0, BK)
            line = v_block * tl.num_programs(2).to(tl.int64) * part_chunks + chunk_place
            tl.store(crossed + line * K + rows, tl.sum(state * dstate, axis=1), mask=rows < K)
        if OUTPUT:
            tokens = tl.arange(0, C)
            pair_tile = pairs + (bh.to(tl.int64) * chunks + chunk) * C * C
            among = tl.load(pair_tile + tokens[:, None] * C + tokens[None, :])
            if REVERSE:
                among, reader = tl.trans(among), w_block
            else:
                reader = load_block(read + token * K, H * K, left, column, C, BK, K)
            found = tl.dot(reader, state.to(y_block.dtype), input_precision=PRECISION) * scale
            found = exact_product(among, y_block, found, PRECISION)
            store_block(out + token * V, found, H * V, left, v_column, C, BV, V)
        state = state * passing[:, None]
        state = tl.dot(tl.trans(crossing), y_block, state, input_precision=PRECISION)
        decay *= passing
    if not ENTER:
        store_block(ends + place * K * V + inner, state, V, K - column, v_column, BK, BV, V)
        if v_column == 0:
            tl.store(decays + place * G + gates, decay, mask=gates < G)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    states, decays, until, end, total, scale, stretches,
    K: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
    BK: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace each stretch's end state by what enters it if zero enters the span.

    until [B, H, stretches, G]: what is left, at the stretch, of a state that enters the span. end
    [B, H, K, V], total [B, H, G]: state, in reverse scale x D, and decay behind the whole span.
    """
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    column, v_column = block // v_blocks * BK, block % v_blocks * BV
    g_column = column if G == K else 0
    gates = g_column + tl.arange(0, BG)
    inner = column * V
    state = tl.zeros([BK, BV], dtype=tl.float32)
    decay = tl.full([BG], 1.0, dtype=tl.float32)
    for step in tl.range(stretches, num_stages=SCAN_STAGES):
        place = bh * stretches + (stretches - 1 - step if REVERSE else step)
        tile = states + place * K * V + inner
        added = load_block(tile, V, K - column, v_column, BK, BV, V)
        passing = tl.load(decays + place * G + gates, mask=gates < G, other=1.0)
        store_block(tile, state, V, K - column, v_column, BK, BV, V)
        if v_column == 0:
            tl.store(until + place * G + gates, decay, mask=gates < G)
        state = state * passing[:, None] + added
        decay *= passing
    unit = scale if REVERSE else 1.0
    store_block(end + bh * K * V + inner, state * unit, V, K - column, v_column, BK, BV, V)
    if v_column == 0:
        tl.store(total + bh * G + gates, decay, mask=gates < G)
