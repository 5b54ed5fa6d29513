"""DeepSpeed's engine as accelerate drives it, with the gradient that one device would have.

accelerate calls `backward` for each micro-batch and says which one ends the step. Its own wrapper
would do, but for two things: `hybridsp.initialize` cancels the engine's division by the number of
micro-batches, so that division has to take place; at ZeRO-0 in fp32 DeepSpeed reports no gradient
norm, so it is taken before the step; and a step whose loss or gradient is not finite is left out,
as `hybridsp.train_step` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from torch import Tensor

from hybridsp.engine import leave_step_out, unreported_norm


class EngineWrapper(DeepSpeedEngineWrapper):
    """What `Accelerator.deepspeed_engine_wrapped` is to hold.

    Args:
        engine: made by `hybridsp.initialize`.

    Attributes:
        loss: of the last step, or of the part of a step that was seen so far; fp32 [].
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.loss = torch.zeros(())
        self._begins = True
        self._norm: Tensor | None = None

    @property
    def skipped(self) -> bool:
        """Whether the last step was left out."""
        return not self.engine.was_step_applied()

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_: Any) -> None:
        """Accumulate one micro-batch's gradient; step if it is the step's last.

        Args:
            loss: of a parallelized model, with the labels of the whole step counted.
            sync_gradients: whether the step ends here.
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.loss = loss.detach() if self._begins else self.loss + loss.detach()
        self._begins = sync_gradients
        # A loss that is not finite may have a finite gradient, which would be followed.
        self.engine.backward(loss * torch.where(self.loss.isfinite(), 1.0, math.nan))
        if sync_gradients:
            self._norm = unreported_norm(self.engine)
            if self._norm is None or self._norm.isfinite():
                self.engine.step()
            else:
                leave_step_out(self.engine)

    def get_global_grad_norm(self) -> float:
        """Norm of the last step's gradient of the mean loss, before clipping."""
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm)


class OptimizerWrapper(DeepSpeedOptimizerWrapper):
    """What the Trainer is to take for its optimizer: it knows of every step that was left out.

    Args:
        wrapper: of the engine, which takes the steps.
    """

    def __init__(self, wrapper: EngineWrapper) -> None:
        super().__init__(wrapper.engine.optimizer)
        self._wrapper = wrapper

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was left out, so that the learning rate's schedule stands."""
        return self._wrapper.skipped


__all__ = ["EngineWrapper", "OptimizerWrapper"]
