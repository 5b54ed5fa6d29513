"""What a ring computes: its steps, and the blocks of each. Pure.

A ring is visited in steps. At step 0 a rank attends to the keys it has; what comes later depends on
the variant, and only the keys of documents that are cut travel:

    variant       step s > 0 brings
    ring          the shared keys of rank r - s, R - 1 times
    double_ring   of R = N x M ranks, M to a host: those of the rank s % M places to the left on
                  its host, s // M hosts to the left
    allgather     the shared keys of all other ranks at once

A ring is a double ring on one host, M = R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hybridsp.layout import Block, RingLayout, Span, attention_blocks
from hybridsp.ops.softmax import Backend

VARIANTS = ("auto", "ring", "double_ring", "allgather")


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """What a ring computes, and how.

    Attributes:
        rank: of this rank in the ring.
        layout: which tokens the ring's ranks have.
        causal, window, scale: as in `softmax_attention`.
        variant: "ring", "double_ring" or "allgather".
        backend: computes the blocks.
        ranks_per_host: M of a double ring; None for the others.
    """

    rank: int
    layout: RingLayout
    causal: bool
    window: int | None
    scale: float
    variant: str
    backend: Backend
    ranks_per_host: int | None = None

    @property
    def steps(self) -> int:
        """Visits of a rank, the one of its own keys included."""
        return num_steps(self.layout, self.variant)

    @property
    def round(self) -> int:
        """M: the steps of a ring in which the keys of one host go around another."""
        return self.ranks_per_host or len(self.layout.spans)

    def owner(self, step: int) -> int:
        """The rank whose keys a ring's step brings."""
        (host, place), (hosts, places) = divmod(self.rank, self.round), divmod(step, self.round)
        first = (host - hosts) * self.round % len(self.layout.spans)
        return first + (place - places) % self.round

    def blocks(self, step: int) -> tuple[Block, ...]:
        """What this rank computes at a step."""
        source = self.owner(step) if self.variant != "allgather" or step == 0 else None
        return step_blocks(self.layout, self.rank, source, self.causal)


def num_steps(layout: RingLayout, variant: str) -> int:
    """Visits of each rank: one where no document is cut."""
    if not any(layout.shared):
        return 1
    return 2 if variant == "allgather" else len(layout.spans)


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
