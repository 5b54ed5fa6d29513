"""All-Scan against the naive recursion of one process: states, gradients, and its own transpose."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks
from scan_oracle import naive_scan

from hybridsp.collectives import all_scan, start_all_scan

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH, HEADS, ROWS, COLUMNS = 2, 3, 7, 4

# Worlds to test in: on the CPU, and on as many GPUs.
WORLDS = [
    *(("gloo", ranks) for ranks in (1, 2, 3, 4, 8)),
    *(pytest.param("nccl", ranks, marks=pytest.mark.gpu) for ranks in (1, 2, 4)),
]
# 7 rows: 2 and 3 blocks are uneven, 7 is a row per block. 3 ranks per host: 8 ranks are ragged.
ALGORITHMS = {
    "auto": {},
    "allgather": {"algorithm": "allgather"},
    "doubling": {"algorithm": "doubling"},
    "chain": {"algorithm": "chain"},
    "chain of 1 block": {"algorithm": "chain", "num_blocks": 1},
    "chain of 3 blocks": {"algorithm": "chain", "num_blocks": 3},
    "chain of 7 blocks": {"algorithm": "chain", "num_blocks": 7},
    "the hosts there are": {"algorithm": "hierarchical"},
    "hosts of 1 rank": {"algorithm": "hierarchical", "num_blocks": 2, "ranks_per_host": 1},
    "hosts of 2 ranks": {"algorithm": "hierarchical", "ranks_per_host": 2},
    "hosts of 3 ranks": {"algorithm": "hierarchical", "num_blocks": 2, "ranks_per_host": 3},
}
SYMMETRIC = {"symmetric": {"algorithm": "symmetric"}}
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


def all_scans(inputs, device, refused):
    """Of this rank: In, its gradients for a random direction, and the scan from the other end.

    Why it was refused instead, for the algorithms `refused` may be.
    """
    results = {}
    for name, (state, decay, dout, options) in inputs.items():
        with case(name):
            rank = dist.get_rank()
            state, decay, dout = (x[rank].to(device) for x in (state, decay, dout))
            state, decay = (x.requires_grad_() for x in (state, decay))
            try:
                out = all_scan(state, decay, dist.group.WORLD, **options)
            except ValueError as error:
                if options.get("algorithm") not in refused:
                    raise
                results[name] = str(error)
                continue
            grads = torch.autograd.grad(out, (state, decay), dout)
            options["reverse"] = not options["reverse"]
            transpose = all_scan(dout, decay.detach(), dist.group.WORLD, **options)
            assert transpose.grad_fn is None
            results[name] = tuple(x.detach().cpu() for x in (out, *grads, transpose))
    return results


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_all_scan(backend, ranks, subtests):
    inputs = {}
    algorithms = ALGORITHMS if backend == "gloo" else ALGORITHMS | SYMMETRIC
    for decays, reverse, algorithm in itertools.product(DECAYS, [False, True], algorithms):
        state, decay = states_and_decays(ranks, decays)
        options = {"reverse": reverse, **algorithms[algorithm]}
        inputs[decays, reverse, algorithm] = state, decay, torch.randn_like(state), options
    device = "cpu" if backend == "gloo" else "cuda"
    results = run_ranks(all_scans, ranks, inputs, device, {"symmetric"}, backend=backend)
    for name, (state, decay, dout, options) in inputs.items():
        got = [result[name] for result in results]
        with subtests.test("decays {}, reverse {}, {}".format(*name)):
            if isinstance(got[0], str):
                assert len(set(got)) == 1
                pytest.skip(got[0])
            out, dstate, ddecay, transpose = (
                torch.stack(x).double() for x in zip(*got, strict=True)
            )
            exact = [x.double().requires_grad_() for x in (state, decay)]
            expected = naive_scan(*exact, reverse=options["reverse"])
            right = torch.autograd.grad(expected, exact, dout.double(), materialize_grads=True)
            torch.testing.assert_close((out, dstate, ddecay), (expected, *right), **CLOSE)
            # <A x, y> = <x, A' y>, with A' the gradient and, just so, the scan from the other end.
            inner = (out * dout).sum()
            torch.testing.assert_close(inner, (state * dstate).sum(), **CLOSE)
            torch.testing.assert_close(transpose, dstate, rtol=0, atol=0)


EACH = [
    {"algorithm": "chain", "num_blocks": 1},
    {"algorithm": "doubling"},
    {"algorithm": "allgather"},
    {"algorithm": "hierarchical", "num_blocks": 1, "ranks_per_host": 2},
]


def other_layouts():
    """Tensors and gradients that are not contiguous; K = 1; decays that want no gradient."""
    torch.manual_seed(dist.get_rank())
    rank, group = dist.get_rank(), dist.group.WORLD
    for options in EACH:
        scan = functools.partial(all_scan, group=group, **options)
        with case(f"turned, {options}"):
            state = torch.randn(BATCH, HEADS, COLUMNS, ROWS).mT.requires_grad_()
            decay = torch.rand(BATCH, ROWS, HEADS).transpose(1, 2)
            out = scan(state, decay)
            expected = scan(state.contiguous(), decay.contiguous())
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            ones = torch.ones(()).expand(out.shape)
            (grad,) = torch.autograd.grad(out, state, ones)
            (right,) = torch.autograd.grad(expected, state, ones.contiguous())
            torch.testing.assert_close(grad, right, rtol=0, atol=0)
        with case(f"one row, {options}"):
            out = scan(torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 0.5))
            assert out.unique().item() == [0, 3, 4.5][rank]
    pair = dist.new_group([0, 2])
    for options in [{}, *EACH] if rank != 1 else []:
        with case(f"a group of some ranks, {options}"):
            state = torch.full((1, 1, 1, 2), 1.0 + rank)
            out = all_scan(state, torch.ones(1, 1, 1), pair, **options)
            assert out.unique().item() == (0 if rank == 0 else 1)
            out = all_scan(state, torch.ones(1, 1, 1), pair, reverse=True, **options)
            assert out.unique().item() == (0 if rank == 2 else 3)


def test_other_layouts_and_groups():
    run_ranks(other_layouts, 3)


def scans_in_flight(inputs, device):
    """Start all, forward and reverse in turn, then wait for all."""
    results = {}
    for options in [*EACH, {"algorithm": "chain", "num_blocks": 4}, {}]:
        with case(options):
            mine = [x[dist.get_rank()].to(device) for x in inputs]
            pending = [
                start_all_scan(state, decay, dist.group.WORLD, reverse=reverse, **options)
                for state, decay in zip(mine[::2], mine[1::2], strict=True)
                for reverse in (False, True)
            ]
            del mine  # a scan in flight keeps what it reads
            results[str(options)] = torch.stack([scan.wait() for scan in pending]).cpu()
            again = torch.stack([scan.wait() for scan in pending]).cpu()
            torch.testing.assert_close(again, results[str(options)], rtol=0, atol=0)
    return results


@pytest.mark.parametrize(
    ("backend", "ranks"), [("gloo", 4), pytest.param("nccl", 2, marks=pytest.mark.gpu)]
)
def test_several_scans_in_flight_keep_their_order(backend, ranks):
    pairs = [states_and_decays(ranks, "vector") for _ in range(2)]
    expected = [naive_scan(*pair, reverse=reverse) for pair in pairs for reverse in (False, True)]
    device = "cpu" if backend == "gloo" else "cuda"
    inputs = list(itertools.chain.from_iterable(pairs))
    results = run_ranks(scans_in_flight, ranks, inputs, device, backend=backend)
    for rank, result in enumerate(results):
        for name, got in result.items():
            right = torch.stack([entering[rank] for entering in expected])
            torch.testing.assert_close(got, right, **CLOSE, msg=name)


def early_messages():
    """Rank 0 sends when it starts, not when it waits: it waits after rank 1 has what it sent."""
    group, rank = dist.group.WORLD, dist.get_rank()
    store = group.get_group_store()
    state, decay = torch.full((1, 1, 2, 3), 1.0 + rank), torch.ones(1, 1, 2)
    for options in ({"algorithm": "chain", "num_blocks": 1}, {"algorithm": "doubling"}):
        with case(options):
            pending = start_all_scan(state, decay, group, **options)
            if rank == 0:
                store.wait([options["algorithm"]])
                assert not pending.wait().any()
            else:
                assert pending.wait().unique().item() == 1
                store.set(options["algorithm"], "has arrived")


def test_messages_leave_before_anybody_waits():
    run_ranks(early_messages, 2, timeout=20)
