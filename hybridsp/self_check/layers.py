"""Which layers the probe goes through, and which those stand for.

A deep model repeats a few kinds of layers. Two that are alike in every module's class and every
setting run the same code, so the first of them shows what all do, and the probe passes the others
by, except for the model's last. Settings are compared by what they contain, functions by their code
and what they close over; what cannot be compared has to be one object for all. That is not only
cheaper: in bf16 every layer multiplies the rounding errors of those before it, until after a dozen
nothing can be told any more. A layer that differs in anything, as one that kept an implementation
without communication, is a kind of its own and is gone through.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridsp.adapters import ADAPTERS, decoder_layers
from hybridsp.attention import KeepingAttention
from hybridsp.memory import OffloadingCheckpoint
from hybridsp.self_check.no_trace import PLAIN, plain_attributes

# Which layer it is, its path (LoRA's), whether it is the last: alike layers differ in these.
PLACE = {"layer_idx", "target_name", "is_last"}
# Code of others that PyTorch calls. What else PyTorch keeps in a module does not decide what it
# computes, or is looked at separately.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What DeepSpeed notes in modules under ZeRO-3.
DEEPSPEED, DEEPSPEED_PREFIX = {"_original_parameters", "_external_params"}, "ds_"
LEFT_OUT = {*vars(nn.Module()), *PLACE, *DEEPSPEED}


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
    """All that decides what a layer computes but its number and the values of its weights."""
    inside = {id(module): name for name, module in layer.named_modules()}
    inside |= {id(tensor): name for name, tensor in layer.named_parameters()}
    inside |= {id(tensor): name for name, tensor in layer.named_buffers()}
    setting = _Settings(inside).of
    settings: list[Hashable] = [
        # Under ZeRO-3 a parameter's own shape is that of what is here at the moment.
        (name, inside[id(x)], getattr(x, "ds_shape", x.shape), x.dtype, x.requires_grad)
        for tensors in (layer.named_parameters, layer.named_buffers)
        for name, x in tensors(remove_duplicate=False)
    ]
    for name, module in layer.named_modules():
        own = {
            key: setting(value)
            for key, value in vars(module).items()
            if not (key in LEFT_OUT or key.startswith(DEEPSPEED_PREFIX))
        }
        hooks = [
            (kind, setting(hook))
            for kind in HOOKS
            for hook in getattr(module, kind, {}).values()
            if not _is_deepspeeds(hook)
        ]
        children = tuple((key, inside.get(id(x))) for key, x in module._modules.items())
        own_settings = (module.training, children, frozenset(own.items()), *hooks)
        settings.append((name, type(module), own_settings))
    return tuple(settings)


class _Settings:
    """Values as what is equal for those that make two layers compute alike.

    By content where that can be told, and by identity where not: one object that the layers share
    is no difference, as the model's config or the mesh; one of its own is.

    Args:
        inside: the layer's modules and tensors, by id; they are known by their place in it.
    """

    def __init__(self, inside: dict[int, str]) -> None:
        self._inside = inside
        self._around: list[int] = []

    def of(self, value: Any) -> Hashable:
        """What to compare instead of the value."""
        while isinstance(value, (KeepingAttention, OffloadingCheckpoint)):
            # Put around what a layer has when it first runs; `checkpoint_wrappers` says which.
            value = value.checkpoint
        if isinstance(value, PLAIN):
            return type(value), repr(value)
        if id(value) in self._inside:
            return "inside", self._inside[id(value)]
        if id(value) in self._around:
            return "around", len(self._around) - self._around.index(id(value))
        self._around.append(id(value))
        try:
            return type(value), self._content(value)
        finally:
            self._around.pop()

    def _content(self, value: Any) -> Hashable:
        if _is_deepspeeds(value):
            return getattr(value, "__qualname__", None)
        if isinstance(value, Mapping):
            own = {key: item for key, item in value.items() if key not in PLACE}
            return frozenset((self.of(key), self.of(item)) for key, item in own.items())
        if isinstance(value, (list, tuple)):
            return tuple(self.of(item) for item in value)
        if isinstance(value, (set, frozenset)):
            return frozenset(self.of(item) for item in value)
        if isinstance(value, (bytes, complex, torch.device)):
            return value
        if isinstance(value, functools.partial):
            return self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, FunctionType):
            # Functions of one factory share their code and differ in what they close over.
            cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
            attributes = (value.__defaults__, value.__kwdefaults__, vars(value))
            return id(value.__code__), cells, self.of(attributes)
        # Of LoRA's layers each has objects of its own that are nothing but their class.
        return None if getattr(value, "__dict__", None) == {} and _is_plain(value) else id(value)

    def _cell(self, cell: CellType) -> Hashable:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return "empty"


def _is_plain(value: Any) -> bool:
    """Whether all that an object holds is in its `__dict__`."""
    return type(value).__basicsize__ <= _Empty.__basicsize__


class _Empty:
    pass


def _is_deepspeeds(value: Any) -> bool:
    """Whether DeepSpeed made it: it gives every layer hooks and classes of its own."""
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        # Not `__module__`, which functools.wraps copies from the function inside.
        module = value.__globals__.get("__name__", "")
        if module.startswith("torch.") and hasattr(value, "__wrapped__"):  # compiler.disable
            return _is_deepspeeds(value.__wrapped__)
    else:
        module = value.__module__ if isinstance(value, type) else type(value).__module__
    return str(module).split(".")[0] == "deepspeed"
