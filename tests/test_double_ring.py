"""Double rings: every split of a ring over hosts against the oracle, messages, refusals."""

import itertools
import re
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks
from sp_cases import DOCUMENTS, TOTAL, Case, check
from test_attention import attention_inputs, right_attention, skewed
from test_layout import drawn_bounds, skewed_bounds

from hybridsp.attention import softmax, softmax_attention
from hybridsp.attention.ring_choice import choose_variant
from hybridsp.attention.ring_plan import RingPlan
from hybridsp.attention.ring_transport import shared_shapes, transport_of
from hybridsp.collectives import RingExchange, ring_links, topology
from hybridsp.collectives.cost import Link
from hybridsp.collectives.ring_links import ONE_HOST, DoubleLinks, RingLinks, ring_ranks_per_host
from hybridsp.layout import ring_layout
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import plain

# --- what is computed ---


def doubles(ranks):
    """(ring, ulysses, ranks per host) of every double ring on so many ranks."""
    return [
        (ring, ranks // ring, count)
        for ring in range(4, ranks + 1)
        for count in range(2, ring)
        if ranks % ring == 0 and ring % count == 0
    ]


@pytest.mark.parametrize("ranks", [4, 6, 8])
def test_double_rings(ranks, subtests):
    """One document and packed ones, skewed so that ranks share unequally many rows, or none."""
    total = {4: TOTAL, 6: 60, 8: 80}[ranks]
    documents = DOCUMENTS if ranks == 4 else {"one": None, "5": skewed(total, 5)}
    documents |= {"20": skewed(total, 20), "equal": list(range(0, total + 1, 2))}
    cases = {
        f"ring {ring} by {count}, ulysses {ulysses}, documents {name}, causal {causal}": Case(
            softmax_attention,
            attention_inputs(2 if bounds is None else 1, total, (6, 2)),
            ring=ring,
            ulysses=ulysses,
            bounds=bounds,
            options={"variant": "double_ring", "ranks_per_host": count, "causal": causal},
        )
        for ring, ulysses, count in doubles(ranks)
        for name, bounds in documents.items()
        for causal in ((True, False) if name == "one" else (True,))
    }
    check(ranks, cases, right_attention, subtests)


@pytest.mark.gpu
def test_a_double_ring_on_gpus(subtests):
    cases = {
        name: Case(
            softmax_attention,
            attention_inputs(1, TOTAL, (6, 2)),
            ring=4,
            bounds=bounds,
            options={"variant": "double_ring", "ranks_per_host": 2},
        )
        for name, bounds in DOCUMENTS.items()
    }
    check(4, cases, right_attention, subtests, "nccl")


# --- what is sent ---


def plan_of(mesh, bounds, count):
    return RingPlan(
        rank=mesh.ring_group.rank(),
        layout=ring_layout(tuple(bounds), mesh.ring),
        causal=True,
        window=None,
        scale=1.0,
        variant="double_ring",
        backend=plain.BACKEND,
        ranks_per_host=count,
    )


def test_a_double_ring_visits_every_rank_once_and_its_own_host_first():
    mesh = mock.Mock(ring=8)
    for rank, count in itertools.product(range(8), (2, 4)):
        mesh.ring_group.rank.return_value = rank
        plan = plan_of(mesh, [0, 64], count)
        owners = [plan.owner(step) for step in range(plan.steps)]
        assert sorted(owners) == list(range(8))
        assert owners[0] == rank
        hosts = [owner // count for owner in owners]
        assert hosts == [(rank // count - step // count) % (8 // count) for step in range(8)]
    assert replace(plan, variant="ring", ranks_per_host=None).owner(3) == 4


def integers(*shape):
    """fp32 that sums exactly in any order."""
    return torch.randint(-8, 9, shape).float()


def adjoint(counts, documents):
    """<visited, y> summed over ranks = <own, what came home>: the way home is the transpose."""
    mesh = SPMesh(ring=dist.get_world_size())
    torch.manual_seed(mesh.rank)
    for count, bounds in itertools.product(counts, documents):
        with case(f"{count} to a host, documents {bounds}"):
            plan = plan_of(mesh, bounds, count)
            tokens = sum(stop - start for start, stop in plan.layout.spans[plan.rank])
            k, v = integers(1, tokens, 2, 3), integers(1, tokens, 2, 5)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            transport, seen = transport_of(plan, mesh), 0.0
            for _ in range(2):  # a transport serves any number of passes
                for step, keys, values in transport.visits(k, v):
                    if step == 0:
                        assert keys is k
                        continue
                    y, z = integers(*keys.shape), integers(*values.shape)
                    assert [keys.shape, values.shape] == shared_shapes(plan, plan.owner(step), k, v)
                    seen += float((keys * y).sum() + (values * z).sum())
                    transport.send_home(step, y, z, dk, dv)
                transport.collect(dk, dv)
            sums = torch.tensor([seen, float((k * dk).sum() + (v * dv).sum())])
            dist.all_reduce(sums)
            assert sums[0] == sums[1]


@pytest.mark.parametrize(("ranks", "counts"), [(4, [2]), (8, [2, 4])])
def test_the_way_home_is_the_transpose(ranks, counts):
    run_ranks(adjoint, ranks, counts, [[0, 64], *(drawn_bounds(90) for _ in range(6))])


def inputs(length=8):
    torch.manual_seed(0)
    return [torch.randn(1, length, heads, 6, requires_grad=True) for heads in (6, 3, 3)]


def trained(mesh, leaves, **options):
    out = softmax_attention(*leaves, mesh=mesh, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def messages(ranks_per_host):
    mesh, posts, post = SPMesh(ring=dist.get_world_size()), [], RingExchange.post

    def watched(exchange, *args, shift=1):
        posts.append((exchange._size, exchange._tag, shift))
        post(exchange, *args, shift=shift)

    with mock.patch.object(RingExchange, "post", watched):
        trained(mesh, inputs(), variant="double_ring", ranks_per_host=ranks_per_host)
    return posts


def test_between_hosts_goes_one_message_of_keys_and_one_of_gradients_per_host():
    """(ranks of the ring, tag, shift): K and V are tag 0, gradients 1; NCCL matches by order."""
    near, far, home = (2, 0, 1), (6, 0, 2), (2, 1, -1)
    right = [far, near, far, near, near]  # forward: a round ends without a near message
    right += [far, near, home, far, near, home, near, (6, 1, -2), home, (6, 1, -4)]
    assert run_ranks(messages, 6, 2) == [right] * 6


def late_ranks():
    """A rank that is late with every message changes no bit."""
    mesh, post, wait = SPMesh(ring=4), RingExchange.post, RingExchange.wait
    options = {"variant": "double_ring", "ranks_per_host": 2}
    options["cu_seqlens"] = torch.tensor([0, 1, 5, 32], dtype=torch.int32)

    def late(function, of_rank):
        def call(*args, **kwargs):
            time.sleep(0.02 * (mesh.rank == of_rank))
            return function(*args, **kwargs)

        return call

    right = trained(mesh, inputs(), **options)
    for rank in range(4):
        with (
            case(rank),
            mock.patch.object(RingExchange, "post", late(post, rank)),
            mock.patch.object(RingExchange, "wait", late(wait, (rank + 1) % 4)),
        ):
            got = trained(mesh, inputs(), **options)
            torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_late_messages():
    run_ranks(late_ranks, 4)


# --- which hosts make a double ring, and when it is taken ---


@pytest.mark.parametrize(
    ("hosts", "ulysses", "count"),
    [
        *(("aabb", 1, 2), ("aaaa", 1, 4), ("abcd", 1, 1), ("aaaabbbb", 2, 2), ("aabb", 2, 1)),
        *(("aaab", 1, None), ("abab", 1, None), ("aaabbbcc", 1, None), ("aaaaabbb", 2, None)),
        ("abababab", 2, 4),  # each of the two rings has a host of its own
    ],
)
def test_ranks_of_a_ring_on_a_host(hosts, ulysses, count):
    assert ring_ranks_per_host(hosts, ulysses) == count


def told(mesh, **options):
    with pytest.raises(ValueError, match="variant") as caught:
        softmax_attention(*inputs(), mesh=mesh, **options)
    return str(caught.value)


def on_hosts():
    """Ranks that believe they run on other hosts: the links that they find, and what is refused."""
    found, refused = {}, {}
    for hosts, ulysses in (("aaaabbbb", 1), ("aaaabbbb", 2), ("aaaaaaab", 1), ("a" * 8, 1)):
        with mock.patch.object(topology, "host_identity", lambda h=hosts: h[dist.get_rank()]):
            mesh = SPMesh(ring=8 // ulysses, ulysses=ulysses)
            found[hosts, ulysses] = links = ring_links.ring_links(mesh)
            right = trained(mesh, inputs(), variant="ring")
            if links.double is None:
                refused[hosts] = told(mesh, variant="double_ring")
            else:
                got = trained(mesh, inputs(), variant="double_ring")
                torch.testing.assert_close(got, right)
            with mock.patch.object(softmax, "choose_variant", return_value="ring") as choice:
                trained(mesh, inputs(), variant="auto")
            assert choice.call_args.kwargs["links"] is links
            if links.double is not None:
                with mock.patch.object(softmax, "choose_variant", return_value="double_ring"):
                    got = trained(mesh, inputs(), variant="auto")
                torch.testing.assert_close(got, right)
    return found, refused


def test_hosts_are_found_out():
    (first, refused), *others = run_ranks(on_hosts, 8)
    assert all(other == (first, refused) for other in others), "all ranks know the same"
    assert first["aaaabbbb", 1].double.ranks_per_host == 4
    assert first["aaaabbbb", 2].double.ranks_per_host == 2
    assert "equally many consecutive ranks" in refused["aaaaaaab"]
    assert "every ring lies on one host" in refused["a" * 8]
    assert first["aaaaaaab", 1].double is None
    assert first["a" * 8, 1] == ONE_HOST, "nothing is measured where all is near"
    double = first["aaaabbbb", 1].double
    for link in (double.inner, double.outer, first["aaaaaaab", 1].step):
        assert link.latency > 0
        assert link.bandwidth > 0


def refusals():
    mesh, wrong = SPMesh(ring=4), {"variant": "double_ring"}
    return [
        *(told(mesh, **wrong, ranks_per_host=count) for count in (1, 3, 4, -2)),
        told(mesh, variant="ring", ranks_per_host=2),
        told(SPMesh(ring=1), **wrong),
        told(SPMesh(ring=2), **wrong),
    ]


def test_refusals():
    for of_rank in run_ranks(refusals, 4):
        *counts, other, alone, one_host = of_rank
        for count, message in zip((1, 3, 4, -2), counts, strict=True):
            assert re.match(f"ranks_per_host = {count} with ring = 4: .* use a divisor", message)
        assert "only a double ring asks for it" in other
        assert "ring = 1" in alone
        assert "every ring lies on one host; use 'ring'" in one_host


def disagreeing():
    mesh = SPMesh(ring=8)
    return told(mesh, variant="double_ring", ranks_per_host=2 if mesh.rank == 3 else 4)


def test_ranks_that_differ_are_told():
    (message,) = set(run_ranks(disagreeing, 8))
    assert re.search("rank 3: [^;]*ranks_per_host=2,", message)


FAST, SLOW = Link(latency=40e-6, bandwidth=200e9), Link(latency=60e-6, bandwidth=10e9)
DOUBLE = DoubleLinks(ranks_per_host=4, inner=FAST, outer=SLOW)
TWO_HOSTS = RingLinks(step=SLOW, gather=SLOW, double=DOUBLE)


def chosen(tokens, links, bounds=None):
    """Of one KV head for 4 heads of 128 in bf16, in a ring of 8."""
    layout = ring_layout(bounds or (0, tokens), 8)
    return choose_variant(layout, row_bytes=512, pair_flops=4 * 4 * 128, causal=True, links=links)


def test_auto_takes_a_double_ring_where_the_network_is_slower_than_the_blocks():
    assert chosen(2**16, TWO_HOSTS) == "double_ring"
    assert chosen(2**20, TWO_HOSTS) == "ring", "the blocks hide even the slow messages"
    assert chosen(2**16, replace(TWO_HOSTS, double=None)) != "double_ring"
    assert chosen(2**16, ONE_HOST) != "double_ring"
    no_wire = replace(DOUBLE, outer=replace(SLOW, bandwidth=1e5))
    assert chosen(2**16, replace(TWO_HOSTS, double=no_wire)) != "double_ring"
    packed = skewed_bounds(seed=0, sigma=0.5, total=2**16)
    assert chosen(None, replace(TWO_HOSTS, gather=FAST), packed) == "allgather"
    assert chosen(None, TWO_HOSTS, tuple(range(101))) == "ring", "nothing travels"
