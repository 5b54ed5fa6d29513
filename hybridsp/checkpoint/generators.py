"""The random generators of a rank: torch's, CUDA's, numpy's and Python's.

With as many ranks as before each goes on with its own streams. With another number there is no
stream for each to go on with, so all are seeded anew from the saved run's seed, the step and the
rank: reproducible, and none draws again what was drawn before.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridsp.checkpoint.manifest import REMEDY
from hybridsp.untrusted import reading

WHAT = "random generators"


def generators_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rng-{rank:05d}.pt"


def generators_state() -> dict[str, Any]:
    """This process's generators as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "seed": torch.initial_seed(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_generators(directory: Path, rank: int) -> None:
    """Let this process's generators go on where those of a rank were saved.

    Raises:
        ValueError: the rank's file holds no such state.
    """
    path = directory / generators_file(rank)
    with reading(path, WHAT, REMEDY):
        state = torch.load(path, weights_only=True)
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])


def seed_generators_anew(directory: Path, step: int, rank: int) -> int:
    """Seed this process's generators for a world of another size; returns the saved run's seed.

    Raises:
        ValueError: the first rank's file holds no seed.
    """
    path = directory / generators_file(0)
    with reading(path, WHAT, REMEDY):
        saved = int(torch.load(path, weights_only=True)["seed"])
        words = np.random.SeedSequence([saved, step, rank]).generate_state(2)
    seed = int(words[0]) << 31 | int(words[1]) >> 1
    torch.manual_seed(seed)  # CUDA's as well
    np.random.seed(int(words[0]))
    random.seed(seed)
    return saved


__all__ = ["generators_file", "generators_state", "restore_generators", "seed_generators_anew"]
