"""The calls of a backend that compute a list of blocks: one for many, or one for each.

Fifty packed documents are fifty blocks. One at a time each under-fills the GPU and costs the host
more than the kernel takes; so where a backend has varlen passes, the blocks are put in groups, and
each group is one call. Within a group no row of queries or of keys occurs twice, so what a call
returns can be merged into its rows, and gradients added to theirs, all at once.

    own keys of a rank, or a ring's step         one group: a document is one block
    all others' keys at once, causal             two: a document's early queries, and its late ones,
                                                 see the same first keys

Rows that lie side by side are a slice, and nothing is copied; else the call's are gathered by one
index, and its results scattered by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridsp.layout import Block
from hybridsp.ops.merge import merge_attention_
from hybridsp.ops.softmax.contract import Backend, Packing


class Rows:
    """The rows of tensors [B, L, ...] that one call works on.

    Args:
        parts: slices, rising, without a common row.
        device: of the tensors.

    Attributes:
        size: how many they are.
        span: from the first to the last.
        index: int64, the rows; None where they are all of the span.
    """

    def __init__(self, parts: Sequence[slice], device: torch.device) -> None:
        self.span = slice(parts[0].start, parts[-1].stop)
        self.size = sum(map(_size, parts))
        self.index = None if self.size == _size(self.span) else _index(parts, device)

    def take(self, x: Tensor) -> Tensor:
        """These rows: a view, or a copy if there are others between them."""
        return x[:, self.span] if self.index is None else x.index_select(1, self.index)

    def add_(self, whole: Tensor, share: Tensor) -> None:
        """Add to these rows of `whole`."""
        if self.index is None:
            whole[:, self.span].add_(share)
        else:
            whole.index_add_(1, self.index, share.to(whole.dtype))

    def merge_(self, out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        """`merge_attention_` into these rows of `out` and `lse`."""
        rows = self.take(out), self.take(lse)
        merge_attention_(*rows, block_out, block_lse)
        if self.index is not None:
            for whole, part in zip((out, lse), rows, strict=True):
                whole.index_copy_(1, self.index, part)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a backend's passes.

    Attributes:
        q, k: rows of the queries, and of the keys and values.
        packing: of these rows, if they are several blocks.
        backend: whose passes.
        options: scale, causal and window.
    """

    q: Rows
    k: Rows
    packing: Packing | None
    backend: Backend
    options: dict[str, Any]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse of the call's rows, given these alone; as `BlockForward`."""
        if self.packing is None:
            return self.backend.forward(q, k, v, **self.options)
        assert self.backend.varlen is not None
        return self.backend.varlen.forward(q, k, v, self.packing, **self.options)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the call's rows, given dout, q, k, v, out, lse of these alone."""
        dout, q, k, v, out, lse = tensors
        if self.packing is None:
            return self.backend.backward(dout, q, k, v, out, lse, **self.options)
        assert self.backend.varlen is not None
        return self.backend.varlen.backward(dout, q, k, v, out, lse, self.packing, **self.options)

    def merge_forward_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Merge attention over the call's keys into `out` and `lse`, fp32, of all rows."""
        tensors = self.q.take(q), self.k.take(k), self.k.take(v)
        self.q.merge_(out, lse, *self.forward(*tensors))

    def add_backward_(self, dq: Tensor, dk: Tensor, dv: Tensor, *tensors: Tensor) -> None:
        """Add its gradients to fp32 `dq`, `dk`, `dv`, from dout, q, k, v, out, lse of all rows."""
        sides = self.q, self.q, self.k, self.k, self.q, self.q
        shares = self.backward(*(rows.take(x) for rows, x in zip(sides, tensors, strict=True)))
        for rows, whole, share in zip((self.q, self.k, self.k), (dq, dk, dv), shares, strict=True):
            rows.add_(whole, share)


def calls_of(
    blocks: Iterable[Block],
    backend: Backend,
    device: torch.device,
    *,
    scale: float,
    window: int | None = None,
) -> list[Call]:
    """The calls that compute these blocks.

    Args:
        blocks: rising in rows of queries, and within a document also in those of keys.
        backend: what computes them.
        device: of the tensors.
        scale, window: as in `BlockForward`.

    Returns:
        A call per group where the backend has varlen passes, else one per block.
    """
    groups = [[block] for block in blocks] if backend.varlen is None else _groups(blocks)
    calls = []
    for group in groups:
        q, k = [block.q for block in group], [block.k for block in group]
        packing = None
        if len(group) > 1:
            packing = Packing([_size(rows) for rows in q], [_size(rows) for rows in k], device)
        options = {"scale": scale, "causal": group[0].causal, "window": window}
        calls.append(
            Call(
                q=Rows(q, device),
                k=Rows(k, device),
                packing=packing,
                backend=backend,
                options=options,
            )
        )
    return calls


def _groups(blocks: Iterable[Block]) -> list[list[Block]]:
    """Each block goes to the first group of its kind that ends before it, queries and keys."""
    groups: list[list[Block]] = []
    for block in blocks:
        for group in groups:
            last = group[-1]
            after = last.q.stop <= block.q.start and last.k.stop <= block.k.start
            if after and last.causal == block.causal:
                group.append(block)
                break
        else:
            groups.append([block])
    return groups


def _size(rows: slice) -> int:
    return rows.stop - rows.start


def _index(parts: Sequence[slice], device: torch.device) -> Tensor:
    """The rows of these slices; only two numbers for each come from the host."""
    sizes = [_size(part) for part in parts]
    total = sum(sizes)
    before, shifts = 0, []
    for part, size in zip(parts, sizes, strict=True):
        shifts.append(part.start - before)
        before += size
    repeats, offsets = torch.tensor([sizes, shifts]).to(device, non_blocking=True)
    shift = offsets.repeat_interleave(repeats, output_size=total)
    return torch.arange(total, device=device).add_(shift)
