"""What a ring computes: steps, the blocks of each, and which variant brings the keys faster. Pure.

A ring is visited in steps. At step 0 a rank attends to the keys it has; what comes later depends on
the variant, and only the keys of documents that are cut travel:

    variant     step s > 0 brings
    ring        the shared keys of rank r - s, R - 1 times
    allgather   the shared keys of all other ranks at once
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hybridsp.layout import Block, RingLayout, Span, attention_blocks
from hybridsp.ops.softmax import Backend

VARIANTS = ("auto", "ring", "allgather")


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """What a ring computes, and how.

    Attributes:
        rank: of this rank in the ring.
        layout: which tokens the ring's ranks have.
        causal, window, scale: as in `softmax_attention`.
        variant: "ring" or "allgather".
        backend: computes the blocks.
    """

    rank: int
    layout: RingLayout
    causal: bool
    window: int | None
    scale: float
    variant: str
    backend: Backend

    @property
    def steps(self) -> int:
        """Visits of a rank, the one of its own keys included."""
        return num_steps(self.layout, self.variant)

    def owner(self, step: int) -> int:
        """The rank whose keys a ring's step brings."""
        return (self.rank - step) % len(self.layout.spans)

    def blocks(self, step: int) -> tuple[Block, ...]:
        """What this rank computes at a step."""
        source = self.owner(step) if self.variant == "ring" or step == 0 else None
        return step_blocks(self.layout, self.rank, source, self.causal)


def num_steps(layout: RingLayout, variant: str) -> int:
    """Visits of each rank: one where no document is cut."""
    if not any(layout.shared):
        return 1
    return len(layout.spans) if variant == "ring" else 2


# All layers of a model, forward and backward, ask for the same few steps.
@lru_cache(maxsize=256)
def step_blocks(
    layout: RingLayout, rank: int, source: int | None, causal: bool
) -> tuple[Block, ...]:
    """What ring rank `rank` computes of the shared keys of rank `source`; None: of all others'.

    Its own keys are all there, not only the shared ones.
    """
    mine = layout.spans[rank]
    if source is None:
        theirs = tuple(span for _, span in others_shared(layout, rank))
    else:
        theirs = mine if source == rank else layout.shared[source]
    return tuple(attention_blocks(mine, theirs, layout.bounds, causal=causal))


def others_shared(layout: RingLayout, rank: int) -> list[tuple[int, Span]]:
    """The shared spans of all other ranks, rising, each after its rank."""
    spans = [(r, span) for r, of_rank in enumerate(layout.shared) for span in of_rank if r != rank]
    return sorted(spans, key=lambda owned: owned[1])


# Orders of magnitude of a GPU of 2023 inside a host, which is all that the choice needs: what one
# more message and one more block (launches, a merge) cost, how fast keys come, and how fast blocks
# are done.
MESSAGE_SECONDS = 40e-6
BLOCK_SECONDS = 20e-6
BYTES_PER_SECOND = 100e9
FLOPS_PER_SECOND = 400e12
BACKWARD_FLOPS = 2.5  # of a forward's
GRADIENT_BYTES = 2  # of the keys' and values': fp32 beside bf16
# All others' keys are held at once, and their gradients, which are larger.
MAX_GATHERED_BYTES = 256 * 2**20


@lru_cache(maxsize=16)
def choose_variant(layout: RingLayout, *, row_bytes: int, pair_flops: int, causal: bool) -> str:
    """The variant predicted to be faster, forward and backward.

    A ring step hides its messages behind its blocks, if those take longer; an all-gather hides them
    behind the rank's own blocks, the gradients' way back behind nothing, and has fewer messages and
    fewer blocks, each of more keys. So the gather wins where sequences are short, and where many
    packed documents make many small blocks.

    Args:
        layout: of the ring.
        row_bytes: of one token's keys and values on a rank.
        pair_flops: of one query-key pair on a rank, all heads, forward.
        causal: as in `softmax_attention`.

    Returns:
        "ring" or "allgather", the same on every rank.
    """
    ring = len(layout.spans)
    shared = sum(stop - start for of_rank in layout.shared for start, stop in of_rank)
    if (
        num_steps(layout, "ring") == 1
        or (ring - 1) * shared * row_bytes > ring * MAX_GATHERED_BYTES
    ):
        return "ring"
    message = shared * row_bytes / ring / BYTES_PER_SECOND
    blocks = step_blocks(layout, 0, None, causal)
    ring_blocks = sum(len(step_blocks(layout, 0, other, causal)) for other in range(1, ring))
    passes = [(1.0, 0.0), (BACKWARD_FLOPS, GRADIENT_BYTES * message)]
    in_ring = gathered = 0.0
    for flops, gradients in passes:
        rate = FLOPS_PER_SECOND / (pair_flops * flops)
        own = sum(block.area for block in step_blocks(layout, 0, 0, causal)) / rate
        others = sum(block.area for block in blocks) / rate
        step = others / (ring - 1)
        in_ring += max(own, message) + (ring - 2) * max(step, message + gradients) + step
        in_ring += gradients + (ring - 1) * MESSAGE_SECONDS + ring_blocks * BLOCK_SECONDS
        gathered += max(own, (ring - 1) * message) + others
        gathered += (ring - 1) * gradients + MESSAGE_SECONDS + len(blocks) * BLOCK_SECONDS
    return "allgather" if gathered < in_ring else "ring"
