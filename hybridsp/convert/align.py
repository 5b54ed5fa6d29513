"""Teaching one linear layer what the softmax layer in its place computed.

A converted layer is wrong by itself, not because of its neighbours: give it the inputs that the
source's layer saw, and what it should answer is the source's output (layer-wise alignment, stage 1
of HALO, arXiv:2601.22156, section 3, and of RADLADS, arXiv:2505.03005). So layers are fitted one
at a time, each a small regression that runs on a CPU in a minute, on inputs and outputs recorded
from one pass over a text. That is enough to compare the choices of a conversion, and to tell which
layers linear attention can replace; `hybridsp.distill` is the same at full scale.

Shapes: N windows of text, L tokens each, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridsp.models.hybrid_gla import HybridGLAModel

WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class AttentionRecord:
    """What a softmax layer was given and what it answered.

    Attributes:
        inputs: [N, L, D] behind the layer's input norm.
        outputs: [N, L, D] of o_proj, in front of the residual connection.
    """

    inputs: Tensor
    outputs: Tensor

    def __getitem__(self, windows: slice) -> AttentionRecord:
        return AttentionRecord(self.inputs[windows], self.outputs[windows])

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class FitOptions:
    """How a layer is fitted: AdamW, linear warm-up over a tenth of the steps, then cosine to 0."""

    steps: int = 100
    lr: float = 2e-3
    windows_per_step: int = 2


@torch.no_grad()
def record_attention(
    model: PreTrainedModel, tokens: Tensor, layers: Iterable[int]
) -> dict[int, AttentionRecord]:
    """Run a softmax model over text and keep what its attention layers did.

    Args:
        model: a causal language model with `model.model.layers[i].self_attn`.
        tokens: int [N, L].
        layers: which to record.

    Returns:
        One record per layer, in the model's dtype; each holds 2 * N * L * D numbers.
    """
    kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in layers}

    def keep(i: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kept[i][0].append(inputs)
            kept[i][1].append(output[0])

        return hook

    handles = [
        model.model.layers[i].self_attn.register_forward_hook(keep(i), with_kwargs=True)
        for i in kept
    ]
    try:
        for window in tokens:
            model.model(window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {i: AttentionRecord(torch.cat(x), torch.cat(y)) for i, (x, y) in kept.items()}


def fit_layer(
    model: HybridGLAModel,
    layer: int,
    record: AttentionRecord,
    options: FitOptions | None = None,
) -> None:
    """Train one linear layer in place to answer as the softmax layer did.

    Args:
        model: the decoder that holds the layer; its other weights stay as they are.
        layer: index of a linear layer.
        record: of that layer in the source; windows are taken in order, again and again.
        options: of the training; None for the defaults.
    """
    options = options or FitOptions()
    mixer = model.layers[layer].linear_attn
    optimizer = torch.optim.AdamW(
        mixer.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        options.lr,
        total_steps=options.steps,
        pct_start=WARMUP_SHARE,
        cycle_momentum=False,
    )
    batches = max(1, len(record) // options.windows_per_step)
    for step in range(options.steps):
        first = step % batches * options.windows_per_step
        batch = record[first : first + options.windows_per_step]
        with torch.enable_grad():
            relative_error(model, layer, batch).backward()
        nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def relative_error(model: HybridGLAModel, layer: int, record: AttentionRecord) -> Tensor:
    """Mean squared error of a linear layer over the mean square of the answer, a scalar.

    1.0 is what a layer that answers zero has.
    """
    x = record.inputs
    rotation = None
    if "linear_attention" in model.rotary_embs:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotation = model.rotary_embs["linear_attention"](x, positions)
    answer = model.layers[layer].linear_attn(x, position_embeddings=rotation)
    scale = record.outputs.square().mean()
    # A layer that was pruned to say nothing has a scale of 0.
    return (answer - record.outputs).square().mean() / scale.clamp_min(torch.finfo(x.dtype).tiny)


__all__ = ["AttentionRecord", "FitOptions", "fit_layer", "record_attention", "relative_error"]
