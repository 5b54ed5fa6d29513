"""What the two objectives have in common: when they speak in place of their student.

An objective is installed in a parallelized model. In training it answers the model's forward; in
evaluation the model does, so that a held-out loss is the same number in every phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridsp.distill.teacher import Teacher


class Objective(ABC):
    """Answers a student's forward in training.

    Args:
        student: a parallelized model, inside an engine or not.
        teacher: of the same mesh.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher) -> None:
        self.student, self.teacher = student, teacher
        self._own_forward = student.forward
        student.forward = self._forward

    @abstractmethod
    def answer(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The objective's loss on this rank's part of a batch. Collective.

        Args:
            input_ids, position_ids, shift_labels: [B, L], as `hybridsp.shard_batch` makes them.
            num_items_in_batch: see `hybridsp.loss.TokenMean`.
            kwargs: go to every layer (`cu_seq_lens_q` ...).
        """

    def _forward(self, input_ids: Tensor | None = None, **batch: Any) -> CausalLMOutputWithPast:
        if not self.student.training:
            return self._own_forward(input_ids, **batch)
        assert input_ids is not None, "shard_batch makes it"
        return self.answer(input_ids, **batch)


__all__ = ["Objective"]
