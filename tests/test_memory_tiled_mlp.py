"""The tiled MLP against the same MLP in one piece: values, every gradient, and what is held."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from hybridsp.memory import tile_mlp

HIDDEN, INNER = 6, 40
SHAPES = [(1, 7), (1, 8), (1, 9), (2, 9), (3, 1), (1, 1)]
TILES = [1, 3, 4, 8, 1000]


def mlp_of(tile=None, *, bias=True, hidden=HIDDEN, inner=INNER, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, mlp_bias=bias)
    mlp = LlamaMLP(config).to(dtype)
    tile_mlp(mlp, tile)
    return mlp


def gradients(mlp, x, dy):
    """Output, gradient of the input, gradient of each parameter that has one."""
    x = x.detach().clone().requires_grad_()
    mlp.zero_grad()
    y = mlp(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in mlp.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_mlp_in_one_piece(shape, subtests):
    x, dy = torch.randn(2, *shape, HIDDEN)
    right = gradients(mlp_of(), x, dy)
    for tile, how in itertools.product(TILES, ["plain", "checkpointed", "reentrant"]):
        with subtests.test(f"tile {tile}, {how}"):
            mlp = mlp_of(tile)
            forward = mlp
            if how != "plain":
                forward = partial(checkpoint, mlp, use_reentrant=how == "reentrant")
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            assert y.shape == x.shape
            y.backward(dy)
            got = [y.detach(), leaf.grad, *(p.grad for p in mlp.parameters())]
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_tensors_that_lie_differently_in_memory():
    mlp, tiled = mlp_of(), mlp_of(4)
    x, dy = torch.randn(2, 2, HIDDEN, 9).transpose(2, 3)
    assert not x.is_contiguous()
    torch.testing.assert_close(gradients(tiled, x, dy), gradients(mlp, x, dy), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [["gate_proj.weight", "up_proj.bias"], "all"], ids=str)
def test_frozen_parameters(frozen):
    x, dy = torch.randn(2, 1, 9, HIDDEN)
    mlps = mlp_of(), mlp_of(4)
    for mlp in mlps:
        for name, p in mlp.named_parameters():
            p.requires_grad_(frozen != "all" and name not in frozen)
    want, got = (gradients(mlp, x, dy) for mlp in mlps)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in mlps[1].parameters() if not p.requires_grad)


def test_an_input_without_gradient_and_gradients_of_some():
    x, dy = torch.randn(2, 1, 9, HIDDEN)
    mlps = mlp_of(), mlp_of(4)
    for ask in (["gate_proj.weight"], ["down_proj.bias", "up_proj.weight"]):
        want, got = (
            torch.autograd.grad(mlp(x), [mlp.get_parameter(name) for name in ask], dy)
            for mlp in mlps
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    frozen = mlps[1].requires_grad_(False)
    assert not frozen(x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mlps[1](x), mlps[0](x))


def test_gradients_accumulate_and_graphs_may_be_kept():
    x, dy = torch.randn(2, 1, 9, HIDDEN)
    want, got = [], []
    for mlp, grads in ((mlp_of(), want), (mlp_of(4), got)):
        for _ in range(3):
            mlp(x).backward(dy)
        y = mlp(x)
        y.backward(dy, retain_graph=True)
        y.backward(dy)
        grads.extend(p.grad for p in mlp.parameters())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class DroppingLinear(nn.Linear):
    """As LoRA's linear layers: dropout within the MLP."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_drops_the_same_again(checkpointed):
    """The gradient is that of the values that came out: the finite difference, as it is linear."""
    tile, tokens = 2, 9
    mlp = nn.Sequential(DroppingLinear(HIDDEN, INNER), DroppingLinear(INNER, HIDDEN)).double()
    tile_mlp(mlp, tile)
    x, dy = torch.randn(2, 1, tokens, HIDDEN, dtype=torch.float64)
    x.requires_grad_()
    forward = partial(checkpoint, mlp, use_reentrant=False) if checkpointed else mlp

    def value(x):
        torch.manual_seed(5)
        return forward(x)

    y = value(x)
    state = torch.get_rng_state()
    torch.rand(3)
    before = torch.get_rng_state()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on"
    assert not torch.equal(state, before)
    direction = torch.randn_like(x)
    with torch.no_grad():
        change = ((value(x + direction) - value(x)) * dy).sum()
    torch.testing.assert_close((dx * direction).sum(), change)


def test_autocast_in_the_backward_is_that_of_the_forward():
    x, dy = torch.randn(2, 1, 64, HIDDEN)
    results = []
    for mlp in (mlp_of(), mlp_of(5)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = mlp(leaf)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        results.append([y.detach(), leaf.grad, *(p.grad for p in mlp.parameters())])
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


def test_bf16_parameters_lose_nothing_by_tiles():
    """Against fp64, many small tiles err no more than one piece: their sum is in fp32."""
    tokens = 4096
    x, dy = torch.randn(2, 1, tokens, HIDDEN).bfloat16()
    exact = gradients(mlp_of(dtype=torch.bfloat16).double(), x.double(), dy.double())
    whole = gradients(mlp_of(dtype=torch.bfloat16), x, dy)
    tiled = gradients(mlp_of(16, dtype=torch.bfloat16), x, dy)
    for right, one, many in zip(exact, whole, tiled, strict=True):
        assert many.dtype == torch.bfloat16
        error_of_one, error = ((g.double() - right).norm() / right.norm() for g in (one, many))
        assert error <= 1.1 * error_of_one + 1e-4


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation has returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_nothing_is_as_long_as_the_sequence_and_as_wide_inside():
    tokens, tile, hidden, inner = 512, 16, 4, 256
    x, dy = torch.randn(2, 1, tokens, hidden)
    sizes = {}
    for name, mlp in (
        ("whole", mlp_of(hidden=hidden, inner=inner)),
        ("tiled", mlp_of(tile, hidden=hidden, inner=inner)),
    ):
        with Largest() as largest:
            gradients(mlp, x, dy)
        sizes[name] = largest.numel
    assert sizes == {"whole": tokens * inner, "tiled": max(tokens * hidden, tile * inner)}


def test_what_is_saved_is_the_input_once():
    saved = []
    mlp = mlp_of(4)
    x = torch.randn(1, 9, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x)
    assert [t.shape for t in saved] == [x.shape]


def test_checkpointing_does_not_run_it_a_third_time():
    """The forward, and the backward's own: where the MLP comes last, as it does in a layer."""
    tiles = []
    mlp = mlp_of(3)
    mlp.act_fn.register_forward_hook(lambda *_: tiles.append(1))
    x = torch.randn(1, 9, HIDDEN, requires_grad=True)
    checkpoint(lambda x: x + mlp(x), x, use_reentrant=False).sum().backward()
    assert len(tiles) == 2 * 3


def test_hooks_on_parameters_are_called_once():
    calls = []
    mlp = mlp_of(2)
    for p in mlp.parameters():
        p.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    mlp(torch.randn(1, 9, HIDDEN)).sum().backward()
    assert len(calls) == len(list(mlp.parameters()))


def test_a_tile_can_be_changed_and_taken_back():
    mlp = mlp_of(4)
    tile_mlp(mlp, 5)
    assert mlp.tile_tokens == 5
    tile_mlp(mlp, None)
    assert "forward" not in vars(mlp)
    tile_mlp(mlp, 4)
    x = torch.randn(1, 9, HIDDEN)
    torch.testing.assert_close(mlp(x), mlp_of()(x))
