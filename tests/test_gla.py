"""Gated linear attention on one device against its oracle, and what it refuses and keeps."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from exact import compare

from hybridsp.ops import LINEAR_ATTENTION_FUNCTIONS
from hybridsp.ops.gla import contract, gated_linear_attention, segment_ids
from hybridsp.ops.gla.plain import BACKEND as PLAIN
from hybridsp.ops.reference import naive_gla

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Empty documents at both ends and inside, documents of one token, starts on and beside the edges
# of chunks of 16 tokens.
DOCUMENTS = [0, 0, 1, 16, 16, 17, 31, 48, 64, 65, 65]


def gla_inputs(length, decays, *, batch=2, heads=3, key_dim=5, value_dim=7, state=False):
    q, k = torch.randn(2, batch, length, heads, key_dim)
    v = torch.randn(batch, length, heads, value_dim)
    g = -2 * torch.rand(batch, length, heads, key_dim if decays == "vector" else 1)
    return [q, k, v, g, *([torch.randn(batch, heads, key_dim, value_dim)] if state else [])]


def gla(q, k, v, g, state=None, *, bounds=None):
    segments = None if bounds is None else segment_ids(bounds, 0, q.shape[1])
    return gated_linear_attention(q, k, v, g, scale=0.3, segments=segments, initial_state=state)


def right_gla(q, k, v, g, state=None, *, bounds=None):
    return naive_gla(q, k, v, g, scale=0.3, cu_seqlens=bounds, initial_state=state)


DECAYS = pytest.mark.parametrize("decays", ["vector", "scalar"])


@DECAYS
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 130])
def test_gla(length, decays):
    compare(gla, right_gla, gla_inputs(length, decays))
    compare(gla, right_gla, gla_inputs(length, decays, batch=1, state=True))


@DECAYS
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bounds", [DOCUMENTS, [0, 65], [0, 64, 65], list(range(66))])
def test_gla_of_packed_documents(bounds, state, decays):
    inputs = gla_inputs(65, decays, batch=1, state=state)
    compare(lambda *x: gla(*x, bounds=bounds), lambda *x: right_gla(*x, bounds=bounds), inputs)


# -2.5 adds up to 40 in a chunk of 16, where exp(b_i - b_j) may no longer be split in two factors.
GATES = [[0], [-80], [0, -80], [0, -1e-3, -3, -80], [-2.49], [-2.51], [0, -2.49], [0, -2.51]]


@DECAYS
@pytest.mark.parametrize("choices", GATES, ids=str)
def test_gla_of_gates_that_shut_and_gates_that_stay_open(choices, decays):
    """exp(-80) is near fp32's smallest number; at 0 nothing is forgotten."""
    *inputs, g = gla_inputs(130, decays, batch=1)
    g = torch.tensor(choices, dtype=torch.float32)[torch.randint(len(choices), g.shape)]
    compare(gla, right_gla, [*inputs, g])


@DECAYS
def test_gla_of_bf16_inputs_rounds_once(decays):
    inputs = [x.bfloat16() for x in gla_inputs(33, decays)]
    out, state = gla(*inputs)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    compare(gla, right_gla, inputs, rtol=2**-8)


def test_gla_refuses_shapes_that_do_not_fit():
    q, k, v, g = gla_inputs(8, "vector")
    for inputs, name in [
        ((q, k[:, :, :1], v, g), "clone KV heads"),
        ((q, k, v[:, :7], g), "do not fit"),
        ((q, k, v, g[:, :, :1]), "do not fit"),
        ((q, k, v, g[..., :2]), "g has 2 decays per head"),
        ((q[:, :0], k[:, :0], v[:, :0], g[:, :0]), "L = 0"),
    ]:
        with pytest.raises(ValueError, match=name):
            gla(*inputs)


def test_local_linear_attention():
    *inputs, state = gla_inputs(65, "vector", batch=1, state=True)
    local = LINEAR_ATTENTION_FUNCTIONS["local"]
    cu = torch.tensor(DOCUMENTS, dtype=torch.int32)
    out, nothing = local(None, *inputs, scale=0.3, cu_seqlens=cu)
    assert nothing is None
    torch.testing.assert_close(out, right_gla(*inputs, bounds=DOCUMENTS)[0], **CLOSE)
    got = local(None, *inputs, scale=0.3, initial_state=state, output_final_state=True)
    torch.testing.assert_close(got, right_gla(*inputs, state), **CLOSE)


@DECAYS
def test_gla_of_one_gate_that_shuts_wholly(decays):
    """exp(-1e4) is 0, and a difference of two sums that hold it must still be exact."""
    *inputs, g = gla_inputs(65, decays, batch=1)
    g[:, 20], g[:, 40], g[:, 50:] = -100.0, -1e4, 0.0
    compare(gla, right_gla, [*inputs, g])


@DECAYS
@pytest.mark.parametrize("used", ["out", "state"])
def test_gla_of_which_only_one_output_is_used(used, decays):
    """The other one's gradient is not zeros but nothing."""
    inputs = gla_inputs(33, decays, state=True)
    which = slice(0, 1) if used == "out" else slice(1, 2)
    compare(lambda *x: gla(*x)[which], lambda *x: right_gla(*x)[which], inputs)


def test_gla_under_autocast_is_what_it_is_without():
    inputs = [x.requires_grad_() for x in gla_inputs(33, "vector", state=True)]
    right = gla(*inputs)
    right_grads = torch.autograd.grad(right, inputs, [torch.ones_like(x) for x in right])
    with torch.autocast("cpu", torch.bfloat16):
        outs = gla(*inputs)
        grads = torch.autograd.grad(outs, inputs, [torch.ones_like(x) for x in outs])
    torch.testing.assert_close((outs, grads), (right, right_grads), rtol=0, atol=0)


def test_gla_keeps_its_inputs_and_nothing_that_grows_with_the_chunks():
    inputs = [x.requires_grad_() for x in gla_inputs(130, "vector", state=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gla(*inputs)
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in inputs)


def with_gate(g, value):
    g = g.clone()
    g[1, 3, 2, 0] = value
    return g


@pytest.mark.parametrize("value", [1e-3, float("nan"), float("inf"), -float("inf")])
def test_gla_refuses_what_is_no_log_decay(value):
    q, k, v, g = gla_inputs(8, "vector")
    with pytest.raises(ValueError, match="a log decay is finite, not NaN and <= 0"):
        gla(q, k, v, with_gate(g, value))


def test_gla_refuses_other_tensors_that_do_not_fit():
    q, k, v, g = gla_inputs(8, "scalar")
    with pytest.raises(ValueError, match=r"v is torch\.int64"):
        gla(q, k, v.long(), g)
    with pytest.raises(ValueError, match="g is on meta, but q on cpu"):
        gla(q, k, v, g.to("meta"))
    with pytest.raises(ValueError, match=r"segments have shape \(7,\) for L = 8 tokens"):
        gated_linear_attention(q, k, v, g, scale=1.0, segments=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 3, 7, 5\)"):
        gla(q, k, v, g, torch.zeros(2, 3, 7, 5))


# --- the choice of a backend ---


def tokens(*, cuda):
    """What the choice reads of tokens that may be on a GPU which the test does not have."""
    return SimpleNamespace(q=SimpleNamespace(is_cuda=cuda))


@pytest.fixture
def triton_says(monkeypatch):
    """Let the Triton backend give this reason, or be missing."""

    def say(reason):
        able = contract.Backend("triton", None, None, why_not=lambda tokens: reason)
        monkeypatch.setitem(sys.modules, "hybridsp.ops.gla.triton", SimpleNamespace(BACKEND=able))
        return able

    contract._log_why_not.cache_clear()
    return say


def test_triton_is_chosen_on_a_gpu_if_it_can(triton_says):
    able = triton_says(None)
    assert contract.choose_backend(tokens(cuda=True)) is able
    assert contract.choose_backend(tokens(cuda=False)) is PLAIN
    assert contract.choose_backend(tokens(cuda=True), "plain") is PLAIN
    assert contract.choose_backend(tokens(cuda=False), "triton") is able


def test_why_triton_is_not_chosen_is_logged_once_per_reason(triton_says, caplog):
    caplog.set_level(logging.WARNING)
    for reason in ("K is above 256", "K is above 256", "no kernel for fp64"):
        triton_says(reason)
        assert contract.choose_backend(tokens(cuda=True)) is PLAIN
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "K is above 256" in messages[0]
    assert "no kernel for fp64" in messages[1]


def test_a_backend_asked_for_by_name_says_why_it_cannot(triton_says, monkeypatch):
    triton_says("K is above 256")
    with pytest.raises(ValueError, match="'triton' cannot do this: K is above 256"):
        contract.choose_backend(tokens(cuda=True), "triton")
    monkeypatch.setitem(sys.modules, "hybridsp.ops.gla.triton", None)
    with pytest.raises(
        ValueError, match="'triton' cannot do this: Triton's kernels cannot be imported"
    ):
        contract.choose_backend(tokens(cuda=True), "triton")
    with pytest.raises(ValueError, match="backend = 'cuda' is unknown"):
        contract.choose_backend(tokens(cuda=False), "cuda")
