"""Which layers the probe goes through, and which those stand for.

A deep model repeats a few kinds of layers. Two that are alike in every module's class and every
setting run the same code, so the first of them shows what all do, and the probe passes the others
by, except for the model's last. That is not only cheaper: in bf16 every layer multiplies the
rounding errors of those before it, until after a dozen nothing can be told any more. A layer that
differs in anything, as one that kept an implementation without communication, is a kind of its own
and is gone through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridsp.adapters import ADAPTERS, decoder_layers
from hybridsp.mesh import SPMesh
from hybridsp.self_check.no_trace import PLAIN, plain_attributes

# In these layers differ that are alike: their number; what PyTorch and what DeepSpeed notes.
NUMBER, PRIVATE = "layer_idx", ("_", "ds_")


@dataclass(frozen=True)
class Mixer:
    """A token mixer of the model.

    Attributes:
        name: its path in the model.
        kind: what tells mixers apart that communicate differently, in words.
        module: the mixer.
        halo: how many tokens further on its convolution still sees a token.
        layer: the decoder layer it is in.
        likeness: equal for mixers that run the same code.
    """

    name: str
    kind: str
    module: nn.Module
    halo: int
    layer: nn.Module
    likeness: Hashable


def find_mixers(model: PreTrainedModel) -> list[Mixer]:
    """The token mixers of a parallelized model, from the first layer to the last."""
    adapter = ADAPTERS[model.config.model_type]
    names = {id(module): name for name, module in model.named_modules()}
    kinds = getattr(model.config, "layer_types", None)
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        layer_type = kinds[index] if kinds else ""
        for child, module in adapter.mixers(layer).items():
            linear = type(module).__name__ in adapter.linear
            taps = getattr(model.config, "linear_conv_kernel_dim", 0) if linear else 0
            kind = type(module).__name__ + (f" ({layer_type})" if layer_type else "")
            likeness = (child, layer_type, _settings(layer))
            name = names[id(module)]
            found.append(Mixer(name, kind, module, max(taps - 1, 0), layer, likeness))
    return found


def first_of_each_kind(mixers: list[Mixer]) -> list[Mixer]:
    """The first of all mixers that are alike, whose gradient everything behind it goes into."""
    first: dict[Hashable, Mixer] = {}
    for mixer in mixers:
        first.setdefault(mixer.likeness, mixer)
    return list(first.values())


def of_layers_gone_through(mixers: list[Mixer]) -> list[Mixer]:
    """Those whose layer holds the first of the mixers that are alike, and those of the last layer.

    The last, because offloading and checkpointing end there.
    """
    layers = {id(mixer.layer) for mixer in [*first_of_each_kind(mixers), *mixers[-1:]]}
    return [mixer for mixer in mixers if id(mixer.layer) in layers]


@contextlib.contextmanager
def passing_by(model: PreTrainedModel, mixers: list[Mixer]) -> Iterator[None]:
    """The model goes only through the layers that these mixers are in."""
    through = {id(mixer.layer) for mixer in mixers}
    names = {id(module): name for name, module in model.named_modules()}
    passed = {names[id(x)]: x for x in decoder_layers(model) if id(x) not in through}
    try:
        for name, layer in passed.items():
            model.set_submodule(name, _PassedBy(layer))
        yield
    finally:
        for name, layer in passed.items():
            model.set_submodule(name, layer)


class _PassedBy(nn.Module):
    """In the place of a layer, with its settings, which the model may ask for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self).update(plain_attributes(layer))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The layer's input [B, L, D]."""
        return hidden_states


def _settings(layer: nn.Module) -> Hashable:
    """All that decides what a layer computes but its number and its weights."""
    settings = []
    for name, module in layer.named_modules():
        own = {
            key: _setting(value)
            for key, value in vars(module).items()
            if not (key == NUMBER or key.startswith(PRIVATE))
        }
        settings.append((name, type(module), tuple(sorted(own.items()))))
    return tuple(settings)


def _setting(value: Any) -> Hashable:
    if isinstance(value, PLAIN):
        return value
    # Of the rest, which may be one object per layer, the mesh has to be the same; and a function,
    # such as a forward of its own, is known by its name.
    mesh = id(value) if isinstance(value, SPMesh) else None
    return type(value).__name__, getattr(value, "__qualname__", mesh)
