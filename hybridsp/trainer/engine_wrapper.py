"""DeepSpeed's engine as accelerate drives it, with the gradient that one device would have.

accelerate calls `backward` for each micro-batch and says which one ends the step. Its own wrapper
would do, but for two things: `hybridsp.initialize` cancels the engine's division by the number of
micro-batches, so that division has to take place; and at ZeRO-0 in fp32 DeepSpeed reports no
gradient norm, so it is taken before the step.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DeepSpeedEngineWrapper
from torch import Tensor

from hybridsp.engine import unreported_norm


class EngineWrapper(DeepSpeedEngineWrapper):
    """What `Accelerator.deepspeed_engine_wrapped` is to hold.

    Args:
        engine: made by `hybridsp.initialize`.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._norm: Tensor | None = None

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_: Any) -> None:
        """Accumulate one micro-batch's gradient; step if it is the step's last.

        Args:
            loss: of a parallelized model, with the labels of the whole step counted.
            sync_gradients: whether the step ends here.
        """
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss)
        if sync_gradients:
            self._norm = unreported_norm(self.engine)
            self.engine.step()

    def get_global_grad_norm(self) -> float:
        """Norm of the last step's gradient of the mean loss, before clipping."""
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm)


__all__ = ["EngineWrapper"]
