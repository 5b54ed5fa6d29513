"""A checkpoint under examination: loaded, cut over all ranks, and asked for hidden states.

What comes out of the decoder is [B, L, D] and small. What the head makes of it, [B, L, vocabulary],
is not, so the head is applied elsewhere (`scores`) and only where a token is scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from hybridsp.mesh import SPMesh
from hybridsp.parallelize import parallelize
from hybridsp.pretrained import load_causal_lm
from hybridsp.sharding import shard_batch

# Tokens of one forward on each rank: enough to fill a GPU, little beside a training step.
TOKENS_PER_RANK = 2**15


class Subject:
    """A parallelized model that answers for this rank's part of a batch.

    Args:
        name: how tables call it.
        model: a causal language model of a supported family; it is parallelized in place.
        mesh: the grid of ranks; all of them share one sequence.

    Raises:
        ValueError: the mesh has data parallelism, or the model cannot be parallelized.
    """

    def __init__(self, name: str, model: PreTrainedModel, mesh: SPMesh) -> None:
        if mesh.dp != 1:
            raise ValueError(
                f"{mesh} trains {mesh.dp} sequences at once, but here all ranks share one: build "
                f"the mesh with ring * ulysses = {mesh.world_size}"
            )
        parallelize(model, mesh)
        self.name, self.mesh = name, mesh
        self.model = model.to(mesh.device).eval()

    def rows_per_batch(self, length: int) -> int:
        """Sequences of `length` tokens to give to one forward."""
        return max(1, TOKENS_PER_RANK * self.mesh.sp // length)

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's output for this rank's part of a batch. Collective.

        Args:
            batch: as `shard_batch` takes it, the same on every rank.

        Returns:
            hidden [B, L, D], the labels of its tokens int64 [B, L] (-100 where none counts) and
            their positions in their documents int64 [B, L].
        """
        part: dict[str, Any] = shard_batch(batch, self.mesh)
        labels = part.pop("shift_labels")
        output = self.model.get_decoder()(**part, use_cache=False)
        return output.last_hidden_state, labels, part["position_ids"]

    @property
    def head(self) -> Tensor:
        """The weight that makes logits of hidden states, [vocabulary, D]."""
        return self.model.lm_head.weight

    def total(self, values: Tensor) -> Tensor:
        """The sum of each rank's values, on the CPU. Collective."""
        values = values.clone()
        dist.all_reduce(values, group=self.mesh.sp_group)
        return values.cpu()


def load_subject(name: str, folder: str | Path, world: SPMesh, dtype: torch.dtype) -> Subject:
    """Load a checkpoint and cut it over all ranks, by degrees that fit its heads. Collective.

    Args:
        name: how tables call it.
        folder: where the checkpoint is.
        world: any mesh over the job.
        dtype: of the weights.

    Raises:
        ValueError: the checkpoint is not whole or not supported; on every rank.
    """

    def load() -> PreTrainedModel:
        return load_causal_lm(folder, dtype=dtype)

    model = world.on_every_rank(load)
    mesh = SPMesh.auto(
        world.world_size,
        num_heads=model.config.num_attention_heads,
        num_kv_heads=model.config.num_key_value_heads,
    )
    return Subject(name, model, mesh)


__all__ = ["Subject", "load_subject"]
