"""Trying a backend: one small block, its results against the plain backend's.

What a kernel supports depends on the chip, the versions of PyTorch, cuDNN and the package, and how
the package was built; tables of that are out of date when they are written. Worse than a refusal
are gradients that are silently wrong: FlashAttention-4 has given them for head dims that are not a
multiple of 32. So before a backend is used for the first time on some kind of tensors, it computes
64 queries over 128 keys as a ring of two steps would, forward and backward. That takes
milliseconds, or the kernel's compilation, which would have come anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hybridsp.ops.merge import merge_attention
from hybridsp.ops.softmax.contract import Backend
from hybridsp.ops.softmax.plain import BACKEND as PLAIN

TOKENS = 64
WINDOW = 40
LIMIT = 0.05  # of a result's norm; bf16 comes to 0.003, what is wrong to more than 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What decides whether a kernel works, and which one it is."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    group: int  # query heads per KV head
    windowed: bool
    deterministic: bool


def kind_of(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Kind:
    """The kind of these tensors."""
    return Kind(
        device=q.device,
        dtype=q.dtype,
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        group=q.shape[2] // k.shape[2],
        windowed=window is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@cache
def why_it_fails(backend: Backend, kind: Kind) -> str | None:
    """Try a backend on a kind of tensors; None if it is right."""
    tensors = _random_tensors(kind)
    window = WINDOW if kind.windowed else None
    try:
        got = attend_in_two_steps(backend, *tensors, window=window)
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend
    # RuntimeError is PyTorch's and the kernels' own; the rest come from the packages' Python.
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        return f"a trial raised {type(error).__name__}: {str(error).splitlines()[0]}"
    right = attend_in_two_steps(PLAIN, *tensors, window=window)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, right, strict=True):
        off = (a.float() - b).norm().item() / b.norm().item()
        if not off < LIMIT:  # written so that NaN fails
            return f"a trial's {name} was off by {off:.1%}"
    return None


def attend_in_two_steps(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of the last Lq of Lk tokens over all of them, as a ring's two steps do it.

    First their own keys, causally, then those before, merged in fp32; then both steps' gradients.
    With a window there is only the first step, and the keys before are left out.

    Args:
        backend: what computes the blocks.
        q, dout: [B, Lq, Hq, D] and [B, Lq, Hq, Dv].
        k, v: [B, Lk, Hkv, D] and [B, Lk, Hkv, Dv], Lk > Lq.
        window: as in `BlockForward`.

    Returns:
        out, lse, dq, dk, dv, all fp32 but out, which is rounded to q's dtype as ring attention
        saves it.
    """
    scale, past = q.shape[-1] ** -0.5, k.shape[1] - q.shape[1]
    steps = [(slice(past, None), True)] + [(slice(0, past), False)] * (window is None)
    out = torch.zeros(dout.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    for keys, causal in steps:
        options = {"scale": scale, "causal": causal, "window": window}
        block_out, block_lse = backend.forward(q, k[:, keys], v[:, keys], **options)
        out, lse = merge_attention(out, lse, block_out, block_lse)
    out = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for keys, causal in steps:
        options = {"scale": scale, "causal": causal, "window": window}
        gradients = backend.backward(dout, q, k[:, keys], v[:, keys], out, lse, **options)
        dq += gradients[0]
        dk[:, keys] += gradients[1]
        dv[:, keys] += gradients[2]
    return out, lse, dq, dk, dv


def _random_tensors(kind: Kind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout of a kind; from a generator of their own, so that no seed is disturbed."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(1, tokens, heads, dim, generator=generator)
        return x.to(kind.device, kind.dtype)

    return (
        draw(TOKENS, 2 * kind.group, kind.key_dim),
        draw(2 * TOKENS, 2, kind.key_dim),
        draw(2 * TOKENS, 2, kind.value_dim),
        draw(TOKENS, 2 * kind.group, kind.value_dim),
    )
