"""One hop of the symmetric All-Scan as a Triton kernel: take a state, add to it, hand it on.

The kernel knows pointers only: this rank's state and mailbox, and of its two neighbours the words
it writes to. Some of them lie in another GPU's memory, which changes nothing but the scope of the
flags. `symmetric.py` says what a mailbox is, who owns which flag and why nobody waits for ever.

Why a neighbour that sees a flag sees the data behind it: each thread stores (or loads) its share of
the slice; `tl.debug_barrier` is a bar.sync, which orders the accesses of all threads of the program
before what its thread 0 does next; and that is a release at system scope, which is cumulative: it
publishes what happened before it in whichever thread. The receiver's thread 0 acquires the flag at
system scope, and the barrier with which Triton hands that thread's result to the others orders
their loads after it. (NCCL's primitives post their steps in the same way: barrier, then a release
by one thread.)

The module imports triton, so it is imported on first use.
"""

import triton
import triton.language as tl


@triton.jit(debug=True)  # which is what compiles device_assert
def _take_turn(flag, awaited: tl.constexpr, patience):
    """Wait until `flag` is `awaited` (0 or 1), turn it over, and see what came before it.

    A scalar atomic is done by thread 0, while the others stand at the barrier behind it. The flag
    lies in this GPU's own memory, so the polling never touches NVLink.
    """
    polls = 0
    while tl.atomic_cas(flag, awaited, 1 - awaited, sem="acquire", scope="sys") != awaited:
        polls += 1
        tl.device_assert(polls < patience, "symmetric All-Scan: a neighbouring rank is missing")


@triton.jit(debug=True)
def scan_hop(
    state,  # [numel] fp32: S_p
    decay,  # [numel / SPAN] fp32: d_p, each for SPAN neighbouring numbers of the state
    incoming,  # [numel] fp32, written: In(p)
    inbox,  # [slices, SLICE] fp32, own: what the previous rank has written
    arrived,  # [slices] int32, own: 1 from when the previous rank has written until it is read
    occupied,  # [slices] int32, own: 1 from when this rank claims the next one's slot until read
    next_inbox,  # the next rank's inbox ...
    next_arrived,  # ... and its `arrived`
    previous_occupied,  # the previous rank's `occupied`
    numel,
    patience,  # polls of one flag
    SPAN: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_NEXT: tl.constexpr,
):
    """Program i takes the slices i, i + programs, ...: In = inbox, next inbox = d * In + S."""
    for index in range(tl.program_id(0), tl.cdiv(numel, SLICE), tl.num_programs(0)):
        numbers = index * SLICE + tl.arange(0, SLICE)
        inside = numbers < numel
        # Whatever does not need the neighbours comes first, off the critical path.
        leaving = tl.load(state + numbers, inside)
        if HAS_NEXT:
            _take_turn(occupied + index, 0, patience)
        if HAS_PREVIOUS:
            kept = tl.load(decay + numbers // SPAN, inside)
            _take_turn(arrived + index, 1, patience)
            entering = tl.load(inbox + numbers, inside)
            leaving += kept * entering
        if HAS_NEXT:
            tl.store(next_inbox + numbers, leaving, inside)
        tl.debug_barrier()
        if HAS_NEXT:
            tl.atomic_xchg(next_arrived + index, 1, sem="release", scope="sys")
        if HAS_PREVIOUS:
            tl.atomic_xchg(previous_occupied + index, 0, sem="release", scope="sys")
            tl.store(incoming + numbers, entering, inside)
        else:
            tl.store(incoming + numbers, tl.full([SLICE], 0, tl.float32), inside)
