"""All-Scan against the naive recursion of one process: states, gradients, and its own transpose."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks

from hybridsp.collectives import all_scan
from hybridsp.collectives.all_scan import AllScan
from hybridsp.collectives.cost import LOOPBACK, NVLINK, Link, chain_blocks, chain_seconds, link_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH, HEADS, ROWS, COLUMNS = 2, 3, 7, 4

# 7 rows: 2 and 3 blocks are uneven, 7 is a row per block.
ALGORITHMS = {
    "auto": {},
    "allgather": {"algorithm": "allgather"},
    "chain": {"algorithm": "chain"},
    "chain of 1 block": {"algorithm": "chain", "num_blocks": 1},
    "chain of 2 blocks": {"algorithm": "chain", "num_blocks": 2},
    "chain of 3 blocks": {"algorithm": "chain", "num_blocks": 3},
    "chain of 7 blocks": {"algorithm": "chain", "num_blocks": 7},
}
DECAYS = ("vector", "scalar", "documents", "all cut")


def states_and_decays(ranks, decays):
    """Of all ranks, [P, B, H, K, V] and [P, B, H, K or 1]."""
    state = torch.randn(ranks, BATCH, HEADS, ROWS, COLUMNS)
    decay = 0.1 + 0.9 * torch.rand(ranks, BATCH, HEADS, 1 if decays == "scalar" else ROWS)
    if decays == "documents":  # one row is cut on the even ranks, the other on the last
        decay[::2, 0], decay[-1, 1] = 0, 0
    elif decays == "all cut":
        decay[:] = 0
    return state, decay


def naive_scan(state, decay, *, reverse):
    """What enters each rank: In(p+1) = d_p * In(p) + S_p."""
    order = range(len(state))[::-1] if reverse else range(len(state))
    incoming, entering = 0 * state[0], [None] * len(state)
    for rank in order:
        entering[rank] = incoming
        incoming = decay[rank][..., None] * incoming + state[rank]
    return torch.stack(entering)


def all_scans(inputs):
    """Of this rank: In, its gradients for a random direction, and the scan from the other end."""
    results = {}
    for name, (state, decay, dout, options) in inputs.items():
        with case(name):
            rank = dist.get_rank()
            state, decay = (x[rank].clone().requires_grad_() for x in (state, decay))
            out = all_scan(state, decay, dist.group.WORLD, **options)
            grads = torch.autograd.grad(out, (state, decay), dout[rank])
            options["reverse"] = not options["reverse"]
            transpose = all_scan(dout[rank], decay.detach(), dist.group.WORLD, **options)
            assert transpose.grad_fn is None
            results[name] = (out.detach(), *grads, transpose)
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_all_scan(ranks, subtests):
    inputs = {}
    for decays, reverse, algorithm in itertools.product(DECAYS, [False, True], ALGORITHMS):
        state, decay = states_and_decays(ranks, decays)
        options = {"reverse": reverse, **ALGORITHMS[algorithm]}
        inputs[decays, reverse, algorithm] = state, decay, torch.randn_like(state), options
    results = run_ranks(all_scans, ranks, inputs)
    for name, (state, decay, dout, options) in inputs.items():
        got = zip(*(result[name] for result in results), strict=True)
        out, dstate, ddecay, transpose = (torch.stack(x).double() for x in got)
        with subtests.test("decays {}, reverse {}, {}".format(*name)):
            exact = [x.double().requires_grad_() for x in (state, decay)]
            expected = naive_scan(*exact, reverse=options["reverse"])
            right = torch.autograd.grad(expected, exact, dout.double(), materialize_grads=True)
            torch.testing.assert_close((out, dstate, ddecay), (expected, *right), **CLOSE)
            # <A x, y> = <x, A' y>, with A' the gradient and, just so, the scan from the other end.
            inner = (out * dout).sum()
            torch.testing.assert_close(inner, (state * dstate).sum(), **CLOSE)
            torch.testing.assert_close(transpose, dstate, rtol=0, atol=0)


def other_layouts():
    """Tensors and gradients that are not contiguous; K = 1; decays that want no gradient."""
    torch.manual_seed(dist.get_rank())
    rank, group = dist.get_rank(), dist.group.WORLD
    for algorithm in ("chain", "allgather"):
        scan = functools.partial(all_scan, group=group, algorithm=algorithm)
        with case(f"turned, {algorithm}"):
            state = torch.randn(BATCH, HEADS, COLUMNS, ROWS).mT.requires_grad_()
            decay = torch.rand(BATCH, ROWS, HEADS).transpose(1, 2)
            out = scan(state, decay)
            expected = scan(state.contiguous(), decay.contiguous())
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            ones = torch.ones(()).expand(out.shape)
            (grad,) = torch.autograd.grad(out, state, ones)
            (right,) = torch.autograd.grad(expected, state, ones.contiguous())
            torch.testing.assert_close(grad, right, rtol=0, atol=0)
        with case(f"one row, {algorithm}"):
            out = scan(torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 0.5))
            assert out.unique().item() == [0, 3, 4.5][rank]
    with case("a group of some ranks"):
        pair = dist.new_group([0, 2])
        if rank != 1:
            out = all_scan(torch.full((1, 1, 1, 2), 1.0 + rank), torch.ones(1, 1, 1), pair)
            assert out.unique().item() == (0 if rank == 0 else 1)


def test_other_layouts_and_groups():
    run_ranks(other_layouts, 3)


STATE, DECAY = torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5)
MISFITS = {
    r"state \(2, 5, 4\) and decay \(1, 2, 5\) do not fit": (STATE[0], DECAY, {}),
    r"state .* and decay \(1, 2, 5, 1\) do not fit": (STATE, DECAY[..., None], {}),
    r"state .* and decay \(1, 2, 4\) do not fit": (STATE, DECAY[..., :4], {}),
    r"state .* and decay \(1, 1, 5\) do not fit": (STATE, DECAY[:, :1], {}),
    r"state .* and decay \(2, 2, 5\) do not fit": (STATE, DECAY.repeat(2, 1, 1), {}),
    r"state is torch.bfloat16 and decay torch.float32": (STATE.bfloat16(), DECAY, {}),
    r"state is torch.float32 and decay torch.float64": (STATE, DECAY.double(), {}),
    r"algorithm = 'ring' is unknown; use one of": (STATE, DECAY, {"algorithm": "ring"}),
    r"num_blocks = 0 must lie in 1 .. K = 5": (STATE, DECAY, {"num_blocks": 0}),
    r"num_blocks = 6 must lie in 1 .. K = 5": (STATE, DECAY, {"num_blocks": 6}),
}


@pytest.mark.parametrize("match", MISFITS)
def test_misfits_are_refused_before_the_group_is_touched(match):
    state, decay, options = MISFITS[match]
    with pytest.raises(ValueError, match=match):
        all_scan(state, decay, None, **options)


@pytest.mark.parametrize("num_bytes", [100, 10**6, 10**8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_the_number_of_blocks_is_the_fastest(ranks, num_bytes):
    most = 300
    for link in (NVLINK, LOOPBACK, Link(latency=1e-9, bandwidth=1e9)):
        chosen = chain_blocks(link, ranks, num_bytes, most)
        assert 1 <= chosen <= most
        seconds = chain_seconds(link, ranks, num_bytes, chosen)
        fastest = min(chain_seconds(link, ranks, num_bytes, n) for n in range(1, most + 1))
        assert seconds <= 1.01 * fastest


class GroupOf:
    def __init__(self, ranks):
        self.ranks = ranks

    def size(self):
        return self.ranks


def test_auto_takes_what_is_predicted_to_be_faster(monkeypatch):
    """Small states pay latency once; large ones must not be sent to everyone."""
    chosen = []
    monkeypatch.setattr(AllScan, "apply", lambda *arguments: chosen.append(arguments[4]))
    assert link_of(torch.device("cpu")) is LOOPBACK
    assert link_of(torch.device("cuda")) is NVLINK
    for rows in (2, 4096):
        all_scan(torch.zeros(1, 1, rows, 128), torch.ones(1, 1, rows), GroupOf(8))
    assert chosen == ["allgather", "chain"]
