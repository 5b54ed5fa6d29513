"""An MLP that never holds its inner activations of more than one tile of tokens.

Inside an MLP a token is several times as wide as outside, and autograd keeps that width, more than
once, of every token: at a million tokens that alone fills a GPU. But each token goes its own way
through an MLP. So the forward computes tile after tile and keeps the input only, and the backward
takes tile after tile again: forward, then backward (Arctic Long Sequence Training,
arXiv:2506.13996, section 3).

What a parameter receives is the sum over all tiles. It is accumulated here, in fp32 whatever the
parameter's dtype, and handed to autograd once. So hooks on parameters, as DeepSpeed's, fire once
per backward, frozen parameters cost nothing, and how many tiles there are is nobody's business:
ranks with different lengths need no agreement, because ZeRO-3 fetches such an MLP as a whole.

The input is saved *before* the forward runs. Activation checkpointing, which runs a layer again
until the last tensor that its backward wants exists, stops there: the layer's MLP, which comes
last, is not run a third time. (The backward's own run of each tile is the second.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

TokenWise = Callable[[Tensor], Tensor]


def tile_mlp(mlp: nn.Module, tokens: int | None) -> None:
    """Let `mlp` compute in tiles of so many tokens, rows of a batch laid end to end; None: whole.

    Under ZeRO-3 the module then counts as one whose parameters are gathered together.

    Args:
        mlp: a module that maps a tensor [B, L, D] to [B, L, D], each token by itself.
        tokens: at least 1. As many tokens or fewer are computed as if there were no tiles.
    """
    if tokens == getattr(mlp, "tile_tokens", None):
        return
    from deepspeed.utils import set_z3_leaf_module

    mlp.tile_tokens = tokens  # type: ignore[assignment]
    # Gathered by submodule, each tile would be a collective, and ranks would have to have as many.
    set_z3_leaf_module(mlp, tokens is not None)
    if tokens is None:
        del mlp.forward
    else:
        mlp.forward = MethodType(_tiled_forward, mlp)


def _tiled_forward(mlp: Any, x: Tensor) -> Tensor:
    compute = partial(type(mlp).forward, mlp)
    if x.shape[:-1].numel() <= mlp.tile_tokens:
        return compute(x)
    params = [p for p in mlp.parameters() if p.requires_grad]
    anchored = _Anchor.apply(x, *params)
    return _TiledMLP.apply(compute, mlp.tile_tokens, anchored.grad_fn, anchored, *params)


class _Anchor(torch.autograd.Function):
    """The identity; saves its input, at once.

    forward   [B, L, D] -> [B, L, D]
    backward  [B, L, D] -> [B, L, D], and nothing to the parameters, which are there only so that
              the input is saved where it wants no gradient and they do
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.num_params = len(params)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *[None] * ctx.num_params)


class _TiledMLP(torch.autograd.Function):
    """An MLP, tile by tile.

    forward   [B, L, D] -> [B, L, D]
    backward  [B, L, D] -> [B, L, D], and per parameter the sum over all tiles: each tile's part in
              the parameter's dtype, their sum in fp32 or better
    """

    @staticmethod
    def forward(
        ctx: Any, compute: TokenWise, tokens: int, anchor: Any, x: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.compute, ctx.tokens, ctx.anchor, ctx.params = compute, tokens, anchor, params
        ctx.surroundings = _Surroundings(x)
        out = None
        for begin, tile in _tiles(x, tokens):
            y = compute(tile)
            if out is None:
                out = y.new_empty((1, x.shape[:-1].numel(), y.shape[-1]))
            out[:, begin : begin + tokens] = y
        assert out is not None, "there is more than one tile"
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.anchor.saved_tensors
        wanted = {i: p for i, p in enumerate(ctx.params, start=4) if ctx.needs_input_grad[i]}
        sums: dict[int, Tensor] = {}
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat_dx = dx.view(1, -1, x.shape[-1])
        tiles = zip(_tiles(x, ctx.tokens), _tiles(grad, ctx.tokens), strict=True)
        with ctx.surroundings.restored():
            for (begin, tile), (_, dy) in tiles:
                tile = tile.detach().requires_grad_()
                with torch.enable_grad():
                    y = ctx.compute(tile)
                inputs = [tile, *wanted.values()]
                d_tile, *parts = torch.autograd.grad(y, inputs, dy, allow_unused=True)
                flat_dx[:, begin : begin + ctx.tokens] = d_tile
                for i, part in zip(wanted, parts, strict=True):
                    if part is not None:
                        _accumulate(sums, i, part)
        grads = (sums[i].to(p.dtype) if i in sums else None for i, p in enumerate(ctx.params, 4))
        return (None, None, None, dx, *grads)


def _tiles(x: Tensor, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """[B, L, D] -> each tile [1, tokens or fewer, D] of [1, B * L, D], and where it begins."""
    flat = x.reshape(1, -1, x.shape[-1])
    return ((i * tokens, tile) for i, tile in enumerate(flat.split(tokens, dim=1)))


def _accumulate(sums: dict[int, Tensor], i: int, part: Tensor) -> None:
    if i not in sums:  # zeros and not the part itself, which may be a view of what is not ours
        sums[i] = torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
    sums[i].add_(part)


class _Surroundings:
    """What a computation depends on beside its input, as it is now: random numbers and autocast."""

    def __init__(self, x: Tensor) -> None:
        kind = x.device.type
        self._kind = kind
        self._cpu_state = torch.get_rng_state()
        self._devices, self._device_states = get_device_states(x)
        self._autocast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As it was then: dropout, as LoRA has it, drops the same numbers again."""
        with (
            torch.random.fork_rng(self._devices, device_type=self._kind),
            self._autocast,
        ):
            torch.set_rng_state(self._cpu_state)
            set_device_states(self._devices, self._device_states, device_type=self._kind)
            yield
