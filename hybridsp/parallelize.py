"""Installing sequence parallelism into a Hugging Face model, from outside.

The model stays the object it was: its layers are told, by name, to use the sequence-parallel
implementations, and carry the mesh. What no adapter vouches for is refused before anything is
touched, because a token mixer that restarts at each rank's first token trains without complaint.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hybridsp.adapters import ADAPTERS, IMPLEMENTATION, Adapter, decoder_layers, set_checkpointing
from hybridsp.layout import head_shares
from hybridsp.loss import install_tiled_loss
from hybridsp.memory import ActivationOffload, require_checkpointing, tile_mlp
from hybridsp.mesh import SPMesh


def parallelize(
    model: PreTrainedModel,
    mesh: SPMesh,
    *,
    keep_attention: bool = True,
    tiled_mlp: int | None = None,
    offload_activations: bool = False,
) -> None:
    """Make a causal language model compute on sequences cut over the mesh, in place.

    Afterwards the model takes batches made by `hybridsp.shard_batch` and returns the exact mean
    loss over all ranks.

    Args:
        model: a causal language model of a family in `hybridsp.adapters`.
        mesh: the grid of ranks.
        keep_attention: where activations are checkpointed, keep the output of softmax attention,
            [tokens, query heads, head_dim] per softmax layer and rank, and do not compute it a
            second time; False to spend the time and save the memory.
        tiled_mlp: tokens, at least 1, that an MLP computes at a time, forward and backward, so that
            its inner activations are never held for more; None for all at once.
        offload_activations: hold what activation checkpointing keeps of each layer, its input
            [B, L, D] and what `keep_attention` keeps, in pinned host memory until its backward.
            The model's activation checkpointing has to be on by its first step in training, which
            raises a ValueError else.

    Raises:
        ValueError: the family, a layer or an option of the model is not supported, or its heads
            do not fit the mesh; names all of them, and the model is unchanged.
    """
    adapter = ADAPTERS.get(model.config.model_type)
    layers = decoder_layers(model)
    if adapter is None:
        mixers = [mixer for layer in layers for mixer in Adapter().mixers(layer).values()]
        kinds = sorted({type(mixer).__name__ for mixer in mixers})
        raise ValueError(
            f"model_type = {model.config.model_type!r} ({type(model).__name__}, token mixers "
            f"{', '.join(kinds) or 'not found'}) is not supported; supported are "
            f"{', '.join(sorted(ADAPTERS))}. Convert a softmax checkpoint with `hybridsp convert`"
        )
    problems = adapter.problems(model, mesh) + _unknown_mixers(adapter, layers)
    problems += _untileable_mlps(adapter, layers, tiled_mlp)
    if problems:
        raise ValueError("this model cannot be parallelized:\n  " + "\n  ".join(problems))
    head_shares(model.config.num_attention_heads, model.config.num_key_value_heads, mesh.ulysses)

    install_tiled_loss(model, mesh)
    _give_own_config(model)
    offload = _install_offload(model, offload_activations)
    for layer in layers:
        is_last = layer is layers[-1]
        set_checkpointing(layer, keep_attention=keep_attention, offload=offload, is_last=is_last)
        mlp = adapter.mlp(layer)
        if mlp is not None:
            tile_mlp(mlp, tiled_mlp)
        for mixer in adapter.mixers(layer).values():
            adapter.install(mixer, mesh)
    model.config._attn_implementation = IMPLEMENTATION


def _give_own_config(model: PreTrainedModel) -> None:
    """Part the model's config from that of other models, which may be the same object."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _install_offload(model: Any, wanted: bool) -> ActivationOffload | None:
    """The model's offload; None where none is wanted."""
    # Of a model that is parallelized once more, with the host memory that it has pinned.
    offload = getattr(model, "activation_offload", None) or ActivationOffload()
    # The decoder too, because peft's wrappers call their model's forward past its hooks.
    for module in (model, model.get_decoder()):
        module.activation_offload = offload if wanted else None
        if _check_offload not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_check_offload)
    return model.activation_offload


def _check_offload(model: Any, args: Any) -> None:
    # Not sooner: checkpointing may be switched on at any time before the first step. Not later: in
    # the embedding ZeRO-3 already waits for the other ranks.
    if model.activation_offload is not None:
        require_checkpointing(model, decoder_layers(model))


def _unknown_mixers(adapter: Adapter, layers: list[nn.Module]) -> list[str]:
    known = ", ".join((*adapter.softmax, *adapter.linear))
    return [
        f"layer {index}: {name} is {type(mixer).__name__}, which is none of {known}"
        for index, layer in enumerate(layers)
        for name, mixer in adapter.mixers(layer).items()
        if not adapter.knows(mixer)
    ]


def _untileable_mlps(adapter: Adapter, layers: list[nn.Module], tokens: int | None) -> list[str]:
    if tokens is None:
        return []
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        return [
            f"tiled_mlp = {tokens!r}: give the tokens of a tile, at least 1, or None to compute "
            "all tokens at once"
        ]
    known = ", ".join(adapter.mlps) or "no MLP of this family"
    return [
        f"layer {index}: mlp is {type(getattr(layer, 'mlp', None)).__name__}, and only {known} can "
        f"be computed in tiles; remove tiled_mlp = {tokens}"
        for index, layer in enumerate(layers)
        if adapter.mlp(layer) is None
    ]
