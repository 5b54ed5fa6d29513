"""What softmax attention has to compute, in numbers: documents, pairs, FLOPs, and whose they are.

A pair is a query and a key that it sees. One head's forward is two matrix products over them,
2 D each of multiplications and additions, and a backward five: so

    forward             4 D FLOPs per pair and query head
    forward + backward  3.5 times as many (the backward is 2.5 forwards, its recomputation included)

Pairs are counted exactly: from the documents' lengths, the causal mask and the window. What a
kernel computes in vain, in tiles on the diagonal, is its own loss. Pure: numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hybridsp.layout import attention_areas, even_cuts, intersect, ring_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARDS = {"fwd": 1.0, "fwd+bwd": 3.5}
# Of the logarithm of a document's length: among 50 one has a fifth of all tokens, or so.
LENGTH_SIGMA = 1.5
BALANCE_COLUMNS = {
    "documents": "documents",
    "ring": "R",
    "pairs_per_rank": "pairs/rank",
    "max_over_mean": "max / mean",
    "contiguous_max_over_mean": "contiguous",
}
BALANCE_TITLE = (
    "balance: query-key pairs of the busiest ring rank over the mean; the last column if ranks "
    "kept their contiguous tokens"
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Causal attention over one packed sequence.

    Attributes:
        bounds: document boundaries, rising from 0 to the number of tokens.
        heads, kv_heads, head_dim: Hq, Hkv, D (keys' and values' alike).
        window: keys that a query sees, itself included; None for all.
        dtype: of q, k, v.
    """

    bounds: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """T."""
        return self.bounds[-1]

    def flops(self, passes: str) -> float:
        """Of "fwd" or "fwd+bwd"; see the module's text."""
        pairs = count_pairs(self.bounds, self.window)
        return FORWARDS[passes] * 4 * pairs * self.head_dim * self.heads


def document_bounds(tokens: int, documents: int, seed: int) -> tuple[int, ...]:
    """Boundaries of so many documents, of at least one token each, with skewed lengths.

    Lengths are lognormal: a few long documents hold most of the tokens, as in packed batches.

    Raises:
        ValueError: there are more documents than tokens.
    """
    if documents > tokens:
        raise ValueError(
            f"{documents} documents in {tokens} tokens: each needs one, so ask for fewer "
            "(--documents) or more tokens (--tokens-per-rank)"
        )
    shares = np.random.default_rng(seed).lognormal(sigma=LENGTH_SIGMA, size=documents).cumsum()
    cuts = np.floor((tokens - documents) * shares / shares[-1]).astype(int)
    inner = [int(cut) + number for number, cut in enumerate(cuts[:-1], start=1)]
    return (0, *inner, tokens)


def count_pairs(
    bounds: Sequence[int], window: int | None = None, queries: tuple[int, int] | None = None
) -> int:
    """Query-key pairs of causal attention within documents.

    Args:
        bounds: document boundaries, rising from 0.
        window: keys that a query sees, itself included; None for all.
        queries: count those of these tokens alone, [start, stop).
    """
    total = 0
    for start, stop in pairwise(bounds):
        mine = (start, stop) if queries is None else intersect((start, stop), queries)
        if mine is not None:
            total += _first_pairs(mine[1] - start, window) - _first_pairs(mine[0] - start, window)
    return total


def _first_pairs(queries: int, window: int | None) -> int:
    """Pairs of a document's first queries: 1, 2, 3, ... keys each, but no more than the window."""
    rising = queries if window is None else min(queries, window)
    return rising * (rising + 1) // 2 + (queries - rising) * (window or 0)


def balance(bounds: tuple[int, ...], ring: int) -> dict[str, Any]:
    """How evenly a ring's ranks share the pairs of these documents, by name."""
    areas = attention_areas(ring_layout(bounds, ring), causal=True)
    contiguous = [count_pairs(bounds, queries=span) for span in even_cuts(bounds[-1], ring)]
    mean = count_pairs(bounds) / ring
    return {
        "documents": len(bounds) - 1,
        "ring": ring,
        "pairs_per_rank": mean,
        "max_over_mean": max(areas) / mean,
        "contiguous_max_over_mean": max(contiguous) / mean,
    }
