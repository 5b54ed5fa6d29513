"""Block attention in plain PyTorch against its definition: outputs, lse, every gradient."""

import pytest
import torch
from exact import compare
from torch.nn import functional as F

from hybridsp.ops.merge import merge_attention_
from hybridsp.ops.reference import naive_attention
from hybridsp.ops.softmax import block_attention, block_attention_backward, plain

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def attention_inputs(queries, keys, heads=(6, 2), dims=(5, 3)):
    q = torch.randn(2, queries, heads[0], dims[0])
    return q, torch.randn(2, keys, heads[1], dims[0]), torch.randn(2, keys, heads[1], dims[1])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(plain, "QUERY_TILE", 4)


class Block(torch.autograd.Function):
    """One block is the whole softmax: its own out and lse are the merged ones."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = block_attention(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse = ctx.saved_tensors
        return *block_attention_backward(dout, q, k, v, out, lse, **ctx.options), None


def row_by_row(q, k, v, *, scale, causal, window=None):
    """The oracle: each query alone, over exactly the keys that it sees."""
    outs, lses = [], []
    for i in range(q.shape[1]):
        stop = i + 1 if causal else k.shape[1]
        seen = slice(max(0, stop - window) if window else 0, stop)
        row, keys = q[:, i : i + 1], k[:, seen]
        outs.append(naive_attention(row, keys, v[:, seen], scale=scale, causal=False))
        cloned = keys.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = scale * torch.einsum("bihd,bjhd->bihj", row, cloned)
        lses.append(scores.logsumexp(dim=-1))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


MASKS = [
    *((n, n, True, None) for n in (1, 3, 4, 5, 9)),
    *((11, 11, True, window) for window in (1, 2, 4, 7, 11, 50)),
    *((queries, keys, False, None) for queries, keys in ((1, 7), (9, 4), (4, 9))),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [(9, 3), (32, 8), (8, 1), (3, 3)])
@pytest.mark.parametrize(("queries", "keys", "causal", "window"), MASKS)
def test_plain_is_the_definition(queries, keys, causal, window, heads):
    inputs = attention_inputs(queries, keys, heads)
    options = {"scale": 0.7, "causal": causal, "window": window}

    def oracle(*exact):
        out, lse = row_by_row(*exact, **options)
        return out, lse.detach()

    compare(lambda *args: Block.apply(*args, options)[:1], lambda *x: oracle(*x)[:1], inputs)
    lse = block_attention(*inputs, **options)[1]
    torch.testing.assert_close(lse, oracle(*inputs)[1], **CLOSE)


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
        merge_attention_(out, lse, *block)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_place_touches_its_rows_alone(dtype):
    """Of a larger tensor, in fp32 whatever the block's dtype is; weights far below fp32's sum."""
    lses = torch.randn(2, 2, 9, 3) * 30
    outs = torch.randn(2, 2, 9, 3, 4).to(dtype)
    lse, out, rows = lses[0].clone(), outs[0].float().clone(), slice(2, 7)
    merge_attention_(out[:, rows], lse[:, rows], outs[1, :, rows], lses[1, :, rows])
    weights = lses.double().softmax(dim=0)[..., None]
    right = (weights * outs.double()).sum(dim=0)
    torch.testing.assert_close(out[:, rows].double(), right[:, rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        lse[:, rows].double(), lses.double().logsumexp(dim=0)[:, rows], **CLOSE
    )
    for other in (slice(0, 2), slice(7, 9)):
        assert torch.equal(out[:, other], outs[0].float()[:, other])
        assert torch.equal(lse[:, other], lses[0, :, other])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("window", "hidden"), [(None, slice(8, 12)), (2, slice(0, 3))])
def test_plain_does_not_touch_keys_that_a_tile_cannot_see(window, hidden):
    """NaN would come through a mask, as 0 * NaN."""
    q, k, v = attention_inputs(12, 12)
    k[:, hidden] = v[:, hidden] = float("nan")
    rows = slice(4, 8)  # one tile
    out, lse = block_attention(q, k, v, scale=1.0, causal=True, window=window)
    assert out[:, rows].isfinite().all()
    assert lse[:, rows].isfinite().all()
    options = {"scale": 1.0, "causal": True, "window": window}
    dq, *_ = block_attention_backward(torch.ones(out.shape), q, k, v, out, lse, **options)
    assert dq[:, rows].isfinite().all()


def test_plain_ignores_autocast():
    q, k, v = attention_inputs(9, 9)
    right = block_attention(q, k, v, scale=1.0, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(block_attention(q, k, v, scale=1.0, causal=True), right)
