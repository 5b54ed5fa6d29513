"""What every adapter shares: the contract, and softmax layers that ask transformers by name.

transformers looks a softmax implementation up in a global table, by a name kept in the model's
config, and calls it with the layer as first argument. So the table gets one entry,
`IMPLEMENTATION`, that knows no mesh; the mesh is an attribute of the layer, put there by the
adapter, and only models that were parallelized have the name in their config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hybridsp.attention import KeepingAttention, softmax_attention
from hybridsp.memory import ActivationOffload, OffloadingCheckpoint
from hybridsp.mesh import SPMesh

IMPLEMENTATION = "hybridsp"
"""The name under which sequence-parallel implementations are registered."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a language model's decoder; empty where there is nothing like it."""
    lists = (child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList))
    return list(next(lists, []))


def set_checkpointing(
    layer: nn.Module, *, keep_attention: bool, offload: ActivationOffload | None, is_last: bool
) -> None:
    """What becomes of the layer's activations where they are checkpointed.

    It does not matter whether checkpointing is switched on before this or later.

    Args:
        layer: a decoder layer.
        keep_attention: whether attention runs forward once.
        offload: takes what the layer started from to the host; None leaves it on the device.
        is_last: whether no other layer follows.
    """
    put_away = None if offload is None else offload.put_away
    wrap: list[Callable[[Any], Any]] = []
    if keep_attention:
        wrap.append(functools.partial(KeepingAttention, put_away=put_away))
    if offload is not None:
        wrap.append(functools.partial(OffloadingCheckpoint, offload=offload, is_last=is_last))
    layer.checkpoint_wrappers = wrap  # type: ignore[assignment]
    if _choose_checkpoint not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_choose_checkpoint)


def _choose_checkpoint(layer: Any, args: Any) -> None:
    # transformers gives every layer its checkpointing function anew when checkpointing is switched
    # on, so what the layer has is looked at when it is about to be used.
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        return
    while isinstance(checkpoint, (KeepingAttention, OffloadingCheckpoint)):
        checkpoint = checkpoint.checkpoint
    for wrap in layer.checkpoint_wrappers:
        checkpoint = wrap(checkpoint)
    layer._gradient_checkpointing_func = checkpoint


class Adapter:
    """What a family's decoder layers are made of.

    Attributes:
        model_types: `config.model_type` of the models it vouches for.
        tokenwise: children of a decoder layer that work on each token alone, which need nothing.
        softmax: class names of mixers that call transformers' `AttentionInterface`.
        linear: class names of mixers that call the registries of `hybridsp.ops`.
        mlps: class names of the child `mlp` that can be computed in tiles: it maps [B, L, D] to
            [B, L, D], and does nothing else with its tokens (as counting who goes where).
    """

    model_types: tuple[str, ...] = ()
    tokenwise: tuple[str, ...] = ("mlp", "input_layernorm", "post_attention_layernorm")
    softmax: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()

    def problems(self, model: PreTrainedModel, mesh: SPMesh) -> list[str]:
        """What this model asks for that the mesh, or SP at all, does not do, one line each."""
        config, problems = model.config, []
        if getattr(config, "attention_dropout", 0.0):
            problems.append(
                f"config.attention_dropout = {config.attention_dropout}: attention dropout is not "
                "supported; set it to 0"
            )
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if "dynamic" in rope or rope == "longrope":
            problems.append(
                f"config.rope_parameters['rope_type'] = {rope!r}: its frequencies depend on the "
                "length of the whole sequence, which no rank sees; use linear, yarn or llama3"
            )
        windowed = [
            i
            for i, kind in enumerate(getattr(config, "layer_types", None) or [])
            if kind == "sliding_attention"
        ]
        window = getattr(config, "sliding_window", None)
        everywhere = window is not None and getattr(config, "layer_types", None) is None
        if mesh.ring > 1 and (windowed or everywhere):
            problems.append(
                f"config.sliding_window = {window} in layers {windowed or 'all'}: windowed "
                f"attention is not supported with ring = {mesh.ring}; raise ulysses to {mesh.sp}, "
                "with ring = 1, or set sliding_window to None to attend to everything"
            )
        return problems

    def mixers(self, layer: nn.Module) -> dict[str, nn.Module]:
        """The children of a decoder layer that mix tokens."""
        return {n: child for n, child in layer.named_children() if n not in self.tokenwise}

    def knows(self, mixer: nn.Module) -> bool:
        """Whether `install` can make this mixer sequence-parallel."""
        # By name, not by class: `trust_remote_code` loads a copy of the class.
        return type(mixer).__name__ in (*self.softmax, *self.linear)

    def mlp(self, layer: nn.Module) -> nn.Module | None:
        """The MLP of a decoder layer, if it can be computed in tiles."""
        mlp = getattr(layer, "mlp", None)
        return mlp if type(mlp).__name__ in self.mlps else None

    def install(self, mixer: nn.Module, mesh: SPMesh) -> None:
        """Make a mixer sequence-parallel."""
        mixer.sp_mesh = mesh  # type: ignore[assignment]
        if type(mixer).__name__ in self.linear:
            mixer.implementation = IMPLEMENTATION  # type: ignore[assignment]


def sp_softmax_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    past_key_values: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`softmax_attention` in the form of transformers' AttentionInterface; [B, H, L, D] in.

    Raises:
        ValueError: a mask, a cache or dropout, which sequence parallelism does not do, or a window
            that the mesh does not.
    """
    refused = {
        "attention_mask": attention_mask is not None,
        "past_key_values": past_key_values is not None,
        "dropout": dropout != 0.0,
    }
    if any(refused.values()):
        names = ", ".join(name for name, present in refused.items() if present)
        raise ValueError(
            f"{names}: not supported under sequence parallelism; pass batches made by "
            "hybridsp.shard_batch, and generate with the exported model on one device"
        )
    out = softmax_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mesh=module.sp_mesh,
        cu_seqlens=cu_seq_lens_q,
        scale=scaling,
        window=sliding_window,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, sp_softmax_attention)
