"""Installing sequence parallelism into a Hugging Face model, from outside.

The model stays the object it was: its layers are told, by name, to use the sequence-parallel
implementations, and carry the mesh. What no adapter vouches for is refused before anything is
touched, because a token mixer that restarts at each rank's first token trains without complaint.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from hybridsp.adapters import ADAPTERS, IMPLEMENTATION, Adapter, decoder_layers, set_keep_attention
from hybridsp.layout import head_shares
from hybridsp.loss import install_tiled_loss
from hybridsp.mesh import SPMesh


def parallelize(model: PreTrainedModel, mesh: SPMesh, *, keep_attention: bool = True) -> None:
    """Make a causal language model compute on sequences cut over the mesh, in place.

    Afterwards the model takes batches made by `hybridsp.shard_batch` and returns the exact mean
    loss over all ranks.

    Args:
        model: a causal language model of a family in `hybridsp.adapters`.
        mesh: the grid of ranks.
        keep_attention: where activations are checkpointed, keep the output of softmax attention,
            [tokens, query heads, head_dim] per softmax layer and rank, and do not compute it a
            second time; False to spend the time and save the memory.

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
    if problems:
        raise ValueError("this model cannot be parallelized:\n  " + "\n  ".join(problems))
    head_shares(model.config.num_attention_heads, model.config.num_key_value_heads, mesh.ulysses)

    install_tiled_loss(model, mesh)
    _give_own_config(model)
    for layer in layers:
        set_keep_attention(layer, keep_attention)
        for mixer in adapter.mixers(layer).values():
            adapter.install(mixer, mesh)
    model.config._attn_implementation = IMPLEMENTATION


def _give_own_config(model: PreTrainedModel) -> None:
    """Part the model's config from that of other models, which may be the same object."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _unknown_mixers(adapter: Adapter, layers: list[nn.Module]) -> list[str]:
    known = ", ".join((*adapter.softmax, *adapter.linear))
    return [
        f"layer {index}: {name} is {type(mixer).__name__}, which is none of {known}"
        for index, layer in enumerate(layers)
        for name, mixer in adapter.mixers(layer).items()
        if not adapter.knows(mixer)
    ]
