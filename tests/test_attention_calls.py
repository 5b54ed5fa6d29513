"""Calls of softmax attention that all ranks make together: what they ask, send and launch."""

import re
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import case
from disagreements import check_told, refusal, told_of, told_of_a_failure
from distributed import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hybridsp.attention import softmax, softmax_attention
from hybridsp.collectives import RingExchange, agreement
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import choose_backend, plain

# --- what one rank does otherwise than the others ---


def inputs(length=8, heads=3, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, length, n, 6, dtype=dtype) for n in (2 * heads, heads, heads)]


def disagreements(odd_rank):
    """What each rank is told of a first call in which one rank differs; then they are in step."""
    mesh = SPMesh(ring=3)
    alike = inputs()
    bounds = {"cu_seqlens": torch.tensor([0, 5, 24], dtype=torch.int32)}
    many = {"cu_seqlens": torch.arange(0, 25, 2, dtype=torch.int32)}
    moved = {"cu_seqlens": many["cu_seqlens"] + (torch.arange(13) == 4)}
    calls = [
        ("variant", alike, {"variant": "allgather"}, {"variant": "ring"}),
        ("unknown variant", alike, {"variant": "star"}, {}),
        ("L", inputs(length=7), {}, {}),
        ("heads", inputs(heads=2), {}, {}),
        ("shapes", [x[0] for x in alike], {}, {}),
        ("dtype", inputs(dtype=torch.bfloat16), {}, {}),
        ("causal", alike, {"causal": False}, {}),
        ("scale", alike, {"scale": 0.5}, {}),
        ("window", alike, {"window": 4}, {}),
        ("backend", alike, {"backend": "cudnn"}, {}),
        ("plain", alike, {"backend": "plain"}, {}),
        ("documents", alike, bounds, {}),
        ("boundaries", alike, {"cu_seqlens": bounds["cu_seqlens"] + 1}, bounds),
        ("other boundaries", alike, {"cu_seqlens": torch.tensor([0, 6, 24])}, bounds),
        ("one of many boundaries", alike, moved, many),
    ]
    told = told_of(softmax_attention, alike, calls, mesh, odd_rank)
    for variant in ("ring", "allgather", "auto"):
        with case(f"{variant} afterwards"):
            assert softmax_attention(*alike, mesh=mesh, variant=variant).isfinite().all()
    return told


REFUSED = {
    "unknown variant": "variant = 'star' is unknown",
    "shapes": r"shapes q \(8, 6, 6\).* do not fit",
    "window": "window = 4 with ring = 3",
    "backend": "backend = 'cudnn' cannot do this",
    "boundaries": "must rise from 0",
}
DIFFERENT = {
    "variant": "rank {}: softmax_attention.*variant='allgather'",
    "L": r"rank {}: softmax_attention\(q \(1, 7, 6, 6\)",
    "heads": r"rank {}: .*k \(1, 8, 2, 6\)",
    "dtype": r"rank {}: .*v \(1, 8, 3, 6\) bfloat16",
    "causal": "rank {}: .*causal=False",
    "scale": "rank {}: .*scale=0.5,",
    "plain": "rank {}: .*backend='plain'",
    "documents": "rank {}: .*cu_seqlens given",
    "other boundaries": r"rank {}: [^;]*documents \[0, 6, 24\]",
    "one of many boundaries": r"documents 12 \(checksum \w+\)",
}


@pytest.mark.parametrize("odd_rank", [0, 2])
def test_one_rank_that_differs_in_a_first_call_ends_it_on_all(odd_rank, subtests):
    check_told(disagreements, odd_rank, REFUSED, DIFFERENT, subtests)


def questions():
    mesh, asked = SPMesh(ring=2), []
    agree = agreement.agree
    agreement.agree = lambda group, call: asked.append(call) or agree(group, call)
    for length, end in ((4, 1), (5, 1), (4, 1), (4, 3)):
        bounds = torch.tensor([0, end, 2 * length], dtype=torch.int32)
        for _ in range(3):
            softmax_attention(*inputs(length), mesh=mesh, cu_seqlens=bounds)
    return asked


def test_layers_and_documents_are_no_new_kinds():
    for asked in run_ranks(questions, 2):
        assert [re.search(r"q \(1, (\w+), ", call)[1] for call in asked] == ["4", "5"]


# --- what is sent ---


def trained(mesh, **options):
    leaves = [x.requires_grad_() for x in inputs()]
    out = softmax_attention(*leaves, mesh=mesh, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def messages():
    mesh, posts, post = SPMesh(ring=4), [], RingExchange.post

    def watched(exchange, *args, shift=1):
        posts.append((exchange._tag, shift))
        post(exchange, *args, shift=shift)

    with mock.patch.object(RingExchange, "post", watched):
        trained(mesh, variant="ring")
    return posts


def test_ranks_post_in_one_order():
    """NCCL matches messages by their order alone: K and V are 0, gradients 1."""
    keys, home = (0, 1), [(1, -step) for step in range(4)]
    right = [*[keys] * 3, keys, keys, home[1], keys, home[2], home[3]]
    assert run_ranks(messages, 4) == [right] * 4


def late_ranks():
    """A rank that is late with every message changes no bit."""
    mesh, post, wait = SPMesh(ring=3), RingExchange.post, RingExchange.wait

    def late(function, of_rank):
        def call(*args, **kwargs):
            time.sleep(0.02 * (mesh.rank == of_rank))
            return function(*args, **kwargs)

        return call

    bounds = torch.tensor([0, 1, 5, 24], dtype=torch.int32)
    right = trained(mesh, variant="ring", cu_seqlens=bounds)
    for rank in range(3):
        with (
            case(rank),
            mock.patch.object(RingExchange, "post", late(post, rank)),
            mock.patch.object(RingExchange, "wait", late(wait, (rank + 1) % 3)),
        ):
            got = trained(mesh, variant="ring", cu_seqlens=bounds)
            torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_late_messages():
    run_ranks(late_ranks, 3)


# --- what is computed, and by what ---


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU, but for those of the backend."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.blocks = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))

    def backend(self):
        def uncounted(function):
            def call(*args, **kwargs):
                before = self.seen.copy()
                results = function(*args, **kwargs)
                self.seen, self.blocks = before, self.blocks + 1
                return results

            return call

        return replace(
            plain.BACKEND,
            forward=uncounted(plain.block_attention),
            backward=uncounted(plain.block_attention_backward),
        )


def launches_of(documents):
    mesh, launches = SPMesh(), Launches()
    bounds = torch.arange(0, 41, 40 // documents, dtype=torch.int32)
    leaves = [x.requires_grad_() for x in inputs(40, dtype=torch.bfloat16)]
    dout = torch.ones_like(leaves[0])
    with mock.patch.object(softmax, "choose_backend", return_value=launches.backend()), launches:
        out = softmax_attention(*leaves, mesh=mesh, cu_seqlens=bounds)
        torch.autograd.grad(out, leaves, dout)
    return launches.blocks, launches.seen


def launches():
    return [launches_of(documents) for documents in (5, 20)]


def test_a_document_costs_a_device_its_kernels_and_nothing_else():
    (((few, once), (many, again)),) = run_ranks(launches, 1)
    assert (few, many) == (2 * 5, 2 * 20)
    assert once == again
    assert once["cat"] == 5, "out, lse, dq, dk, dv"


def asked_backends():
    """KV heads that are read unevenly are computed one per query head: another kind of kernel."""
    mesh, asked = SPMesh(ulysses=3), []

    def watched(q, k, v, **options):
        asked.append((q.shape[2], k.shape[2], v.shape[2]))
        return choose_backend(q, k, v, **options)

    q, k, v = (torch.randn(1, 4, heads, 6) for heads in (10, 2, 2))
    with mock.patch.object(softmax, "choose_backend", watched):
        softmax_attention(q, k, v, mesh=mesh)
    return asked


def test_the_backend_is_chosen_for_the_heads_that_it_computes():
    assert run_ranks(asked_backends, 3) == [[(4, 1, 1)], [(3, 3, 3)], [(3, 1, 1)]]


def memory_runs_out_on_one_rank():
    """As in a backend's trial."""
    x = torch.randn(1, 4, 2, 8)
    return told_of_a_failure(softmax_attention, (x, x, x), SPMesh(ring=2), softmax, "_backend")


def test_memory_that_runs_out_in_a_trial_ends_all_ranks():
    for told in run_ranks(memory_runs_out_on_one_rank, 2):
        assert "OutOfMemoryError: too little" in told


def one_rank_has_another_kernel():
    """What each rank is told where rank 1 chooses another backend than the rest."""
    mesh, x = SPMesh(ulysses=2), torch.randn(1, 4, 4, 8)
    other = replace(plain.BACKEND, name="other" if mesh.rank == 1 else "plain")
    with mock.patch.object(softmax, "choose_backend", return_value=other):
        return refusal(softmax_attention, (x, x, x), {}, mesh)


def test_a_backend_that_one_rank_alone_has_is_told_of():
    for told in run_ranks(one_rank_has_another_kernel, 2):
        assert re.search("rank 0: .*by backend 'plain'; rank 1: .*by backend 'other'", told)


def ranks_that_compute_other_heads():
    mesh, x = SPMesh(ulysses=2), torch.randn(1, 4, 3, 8)
    own = replace(plain.BACKEND, name=f"of {mesh.rank}")
    with mock.patch.object(softmax, "choose_backend", return_value=own):
        return softmax_attention(x, x, x, mesh=mesh).isfinite().all().item()


def test_ranks_that_compute_other_heads_may_have_other_kernels():
    assert run_ranks(ranks_that_compute_other_heads, 2) == [True, True]


def test_one_document_is_a_length_like_any_other():
    """With its boundaries or without: only several documents' lengths will not come again."""
    assert run_ranks(chosen_with_bounds, 1) == [[False, False, True]]


def chosen_with_bounds():
    mesh, x, asked = SPMesh(), torch.randn(1, 8, 2, 8), []

    def choose(*args, lengths_vary, **options):
        asked.append(lengths_vary)
        return choose_backend(*args, lengths_vary=lengths_vary, **options)

    with mock.patch.object(softmax, "choose_backend", choose):
        for bounds in (None, [0, 8], [0, 3, 8]):
            cu_seqlens = bounds and torch.tensor(bounds, dtype=torch.int32)
            softmax_attention(x, x, x, mesh=mesh, cu_seqlens=cu_seqlens)
    return asked
