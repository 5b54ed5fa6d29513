"""The halo against slicing the whole sequence, for widths up to several ranks."""

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks
from torch.nn import functional as F

from hybridsp.collectives import left_halo

LENGTH = 3
# None; within the left neighbour's 3 tokens; all of them; of several ranks; beyond the sequence.
WIDTHS = (0, 1, 2, 3, 4, 6, 8, 9, 12, 40)
DTYPES = (torch.float32, torch.bfloat16)


def halos(inputs):
    """Of this rank: the halo, and its gradient for a given direction."""
    results = {}
    for (width, dtype), (x, directions) in inputs.items():
        with case((width, dtype)):
            mine = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].requires_grad_()
            halo = left_halo(mine, width, dist.group.WORLD)
            (grad,) = torch.autograd.grad(halo, mine, directions[dist.get_rank()])
            results[width, dtype] = halo.detach(), grad
    return results


def right_halos(x, ranks, width):
    padded = F.pad(x, (0, 0, width, 0))
    return [padded[:, rank * LENGTH : rank * LENGTH + width] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_halo(ranks, subtests):
    inputs = {
        (width, dtype): (
            torch.randn(2, ranks * LENGTH, 5).to(dtype),
            torch.randn(ranks, 2, width, 5).to(dtype),
        )
        for width in WIDTHS
        for dtype in DTYPES
    }
    results = run_ranks(halos, ranks, inputs)
    for (width, dtype), (x, directions) in inputs.items():
        with subtests.test(f"{width} tokens, {dtype}"):
            got, grads = zip(*(result[width, dtype] for result in results), strict=True)
            expected = right_halos(x, ranks, width)
            for halo, right in zip(got, expected, strict=True):
                torch.testing.assert_close(halo, right, rtol=0, atol=0)
            exact = x.double().requires_grad_()
            (right_grad,) = torch.autograd.grad(
                right_halos(exact, ranks, width), exact, [y.double() for y in directions]
            )
            grad = torch.cat(grads, dim=1)
            assert grad.dtype == dtype
            # Summed in fp32, rounded once.
            rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(grad.double(), right_grad, rtol=rtol, atol=1e-6)
            # <A x, y> = <x, A' y>
            image = sum((a.double() * b).sum() for a, b in zip(got, directions, strict=True))
            torch.testing.assert_close(image, (x.double() * right_grad).sum())
