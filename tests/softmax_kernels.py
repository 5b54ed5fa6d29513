"""Stand-ins for kernels that need a GPU: their signatures and layouts, in plain PyTorch.

They let the CPU check what a backend passes to a kernel and how it reads what comes back. Each
insists on what the real one insists on, or would silently read wrongly.
"""

from types import ModuleType

import torch

from hybridsp.ops.softmax import block_attention, block_attention_backward


def window_of(left, right):
    """The contract's window for a kernel's sides, -1 or None for unlimited."""
    if left in (None, -1):
        assert right in (None, -1)
        return None
    assert right == 0
    return left + 1


def attend(q, k, v, causal, scale, window=None):
    """A kernel on [B, L, H, D]; its lse is [B, H, L]."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    out, lse = block_attention(q, k, v, scale=scale, causal=causal, window=window)
    return out.to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def differentiate(dout, q, k, v, out, lse, causal, scale, window=None):
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert {x.dtype for x in (dout, k, v, out)} == {q.dtype}
    tensors = (dout, q, k, v, out, lse.transpose(1, 2))
    grads = block_attention_backward(*tensors, scale=scale, causal=causal, window=window)
    return tuple(x.to(q.dtype) for x in grads)


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
        assert (cq, ck, mq, mk, p, debug) == (None, None, q.shape[1], k.shape[1], 0.0, False)
        assert q.shape[3] == v.shape[3]
        window = window_of(window_size_left, window_size_right)
        out, lse = attend(q, k, v, causal, scale, window)
        unused = torch.zeros(2, dtype=torch.int64)
        return out, lse, unused, unused[0], torch.empty(0)

    def flash_backward(
        dout, q, k, v, out, lse, cq, ck, mq, mk, p, causal, state, unused,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert (cq, ck, mq, mk, p) == (None, None, q.shape[1], k.shape[1], 0.0)
        assert out.shape == q.shape
        window = window_of(window_size_left, window_size_right)
        return differentiate(dout, q, k, v, out, lse, causal, scale, window)

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

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        assert q.shape[3] == v.shape[3]
        window = window_of(window_size_left, window_size_right)
        return *attend(q, k, v, causal, softmax_scale, window), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, False)
        assert out.shape == q.shape
        window = window_of(window_size_left, window_size_right)
        grads = differentiate(dout, q, k, v, out, softmax_lse, causal, softmax_scale, window)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    return module("flash_attn.flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


def flash_attn_3():
    """As in FlashAttention's hopper folder, arguments that are not passed left out."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, num_splits=1,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        return *attend(q, k, v, causal, softmax_scale, window), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, dq=None, dk=None,
        dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        grads = differentiate(dout, q, k, v, out, softmax_lse, is_causal, softmax_scale, window)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    return module("flash_attn_interface", _flash_attn_forward, _flash_attn_backward)


def flash_attn_4():
    """As in flash_attn.cute, arguments that are not passed left out."""

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, return_lse=False,
    ):  # fmt: skip
        out, lse = attend(
            q, k, v, causal, softmax_scale, window_of(window_size_left, window_size_right)
        )
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, deterministic=False,
    ):  # fmt: skip
        window = window_of(window_size_left, window_size_right)
        return differentiate(dout, q, k, v, out, lse, causal, softmax_scale, window)

    return module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def early_flash_attn_4():
    """Its backward knew no windows."""

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        return differentiate(dout, q, k, v, out, lse, causal, softmax_scale)

    recent = flash_attn_4()
    return module("flash_attn.cute.interface", recent._flash_attn_fwd, _flash_attn_bwd)


PACKAGES = {
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
}
