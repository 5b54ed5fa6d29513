"""The probe: one short random sequence per data-parallel rank, cut and whole.

Everything the self-check looks at is read off a few dozen tokens per rank. They go through the
engine as training batches do, cut over the SP ranks, and through the same engine's module whole,
on each rank alone, by the implementations that the layers have without HybridSP. What both should
agree on is taken down by name: each token mixer's output, the loss, gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hybridsp.adapters import IMPLEMENTATION
from hybridsp.loss import count_labels
from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL
from hybridsp.self_check.layers import (
    Mixer,
    find_mixers,
    first_of_each_kind,
    of_layers_gone_through,
    passing_by,
)
from hybridsp.self_check.no_trace import without_reduction
from hybridsp.self_check.sharding import numel
from hybridsp.sharding import shard_batch

TOKENS_PER_RANK = 32
# One rank computes the uncut probe with all activations, so many ranks get fewer tokens each.
MAX_TOKENS, MIN_TOKENS_PER_RANK = 1024, 8
SEED = 20_251_122
# Implementations that know nothing of ranks: transformers' for softmax, ours for the rest.
SOFTMAX_ALONE, LINEAR_ALONE = "sdpa", "local"
# A gradient is compared in fp32 on every rank; of a larger parameter the copies would be felt.
MAX_COMPARED_NUMEL = 2**26

Trace = dict[str, Tensor]
"""What one run of the probe showed, by name: outputs [1, L, D], "loss" [], gradients."""


def compared_parameters(model: PreTrainedModel, mixers: list[Mixer]) -> dict[str, nn.Parameter]:
    """Trainable parameters of one mixer per kind, and the smallest one outside all mixers.

    Of those above MAX_COMPARED_NUMEL none, or one where all are. The smallest one is the last of
    its size, as that of the norm behind the last layer: the fewer layers a gradient comes through,
    the less rounding there is in it.
    """
    inside = tuple(f"{mixer.name}." for mixer in mixers)
    first = tuple(f"{mixer.name}." for mixer in first_of_each_kind(mixers))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    small = {name: p for name, p in trainable.items() if numel(p) <= MAX_COMPARED_NUMEL}
    chosen = {name: p for name, p in small.items() if name.startswith(first)}
    others = {name: p for name, p in (small or trainable).items() if not name.startswith(inside)}
    if others:
        smallest = min(reversed(others), key=lambda name: numel(others[name]))
        chosen[smallest] = others[smallest]
    return chosen


class Probe:
    """The probe sequences of one engine, and what runs of them show.

    Args:
        engine: made by `hybridsp.initialize`.
        mesh: its mesh.

    Attributes:
        length: tokens of one rank, L.
        changed_rank: the SP rank in whose second half tokens are changed.
        num_labels: labels of the whole probe, over all data-parallel ranks.
    """

    def __init__(self, engine: Any, mesh: SPMesh) -> None:
        self.engine, self.mesh = engine, mesh
        self.model: PreTrainedModel = engine.module
        self.mixers = of_layers_gone_through(find_mixers(self.model))
        with passing_by(self.model, self.mixers):
            self.parameters = compared_parameters(self.model, self.mixers)
        halo = max((mixer.halo for mixer in self.mixers), default=0)
        few = max(min(TOKENS_PER_RANK, MAX_TOKENS // mesh.sp), MIN_TOKENS_PER_RANK)
        self.length = max(few, 4 * halo)
        total = self.length * mesh.sp
        generator = torch.Generator().manual_seed(SEED + mesh.dp_rank)
        tokens = torch.randint(self.model.config.vocab_size, (1, total), generator=generator)
        labels = tokens.clone()
        # Other counts in each data-parallel rank: a mean of means would be seen.
        labels[:, : 1 + 3 * (mesh.dp_rank % 8)] = IGNORED_LABEL
        self._batch = {"input_ids": tokens, "labels": labels}
        self.changed_rank = (mesh.sp - 1) // 2
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        count = count_labels(shifted).to(mesh.device)
        dist.all_reduce(count, group=mesh.dp_group)
        self.num_labels = int(count)
        self._whole = {
            "input_ids": tokens.to(mesh.device),
            "shift_labels": shifted.to(mesh.device),
            "position_ids": torch.arange(total, device=mesh.device)[None],
        }

    def outputs(self, *, change_tokens: bool = False, change_at: Mixer | None = None) -> Trace:
        """Each mixer's output for this rank's tokens, nothing else computed.

        Args:
            change_tokens: the second half of `changed_rank` gets other tokens.
            change_at: the second half of `changed_rank` gets another input at this mixer alone, but
                for the tokens that its convolution would carry to the next rank: what arrives
                there comes with the state.
        """
        batch = dict(self._batch)
        if change_tokens:
            start, stop = self.length // 2, self.length
            offset = self.changed_rank * self.length
            tokens = batch["input_ids"].clone()
            tokens[:, offset + start : offset + stop] += 1
            batch["input_ids"] = tokens % self.model.config.vocab_size
        part = shard_batch(batch, self.mesh)
        with contextlib.ExitStack() as stack:
            if change_at is not None and self.mesh.sp_rank == self.changed_rank:
                stack.enter_context(_input_changed(change_at, self.length))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_modes(self.model, training=False))
            trace = stack.enter_context(self._recorded())
            self.model(**part, num_items_in_batch=self.num_labels)
        return trace

    def split(self) -> Trace:
        """The probe cut over the SP ranks, with the gradients as the optimizer would get them."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import safe_get_full_grad

        part = shard_batch(self._batch, self.mesh)
        with _modes(self.model, training=True), self._recorded() as trace:
            # One micro-batch is the whole step, however many the configuration asks for.
            self.engine.set_gradient_accumulation_boundary(True)
            loss = self.engine(**part, num_items_in_batch=self.num_labels).loss
            self.engine.backward(loss)
        # Offloaded gradients are copied to the host beside it, where they are read and wiped.
        get_accelerator().synchronize()
        trace["the loss"] = loss.detach()
        # Collective in ZeRO, so on every rank and in one order.
        grads = {name: safe_get_full_grad(p) for name, p in self.parameters.items()}
        return trace | self._by_mixer(grads)

    def whole(self, noise: float = 0.0) -> Trace:
        """The probe uncut, on each rank alone; summed over the data-parallel ranks.

        Args:
            noise: every mixer and layer rounds its output at random by at most this part of it.
        """
        with _modes(self.model, training=False), _alone(self.model), _rounding(self.mixers, noise):
            with self._recorded() as trace:
                loss_sum = self.model(**self._whole).loss
            parameters = list(self.parameters.values())
            with without_reduction(self.engine):
                # None where there is none: `materialize_grads` would make zeros of ZeRO-3's shard.
                grads = torch.autograd.grad(loss_sum, parameters, allow_unused=True)
        mine = slice(self.mesh.sp_rank * self.length, (self.mesh.sp_rank + 1) * self.length)
        trace = {name: output[:, mine] for name, output in trace.items()}
        sums = {"the loss": loss_sum.detach()}
        sums |= self._by_mixer(dict(zip(self.parameters, grads, strict=True)))
        for name, value in sums.items():
            total = value.float().clone()
            dist.all_reduce(total, group=self.mesh.dp_group)
            trace[name] = total / self.num_labels
        return trace

    def _by_mixer(self, grads: Mapping[str, Tensor | None]) -> Trace:
        """The gradients of each mixer's parameters laid end to end in fp32; None is zero.

        Together, because where a parameter's gradient is a sum that cancels, as that of a key's
        bias is, its own norm is no measure of the rounding in it.
        """
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            whose = next((m.name for m in self.mixers if name.startswith(f"{m.name}.")), name)
            grad = grads[name]
            if grad is None:
                grad = torch.zeros(numel(parameter), device=self.mesh.device)
            parts.setdefault(f"the gradient of {whose}", []).append(grad.float().flatten())
        return {name: torch.cat(pieces) for name, pieces in parts.items()}

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Trace]:
        """Take down each mixer's output, the first time it runs."""
        trace: Trace = {}

        def recorder(name: str) -> Callable[..., None]:
            def record(_module: nn.Module, _args: Any, output: Any) -> None:
                # Checkpointing runs a layer a second time.
                trace.setdefault(name, _first(output).detach().clone())

            return record

        with _hooks(
            mixer.module.register_forward_hook(recorder(f"the output of {mixer.name}"))
            for mixer in self.mixers
        ):
            yield trace


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    """Remove the hooks afterwards."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _modes(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train mode (which checkpoints activations) or not, but dropout never."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training and not isinstance(module, nn.modules.dropout._DropoutNd)
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextlib.contextmanager
def _alone(model: Any) -> Iterator[None]:
    """The layers compute by themselves, and the loss is the sum over this rank's labels."""
    implementation, token_mean = model.config._attn_implementation, model.token_mean
    linear = [m for m in model.modules() if getattr(m, "implementation", None) == IMPLEMENTATION]
    try:
        model.config._attn_implementation = SOFTMAX_ALONE
        model.token_mean = lambda loss_sum, _labels, _count: loss_sum
        for module in linear:
            module.implementation = LINEAR_ALONE
        yield
    finally:
        model.config._attn_implementation = implementation
        model.token_mean = token_mean
        for module in linear:
            module.implementation = IMPLEMENTATION


@contextlib.contextmanager
def _input_changed(mixer: Mixer, length: int) -> Iterator[None]:
    """The mixer sees other hidden states [B, L, D] in the second half of its tokens."""
    start, stop = length // 2, length - mixer.halo

    def change(hidden: Tensor) -> Tensor:
        # Twice the size as well as the sign: products of two features do not cancel it.
        place = torch.arange(hidden.shape[1], device=hidden.device)
        return torch.where(((place >= start) & (place < stop))[:, None], -2 * hidden, hidden)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    with _hooks([mixer.module.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield


@contextlib.contextmanager
def _rounding(mixers: list[Mixer], noise: float) -> Iterator[None]:
    """Every mixer and decoder layer gives its output up to a relative error of `noise`."""
    if not noise:
        yield
        return
    generators: dict[torch.device, torch.Generator] = {}

    def rounded(x: Tensor) -> Tensor:
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(SEED))
        random = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
        return (x * (1 + noise * random)).to(x.dtype)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (rounded(output[0]), *output[1:]) if isinstance(output, tuple) else rounded(output)

    modules = {id(m): m for mixer in mixers for m in (mixer.module, mixer.layer)}
    with _hooks([module.register_forward_hook(hook) for module in modules.values()]):
        yield
