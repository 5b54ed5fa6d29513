"""The first objective: a new layer answers what the old one answered, given what it was given.

A linear layer deep in a raw conversion sees what the linear layers before it made of the text,
which is nothing like what its weights were trained on. So each layer learns alone: it is given the
teacher's own input of that layer, and its output o' is held to the teacher's attention output o,

    loss = sum over layers of  sum |o' - o|^2 / sum |o|^2        1 is what a layer of zeros has

with both sums over the tokens of all ranks whose label counts. No layer's loss depends on another
layer's weights, so the gradient is taken as soon as the teacher has gone through the layer, and
what was computed for it is let go: only one layer's activations are held, whatever the depth. The
sums of a layer are known on all ranks only at the end, but a sum's gradient is known up to the
factor in front: it is scaled when the backward comes by.

As HALO's first stage (arXiv:2601.22156) and LoLCATs' attention transfer (arXiv:2410.10254).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridsp.adapters import ADAPTERS, decoder_layers
from hybridsp.distill.objective import Objective
from hybridsp.distill.teacher import Teacher
from hybridsp.loss import TokenMean
from hybridsp.ops.cross_entropy import IGNORED_LABEL


class Alignment(Objective):
    """Makes a student's forward, in training, return how far its new layers are from the teacher's.

    Args:
        student: a parallelized hybrid, inside an engine or not; `learning_only` has left its new
            mixers alone to learn. Its activation checkpointing has to be off.
        teacher: of the same mesh.

    Attributes:
        layers: numbers of the layers that are aligned: the linear ones, and the softmax ones too
            where the conversion took their position embedding away.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher) -> None:
        super().__init__(student, teacher)
        self.layers = layers_to_align(student.config)
        self._errors = torch.zeros(len(self.layers), dtype=torch.float64)
        self._count = 0
        layers = decoder_layers(student)
        for index in self.layers:
            layers[index].forward = MethodType(_layer_forward, layers[index])

    def metrics(self) -> dict[str, float]:
        """Relative squared errors since the last call, the same on every rank.

        `mse` is their mean, `mse/layer_07` that of layer 7.
        """
        errors = (self._errors / max(self._count, 1)).tolist()
        self._errors.zero_()
        self._count = 0
        by_layer = {f"mse/layer_{i:02d}": e for i, e in zip(self.layers, errors, strict=True)}
        return {"mse": sum(errors) / len(errors), **by_layer}

    def answer(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        shift_labels: Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `Objective.answer`; each micro-batch weighs alike in a step."""
        counts = shift_labels != IGNORED_LABEL
        layers = decoder_layers(self.student)
        kinds = self.student.config.layer_types
        rotations: dict[str, Any] = {}
        errors, energies = [], []

        def learn(index: int, inputs: Tensor, target: Tensor) -> None:
            if index not in self.layers:
                return
            if not rotations:
                rotary = self.student.get_decoder().rotary_embs.items()
                rotations.update({kind: embed(inputs, position_ids) for kind, embed in rotary})
            with torch.enable_grad():
                # A gradient of its input is what ZeRO-3's hooks around a layer wait for.
                error = layers[index](
                    inputs.detach().requires_grad_(),
                    target=target,
                    counts=counts,
                    position_embeddings=rotations.get(kinds[index]),
                    position_ids=position_ids,
                    attention_mask=None,
                    **kwargs,
                )
            errors.append(error)
            energies.append(_sum_of_squares(target, counts))

        self.teacher.hidden_states(input_ids, position_ids, seen=learn, **kwargs)
        return CausalLMOutputWithPast(loss=self._loss(torch.stack(errors), torch.stack(energies)))

    def _loss(self, errors: Tensor, energies: Tensor) -> Tensor:
        """Sum of relative errors over layers, from this rank's sums of squares [layers].

        The value is that of all ranks; the gradient this rank's share, times what cancels
        DeepSpeed's divisors, as `TokenMean`'s.
        """
        mean: TokenMean = self.student.token_mean
        totals = torch.stack([errors.detach(), energies]).double()
        dist.all_reduce(totals, group=mean.mesh.data_group)
        whole = totals[1].clamp(min=torch.finfo(torch.float32).tiny)
        relative = totals[0] / whole
        self._errors = self._errors.to(relative.device) + relative
        self._count += 1
        share = (errors / whole.float()).sum() * (mean.gradient_factor / mean.micro_batches)
        value = (relative.sum() / mean.micro_batches).float()
        return share + (value - share).detach()


class GradientNow(torch.autograd.Function):
    """A scalar of some parameters whose gradient is taken at once, and nothing else is kept.

    forward   compute(): scalar -> the same scalar     keeps d scalar / d parameter
    backward  dscalar -> dscalar * what was kept
    """

    @staticmethod
    def forward(ctx, compute, _inputs, *parameters):  # noqa: D102
        with torch.enable_grad():
            scalar = compute()
            grads = torch.autograd.grad(scalar, parameters, materialize_grads=True)
        ctx.save_for_backward(*grads)
        return scalar.detach()

    @staticmethod
    def backward(ctx, dscalar):  # noqa: D102
        grads = [(grad.float() * dscalar).to(grad.dtype) for grad in ctx.saved_tensors]
        return None, None, *grads


def layers_to_align(config: Any) -> list[int]:
    """Numbers of the layers whose attention is another than the teacher's."""
    every = not getattr(config, "softmax_rope", True)
    return [i for i, kind in enumerate(config.layer_types) if every or kind == "linear_attention"]


def mixer_of(student: PreTrainedModel, index: int) -> nn.Module:
    """The token mixer of a layer."""
    layer = decoder_layers(student)[index]
    (mixer,) = ADAPTERS[student.config.model_type].mixers(layer).values()
    return mixer


def _layer_forward(
    layer: Any, hidden_states: Tensor, target: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """A decoder layer's forward; with a `target`, the squared error of its attention.

    Inside the layer's own call, because that is when ZeRO-3 has its weights here.
    """
    if target is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    counts = kwargs.pop("counts")
    mixer = layer.linear_attn if layer.layer_type == "linear_attention" else layer.self_attn
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]

    def compute() -> Tensor:
        output = mixer(layer.input_layernorm(hidden_states.detach()), **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return _sum_of_squares(output.float() - target.float(), counts)

    return GradientNow.apply(compute, hidden_states, *parameters)


def _sum_of_squares(x: Tensor, counts: Tensor) -> Tensor:
    """Over the tokens that count, fp32 scalar; x [B, L, D], counts bool [B, L]."""
    # Chosen, not multiplied: what a token that does not count has may be infinite.
    return torch.where(counts, x.float().square().sum(dim=-1), 0.0).sum()


__all__ = ["Alignment", "GradientNow", "layers_to_align", "mixer_of"]
