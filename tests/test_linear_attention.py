"""Linear attention over the mesh, every method of it, against one process on the whole sequence."""

import functools
import itertools
import re

import pytest
import torch
from cases import case
from disagreements import check_told, told_of, told_of_a_failure
from distributed import run_ranks
from sp_cases import DOCUMENTS, TOTAL, Case, check, check_bf16

from hybridsp.attention import linear, linear_attention
from hybridsp.attention.linear import METHODS
from hybridsp.collectives import ALGORITHMS, agreement
from hybridsp.mesh import SPMesh
from hybridsp.ops.gla import contract, segment_ids
from hybridsp.ops.gla.plain import PlainBackward, PlainForward
from hybridsp.ops.reference import naive_gla

# Of a GPU test, every rank has a GPU of its own.
WORLDS = [
    *(("gloo", ranks) for ranks in (1, 2, 3, 4, 8)),
    *(pytest.param("nccl", ranks, marks=pytest.mark.gpu) for ranks in (1, 2, 4)),
]
KEY_DIM, VALUE_DIM = 6, 5
DECAYS = {"vector": KEY_DIM, "scalar": 1}


def gla_inputs(batch, decays, *, total=TOTAL, heads=3):
    q, k = torch.randn(2, batch, total, heads, KEY_DIM)
    v = torch.randn(batch, total, heads, VALUE_DIM)
    g = -2 * torch.rand(batch, total, heads, DECAYS[decays])
    return [q, k, v, g]


def right_gla(one):
    scale = one.options.get("scale", KEY_DIM**-0.5)
    return lambda *x: naive_gla(*x, scale=scale, cu_seqlens=one.bounds)[0]


@pytest.mark.parametrize(("backend", "ranks"), WORLDS)
def test_every_method_on_packed_documents(backend, ranks, subtests):
    """One head more than ranks: ulysses has to cut them unevenly."""
    cases = {}
    for (method, (name, bounds)), decays in zip(
        itertools.product(METHODS, DOCUMENTS.items()), itertools.cycle(DECAYS)
    ):
        cases[f"{method}, documents {name}, {decays} decay"] = Case(
            linear_attention,
            gla_inputs(2 if bounds is None else 1, decays, heads=ranks + 1),
            ring=ranks,
            bounds=bounds,
            options={"method": method},
        )
    for algorithm, decays in itertools.product(ALGORITHMS, DECAYS):
        if algorithm == "symmetric" and backend == "gloo":
            continue  # it writes into the memory of other GPUs
        cases[f"{algorithm}, {decays} decay"] = Case(
            linear_attention,
            gla_inputs(1, decays),
            ulysses=ranks,
            bounds=DOCUMENTS["spanning"],
            options={"algorithm": algorithm, "scale": 0.3},
        )
    if ranks == 4:
        for method in METHODS:
            cases[f"{method}, data parallel"] = Case(
                linear_attention, gla_inputs(2, "vector"), ulysses=2, options={"method": method}
            )
    check(ranks, cases, right_gla, subtests, backend)


@pytest.mark.parametrize(("ranks", "length"), [(3, 1), (3, 17), (2, 65)])
def test_lengths_that_no_chunk_divides(ranks, length, subtests):
    total = ranks * length
    packings = {"one": None, "cut": [0, total // 2, total - 1, total]}
    cases = {
        f"{method}, documents {name}, {decays} decay": Case(
            linear_attention,
            gla_inputs(2 if bounds is None else 1, decays, total=total),
            ring=ranks,
            bounds=bounds,
            options={"method": method},
        )
        for method, (name, bounds), decays in itertools.product(
            ("zeco", "ulysses"), packings.items(), DECAYS
        )
    }
    check(ranks, cases, right_gla, subtests)


def test_gates_that_shut_and_gates_that_stay_open(subtests):
    """The state of rank 0 must neither survive a gate of e^-100 nor fade where nothing decays."""
    cases = {}
    for (name, choices), method, decays in itertools.product(
        {"shut": [0.0, -100.0], "some": [0.0] * 20 + [-100.0], "open": [0.0]}.items(),
        METHODS,
        DECAYS,
    ):
        *inputs, g = gla_inputs(1, decays, heads=4)
        g = torch.tensor(choices)[torch.randint(len(choices), g.shape)]
        inputs = [x / 4 for x in inputs]  # a sum that nothing forgets stays of the order of one
        cases[f"{name}, {method}, {decays} decay"] = Case(
            linear_attention, [*inputs, g], ring=4, options={"method": method}
        )
    check(4, cases, right_gla, subtests)


@pytest.mark.parametrize("method", ["zeco", "ulysses"])
def test_bf16_is_as_exact_on_four_ranks_as_on_one(method, subtests):
    """Gates in fp32, as the model has them: under ulysses they share messages with bf16."""
    *inputs, g = gla_inputs(1, "vector", heads=5)
    inputs = [*(x.bfloat16() for x in inputs), g]
    attention = functools.partial(linear_attention, method=method)
    check_bf16(attention, inputs, right_gla(Case(attention, ())), subtests)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("bounds", [[0, 40], [0, 7, 40], [0, 20, 40], [0, 3, 25, 33, 40]])
def test_stages_of_two_spans_equal_one_sequence(bounds, decays):
    """The contract itself, in one process: what leaves the left span enters the right one."""
    whole = [x.double().requires_grad_() for x in gla_inputs(1, decays, total=40)]
    right_out, _ = naive_gla(*whole, scale=0.3, cu_seqlens=bounds)
    dout = torch.randn(right_out.shape)
    right_grads = torch.autograd.grad(right_out, whole, dout.double())
    spans = []
    for start, stop in ((0, 20), (20, 40)):
        q, k, v, g = (x[:, start:stop].float().detach() for x in whole)
        segments = segment_ids(bounds, start, stop)
        spans.append(contract.Tokens(q=q, k=k, v=v, g=g, scale=0.3, segments=segments))
    left, right = (PlainForward(span) for span in spans)
    entering_right, _ = left.end_state()
    right.end_state()
    for one in (left, right):
        one.intra_chunk()
    out = torch.cat([left.output(None), right.output(entering_right)], dim=1)
    left = PlainBackward(spans[0], dout[:, :20], None)
    right = PlainBackward(spans[1], dout[:, 20:], entering_right)
    left.start_gradient()
    leaving_left, _ = right.start_gradient()
    for one in (left, right):
        one.intra_chunk()
    grads = zip(left.gradients(leaving_left), right.gradients(None), strict=True)
    got = [out, *(torch.cat(parts, dim=1) for parts in grads)]
    for x, expected in zip(got, (right_out, *right_grads), strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


def kept_bytes(inputs, method, state_bytes):
    mesh = SPMesh(ring=2)
    parts = [x.chunk(2, dim=1)[mesh.sp_rank].requires_grad_() for x in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_attention(*parts, mesh=mesh, method=method)
    states = 0 if method == "ulysses" else state_bytes
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in parts) + states


def every_method_keeps_little(inputs, state_bytes):
    for method in METHODS:
        with case(method):
            kept_bytes(inputs, method, state_bytes)


def test_the_backward_keeps_the_inputs_and_one_state():
    """Nothing that grows with chunks x K x V; ulysses keeps its share of heads of all tokens."""
    state_bytes = 2 * 4 * KEY_DIM * VALUE_DIM * 4
    run_ranks(every_method_keeps_little, 2, gla_inputs(2, "vector", heads=4), state_bytes)


def misfits():
    """Of all ranks alike; `disagreements` are of one."""
    mesh = SPMesh(ring=2)
    q, k, v, g = gla_inputs(1, "vector", total=8, heads=1)
    nan, positive = g.clone(), g.clone()
    nan[0, 3], positive[0, 3] = float("nan"), 0.5
    for match, inputs, options in [
        ("clone KV heads", (q, k[:, :7], v, g), {}),
        ("g has 2 decays per head", (q, k, v, g[..., :2]), {}),
        (r"g lies in \[nan, nan\]", (q, k, v, nan), {}),
        (r"g lies in \[-1.*, 0.5\]", (q, k, v, positive), {}),
        ("from 0 to the sequence's 16", (q, k, v, g), {"cu_seqlens": torch.tensor([0, 8])}),
        ("method = 'usp' is unknown", (q, k, v, g), {"method": "usp"}),
        ("algorithm = 'ring' is unknown", (q, k, v, g), {"algorithm": "ring"}),
        (
            "'chain' has no effect under method = 'lasp2'",
            (q, k, v, g),
            {"method": "lasp2", "algorithm": "chain"},
        ),
        ("H = 1 heads over P = 2 ranks", (q, k, v, g), {"method": "ulysses"}),
        ("backend = 'fla' is unknown", (q, k, v, g), {"backend": "fla"}),
    ]:
        with case(match), pytest.raises(ValueError, match=match):
            linear_attention(*inputs, mesh=mesh, **options)


def test_what_does_not_fit_is_refused():
    run_ranks(misfits, 2)


def disagreements(odd_rank):
    """What each rank is told of a first call in which one rank differs; then they are in step."""
    mesh = SPMesh(ring=3)
    q, k, v, g = gla_inputs(1, "vector", total=8, heads=3)
    bounds = {"cu_seqlens": torch.tensor([0, 5, 24], dtype=torch.int32)}
    short = [x[:, :7] for x in (q, k, v, g)]
    one_head = [x[:, :, :2] for x in (q, k, v, g)]
    alike = q, k, v, g
    calls = [
        ("g", (q, k, v, -g), {}, {}),
        ("shapes of g", (q, k, v, g[..., :1]), {}, {}),
        ("heads", one_head, {}, {}),
        ("dtype", (*(x.bfloat16() for x in (q, k, v)), g), {}, {}),
        ("method", alike, {"method": "lasp2"}, {}),
        ("unknown method", alike, {"method": "usp"}, {}),
        ("algorithm", alike, {"algorithm": "chain"}, {}),
        ("backend", alike, {"backend": "triton"}, {}),
        ("scale", alike, {"scale": 0.5}, {}),
        ("documents", alike, bounds, {}),
        ("boundaries", alike, {"cu_seqlens": bounds["cu_seqlens"] + 1}, bounds),
        ("L, documents", short, bounds, bounds),
        ("L, ulysses", short, {}, {"method": "ulysses"}),
        ("heads, ulysses", one_head, {}, {"method": "ulysses"}),
        ("dtype of g, ulysses", (q, k, v, g.double()), {}, {"method": "ulysses"}),
        ("no ulysses", alike, {"method": "zeco"}, {"method": "ulysses"}),
    ]
    told = told_of(linear_attention, alike, calls, mesh, odd_rank)
    for method in METHODS:
        with case(f"{method} afterwards"):
            assert linear_attention(*alike, mesh=mesh, method=method).isfinite().all()
    return told


REFUSED = {
    "g": r"g lies in \[.*\]: a log decay",
    "unknown method": "method = 'usp' is unknown",
    "backend": "backend = 'triton' cannot do this",
    "boundaries": "must rise from 0",
    "L, documents": "must rise from 0",
    "heads, ulysses": "H = 2 heads over P = 3 ranks",
}
DIFFERENT = {
    "shapes of g": r"rank {}: [^;]*g \(1, L, 3, 1\) float32",
    "heads": r"rank {}: linear_attention\(q \(1, L, 2, 6\)",
    "dtype": r"rank {}: .*v \(1, L, 3, 5\) bfloat16",
    "method": "rank {}: .*method='lasp2'",
    "algorithm": "rank {}: .*algorithm='chain'",
    "scale": "rank {}: .*scale=0.5,",
    "documents": "rank {}: .*cu_seqlens given",
    "L, ulysses": r"rank {}: .*q \(1, 7, 3, 6\)",
    "dtype of g, ulysses": r"rank {}: .*g \(1, 8, 3, 6\) float64",
    "no ulysses": "rank {}: .*method='zeco'",
}


@pytest.mark.parametrize("odd_rank", [0, 2])
def test_one_rank_that_differs_in_a_first_call_ends_it_on_all(odd_rank, subtests):
    check_told(disagreements, odd_rank, REFUSED, DIFFERENT, subtests)


def memory_runs_out_on_one_rank():
    """As where g's values are looked at."""
    inputs = gla_inputs(1, "vector", total=4, heads=2)
    return told_of_a_failure(linear_attention, inputs, SPMesh(ring=2), linear, "check_tokens")


def test_any_failure_before_a_first_call_ends_all_ranks():
    for told in run_ranks(memory_runs_out_on_one_rank, 2, timeout=60):
        assert "OutOfMemoryError: too little" in told


def questions():
    """What the ranks ask each other in calls of several lengths, layer after layer."""
    mesh, asked = SPMesh(ring=2), []
    agree = agreement.agree
    agreement.agree = lambda group, call: asked.append(call) or agree(group, call)
    for method in ("lasp2", "ulysses"):
        for length in (4, 5, 4):
            inputs = gla_inputs(1, "vector", total=length, heads=2)
            for _ in range(3):
                linear_attention(*inputs, mesh=mesh, method=method)
    return [call for call in asked if call.startswith("linear_attention")]


def test_a_new_length_is_a_new_kind_under_ulysses_alone():
    for asked in run_ranks(questions, 2):
        assert [re.search(r"q \(1, (\w+), ", call)[1] for call in asked] == ["L", "4", "5"]
