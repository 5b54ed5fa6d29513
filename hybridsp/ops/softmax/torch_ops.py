"""Block attention by the kernels that ship with PyTorch: cuDNN's and FlashAttention-2's.

`scaled_dot_product_attention` hides the lse, so these call the operators below it. Both take GQA as
it is, without repeated keys and values.

    cudnn   q, k, v [B, H, L, D] with any strides: our [B, L, H, D] transposed, no copy;
            lse [B, H, L, 1]
    flash   q, k, v [B, L, H, D] as ours (the operator under `_scaled_dot_product_flash_attention`,
            which transposes to this and cannot do windows); lse [B, H, L]; out and dout are copied
            by the operator where they are not contiguous (slices of a batch of two or more);
            varlen: q, k, v [T, H, D], lse [H, T]

What is copied here: the lse on its way into a backward, 4 bytes per query and head, because both
read it head by head; and for flash, values narrower than keys, padded (`widen`).

cuDNN builds a plan for every shape (and strides) that it has not met: on a B200 0.44 s forward and
0.55 s backward, as measured in modelscope/FunASR#3704. The few lengths of an unpacked ring are
planned once; documents whose lengths change every step would be planned for ever (`choose`). And
PyTorch's operator for it has no varlen passes, so packed documents are Flash's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridsp.ops.softmax.contract import (
    Backend,
    Packing,
    Varlen,
    capability,
    check_block,
    why_not_kernel,
    widen,
    with_batch,
    without_batch,
)
from hybridsp.ops.softmax.plain import block_attention, block_attention_backward

# Head dims (keys, values) above 128 that cuDNN has backward kernels for, on Hopper and Blackwell.
WIDE_CUDNN_HEADS = ((192, 128), (192, 192), (256, 256))


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """`BlockForward`; out comes in q's dtype. There is no window."""
    check_block(q, k, causal, window)
    _refuse_window(window)
    if _is_degenerate(q, k):
        return block_attention(q, k, v, scale=scale, causal=causal)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse[..., 0].transpose(1, 2)


def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockBackward`; the gradients come in q's dtype."""
    check_block(q, k, causal, window)
    _refuse_window(window)
    if _is_degenerate(q, k):
        return block_attention_backward(dout, q, k, v, out, lse, scale=scale, causal=causal)
    stats = lse.transpose(1, 2).contiguous()[..., None]
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype)))
    if dout.stride(-1) != 1:  # a broadcast gradient, as of a sum
        dout = dout.contiguous()
    unused_seed = torch.empty((), dtype=torch.int64, device=q.device)  # there is no dropout
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        stats,
        unused_seed,
        unused_seed,
        None,  # no bias
        None,  # no boundaries: one sequence per row
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def why_not_cudnn(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> str | None:
    """Why cuDNN cannot do these."""
    reason = why_not_kernel(q, k, v)
    if reason:
        return reason
    if window is not None:
        return f"PyTorch's operator for it has no window ({window})"
    if _must_be_deterministic():
        return "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
    major, dims = capability(q.device)[0], (q.shape[-1], v.shape[-1])
    if major < 8:
        return "it needs compute capability 8.0"
    if dims[0] > 128 and (major not in (9, 10) or dims not in WIDE_CUDNN_HEADS):
        return f"head dims {dims[0]} (keys) and {dims[1]} (values) have no backward on this chip"
    return None


def _refuse_window(window: int | None) -> None:
    if window is not None:
        raise ValueError(f"backend = 'cudnn' has no window, got {window}; use backend = None")


def _is_degenerate(q: Tensor, k: Tensor) -> bool:
    """One query or one key, which cuDNN refuses; a document may leave such a block in a ring."""
    return q.shape[1] == 1 or k.shape[1] == 1


def _must_be_deterministic() -> bool:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled and not torch.is_deterministic_algorithms_warn_only_enabled()


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`BlockForward` and `VarlenForward`; out comes in q's dtype."""
    check_block(q, k, causal, window, packing)
    wide = without_batch(packing, q, k, widen(v, q.shape[-1]))
    left, right = _window_sides(window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_last_contiguous(*wide),
        *_lengths(q, k, packing),
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    out, lse = with_batch(packing, out, lse)
    return out[..., : v.shape[-1]], lse.transpose(1, 2)


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`BlockBackward` and `VarlenBackward`; the gradients come in q's dtype."""
    check_block(q, k, causal, window, packing)
    wide_v, dout, out = (widen(x.to(q.dtype), q.shape[-1]) for x in (v, dout, out))
    stats = lse.transpose(1, 2).contiguous()
    tensors = without_batch(packing, dout, q, k, wide_v, out, stats)
    left, right = _window_sides(window)
    # There is no dropout, so what the generator was is never read.
    unused_state = torch.empty(2, dtype=torch.int64, device=q.device).view(torch.uint64)
    gradients = torch.ops.aten._flash_attention_backward(
        *_last_contiguous(*tensors),
        *_lengths(q, k, packing),
        0.0,
        causal,
        unused_state,
        unused_state[0],
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq, dk, dv = with_batch(packing, *gradients)
    return dq, dk, dv[..., : v.shape[-1]]


def why_not_flash(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> str | None:
    """Why PyTorch's FlashAttention-2 cannot do these."""
    reason = why_not_kernel(q, k, v)
    if reason is None and capability(q.device)[0] < 8:
        return "it needs compute capability 8.0"
    return reason


def _lengths(
    q: Tensor, k: Tensor, packing: Packing | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The operators' boundaries, None for one sequence per row, and greatest lengths."""
    if packing is None:
        return None, None, q.shape[1], k.shape[1]
    return packing.cu_q, packing.cu_k, packing.max_q, packing.max_k


def _window_sides(window: int | None) -> tuple[int | None, int | None]:
    """How many keys a query sees to its left and right; None for all."""
    return (None, None) if window is None else (window - 1, 0)


def _last_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of those whose last dim is not; the kernel reads rows in vectors."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


CUDNN = Backend(name="cudnn", forward=cudnn_forward, backward=cudnn_backward, why_not=why_not_cudnn)
FLASH = Backend(name="flash", forward=flash_forward, backward=flash_backward, why_not=why_not_flash)
FLASH_VARLEN = Varlen(flash_forward, flash_backward)
