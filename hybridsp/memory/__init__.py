"""What lets one step of a million tokens fit: what is not held, and what is held elsewhere.

An MLP is computed tile by tile, so that nothing of its inner width is ever as long as the sequence;
and what activation checkpointing keeps of each layer lies in host memory until its backward. Both
are put into a model from outside and change no gradient.
"""

from hybridsp.memory.offload import (
    ActivationOffload,
    OffloadingCheckpoint,
    require_checkpointing,
)
from hybridsp.memory.tiled_mlp import tile_mlp

__all__ = ["ActivationOffload", "OffloadingCheckpoint", "require_checkpointing", "tile_mlp"]
