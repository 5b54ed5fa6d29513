"""Ops of one device against their oracles and plain PyTorch: outputs and every gradient."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hybridsp.ops import LINEAR_ATTENTION_FUNCTIONS, SHORT_CONVOLUTION_FUNCTIONS
from hybridsp.ops import softmax as softmax_module
from hybridsp.ops.conv import causal_conv, document_offsets
from hybridsp.ops.gla import gated_linear_attention, segment_ids
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.ops.merge import merge_attention
from hybridsp.ops.reference import naive_attention, naive_causal_conv, naive_gla
from hybridsp.ops.softmax import block_attention, block_attention_backward

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Empty documents at both ends and inside, documents of one token, starts on and beside the edges
# of chunks of 16 tokens.
DOCUMENTS = [0, 0, 1, 16, 16, 17, 31, 48, 64, 65, 65]


def assert_near(got, right, rtol=1e-5):
    """Equal to 1e-5 of itself or, where a sum has cancelled, of the largest element (or of 1)."""
    atol = 1e-5 * max(right.abs().max().item(), 1.0)
    torch.testing.assert_close(got.double(), right, rtol=rtol, atol=atol)


def compare(op, oracle, inputs, rtol=1e-5):
    """Outputs and, for one random direction, gradients of op against the oracle in fp64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs, expected = op(*inputs), oracle(*exact)
    douts = [torch.randn(x.shape).to(x.dtype) for x in outs]
    for out, right in zip(outs, expected, strict=True):
        assert_near(out, right, rtol)
    # An initial state of an empty first document reaches nothing.
    grads = torch.autograd.grad(outs, inputs, douts, materialize_grads=True)
    right_douts = [x.double() for x in douts]
    right_grads = torch.autograd.grad(expected, exact, right_douts, materialize_grads=True)
    for x, grad, right in zip(inputs, grads, right_grads, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, right, rtol)


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


def test_segments_and_offsets_of_every_span():
    """Both say which tokens a token sees; that must not depend on where a span begins."""
    for inner in itertools.combinations_with_replacement(range(7), 3):
        bounds = [0, *inner, 6]
        document = [max(d for d in range(4) if bounds[d] <= t) for t in range(6)]
        for start, stop in itertools.combinations(range(7), 2):
            before = document[start - 1] if start else None
            ids = segment_ids(bounds, start, stop).tolist()
            for i, j in itertools.product(range(stop - start), repeat=2):
                same = document[start + i] == document[start + j]
                assert (ids[i] == ids[j]) == same, (bounds, start, i, j)
            if before is not None:
                continues = [d == before for d in document[start:stop]]
                assert [i == 0 for i in ids] == continues, (bounds, start, stop)
            offsets = document_offsets(bounds, start, stop).tolist()
            starts = [bounds[document[t]] for t in range(start, stop)]
            assert offsets == [t - s for t, s in zip(range(start, stop), starts, strict=True)]


def test_local_linear_attention():
    *inputs, state = gla_inputs(65, "vector", batch=1, state=True)
    local = LINEAR_ATTENTION_FUNCTIONS["local"]
    cu = torch.tensor(DOCUMENTS, dtype=torch.int32)
    out, nothing = local(None, *inputs, scale=0.3, cu_seqlens=cu)
    assert nothing is None
    torch.testing.assert_close(out, right_gla(*inputs, bounds=DOCUMENTS)[0], **CLOSE)
    got = local(None, *inputs, scale=0.3, initial_state=state, output_final_state=True)
    torch.testing.assert_close(got, right_gla(*inputs, state), **CLOSE)


# --- short convolution ---


def torch_conv(x, weight, bias=None, *, activation=None):
    channels, width = weight.shape
    x = F.pad(x.transpose(1, 2), (width - 1, 0))
    y = F.conv1d(x, weight[:, None], bias, groups=channels).transpose(1, 2)
    return F.silu(y) if activation else y


@pytest.mark.parametrize("width", [1, 2, 4, 30])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_conv(length, width):
    x, weight, bias = torch.randn(2, length, 5), torch.randn(5, width), torch.randn(5)
    for inputs, activation in itertools.product([[x, weight], [x, weight, bias]], [None, "silu"]):

        def op(*args, conv=causal_conv, activation=activation):
            return [conv(*args, activation=activation)]

        compare(op, lambda *args, op=op: op(*args, conv=torch_conv), inputs)
        compare(op, lambda *args, op=op: op(*args, conv=naive_causal_conv), inputs)


@pytest.mark.parametrize("width", [1, 4, 30])
def test_conv_of_packed_documents(width):
    x, weight, bias = torch.randn(1, 65, 5), torch.randn(5, width), torch.randn(5)

    def local(*args):
        cu = torch.tensor(DOCUMENTS, dtype=torch.int32)
        options = {"activation": "silu", "cu_seqlens": cu}
        return [SHORT_CONVOLUTION_FUNCTIONS["local"](None, *args, **options)]

    def right(*args):
        return [naive_causal_conv(*args, activation="silu", cu_seqlens=DOCUMENTS)]

    compare(local, right, [x, weight, bias])


@pytest.mark.parametrize("cut", [1, 20, 40, 48, 64])
def test_conv_goes_on_from_its_left_context(cut):
    x, weight = torch.randn(1, 65, 5), torch.randn(5, 4)
    whole = naive_causal_conv(x, weight, cu_seqlens=DOCUMENTS)
    context = F.pad(x, (0, 0, 3, 0))[:, cut : cut + 3]
    offsets = document_offsets(DOCUMENTS, cut, 65)
    y = causal_conv(x[:, cut:], weight, offsets=offsets, left_context=context)
    torch.testing.assert_close(y, whole[:, cut:], **CLOSE)


def test_conv_refuses_what_does_not_fit():
    x, weight = torch.randn(2, 8, 5), torch.randn(5, 4)
    with pytest.raises(ValueError, match="activation = 'gelu'"):
        causal_conv(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="left_context has shape"):
        causal_conv(x, weight, left_context=x[:, :4])


def test_boundaries_that_do_not_describe_the_sequence_are_refused():
    row = torch.zeros(1, 8, 2)
    require_one_packed_row(row, torch.tensor([0, 0, 3, 8, 8]))
    require_one_packed_row(row, torch.tensor([0, 16]), 16)
    for bounds in ([0], [1, 8], [0, 7], [0, 9], [0, 5, 3, 8], [8]):
        with pytest.raises(ValueError, match="must rise from 0 to the sequence's 8 tokens"):
            require_one_packed_row(row, torch.tensor(bounds))
    with pytest.raises(ValueError, match="batch of 2 rows"):
        require_one_packed_row(torch.zeros(2, 4, 2), torch.tensor([0, 8]))


# --- block attention and merge ---


def attention_inputs(queries, keys, heads=(6, 2)):
    q = torch.randn(2, queries, heads[0], 5)
    return q, torch.randn(2, keys, heads[1], 5), torch.randn(2, keys, heads[1], 3)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(softmax_module, "QUERY_TILE", 4)


LENGTHS = [(n, n, True) for n in (1, 3, 4, 5, 9)] + [(1, 7, False), (9, 4, False), (4, 9, False)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize(("queries", "keys", "causal"), LENGTHS)
def test_block_attention(queries, keys, causal, heads):
    q, k, v = inputs = attention_inputs(queries, keys, heads)
    out, lse = block_attention(q, k, v, scale=0.7, causal=causal)
    wide = [x.double().transpose(1, 2).requires_grad_() for x in inputs]
    right = F.scaled_dot_product_attention(*wide, scale=0.7, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out.double(), right.transpose(1, 2), **CLOSE)
    cloned = k.repeat_interleave(heads[0] // heads[1], dim=2)
    scores = 0.7 * torch.einsum("bihd,bjhd->bihj", q, cloned)
    if causal:
        scores += torch.full((queries, keys), float("-inf")).triu(1)[:, None]
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), **CLOSE)
    dout = torch.randn_like(out)
    grads = block_attention_backward(dout, q, k, v, out, lse, scale=0.7, causal=causal)
    right_grads = torch.autograd.grad(right, wide, dout.double().transpose(1, 2))
    for grad, right_grad in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(grad.double(), right_grad.transpose(1, 2), **CLOSE)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_blocks_equal_one_attention_and_so_do_their_gradients(dtype):
    """Queries 6..13 see keys 0..5 wholly and their own causally, as in one step of a ring."""
    q, k, v = (x.to(dtype) for x in attention_inputs(14, 14))
    q = q[:, 6:]
    blocks = [(slice(0, 2), False), (slice(2, 6), False), (slice(6, 14), True)]
    out, lse = torch.zeros(2, 8, 6, 3), torch.full((2, 8, 6), float("-inf"))
    for keys, causal in blocks:
        block = block_attention(q, k[:, keys], v[:, keys], scale=0.7, causal=causal)
        out, lse = merge_attention(out, lse, *block)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    padded = F.pad(exact[0], (0, 0, 0, 0, 6, 0))
    right = naive_attention(padded, *exact[1:], scale=0.7)[:, 6:]
    torch.testing.assert_close(out.double(), right, **CLOSE)
    dout = torch.randn(out.shape).to(dtype)
    dq, dk, dv = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
    for keys, causal in blocks:
        arguments = (dout, q, k[:, keys], v[:, keys], out, lse)
        grads = block_attention_backward(*arguments, scale=0.7, causal=causal)
        assert {grad.dtype for grad in grads} == {torch.float32}
        dq += grads[0]
        dk[:, keys] += grads[1]
        dv[:, keys] += grads[2]
    right_grads = torch.autograd.grad(right, exact, dout.double())
    for grad, right_grad in zip((dq, dk, dv), right_grads, strict=True):
        torch.testing.assert_close(grad.double(), right_grad, **CLOSE)


def test_merge_of_rows_that_saw_no_key():
    inf = float("inf")
    out, block_out = torch.randn(2, 1, 4, 2, 3)
    lse = torch.tensor([-inf, -inf, 2.0, 1e3]).view(1, 4, 1).expand(1, 4, 2)
    block_lse = torch.tensor([-inf, 1.0, -inf, 1e3]).view(1, 4, 1).expand(1, 4, 2)
    out[:, :2], block_out[:, 0] = 0, 0
    merged, merged_lse = merge_attention(out, lse, block_out, block_lse)
    assert merged[:, 0].count_nonzero() == 0
    torch.testing.assert_close(merged[:, 1], block_out[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(merged[:, 2], out[:, 2], rtol=0, atol=0)
    # exp(1e3) is out of range, and an fp32 of 1e3 is itself only good to 6e-5.
    torch.testing.assert_close(merged[:, 3], (out + block_out)[:, 3] / 2, rtol=1e-4, atol=1e-4)
    assert merged_lse[0, :3, 0].tolist() == [-inf, 1.0, 2.0]
    other_way = merge_attention(block_out, block_lse, out, lse)
    torch.testing.assert_close(other_way, (merged, merged_lse))
