"""Evaluation data in step on all ranks, each sample counted once.

Every rank must take the same number of batches, because ranks meet in each. Where the batches do
not go evenly into the data-parallel groups, a group that has run out gets the first batch again,
without labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler

from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL
from hybridsp.trainer.batches import shard_batches


class BatchesInStep(Sampler[list[int]]):
    """The batches of one data-parallel group: every dp-th of the dataset's.

    Args:
        num_samples: samples in the dataset.
        batch_size: samples per batch.
        mesh: the grid of ranks.
    """

    def __init__(self, num_samples: int, batch_size: int, mesh: SPMesh) -> None:
        starts = range(0, num_samples, batch_size)
        batches = [list(range(start, min(start + batch_size, num_samples))) for start in starts]
        mine = batches[mesh.dp_rank :: mesh.dp]
        self.num_real = len(mine)
        self.batches = mine + batches[:1] * (-(-len(batches) // mesh.dp) - len(mine))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def eval_dataloader(
    dataset: Any, batch_size: int, mesh: SPMesh, **options: Any
) -> DataLoader[dict[str, Any]]:
    """A loader of this rank's data-parallel group.

    Args:
        dataset: the whole evaluation data.
        batch_size: samples per batch.
        mesh: the grid of ranks.
        options: of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: the dataset is empty or does not know its length.
    """
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ValueError(
            f"the evaluation dataset {type(dataset).__name__} has no samples or no len(): each "
            "rank must know how many batches there are; give one that does, such as "
            "datasets.Dataset or a list"
        )
    sampler = BatchesInStep(len(dataset), batch_size, mesh)
    return DataLoader(dataset, batch_sampler=sampler, **options)  # type: ignore[arg-type]


@torch.no_grad()
def model_to_evaluate(model: nn.Module, mesh: SPMesh) -> nn.Module:
    """A model that no engine holds, where it can be evaluated.

    Raises:
        ValueError: it has no whole weights.
    """
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "evaluate() before train() on a model that ZeRO-3 loaded in parts: set "
            "eval_on_start=True, or make TrainingArguments after the model"
        )
    return model.to(mesh.device)


def evaluate_loss(
    model: Any, dataloader: DataLoader[dict[str, Any]], mesh: SPMesh
) -> Iterator[float | None]:
    """Mean loss over all labels of a dataset. Collective over all ranks.

    Args:
        model: a parallelized model, or the engine around it, in evaluation mode.
        dataloader: made by `eval_dataloader`.
        mesh: the grid of ranks.

    Yields:
        None after each batch but the last, and then the loss; nan where no label counts.

    Raises:
        ValueError: a batch cannot be cut.
    """
    batches = _batches(dataloader)
    loss_sum, num_labels = 0.0, 0
    for index in range(len(dataloader)):
        cut = shard_batches(itertools.islice(batches, 1), mesh)
        num_labels += cut.num_labels
        # Divided by 1, what comes out is the sum over all ranks.
        loss_sum += model(**cut.parts[0], num_items_in_batch=1).loss.item()
        if index + 1 < len(dataloader):
            yield None
    # Each rank has rounded its own way, and all must agree whether a model is the best so far.
    total = torch.tensor(loss_sum, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(total, group=mesh.data_group)
    mean_sum = total.item() / mesh.world_size
    yield mean_sum / num_labels if num_labels else float("nan")


def _batches(dataloader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The loader's batches, those that only keep this rank in step without labels."""
    num_real = dataloader.batch_sampler.num_real  # type: ignore[union-attr]
    for index, batch in enumerate(dataloader):
        if index >= num_real:
            batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED_LABEL)}
        yield batch


__all__ = ["BatchesInStep", "eval_dataloader", "evaluate_loss", "model_to_evaluate"]
