"""What a backend of block attention does: the whole contract that ring attention needs.

    forward    (q, k, v)                 -> (out, lse)   over these keys alone
    backward   (dout, out, lse global)   -> dq, dk, dv   of these keys' share

`lse` is the log of the softmax's denominator. In the backward `out` and `lse` are those of the
*whole* softmax, merged over all blocks of keys, so `exp(score - lse)` is the true probability and
the blocks' shares add up exactly. Kernels were not written for this, but any that hands out its lse
and takes it back can do it: a backward never asks which keys the lse was summed over.

Packed documents make many small blocks, none of which fills a GPU. Kernels that know variable
lengths ("varlen") compute them all in one call: the blocks' rows lie one after another, and a
`Packing` says where each begins.

Shapes: B batch, Lq queries, Lk keys, Hq query heads, Hkv key-value heads (Hkv divides Hq),
D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("plain", "cudnn", "flash", "flash_attn_2", "flash_attn_3", "flash_attn_4")
MAX_HEAD_DIM = 256  # of every kernel here


class BlockForward(Protocol):
    """Attention of q over the keys of one block."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q: [B, Lq, Hq, D].
            k: [B, Lk, Hkv, D].
            v: [B, Lk, Hkv, Dv].
            scale: factor on the scores.
            causal: query i sees keys 0..i (then Lq == Lk); otherwise every key.
            window: with causal only: query i sees keys i-window+1..i.

        Returns:
            out [B, Lq, Hq, Dv] in fp32 or q's dtype, and lse [B, Lq, Hq] fp32.

        Raises:
            ValueError: causal or window that do not fit the block.
        """


class BlockBackward(Protocol):
    """Gradients of one block's share of a merged attention."""

    def __call__(
        self,
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
        """Differentiate.

        Args:
            dout: [B, Lq, Hq, Dv], gradient of the merged output.
            q, k, v: as in the forward.
            out: [B, Lq, Hq, Dv], the merged output.
            lse: [B, Lq, Hq] fp32, the merged log-sum-exp.
            scale, causal, window: as in the forward.

        Returns:
            dq, dk, dv, shaped as q, k, v, in fp32 or q's dtype.
        """


class Packing:
    """Where the blocks of one call begin among its rows of queries, and among those of keys.

    No block is empty, and together they are all rows.

    Args:
        q_sizes, k_sizes: rows of each block.
        device: of the tensors.

    Attributes:
        q_bounds, k_bounds: N + 1 numbers for N blocks, from 0 on.
        cu_q, cu_k: the same, int32 [N + 1] on the device.
        max_q, max_k: not below the rows of any block.
    """

    def __init__(
        self, q_sizes: Sequence[int], k_sizes: Sequence[int], device: torch.device
    ) -> None:
        self.q_bounds = tuple(accumulate(q_sizes, initial=0))
        self.k_bounds = tuple(accumulate(k_sizes, initial=0))
        bounds = torch.tensor([self.q_bounds, self.k_bounds], dtype=torch.int32)
        self.cu_q, self.cu_k = bounds.to(device, non_blocking=True)
        # Of single queries FlashAttention-2 swaps heads for rows, and lays the lse out otherwise.
        self.max_q, self.max_k = max(2, *q_sizes), max(k_sizes)

    def blocks(self) -> list[tuple[slice, slice]]:
        """Rows of the queries and of the keys, for each block."""
        pairs = zip(pairwise(self.q_bounds), pairwise(self.k_bounds), strict=True)
        return [(slice(*rows), slice(*columns)) for rows, columns in pairs]


class VarlenForward(Protocol):
    """Attention of many blocks at once, each over its own keys."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q, k, v: as in `BlockForward`, with B = 1, the blocks' rows one after another.
            packing: of these rows.
            scale, causal, window: as in `BlockForward`, of every block.

        Returns:
            out and lse, as `BlockForward`.

        Raises:
            ValueError: causal or window that do not fit the blocks.
        """


class VarlenBackward(Protocol):
    """Gradients of many blocks' shares at once."""

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate.

        Args:
            dout, q, k, v, out, lse: as in `BlockBackward`, with B = 1, packed.
            packing: of these rows.
            scale, causal, window: as in the forward.

        Returns:
            dq, dk, dv, shaped as q, k, v, in fp32 or q's dtype.
        """


class Varlen(NamedTuple):
    """A pair of passes that take many blocks, and what it says before it is tried.

    `why_not` is a function: window -> why it cannot be called, None if nothing speaks against it.
    """

    forward: VarlenForward
    backward: VarlenBackward
    why_not: Callable[[int | None], str | None] = lambda window: None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A pair of passes, and what it says about tensors before it is tried on them.

    Attributes:
        name: one of BACKENDS.
        forward, backward: the passes.
        why_not: (q, k, v, window) -> why it cannot do these, None if nothing speaks against it.
        varlen: the passes for many blocks at once; None where there are none that have shown that
            they are right, and the blocks are computed one by one.
    """

    name: str
    forward: BlockForward
    backward: BlockBackward
    why_not: Callable[[Tensor, Tensor, Tensor, int | None], str | None]
    varlen: Varlen | None = None


def check_block(
    q: Tensor, k: Tensor, causal: bool, window: int | None, packing: Packing | None = None
) -> None:
    """Refuse masks that backends would read differently, of one block or of packed ones.

    Raises:
        ValueError: causal with Lq != Lk (some kernels align the diagonal left, some right), or a
            window that is below 1 or comes without causal.
    """
    queries: object = q.shape[1]
    keys: object = k.shape[1]
    if packing is not None:
        assert q.shape[0] == k.shape[0] == 1, "packed blocks are one row"
        assert (queries, keys) == (packing.q_bounds[-1], packing.k_bounds[-1])
        queries, keys = packing.q_bounds, packing.k_bounds
    if causal and queries != keys:
        raise ValueError(
            f"causal = True with {queries} queries and {keys} keys: give the block whose "
            "queries and keys are the same tokens, or causal = False"
        )
    check_window(window)
    if window is not None and not causal:
        raise ValueError(f"window = {window} needs causal = True: it counts back from the query")


def check_window(window: int | None) -> None:
    """Refuse a window in which a query would see no key.

    Raises:
        ValueError: window < 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: give 1 (a token sees itself) or more, or None")


def why_not_kernel(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why none of the GPU kernels can do these tensors; None if one may."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {q.dtype}, not bfloat16 or float16"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}, not one"
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    if key_dim % 8 or value_dim % 8 or key_dim > MAX_HEAD_DIM:
        return (
            f"head dims {key_dim} (keys) and {value_dim} (values) are not multiples of 8 up to "
            f"{MAX_HEAD_DIM}"
        )
    if value_dim > key_dim:
        return f"values are wider than keys: head dims {value_dim} and {key_dim}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability: (8, 0) Ampere, (8, 9) Ada, (9, 0) Hopper, (10, 0) and up Blackwell."""
    return torch.cuda.get_device_capability(device)


def without_batch(packing: Packing | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as kernels want them: [B, L, ...], or packed blocks [T, ...]."""
    return tensors if packing is None else tuple(x[0] for x in tensors)


def with_batch(packing: Packing | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The way back from `without_batch`."""
    return tensors if packing is None else tuple(x[None] for x in tensors)


def widen(x: Tensor, dim: int) -> Tensor:
    """Pad the last dim with zeros to `dim` (a copy), for kernels that take one head dim.

    Zero columns of v make zero columns of out, and of dv where dout has them too.
    """
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))
