"""The second objective: the student says of the next token what the teacher says.

Once each layer does about what its predecessor did, the small errors of many layers are left, and
those only the whole model can make up for. Teacher and student read the same tokens, and

    loss = mean over the labels of  T^2 KL(teacher || student) + ce_weight * cross-entropy

(`divergence.py`), over the labels of all ranks and micro-batches as the plain loss is. Where a
label does not count (-100) neither does the divergence, so a prompt that is masked teaches nothing.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridsp.distill.divergence import tiled_divergence
from hybridsp.distill.objective import Objective
from hybridsp.distill.teacher import Teacher
from hybridsp.loss import TokenMean, count_labels


class Matching(Objective):
    """Makes a student's forward, in training, return how far it is from the teacher's predictions.

    Args:
        student: a parallelized model, inside an engine or not.
        teacher: of the same mesh and vocabulary.
        temperature: of both distributions.
        ce_weight: of the cross-entropy of the labels.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        *,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
    ) -> None:
        super().__init__(student, teacher)
        self.temperature, self.ce_weight = temperature, ce_weight
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._own_head = student.lm_head.forward
        student.lm_head.forward = MethodType(self._head_forward, student.lm_head)

    def metrics(self) -> dict[str, float]:
        """`kl` and `ce`, means over the labels since the last call, the same on every rank."""
        sums = self._sums.to(self.student.token_mean.mesh.device)
        dist.all_reduce(sums, group=self.student.token_mean.mesh.data_group)
        kl, ce, labels = sums.tolist()
        self._sums.zero_()
        return {"kl": kl / max(labels, 1), "ce": ce / max(labels, 1)}

    def answer(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `Objective.answer`."""
        student = self.student
        teacher_hidden = self.teacher.hidden_states(input_ids, position_ids, **kwargs)
        output = student.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs
        )

        def compare(teacher_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                return student.lm_head(
                    output.last_hidden_state, shift_labels, (teacher_hidden, teacher_weight)
                )

        loss_sum, kl, ce = self.teacher.with_head(compare)
        found = torch.stack([kl.double(), ce.double(), count_labels(shift_labels).double()])
        self._sums = self._sums.to(found.device) + found
        mean: TokenMean = student.token_mean
        return CausalLMOutputWithPast(loss=mean(loss_sum, shift_labels, num_items_in_batch))

    def _head_forward(
        self,
        head: nn.Linear,
        hidden: Tensor,
        labels: Tensor | None = None,
        of_teacher: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """The head's own, or the divergence: inside its call, when ZeRO-3 has the weight here."""
        if labels is None or of_teacher is None:
            return self._own_head(hidden, labels)
        return tiled_divergence(
            hidden,
            head.weight,
            *of_teacher,
            labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
        )


__all__ = ["Matching"]
