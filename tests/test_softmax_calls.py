"""Packed documents in few calls: what goes into one, how many a step makes, and what they cost."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from test_attention_calls import Launches
from test_layout import drawn_bounds, skewed_bounds

from hybridsp.attention import softmax, softmax_attention
from hybridsp.attention.ring_plan import num_steps, step_blocks
from hybridsp.layout import Block, ring_layout
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import calls_of, choose, choose_backend, plain, trial, why_not

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PACKED = replace(plain.BACKEND, varlen=plain.VARLEN)
CPU = torch.device("cpu")


def rows_of(rows):
    return list(range(rows.span.start, rows.span.stop)) if rows.index is None else [*rows.index]


def pairs(calls):
    """Each block of queries and keys as it is found in its call's rows."""
    for call in calls:
        q, k = ([int(row) for row in rows_of(rows)] for rows in (call.q, call.k))
        assert (len(q), len(k)) == (call.q.size, call.k.size)
        assert len(set(q)) == len(q)
        assert len(set(k)) == len(k)
        blocks = [(slice(None), slice(None))] if call.packing is None else call.packing.blocks()
        yield from ((q[rows], k[keys], call.options["causal"]) for rows, keys in blocks)


def expected(blocks):
    return [
        (list(range(b.q.start, b.q.stop)), list(range(b.k.start, b.k.stop)), b.causal)
        for b in blocks
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_the_blocks_of_a_step_are_one_call_or_two(causal):
    """Own keys and a ring's step are one; all others' keys at once one for each half, if causal."""
    for _ in range(40):
        total, ring = random.randint(10, 120), random.randint(1, 6)
        layout = ring_layout(tuple(drawn_bounds(total)), ring)
        for rank, source in itertools.product(range(ring), [*range(ring), None]):
            blocks = step_blocks(layout, rank, source, causal)
            calls = calls_of(blocks, PACKED, CPU, scale=1.0)
            assert sorted(pairs(calls)) == sorted(expected(blocks)), layout
            assert len(calls) <= (2 if source is None and causal else 1)
            if source == rank and blocks:
                assert calls[0].q.index is calls[0].k.index is None, "nothing is copied"
            one_by_one = calls_of(blocks, plain.BACKEND, CPU, scale=1.0)
            assert list(pairs(one_by_one)) == expected(blocks)
            assert all(call.packing is None for call in one_by_one)


def test_causal_blocks_and_others_are_calls_of_their_own():
    one, two, three = slice(0, 4), slice(4, 7), slice(7, 9)
    blocks = [
        Block(q=one, k=one, causal=True),
        Block(q=two, k=two, causal=False),
        Block(q=three, k=three, causal=True),
    ]
    calls = calls_of(blocks, PACKED, CPU, scale=1.0)
    assert [[int(row) for row in rows_of(call.q)] for call in calls] == [
        [0, 1, 2, 3, 7, 8],
        [4, 5, 6],
    ]
    assert [call.packing is None for call in calls] == [False, True]


def test_kernels_are_told_that_there_are_two_queries_at_least():
    blocks = [Block(q=slice(i, i + 1), k=slice(i, i + 1), causal=True) for i in range(3)]
    (call,) = calls_of(blocks, PACKED, CPU, scale=1.0)
    assert (call.packing.max_q, call.packing.max_k) == (2, 1)
    assert call.packing.cu_q.tolist() == [0, 1, 2, 3]


def test_packed_blocks_that_do_not_fit_their_mask_are_refused():
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4)
    uneven = [Block(q=slice(0, 2), k=slice(0, 3), causal=True)]
    uneven.append(Block(q=slice(2, 5), k=slice(3, 5), causal=True))
    (call,) = calls_of(uneven, PACKED, CPU, scale=1.0)
    with pytest.raises(ValueError, match=r"causal = True with \(0, 2, 5\) queries and \(0, 3, 5\)"):
        call.forward(q, k, k)
    even = [replace(block, k=block.q, causal=False) for block in uneven]
    (call,) = calls_of(even, PACKED, CPU, scale=1.0, window=3)
    with pytest.raises(ValueError, match="window = 3 needs causal"):
        call.forward(q, k, k)


# --- in the layer ---


class Calls(Launches):
    """Counts the backend's calls too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def watch(self, name, function):
        def call(*args, **kwargs):
            before = self.seen.copy()
            results = function(*args, **kwargs)
            self.seen = before
            self.calls[name] += 1
            return results

        return call

    def backend(self, packed):
        varlen = plain.VARLEN._replace(
            forward=self.watch("forward", plain.packed_attention),
            backward=self.watch("backward", plain.packed_attention_backward),
        )
        return replace(
            plain.BACKEND,
            forward=self.watch("forward", plain.block_attention),
            backward=self.watch("backward", plain.block_attention_backward),
            varlen=varlen if packed else None,
        )


def layer(bounds, *, ring, variant, packed):
    """Results on this rank, the backend's calls and the other launches."""
    mesh, launches = SPMesh(ring=ring), Calls()
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, total, heads, 8, generator=generator) for heads in (6, 2, 2, 6)]
    q, k, v, dout = (x.chunk(mesh.sp, dim=1)[mesh.sp_rank] for x in inputs)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    backend = launches.backend(packed)
    with mock.patch.object(softmax, "choose_backend", return_value=backend), launches:
        out = softmax_attention(*leaves, mesh=mesh, cu_seqlens=cu_seqlens, variant=variant)
        gradients = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), *gradients], launches.calls, launches.seen


BOUNDS = skewed_bounds(seed=0, sigma=1.5, total=320)


def calls_in_a_ring():
    results = {}
    for variant in ("ring", "allgather"):
        (right, _, _), (got, calls, _) = (
            layer(BOUNDS, ring=4, variant=variant, packed=packed) for packed in (False, True)
        )
        torch.testing.assert_close(got, right, **CLOSE)
        results[variant] = calls
    return results


def test_a_ring_step_is_one_call_and_gives_what_a_loop_gives():
    assert num_steps(ring_layout(tuple(BOUNDS), 4), "ring") == 4
    for calls in run_ranks(calls_in_a_ring, 4):
        assert calls["ring"] == {"forward": 4, "backward": 4}
        assert calls["allgather"]["forward"] == calls["allgather"]["backward"] in (2, 3)


def calls_alone():
    return [
        layer(bounds, ring=1, variant="auto", packed=True)[1:]
        for bounds in ([0, 320], BOUNDS, list(range(0, 321, 5)))
    ]


def test_packed_documents_cost_one_device_what_a_single_one_does():
    (((once, seen), *packed),) = run_ranks(calls_alone, 1)
    assert once == {"forward": 1, "backward": 1}
    assert not {"cat", "index_select", "index_add_"} & set(seen)
    assert packed == [(once, seen)] * 2


# --- on a GPU ---


def blocks_of_a_rank(documents, total):
    """What a rank of a ring computes: of its own keys, and of all others', which follow them."""
    layout = ring_layout(skewed_bounds(seed=1, sigma=1.5, total=total, documents=documents), 4)
    own, others = step_blocks(layout, 2, 2, True), step_blocks(layout, 2, None, True)
    rows = own[-1].q.stop
    shifted = [replace(b, k=slice(rows + b.k.start, rows + b.k.stop)) for b in others]
    return [*own, *shifted], rows, max(b.k.stop for b in shifted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_varlen_kernels_against_plain_fp32(dims, dtype, capsys):
    """Own documents, gathered rows, uneven keys; what is chosen for packed documents has them."""
    blocks, queries, keys = blocks_of_a_rank(documents=30, total=4000)
    lines = []
    for heads, window in (((6, 6), None), ((9, 3), None), ((8, 1), None), ((8, 2), 100)):
        shapes = ((queries, heads[0], 0), (keys, heads[1], 0), (keys, heads[1], 1))
        q, k, v, dout = (
            torch.randn(1, rows, count, dims[side]).to("cuda", dtype)
            for rows, count, side in (*shapes, (queries, heads[0], 1))
        )
        wide = [x.float() for x in (q, k, v, dout)]
        right = trial.attend_in_blocks(plain.BACKEND, blocks, *wide, window=window)
        assert choose_backend(q, k, v, window=window, lengths_vary=True).varlen is not None
        for name in choose._VARLEN:
            if name == "plain" or why_not(name, q, k, v, window) is not None:
                continue
            backend = choose_backend(q, k, v, window=window, name=name, lengths_vary=True)
            assert backend.varlen is not None, choose.why_not_varlen(name, q, k, v, window)
            got = trial.attend_in_blocks(backend, blocks, q, k, v, dout, window=window)
            off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, right, strict=True)]
            assert max(off) < 1e-2, (name, heads, window, off)
            lines.append(f"{dims} {dtype} heads {heads} window {window} {name}: {max(off):.1e}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
