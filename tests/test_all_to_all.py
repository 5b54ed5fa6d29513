"""Tokens for heads and back: what arrives is what the layout promises, and so is the transpose."""

import itertools

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks

from hybridsp.collectives import heads_to_seq, seq_to_heads
from hybridsp.layout import relayout
from hybridsp.mesh import SPMesh

BATCH, Q_DIM, V_DIM = 2, 3, 2
HEADS = [(9, 3), (8, 1), (6, 6), (8, 2)]
# (ring, ulysses) of 4 and of 6 ranks; where they are fewer, every data-parallel row does the same.
# In odd rings and odd lengths a rank sends parts of both half-chunks to the same rank.
MESHES = {
    4: [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)],
    6: [(3, 1), (1, 3), (6, 1), (3, 2), (2, 3), (1, 6)],
}
LENGTHS = (1, 3, 4)


def exchange(meshes, inputs):
    """Of this rank: what arrives, its way back, and the gradients of both for given directions."""
    results = {}
    for ring, ulysses in meshes:
        mesh = SPMesh(ring=ring, ulysses=ulysses)
        for (length, heads), whole in inputs[ring, ulysses].items():
            with case((ring, ulysses, length, heads)):
                route = relayout(length * mesh.sp, ring, ulysses, *heads)
                mine = [x.chunk(mesh.sp, dim=1)[mesh.sp_rank].requires_grad_() for x in whole]
                arrived = seq_to_heads(*mine, route, mesh.sp_group)
                back = heads_to_seq(arrived[0], route, mesh.sp_group)
                torch.manual_seed(mesh.sp_rank)
                directions = [torch.randn_like(x) for x in arrived]
                grads = torch.autograd.grad(arrived, mine, directions)
                out = arrived[0].detach().requires_grad_()
                home = heads_to_seq(out, route, mesh.sp_group)
                (dout,) = torch.autograd.grad(home, out, whole[0].chunk(mesh.sp, 1)[mesh.sp_rank])
                arrived = [x.detach() for x in arrived]
                result = arrived, directions, grads, back.detach(), dout
                results[ring, ulysses, length, heads] = mesh.sp_rank, result
    return results


def whole_inputs(total, heads):
    return [
        torch.randn(BATCH, total, heads[0], Q_DIM),
        torch.randn(BATCH, total, heads[1], Q_DIM),
        torch.randn(BATCH, total, heads[1], V_DIM),
    ]


def promised(whole, route, rank):
    """This rank's half-chunks and heads of the whole q, k, v."""
    tokens = [t for start, stop in route.spans(rank) for t in range(start, stop)]
    share = route.share(rank)
    chosen = zip(whole, (share.q, share.kv, share.kv), strict=True)
    return [x[:, tokens][:, :, list(heads)] for x, heads in chosen]


@pytest.mark.parametrize("world", MESHES)
def test_exchange(world, subtests):
    inputs = {
        (ring, ulysses): {
            (length, heads): whole_inputs(length * ring * ulysses, heads)
            for length, heads in itertools.product(LENGTHS, HEADS)
        }
        for ring, ulysses in MESHES[world]
    }
    results = run_ranks(exchange, world, MESHES[world], inputs)
    equal = {"rtol": 0, "atol": 0}
    for ring, ulysses in MESHES[world]:
        for (length, heads), whole in inputs[ring, ulysses].items():
            name = ring, ulysses, length, heads
            with subtests.test("ring {}, ulysses {}, {} tokens, heads {}".format(*name)):
                sp = ring * ulysses
                route = relayout(length * sp, ring, ulysses, *heads)
                for rank, (arrived, *_, back, dout) in [result[name] for result in results]:
                    right = promised(whole, route, rank)
                    torch.testing.assert_close(arrived, right, **equal)
                    torch.testing.assert_close(back, whole[0].chunk(sp, dim=1)[rank], **equal)
                    torch.testing.assert_close(dout, right[0], **equal)
                check_transpose(whole, route, dict(result[name] for result in results))


def check_transpose(whole, route, of_rank):
    """Gradients by autograd through plain indexing, where replicated KV heads add up."""
    whole = [x.clone().requires_grad_() for x in whole]
    promises = [x for rank in range(route.sp) for x in promised(whole, route, rank)]
    directions = [y for rank in range(route.sp) for y in of_rank[rank][1]]
    right = torch.autograd.grad(promises, whole, directions)
    grads = [torch.cat(g, 1) for g in zip(*(of_rank[r][2] for r in range(route.sp)), strict=True)]
    torch.testing.assert_close(tuple(grads), right)
    # <A x, y> = <x, A' y>
    image = sum((x * y).double().sum() for x, y in zip(promises, directions, strict=True))
    preimage = sum((x * g).double().sum() for x, g in zip(whole, grads, strict=True))
    torch.testing.assert_close(image, preimage, rtol=1e-5, atol=1e-5)


def in_bf16():
    """Four ranks share a KV head: their gradients add up in fp32 and are rounded once."""
    mesh = SPMesh(ulysses=4)
    route = relayout(4, 1, 4, 4, 1)
    q, k, v = (torch.ones(1, 1, h, 1, dtype=torch.bfloat16).requires_grad_() for h in (4, 1, 1))
    arrived = seq_to_heads(q, k, v, route, mesh.sp_group)
    assert [x.dtype for x in arrived] == [torch.bfloat16, torch.float32, torch.float32]
    # Added one by one in bf16, whose next number after 1 is 1 + 2^-7, the small ones would vanish.
    direction = torch.full_like(arrived[2], 1.0 if mesh.sp_rank == 0 else 2**-9)
    (dv,) = torch.autograd.grad(arrived[2], v, direction)
    assert dv.dtype == torch.bfloat16
    return dv.float().item()


def test_gradients_of_bf16_heads_add_up_in_fp32():
    assert run_ranks(in_bf16, 4) == [1 + 2**-7] * 4


def strided(group_size):
    """Tensors that are not contiguous travel like any others."""
    mesh = SPMesh(ring=group_size)
    route = relayout(2 * group_size, group_size, 1, 2, 2)
    torch.manual_seed(dist.get_rank())
    turned = [torch.randn(2, 2, 2, 3).transpose(1, 2).requires_grad_() for _ in range(3)]
    straight = [x.detach().contiguous().requires_grad_() for x in turned]
    for got, right in zip(
        seq_to_heads(*turned, route, mesh.sp_group),
        seq_to_heads(*straight, route, mesh.sp_group),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
        home = heads_to_seq(got.mT.contiguous().mT, route, mesh.sp_group)
        expected = heads_to_seq(right, route, mesh.sp_group)
        torch.testing.assert_close(home, expected, rtol=0, atol=0)


def test_tensors_that_are_not_contiguous():
    run_ranks(strided, 2, 2)
