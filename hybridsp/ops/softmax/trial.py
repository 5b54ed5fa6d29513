"""Trying a backend: a few small blocks, its results against the plain backend's.

What a kernel supports depends on the chip, the versions of PyTorch, cuDNN and the package, and how
the package was built; tables of that are out of date when they are written. Worse than a refusal
are gradients that are silently wrong: FlashAttention-4 has given them for head dims that are not a
multiple of 32. So before a backend is used for the first time on some kind of tensors, it computes
64 queries over 128 keys as a ring of two steps would, forward and backward; and before its varlen
passes are, the same of documents of uneven lengths, one of which is a single token and one of which
sees no more keys in the second step. That takes milliseconds, or the kernel's compilation, which
would have come anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hybridsp.layout import Block
from hybridsp.ops.softmax.calls import calls_of
from hybridsp.ops.softmax.contract import Backend, Varlen
from hybridsp.ops.softmax.plain import BACKEND as PLAIN

TOKENS = 64
WINDOW = 40
OWN_SIZES = (30, 1, 24, 9)  # of the queries' documents
PAST_SIZES = (17, 40, 0, 7)  # keys that each sees besides
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
    return _why_blocks_fail(backend, kind, _one_document(TOKENS, 2 * TOKENS))


@cache
def why_varlen_fails(backend: Backend, varlen: Varlen, kind: Kind) -> str | None:
    """Try varlen passes, in place of the backend's own, on a kind of tensors."""
    window = WINDOW if kind.windowed else None
    reason = varlen.why_not(window)
    return reason or _why_blocks_fail(replace(backend, varlen=varlen), kind, documents())


def _why_blocks_fail(backend: Backend, kind: Kind, blocks: Sequence[Block]) -> str | None:
    tensors = _random_tensors(kind)
    window = WINDOW if kind.windowed else None
    try:
        got = attend_in_blocks(backend, blocks, *tensors, window=window)
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend
    # Whatever it is: compilers of kernels raise plain Exceptions of their own, and every one of
    # them only means that another backend is taken, with this reason in the log.
    except Exception as error:  # noqa: BLE001 - see above
        return f"a trial raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    right = attend_in_blocks(PLAIN, blocks, *tensors, window=window)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, right, strict=True):
        off = (a.float() - b).norm().item() / b.norm().item()
        if not off < LIMIT:  # written so that NaN fails
            return f"a trial's {name} was off by {off:.1%}"
    return None


def attend_in_two_steps(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of the last Lq of Lk tokens over all of them, as a ring's two steps do it.

    Args:
        backend: what computes the blocks.
        q, dout: [B, Lq, Hq, D] and [B, Lq, Hq, Dv].
        k, v: [B, Lk, Hkv, D] and [B, Lk, Hkv, Dv], Lk > Lq.
        window: as in `BlockForward`.

    Returns:
        As `attend_in_blocks`.
    """
    blocks = _one_document(q.shape[1], k.shape[1])
    return attend_in_blocks(backend, blocks, q, k, v, dout, window=window)


def attend_in_blocks(
    backend: Backend,
    blocks: Sequence[Block],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention in blocks that are merged in fp32, and their gradients, as in a ring.

    With a window there are only the causal blocks, and the keys of the others are left out.

    Args:
        backend: what computes the blocks.
        blocks: of these rows; every query is in one at least.
        q, dout: [B, Lq, Hq, D] and [B, Lq, Hq, Dv]; B = 1 where varlen passes are tried.
        k, v: [B, Lk, Hkv, D] and [B, Lk, Hkv, Dv].
        window: as in `BlockForward`.

    Returns:
        out, lse, dq, dk, dv, all fp32 but out, which is rounded to q's dtype as ring attention
        saves it.
    """
    seen = [block for block in blocks if window is None or block.causal]
    calls = calls_of(seen, backend, q.device, scale=q.shape[-1] ** -0.5, window=window)
    out = torch.zeros(dout.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    for call in calls:
        call.merge_forward_(out, lse, q, k, v)
    out = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for call in calls:
        call.add_backward_(dq, dk, dv, dout, q, k, v, out, lse)
    return out, lse, dq, dk, dv


def _one_document(queries: int, keys: int) -> list[Block]:
    """First the queries' own keys, causally, then those before."""
    rows, past = slice(0, queries), keys - queries
    own = Block(q=rows, k=slice(past, keys), causal=True)
    return [own, Block(q=rows, k=slice(0, past), causal=False)]


def documents() -> list[Block]:
    """The same of several documents in these rows; first those of the first step."""
    own, past = _spans(OWN_SIZES), _spans(PAST_SIZES)
    blocks = [
        Block(q=rows, k=slice(TOKENS + rows.start, TOKENS + rows.stop), causal=True) for rows in own
    ]
    return blocks + [
        Block(q=rows, k=keys, causal=False)
        for rows, keys in zip(own, past, strict=True)
        if keys.start < keys.stop
    ]


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(*span) for span in pairwise(accumulate(sizes, initial=0))]


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
