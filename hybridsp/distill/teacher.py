"""The teacher: a softmax model that answers and does not learn.

It is parallelized like its student, over the same mesh, so that what it says of this rank's tokens
is there when the student needs it and nothing of it has to cross ranks. Under ZeRO-3 its weights
are cut over all ranks as the student's are; at other stages every rank holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridsp.adapters import ADAPTERS, decoder_layers
from hybridsp.loss import count_labels
from hybridsp.mesh import SPMesh
from hybridsp.release import release

# Called with a layer's number, its input and its attention's output, both [B, L, D].
LayerSeen = Callable[[int, Tensor, Tensor], None]

# What DeepSpeed may be told of a model that is only read.
READING = ("zero_optimization", "bf16", "bfloat16", "train_micro_batch_size_per_gpu")


class Teacher:
    """A frozen causal language model that `hybridsp.parallelize` prepared.

    Args:
        model: the model; its parameters stop asking for gradients. Under ZeRO-3 made as
            `hybridsp.prepare.load_prepared` makes it.
        mesh: its mesh.
        config: the student's DeepSpeed configuration.
    """

    def __init__(self, model: PreTrainedModel, mesh: SPMesh, config: Mapping[str, Any]) -> None:
        model.requires_grad_(False)
        model.eval()
        self.model = model
        self._engine: Any = None
        if config.get("zero_optimization", {}).get("stage") == 3:
            self._engine = _sharded(model, mesh, config)
        else:
            model.to(mesh.device)
        _lend_weight(model)

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        seen: LayerSeen | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What the head would be given, of this rank's part of a batch. Collective.

        Args:
            input_ids, position_ids: [B, L], as `hybridsp.shard_batch` makes them.
            seen: called behind each layer, before the next one runs.
            kwargs: go to every layer (`cu_seq_lens_q` ...).

        Returns:
            [B, L, D], normalised.
        """
        with self._watched(seen):
            output = self.model.get_decoder()(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **kwargs
            )
        return output.last_hidden_state

    def with_head(self, then: Callable[[Tensor], Any]) -> Any:
        """What `then` returns, called with the head's weight [vocabulary, D] while it is here."""
        # Past the module's own output, which ZeRO-3's hooks cut from the graph it came from.
        found = []
        with torch.no_grad():
            self.model.lm_head(lambda weight: found.append(then(weight)))
        return found[0]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """Mean loss over all labels of the batches and all ranks. Collective over all ranks.

        Args:
            batches: this rank's parts, made by `hybridsp.shard_batch`.
        """
        mesh: SPMesh = self.model.token_mean.mesh
        labels = torch.tensor(
            sum(int(count_labels(batch["shift_labels"])) for batch in batches), device=mesh.device
        )
        dist.all_reduce(labels, group=mesh.data_group)
        return sum(self.model(**b, num_items_in_batch=labels).loss.item() for b in batches)

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        if self._engine is not None:
            release(self._engine)

    @contextmanager
    def _watched(self, seen: LayerSeen | None) -> Iterator[None]:
        if seen is None:
            yield
            return
        hooks = []
        for index, layer in enumerate(decoder_layers(self.model)):
            (mixer,) = ADAPTERS[self.model.config.model_type].mixers(layer).values()
            watch = _Watch(index, seen)
            hooks.append(mixer.register_forward_hook(watch.attention))
            hooks.append(layer.register_forward_hook(watch.layer))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watch:
    """Holds a layer's attention output until the layer is through."""

    def __init__(self, index: int, seen: LayerSeen) -> None:
        self.index, self.seen = index, seen
        self.output: Tensor | None = None

    def attention(self, _mixer: nn.Module, _inputs: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def layer(self, _layer: nn.Module, inputs: Any, _output: Any) -> None:
        output, self.output = self.output, None
        assert output is not None, "a layer runs its attention once"
        self.seen(self.index, inputs[0], output)


def _lend_weight(model: PreTrainedModel) -> None:
    """Let the head be called with a function of its weight, inside its own call under ZeRO-3."""
    head = model.lm_head
    own = head.forward

    def forward(head: nn.Linear, given: Any, *labels: Any) -> Any:
        return given(head.weight) if callable(given) else own(given, *labels)

    head.forward = MethodType(forward, head)


def _sharded(model: PreTrainedModel, mesh: SPMesh, config: Mapping[str, Any]) -> Any:
    """DeepSpeed's engine around a model that is only read; it gathers a layer for its forward."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder_layers(model):
        set_z3_leaf_module(layer, True)
    reading = {name: copy.deepcopy(config[name]) for name in READING if name in config}
    reading["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(
        model=model, config=reading, mpu=mesh.mpu, dist_init_required=False
    )
    engine.eval()
    return engine


def check_pair(teacher: Any, student: Any, *, aligns: bool) -> None:
    """Refuse a teacher that has nothing to say to this student.

    Args:
        teacher, student: configurations of models.
        aligns: whether layer is to be compared with layer.

    Raises:
        ValueError: vocabularies differ, or the student has no converted layer; to align, also other
            layers, another width, or a teacher of linear layers.
    """
    if teacher.vocab_size != student.vocab_size:
        raise ValueError(
            f"teacher has vocab_size = {teacher.vocab_size}, model has {student.vocab_size}: they "
            "share no vocabulary; name the checkpoint that the model was converted from"
        )
    if "linear_attention" not in (getattr(student, "layer_types", None) or ()):
        raise ValueError(
            f"model is a {student.model_type} without linear_attention layers, so a teacher has "
            "nothing to teach it: make one with `hybridsp convert`"
        )
    if not aligns:
        return
    for name in ("num_hidden_layers", "hidden_size"):
        if getattr(teacher, name) != getattr(student, name):
            raise ValueError(
                f"teacher has {name} = {getattr(teacher, name)}, model has "
                f"{getattr(student, name)}, but align compares them layer by layer: name the "
                "checkpoint that the model was converted from, or drop align"
            )
    if "linear_attention" in (getattr(teacher, "layer_types", None) or ()):
        raise ValueError(
            "teacher has linear_attention layers itself, which are no softmax attention to align "
            "with: name the softmax checkpoint that the model was converted from, or drop align"
        )


__all__ = ["Teacher", "check_pair"]
