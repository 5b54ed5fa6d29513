"""Cutting a batch over the SP ranks: shift the labels first, then cut.

Every rank of an SP group has the same whole batch and keeps its contiguous part. Labels are
shifted before the cut, so that the last token of a rank's part still learns the first token of the
next one; a document's last token learns nothing. Rows of packed documents are laid end to end in
one row, which is the same thing, since documents do not see each other. A length that the SP degree
does not divide is padded at the end, as a document of its own that no label counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL
from hybridsp.ops.interfaces import is_integer, require_one_packed_row

KEYS = ("input_ids", "labels", "cu_seqlens")


def shard_batch(batch: Mapping[str, Tensor], mesh: SPMesh) -> dict[str, Tensor | int]:
    """This rank's part of a batch, as keyword arguments of a parallelized model.

    Args:
        batch: the whole batch, the same on every rank of the SP group:
            input_ids: int64 [B, T].
            labels: int64 [B, T], not shifted, -100 where nothing is to be learnt; optional, the
                input_ids if absent.
            cu_seqlens: int32 [documents + 1], boundaries of the documents packed in the rows laid
                end to end, rising from 0 to B * T, with a boundary at each row's end; optional,
                each row is one document if absent.
        mesh: the grid of ranks.

    Returns:
        input_ids, shift_labels, position_ids (int64 [B, L], or [1, B * T / P] if packed; positions
        count from each document's start) on the mesh's device and, if packed, cu_seq_lens_q and
        cu_seq_lens_k (int32, boundaries of the *whole* sequence, on the CPU) with max_length_q and
        max_length_k (tokens of the longest document).

    Raises:
        ValueError: unknown or missing keys, shapes that do not fit, boundaries that do not rise.
    """
    batch = {key: value for key, value in batch.items() if value is not None}
    _check(batch)
    tokens = batch["input_ids"].long()
    labels = batch.get("labels", tokens).long()
    cu_seqlens = batch.get("cu_seqlens")
    packed: dict[str, Tensor | int] = {}
    if cu_seqlens is None:
        bounds = [0, tokens.shape[1]]
    else:
        _check_boundaries(cu_seqlens, tokens)
        tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
        bounds = cu_seqlens.tolist()
    pad = -tokens.shape[1] % mesh.sp
    if cu_seqlens is not None:
        bounds = [*bounds, bounds[-1] + pad] if pad else bounds
        packed = _document_arguments(bounds)
    shift_labels = F.pad(_shifted(labels, bounds), (0, pad), value=IGNORED_LABEL)
    tokens = F.pad(tokens, (0, pad))
    positions = _positions(bounds, tokens.shape[1]).expand_as(tokens)
    length = tokens.shape[1] // mesh.sp
    mine = slice(mesh.sp_rank * length, (mesh.sp_rank + 1) * length)

    def cut(x: Tensor) -> Tensor:
        return x[:, mine].contiguous().to(mesh.device)

    return {
        "input_ids": cut(tokens),
        "shift_labels": cut(shift_labels),
        "position_ids": cut(positions),
        **packed,
    }


def _shifted(labels: Tensor, bounds: list[int]) -> Tensor:
    """The label of each token's successor; none for the last token of a document."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    last = torch.tensor([stop - 1 for start, stop in pairwise(bounds) if start < stop])
    last = last[last < labels.shape[1]]
    shifted[:, last] = IGNORED_LABEL
    return shifted


def _positions(bounds: list[int], total: int) -> Tensor:
    """Distance from the document's start, int64 [1, total]; padding after it counts on."""
    starts = torch.zeros(total, dtype=torch.int64)
    for start, stop in pairwise(bounds):
        starts[start : max(stop, start)] = start
    starts[bounds[-1] :] = bounds[-2] if len(bounds) > 1 else 0
    return (torch.arange(total) - starts)[None]


def _document_arguments(bounds: list[int]) -> dict[str, Tensor | int]:
    longest = max(stop - start for start, stop in pairwise(bounds))
    boundaries = torch.tensor(bounds, dtype=torch.int32)
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _check(batch: Mapping[str, Tensor]) -> None:
    if unknown := sorted(set(batch) - set(KEYS)):
        raise ValueError(
            f"batch has {unknown}, which shard_batch does not know; give {list(KEYS)} (packed "
            "documents as cu_seqlens; padding by labels of -100 at the end, not by a mask)"
        )
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"batch[{key!r}] is a {type(value).__name__}: give a tensor")
    tokens = batch.get("input_ids")
    if tokens is None or tokens.dim() != 2 or tokens.numel() == 0:
        shape = None if tokens is None else tuple(tokens.shape)
        raise ValueError(
            f"batch['input_ids'] has shape {shape}; give int64 [B, T] with B and T >= 1"
        )
    labels = batch.get("labels")
    if labels is not None and labels.shape != tokens.shape:
        raise ValueError(
            f"batch['labels'] has shape {tuple(labels.shape)}, input_ids {tuple(tokens.shape)}: "
            "give one label per token, -100 where nothing is to be learnt"
        )
    for key, value in batch.items():
        if not is_integer(value):
            raise ValueError(f"batch[{key!r}] is of {value.dtype}: give int64 or int32")


def _check_boundaries(cu_seqlens: Tensor, tokens: Tensor) -> None:
    rows, length = tokens.shape
    require_one_packed_row(tokens.reshape(1, -1), cu_seqlens)
    if missing := set(range(0, rows * length + 1, length)) - set(cu_seqlens.tolist()):
        raise ValueError(
            f"cu_seqlens has no boundary at {min(missing)}, the end of a row of {length} tokens: "
            f"a document cannot go on in the next row; it counts over all {rows} rows end to end"
        )


__all__ = ["shard_batch"]
