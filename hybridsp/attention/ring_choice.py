"""Which variant brings the keys of a ring faster: a small cost model. Pure.

Forward, for a ring of R = N x M ranks on N hosts, with s a step's blocks and m a message of one
rank's keys over a link:

    ring          (R - 1) max(s, m_step) + s
    double_ring   (N - 1) max(round, m_outer) + round      round = (M - 1) max(s, m_inner) + s
    allgather     max(s, (R - 1) m_gather) + (R - 1) s

The first step is the rank's own blocks. The backward sends the keys again and gradients home: in a
ring beside the next keys, those of the last step behind nothing; after an all-gather all of them
behind nothing. To this come a latency per message and a cost per call of the kernels: blocks of one
kind are one call (`ops.softmax.calls`), so a ring has one a step, and a causal gather two, because
a document's early and late queries see the same first keys.

In a ring over hosts every rank waits for the one whose neighbour is on another host: one network
card per host works, in each direction, and its step holds up all. In a double ring every rank sends
to another host, but once in M steps, so all cards work, and have M steps' time. A ring in both
directions would gain nothing here, since links and cards carry as much to the left while they carry
to the right, and a rank of the ring already sends and receives all the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hybridsp.attention.ring_plan import num_steps, step_blocks
from hybridsp.collectives.cost import Link
from hybridsp.collectives.ring_links import DoubleLinks, RingLinks
from hybridsp.layout import RingLayout

# Orders of magnitude of a GPU of 2023, which is all that the choice needs: what one more call
# costs (launches, a merge), and how fast blocks are done.
CALL_SECONDS = 20e-6
FLOPS_PER_SECOND = 400e12
BACKWARD_FLOPS = 2.5  # of a forward's
GRADIENT_BYTES = 2  # of the keys' and values': fp32 beside bf16
# All others' keys are held at once, and their gradients, which are larger.
MAX_GATHERED_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Forward or backward: seconds of compute, and bytes.

    Attributes:
        ring: ranks R.
        own: seconds of a rank's blocks over its own keys.
        step: of those over another rank's.
        keys: bytes of what a rank shares of its keys and values.
        gradients: of theirs; 0 in the forward.
    """

    ring: int
    own: float
    step: float
    keys: float
    gradients: float

    def ring_seconds(self, link: Link) -> float:
        """One neighbour at a time."""
        keys, gradients = self.keys / link.bandwidth, self.gradients / link.bandwidth
        first = max(self.own, keys) + (self.ring - 2) * max(self.step, keys + gradients)
        return first + self.step + gradients + (self.ring - 1) * link.latency

    def double_seconds(self, links: DoubleLinks) -> float:
        """One neighbour on the host at a time, one host at a time."""
        ranks, inner, outer = links.ranks_per_host, links.inner, links.outer
        hosts = self.ring // ranks
        keys, gradients = self.keys / inner.bandwidth, self.gradients / inner.bandwidth
        far_keys, far_gradients = self.keys / outer.bandwidth, self.gradients / outer.bandwidth
        others = (ranks - 2) * max(self.step, keys + gradients) + self.step
        first = max(max(self.own, keys) + others, far_keys)
        later = max(self.step, keys + gradients) + others
        rounds = first + (hosts - 2) * max(later, far_keys + far_gradients) + later
        latency = (self.ring - hosts) * inner.latency + (hosts - 1) * outer.latency
        return rounds + gradients + far_gradients + latency

    def gather_seconds(self, link: Link) -> float:
        """All at once."""
        keys, gradients = self.keys / link.bandwidth, self.gradients / link.bandwidth
        others = (self.ring - 1) * (self.step + gradients)
        return max(self.own, (self.ring - 1) * keys) + others + link.latency


@lru_cache(maxsize=16)
def choose_variant(
    layout: RingLayout, *, row_bytes: int, pair_flops: int, causal: bool, links: RingLinks
) -> str:
    """The variant predicted to be fastest, forward and backward.

    A gather wins where sequences, or the parts of packed documents that are cut, are short; a
    double ring where the network between hosts is slower than the blocks.

    Args:
        layout: of the ring.
        row_bytes: of one token's keys and values on a rank.
        pair_flops: of one query-key pair on a rank, all heads, forward.
        causal: as in `softmax_attention`.
        links: between the ring's ranks.

    Returns:
        "ring", "double_ring" or "allgather", the same on every rank.
    """
    ring = len(layout.spans)
    if num_steps(layout, "ring") == 1:
        return "ring"
    shared = sum(stop - start for of_rank in layout.shared for start, stop in of_rank)
    keys = shared * row_bytes / ring
    gathered = step_blocks(layout, 0, None, causal)
    calls = sum(bool(step_blocks(layout, 0, other, causal)) for other in range(1, ring))
    gather_calls = min(2 if causal else 1, len(gathered))
    own = sum(block.area for block in step_blocks(layout, 0, 0, causal))
    step = sum(block.area for block in gathered) / (ring - 1)
    passes = [
        _Pass(
            ring=ring,
            own=own * pair_flops * flops / FLOPS_PER_SECOND,
            step=step * pair_flops * flops / FLOPS_PER_SECOND,
            keys=keys,
            gradients=gradients * keys,
        )
        for flops, gradients in ((1.0, 0.0), (BACKWARD_FLOPS, GRADIENT_BYTES))
    ]
    per_call = len(passes) * CALL_SECONDS
    seconds = {"ring": sum(p.ring_seconds(links.step) for p in passes) + calls * per_call}
    if links.double is not None:
        in_double = sum(p.double_seconds(links.double) for p in passes)
        seconds["double_ring"] = in_double + calls * per_call
    if (ring - 1) * keys <= MAX_GATHERED_BYTES:
        at_once = sum(p.gather_seconds(links.gather) for p in passes)
        seconds["allgather"] = at_once + gather_calls * per_call
    return min(seconds, key=seconds.__getitem__)  # the first of equals
