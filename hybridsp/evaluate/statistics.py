"""How sure a figure is: means of clustered values, and shares of few trials.

Tokens of one window rise and fall together, and windows of one document do: counting each token as
a measurement of its own would make every difference significant. So documents are the clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the standard normal, for 95%.
TWO_SIDED_95 = 1.959964


def clustered_mean(values: Tensor, weights: Tensor, clusters: Tensor) -> tuple[float, float | None]:
    """Weighted mean, and its standard error where values of one cluster are not independent.

    The sandwich estimator of a ratio with clusters, with the usual correction G / (G - 1).

    Args:
        values: [n].
        weights: [n], not negative, not all 0.
        clusters: int64 [n], which cluster each is of.

    Returns:
        The mean and its standard error; None for the error of a single cluster.
    """
    values, weights = values.double(), weights.double()
    mean = (values * weights).sum() / weights.sum()
    _, index = clusters.unique(return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return mean.item(), None
    residuals = torch.zeros(count, dtype=torch.float64)
    residuals.scatter_add_(0, index, weights * (values - mean))
    variance = residuals.square().sum() / weights.sum().square() * count / (count - 1)
    return mean.item(), variance.sqrt().item()


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), which stays inside [0, 1] and is right at 0 and 1.

    Args:
        hits: trials that succeeded.
        trials: at least 1.
    """
    z = TWO_SIDED_95
    share = hits / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    # Rounding can leave a share of 0 or 1, an end of its own interval, outside.
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


__all__ = ["clustered_mean", "wilson_interval"]
