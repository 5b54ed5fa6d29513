"""The loss of a sequence that many ranks share: a sum, divided once.

Each rank sums the losses of its own labels. What is wanted is their mean over the whole optimizer
step, over all ranks and all micro-batches, so the sum is divided by that one count N; a rank with
few labels, or none, then weighs exactly what it should. A mean of the ranks' means would not do.

The value that comes out is the exact mean, the same on every rank. Its gradient is this rank's
share times `gradient_factor`, which `hybridsp.engine` sets so that it cancels whatever DeepSpeed
divides by; without DeepSpeed it is 1, and gradients are to be summed over all ranks.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL, tiled_cross_entropy

# What only a whole sequence can have.
NOT_OF_A_PART = ("labels", "attention_mask", "past_key_values")


class TokenMean:
    """Mean loss over the labels of all ranks.

    Args:
        mesh: the grid of ranks.

    Attributes:
        gradient_factor: what the gradient is multiplied by.
        micro_batches: micro-batches of one optimizer step.
    """

    def __init__(self, mesh: SPMesh) -> None:
        self.mesh = mesh
        self.gradient_factor = 1.0
        self.micro_batches = 1

    def __call__(
        self, loss_sum: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None
    ) -> Tensor:
        """The exact mean, the same on every rank. Collective over all ranks.

        Args:
            loss_sum: fp32 scalar, the sum over this rank's valid labels.
            labels: this rank's shifted labels, -100 where there is none.
            num_items_in_batch: valid labels of the whole optimizer step, over all ranks and
                micro-batches; None to count them here, which one micro-batch per step allows.

        Raises:
            ValueError: several micro-batches make up a step, and their labels were not counted.
        """
        if num_items_in_batch is None and self.micro_batches > 1 and torch.is_grad_enabled():
            raise ValueError(
                f"{self.micro_batches} micro-batches make up one step, so the number of labels to "
                "divide by is not known here: call hybridsp.train_step(engine, micro_batches), or "
                "pass num_items_in_batch = the valid labels of the whole step over all ranks"
            )
        totals = torch.stack([loss_sum.detach().double(), count_labels(labels).double()])
        dist.all_reduce(totals, group=self.mesh.data_group)
        count = totals[1] if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, dtype=torch.float64, device=totals.device).clamp(min=1)
        share = loss_sum * (self.gradient_factor / count).float()
        return share + ((totals[0] / count).float() - share).detach()


def count_labels(labels: Tensor) -> Tensor:
    """Number of valid labels, int64 scalar tensor."""
    return (labels != IGNORED_LABEL).sum()


def install_tiled_loss(model: PreTrainedModel, mesh: SPMesh) -> None:
    """Give a causal language model a forward that takes `shift_labels` and never holds the logits.

    The head computes the loss inside its own forward, so that ZeRO-3, which gathers a module's
    weights around its forward and backward, has them there when they are used.

    Raises:
        ValueError: the model has no bias-free linear `lm_head`.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"lm_head of {type(model).__name__} is {head}: a causal language model with a linear "
            "head without bias is needed"
        )
    head.forward = MethodType(_head_forward, head)
    model.token_mean = TokenMean(mesh)
    model.forward = MethodType(_causal_lm_forward, model)


def _head_forward(head: nn.Linear, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
    if labels is None:
        return F.linear(hidden, head.weight)
    return tiled_cross_entropy(hidden, head.weight, labels)


def _causal_lm_forward(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Forward of one rank's part of a batch made by `hybridsp.shard_batch`.

    Args:
        input_ids: this rank's tokens [B, L].
        position_ids: their positions in their documents [B, L].
        shift_labels: the token that follows each one [B, L], -100 where none counts.
        num_items_in_batch: see `TokenMean`.
        kwargs: go to every layer (`cu_seq_lens_q` ...).

    Returns:
        The exact mean loss over all ranks; or, without labels, the logits of this rank's tokens.

    Raises:
        ValueError: what only a whole sequence can have (labels that were not shifted before the
            cut, a mask, a cache), or positions that are missing.
    """
    misplaced = {name: kwargs.pop(name, None) for name in NOT_OF_A_PART}
    misplaced = {name: value for name, value in misplaced.items() if value is not None}
    if misplaced or position_ids is None or kwargs.pop("use_cache", False):
        raise ValueError(
            "a parallelized model takes this rank's part of a batch, with position_ids and "
            f"shift_labels (got {sorted(misplaced) or 'no position_ids, or use_cache'}): make it "
            "with hybridsp.shard_batch; generate with the exported model on one device"
        )
    output = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs)
    if shift_labels is None:
        return CausalLMOutputWithPast(logits=model.lm_head(output.last_hidden_state))
    loss_sum = model.lm_head(output.last_hidden_state, shift_labels)
    loss = model.token_mean(loss_sum, shift_labels, num_items_in_batch)
    return CausalLMOutputWithPast(loss=loss)
