"""What the measured kernel and link say about softmax attention on other numbers of ranks.

P = R x U ranks with L tokens each attend to T = P L. A rank's kernel runs at the rate that was
measured on one device, and messages take latency + bytes / bandwidth of one link, the same between
all ranks, or of another one where they leave a host. Per layer, forward:

    all-to-all   q, k, v on the way in and o on the way out, (P - 1) / P of each; nothing hides it
    ring         R steps of equal work; in all but the last one the next K and V travel meanwhile:
                 (R - 1) max(step, message) + step; over hosts the slowest message counts
    double ring  M ranks on each of N hosts: (N - 1) max(round, message between hosts) + round, with
                 round = (M - 1) max(step, message) + step
    allgather    R - 1 messages' bytes at once, behind the first step: max(step, gather) + the rest;
                 over hosts each of M ranks brings an M-th part of what comes from other hosts

The backward has 2.5 times the work, the same all-to-alls in the opposite direction, K and V once
more, and the gradients of K and V in fp32: in a ring beside K and V, the last ones alone (a double
ring's once in the host and once between hosts); of an all-gather behind everything. This is a
model: no congestion, no launches, no imbalance, and a network card for every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridsp.bench.softmax.work import FORWARDS, Work
from hybridsp.collectives.cost import Link
from hybridsp.mesh import choose_degrees

RANKS_DRAWN = [2**n for n in range(1, 11)]
RANKS_PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer on P ranks, of one document.

    Attributes:
        work: heads, head dim and dtype; its tokens are one rank's.
        rate: FLOP/s of the kernel in these passes.
        passes: "fwd" or "fwd+bwd".
        link: between any two ranks, or those of a host.
        host_link: between ranks of different hosts; None where they are not told apart.
    """

    work: Work
    rate: float
    passes: str
    link: Link
    host_link: Link | None = None

    def lines(self) -> dict[str, list[tuple[int, float]]]:
        """(P, fraction of the kernel's rate) of each way to use P ranks, by its label."""
        work, host = self.work, f"U as SPMesh.auto on hosts of {RANKS_PER_HOST}"
        lines: dict[str, list[tuple[int, float]]] = {}
        for ranks in RANKS_DRAWN:
            usp = choose_degrees(ranks, work.heads, work.kv_heads, RANKS_PER_HOST)
            ways = {
                f"ring, {host}": (*usp, "ring"),
                f"allgather, {host}": (*usp, "allgather"),
                "ring, U = 1": (ranks, 1, "ring"),
            }
            if self.host_link is not None:
                ways[f"double ring, {host}"] = (*usp, "double_ring")
                ways["double ring, U = 1"] = (ranks, 1, "double_ring")
            for label, way in ways.items():
                fraction = self.compute_seconds(ranks) / self.seconds(*way)
                lines.setdefault(label, []).append((ranks, fraction))
        return lines

    def seconds(self, ring: int, ulysses: int, variant: str) -> float:
        """What the module's text says. `variant` is never "auto"."""
        forward = self.compute_seconds(ring * ulysses) / FORWARDS[self.passes]
        total = self._attention(forward, ring, ulysses, variant)
        total += self._relayout(ring * ulysses, ulysses)
        if self.passes == "fwd+bwd":
            backward = forward * (FORWARDS["fwd+bwd"] - FORWARDS["fwd"])
            total += self._attention(backward, ring, ulysses, variant, is_backward=True)
            total += self._relayout(ring * ulysses, ulysses)
        return total

    def compute_seconds(self, ranks: int) -> float:
        """Of each rank's share of the kernel's work, if nothing else took time."""
        tokens = self.work.tokens * ranks
        pairs = tokens * (tokens + 1) / 2
        flops = FORWARDS[self.passes] * 4 * pairs * self.work.head_dim * self.work.heads
        return flops / ranks / self.rate

    def _attention(
        self, compute: float, ring: int, ulysses: int, variant: str, *, is_backward: bool = False
    ) -> float:
        if ring == 1:
            return compute
        step, elements = compute / ring, self._kv_elements(ulysses)
        keys, gradients = elements * self.work.dtype.itemsize, is_backward * elements * 4
        places = min(ring, max(1, RANKS_PER_HOST // ulysses))
        if variant == "allgather":
            gather = max(step, self._gather(keys, ring, places))
            give_back = self._gather(gradients, ring, places) if is_backward else 0.0
            return gather + (ring - 1) * step + give_back
        moving = keys + gradients
        if variant == "double_ring" and 1 < places < ring:
            near, far = self.link, self._link_of(True)
            around = (places - 1) * max(step, near.seconds(moving)) + step
            last = near.seconds(gradients) + far.seconds(gradients) if is_backward else 0.0
            return (ring // places - 1) * max(around, far.seconds(moving)) + around + last
        link = self._link_of(ring > places)
        last = link.seconds(gradients) if is_backward else 0.0
        return (ring - 1) * max(step, link.seconds(moving)) + step + last

    def _gather(self, share: float, ring: int, places: int) -> float:
        """Every rank's share to all ranks of a ring, so many of them to a host, or back."""
        inside = self.link.seconds((ring - 1) * share)
        if ring == places or self.host_link is None:
            return inside
        return max(inside, self.host_link.seconds((ring - places) / places * share))

    def _link_of(self, leaves_the_host: bool) -> Link:
        return self.host_link or self.link if leaves_the_host else self.link

    def _kv_elements(self, ulysses: int) -> int:
        """Of the keys and values that a rank holds in attention: U ranks' tokens, some heads."""
        heads = max(1, -(-self.work.kv_heads // ulysses))
        return self.work.tokens * ulysses * heads * 2 * self.work.head_dim

    def _relayout(self, ranks: int, ulysses: int) -> float:
        """Both all-to-alls; KV heads that are fewer than the Ulysses ranks are sent to several."""
        if ranks == 1:
            return 0.0
        per_head = self.work.tokens * self.work.head_dim * self.work.dtype.itemsize
        kv_heads = max(self.work.kv_heads, ulysses)
        away, link = (ranks - 1) / ranks, self._link_of(ranks > RANKS_PER_HOST)
        way_in = link.seconds(away * per_head * (self.work.heads + 2 * kv_heads))
        return way_in + link.seconds(away * per_head * self.work.heads)
