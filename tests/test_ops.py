"""Ops of one device against their oracles and plain PyTorch: outputs and every gradient.

Gated linear attention and block attention have files of their own, test_gla.py and
test_softmax.py.
"""

import itertools

import pytest
import torch
from exact import compare
from torch.nn import functional as F

from hybridsp.ops import SHORT_CONVOLUTION_FUNCTIONS
from hybridsp.ops.conv import causal_conv, document_offsets
from hybridsp.ops.gla import segment_ids
from hybridsp.ops.interfaces import require_one_packed_row
from hybridsp.ops.merge import merge_attention_
from hybridsp.ops.reference import naive_causal_conv

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# Empty documents at both ends and inside, documents of one token.
DOCUMENTS = [0, 0, 1, 16, 16, 17, 31, 48, 64, 65, 65]


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


# --- merge ---


def test_merge_of_rows_that_saw_no_key():
    inf = float("inf")
    out, block_out = torch.randn(2, 1, 4, 2, 3)
    lse = torch.tensor([-inf, -inf, 2.0, 1e3]).view(1, 4, 1).expand(1, 4, 2)
    block_lse = torch.tensor([-inf, 1.0, -inf, 1e3]).view(1, 4, 1).expand(1, 4, 2)
    out[:, :2], block_out[:, 0] = 0, 0
    merged, merged_lse = out.clone(), lse.clone()
    merge_attention_(merged, merged_lse, block_out, block_lse)
    assert merged[:, 0].count_nonzero() == 0
    torch.testing.assert_close(merged[:, 1], block_out[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(merged[:, 2], out[:, 2], rtol=0, atol=0)
    # exp(1e3) is out of range, and an fp32 of 1e3 is itself only good to 6e-5.
    torch.testing.assert_close(merged[:, 3], (out + block_out)[:, 3] / 2, rtol=1e-4, atol=1e-4)
    assert merged_lse[0, :3, 0].tolist() == [-inf, 1.0, 2.0]
    other_way = block_out.clone(), block_lse.clone()
    merge_attention_(*other_way, out, lse)
    torch.testing.assert_close(other_way, (merged, merged_lse))
