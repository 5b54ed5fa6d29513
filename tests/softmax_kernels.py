"""Stand-ins for kernels that need a GPU: their signatures and layouts, in plain PyTorch.

They let the CPU check what a backend passes to a kernel and how it reads what comes back. Each
insists on what the real one insists on, or would silently read wrongly.
"""

from itertools import pairwise
from types import ModuleType

import torch

from hybridsp.ops.softmax import block_attention, block_attention_backward, trial

KIND = trial.Kind(
    device=torch.device("cpu"),
    dtype=torch.float32,
    key_dim=16,
    value_dim=16,
    group=3,
    windowed=False,
    deterministic=False,
)


def window_of(left, right):
    """The contract's window for a kernel's sides, -1 or None for unlimited."""
    if left in (None, -1):
        assert right in (None, -1)
        return None
    assert right == 0
    return left + 1


def attend(q, k, v, causal, scale, window=None, lengths=(None,) * 4):
    """A kernel on [B, L, H, D], whose lse is [B, H, L]; or on [T, H, D], whose lse is [H, T]."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    options = {"scale": scale, "causal": causal, "window": window}
    if lengths[0] is None:
        out, lse = block_attention(q, k, v, **options)
        return out.to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()
    out, lse = torch.empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[1], q.shape[0])
    for rows, keys in packed(q, k, lengths):
        block_out, block_lse = block_attention(
            q[None, rows], k[None, keys], v[None, keys], **options
        )
        out[rows], lse[:, rows] = block_out[0], block_lse[0].T
    return out.to(q.dtype), lse


def differentiate(dout, q, k, v, out, lse, causal, scale, window=None, lengths=(None,) * 4):
    assert lse.is_contiguous()
    assert {x.dtype for x in (dout, k, v, out)} == {q.dtype}
    options = {"scale": scale, "causal": causal, "window": window}
    if lengths[0] is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        tensors = (dout, q, k, v, out, lse.transpose(1, 2))
        return tuple(x.to(q.dtype) for x in block_attention_backward(*tensors, **options))
    assert lse.shape == (q.shape[1], q.shape[0])
    dq, dk, dv = (torch.empty(x.shape) for x in (q, k, v))
    for rows, keys in packed(q, k, lengths):
        of_rows = [x[None, rows] for x in (dout, q, out, lse.T)]
        grads = block_attention_backward(
            *of_rows[:2], k[None, keys], v[None, keys], *of_rows[2:], **options
        )
        dq[rows], dk[keys], dv[keys] = (x[0] for x in grads)
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


def packed(q, k, lengths):
    """Rows of each block. A kernel skips rows past the greatest length, and reads past the last."""
    cu_q, cu_k, max_q, max_k = lengths
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    bounds = cu_q.tolist(), cu_k.tolist()
    assert [(x[0], x[-1]) for x in bounds] == [(0, q.shape[0]), (0, k.shape[0])]
    blocks = [[slice(*span) for span in pairwise(x)] for x in bounds]
    assert all(rows.start < rows.stop <= rows.start + max_q for rows in blocks[0])
    assert all(keys.start < keys.stop <= keys.start + max_k for keys in blocks[1])
    assert max_q > 1, "FlashAttention-2 would lay the lse out otherwise"
    return zip(*blocks, strict=True)


def register_operators(library):
    """PyTorch's operators, for the CPU."""

    def swapped(*tensors):
        return (x.transpose(1, 2) for x in tensors)

    def cudnn(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert (bias, with_lse, dropout) == (None, True, 0.0)
        assert min(q.shape[2], k.shape[2]) > 1
        out, lse = attend(*swapped(q, k, v), causal, scale)
        seed = torch.zeros((), dtype=torch.int64)
        none = torch.empty(0)
        lengths = (none, none, q.shape[2], k.shape[2])
        return out.transpose(1, 2), lse[..., None], *lengths, seed, seed, none

    def cudnn_backward(
        dout, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, p, causal, **kw
    ):
        assert (bias, cq, ck, mq, mk, p) == (None, None, None, q.shape[2], k.shape[2], 0.0)
        assert dout.stride(-1) == 1
        assert lse.shape[3] == 1
        tensors = swapped(dout, q, k, v, out)
        return tuple(swapped(*differentiate(*tensors, lse[..., 0], causal, **kw)))

    def flash(
        q, k, v, cq, ck, mq, mk, p, causal, debug,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert (p, debug) == (0.0, False)
        assert cq is not None or (ck, mq, mk) == (None, q.shape[1], k.shape[1])
        assert q.shape[-1] == v.shape[-1]
        window = window_of(window_size_left, window_size_right)
        out, lse = attend(q, k, v, causal, scale, window, (cq, ck, mq, mk))
        unused = torch.zeros(2, dtype=torch.int64)
        return out, lse, unused, unused[0], torch.empty(0)

    def flash_backward(
        dout, q, k, v, out, lse, cq, ck, mq, mk, p, causal, state, unused,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert p == 0.0
        assert cq is not None or (ck, mq, mk) == (None, q.shape[1], k.shape[1])
        assert out.shape == q.shape
        window = window_of(window_size_left, window_size_right)
        return differentiate(dout, q, k, v, out, lse, causal, scale, window, (cq, ck, mq, mk))

    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")


def module(name, *functions):
    """A module of these functions."""
    made = ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


def flash_attn_2():
    """As in flash-attn 2.8."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        assert q.shape[-1] == v.shape[-1]
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *attend(q, k, v, causal, softmax_scale, window, lengths), None, None

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        lengths, window = (None,) * 4, (window_size_left, window_size_right)
        extras = softcap, alibi_slopes, return_softmax
        return _flash_attn_varlen_forward(
            q, k, v, *lengths, dropout_p, softmax_scale, causal, *window, *extras
        )

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, False)
        assert out.shape == q.shape
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        tensors = dout, q, k, v, out, softmax_lse
        grads = differentiate(*tensors, causal, softmax_scale, window, lengths)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        lengths, window = (None,) * 4, (window_size_left, window_size_right)
        tensors, extras = (dout, q, k, v, out, softmax_lse), (softcap, alibi_slopes, deterministic)
        _flash_attn_varlen_backward(
            *tensors, dq, dk, dv, *lengths, dropout_p, softmax_scale, causal, *window, *extras
        )

    functions = (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    )
    return module("flash_attn.flash_attn_interface", *functions)


def flash_attn_3():
    """As in FlashAttention's hopper folder, arguments that are not passed left out."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, num_splits=1,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *attend(q, k, v, causal, softmax_scale, window, lengths), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        tensors = dout, q, k, v, out, softmax_lse
        grads = differentiate(*tensors, is_causal, softmax_scale, window, lengths)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    return module("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


def flash_attn_4():
    """As in flash_attn.cute, arguments that are not passed left out."""

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=None, window_size_right=None,
        return_lse=False,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attend(q, k, v, causal, softmax_scale, window, lengths)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, deterministic=False, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return differentiate(dout, q, k, v, out, lse, causal, softmax_scale, window, lengths)

    return module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def early_flash_attn_4():
    """Its backward knew neither windows nor packed blocks."""

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        return differentiate(dout, q, k, v, out, lse, causal, softmax_scale)

    recent = flash_attn_4()
    return module("flash_attn.cute.interface", recent._flash_attn_fwd, _flash_attn_bwd)


PACKAGES = {
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
}
