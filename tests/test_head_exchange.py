"""Tokens for heads and back: exact copies, whatever the dtypes, and each the other's transpose."""

import itertools

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks

from hybridsp.collectives.head_exchange import heads_to_tokens, tokens_to_heads
from hybridsp.layout import even_cuts

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def exchange(batch, length, heads, dims):
    """Forward and backward are copies, so that every rank can tell its result from the whole."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    whole = [
        torch.randn(batch, ranks * length, heads, dim).to(dtype)
        for dim, dtype in zip(dims, DTYPES, strict=True)
    ]
    mine = slice(group.rank() * length, (group.rank() + 1) * length)
    share = slice(*even_cuts(heads, ranks)[group.rank()])
    parts = [x[:, mine].clone().requires_grad_() for x in whole]
    gathered = tokens_to_heads(*parts, group=group)
    for x, right in zip(gathered, whole, strict=True):
        torch.testing.assert_close(x, right[:, :, share], rtol=0, atol=0)
    back = [heads_to_tokens(x, num_heads=heads, group=group) for x in gathered]
    for x, part in zip(back, parts, strict=True):
        torch.testing.assert_close(x, part, rtol=0, atol=0)
    grads = torch.autograd.grad(back, parts, [2 * x[:, mine] for x in whole])
    for grad, part in zip(grads, parts, strict=True):
        torch.testing.assert_close(grad, 2 * part.detach(), rtol=0, atol=0)


def exchanges(sizes):
    for batch, length, heads, dims in sizes:
        with case((batch, length, heads, dims)):
            exchange(batch, length, heads, dims)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exchange(ranks):
    """Odd sizes, where a bf16 piece would leave the next one off its own dtype's boundary."""
    sizes = itertools.product((1, 2), (1, 5), (ranks, ranks + 1, 2 * ranks), [(3, 1, 5), (1, 1, 1)])
    run_ranks(exchanges, ranks, list(sizes))


def test_exchange_of_tensors_whose_gradient_is_not_asked_for():
    run_ranks(only_one_gradient, 2)


def only_one_gradient():
    group = dist.group.WORLD
    q, g = torch.randn(1, 3, 2, 4).requires_grad_(), torch.randn(1, 3, 2, 1)
    out, gates = tokens_to_heads(q, g.expand(-1, -1, -1, 4), group=group)
    assert gates.shape == (1, 6, 1, 4)
    (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
    torch.testing.assert_close(grad, torch.ones_like(q), rtol=0, atol=0)
