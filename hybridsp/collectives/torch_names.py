"""Collectives on one tensor per rank, whatever this PyTorch calls them.

torch 2.13 renamed them and warns of the old names, which are all that torch 2.11 knows.
"""

from __future__ import annotations

import torch.distributed as dist

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

__all__ = ["all_gather", "reduce_scatter"]
