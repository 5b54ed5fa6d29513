"""From what Hugging Face collators make to the parts that the ranks of a sequence hold.

A collator says where documents start in one of several ways: boundaries (`cu_seq_lens_q`),
positions that start again at 0, or a number per document (`seq_idx`). And it pads rows at the end
under an `attention_mask`. A causal model never looks at what comes later, so padding at the end
changes nothing for the tokens before it and the mask can go; padding elsewhere cannot be had.

The ranks of one sequence each load the whole batch and keep their part of it. That a dataset or a
collator that draws random numbers gave them different batches would not be seen in the loss, so
their checksums are compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.loss import count_labels
from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL
from hybridsp.sharding import shard_batch
from hybridsp.untrusted import shown

BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
# Follow from the boundaries.
DERIVED = ("max_length_q", "max_length_k")
PER_TOKEN = ("position_ids", "seq_idx")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """This rank's parts of some batches, and what the whole batches hold over all ranks.

    Attributes:
        parts: keyword arguments of a parallelized model, one entry per batch.
        num_labels: labels that count.
        num_tokens: tokens, padding included.
        num_real_tokens: tokens, padding left out.
    """

    parts: list[dict[str, Any]]
    num_labels: int
    num_tokens: int
    num_real_tokens: int


def shard_batches(batches: Iterable[Mapping[str, Any]], mesh: SPMesh) -> Parts:
    """Cut collated batches over the ranks of each sequence. Collective over all ranks.

    Args:
        batches: the same on all ranks of an SP group, as `whole_batch` takes them; they may be yet
            to be loaded and collated, which is done here.
        mesh: the grid of ranks.

    Raises:
        ValueError: a batch cannot be loaded or cut on some rank, or the ranks of an SP group have
            different ones; on every rank.
    """
    loaded, wholes, parts, failure = _attempt(batches, mesh)
    sums = torch.tensor([_checksum(wholes)], dtype=torch.int64, device=mesh.device)
    extremes = torch.cat([sums, -sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.sp_group)
    counts = torch.zeros(5, dtype=torch.int64, device=mesh.device)
    counts[0] = failure is not None
    counts[1] = extremes[0] + extremes[1] != 0
    counts[2] = sum(int(count_labels(part["shift_labels"])) for part in parts)
    if mesh.sp_rank == 0 and failure is None:
        counts[3] = sum(whole["input_ids"].numel() for whole in wholes)
        counts[4] = sum(_num_real_tokens(batch) for batch in loaded)
    dist.all_reduce(counts, group=mesh.data_group)
    failed, differing, num_labels, num_tokens, num_real_tokens = counts.tolist()
    if failed:
        mesh.agree(failure)
    if differing:
        raise ValueError(
            "the ranks that share a sequence got different batches: a dataset, collator or "
            "sampler must give the same samples to every rank, so it may draw random numbers only "
            "from a seed that all ranks share (such as the sample's index)"
        )
    return Parts(
        parts=parts,
        num_labels=num_labels,
        num_tokens=num_tokens,
        num_real_tokens=num_real_tokens,
    )


def _attempt(
    batches: Iterable[Mapping[str, Any]], mesh: SPMesh
) -> tuple[
    list[Mapping[str, Any]], list[dict[str, Tensor]], list[dict[str, Any]], Exception | None
]:
    """Batches, as they were and as a whole, and this rank's parts; or why there are none."""
    try:
        loaded = list(batches)
        wholes = [whole_batch(batch) for batch in loaded]
        return loaded, wholes, [shard_batch(whole, mesh) for whole in wholes], None
    except Exception as error:  # noqa: BLE001 - none is lost: every rank raises it
        return [], [], [], error


def whole_batch(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A collator's batch as `hybridsp.shard_batch` takes it.

    Args:
        batch: input_ids and labels, int64 [B, T]; and any of attention_mask [B, T] (padding at the
            end only), position_ids [B, T] (from 0 in each document), seq_idx [B, T], and
            cu_seqlens, cu_seq_lens_q, cu_seq_lens_k [documents + 1]. All that are given must tell
            of the same documents.

    Returns:
        input_ids and labels, with cu_seqlens if a row holds more than one document, and whatever
        else the batch holds, which `shard_batch` refuses.

    Raises:
        ValueError: there are no labels or not one per token, no tokens, a key's value is of another
            kind or shape, padding is not at the end or has labels, a document's positions do not
            start at 0, or two keys tell of different documents.
    """
    rest = {key: value for key, value in batch.items() if value is not None and key not in DERIVED}
    tokens, labels = rest.get("input_ids"), rest.get("labels")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not isinstance(labels, Tensor):
        raise ValueError(
            f"the batch has {sorted(batch)}: a causal language model is trained on input_ids and "
            "labels, both [B, T]; use a collator that makes labels, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) or DataCollatorWithFlattening"
        )
    if labels.shape != tokens.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, input_ids {tuple(tokens.shape)}: give one "
            f"label per token, {IGNORED_LABEL} where nothing is to be learnt"
        )
    if tokens.shape[1] == 0:
        raise ValueError("input_ids have no tokens: leave empty rows out of the data")
    _check_kinds(rest, tokens)
    real = _real_tokens(rest.pop("attention_mask", None), tokens, labels)
    told = {key: rest.pop(key).flatten().tolist() for key in BOUNDARIES if key in rest}
    if "position_ids" in rest:
        told["position_ids"] = _from_positions(rest.pop("position_ids"), tokens, real)
    if "seq_idx" in rest:
        told["seq_idx"] = _from_document_numbers(rest.pop("seq_idx"), tokens)
    if len({tuple(bounds) for bounds in told.values()}) > 1:
        raise ValueError(
            f"{' and '.join(told)} tell of different documents: leave out those that are wrong, "
            "one of them is enough"
        )
    bounds: list[int] = next(iter(told.values()), [])
    rows, length = tokens.shape
    if bounds and bounds != list(range(0, rows * length + 1, length)):
        rest["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    return rest


def _check_kinds(rest: Mapping[str, Any], tokens: Tensor) -> None:
    """Refuse what can tell nothing of these tokens, whatever it says."""
    for key in ("attention_mask", *BOUNDARIES, *PER_TOKEN):
        value = rest.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_complex():
            found = value.dtype if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"{key} is {found}: give a tensor of integers, or leave it out")
        ends = zip(reversed(value.shape), reversed(tokens.shape), strict=False)
        if key in PER_TOKEN and (value.dim() > 2 or any(n not in (1, of) for n, of in ends)):
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, input_ids {tuple(tokens.shape)}: give one "
                "value per token, or leave it out"
            )


def _real_tokens(mask: Tensor | None, tokens: Tensor, labels: Tensor) -> Tensor:
    """Bool [B, T]: True where there is a token, False where there is padding."""
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} for input_ids {tuple(tokens.shape)}, or "
            "values other than 0 and 1: only a mask of padding can be honoured; tell of documents "
            "by position_ids or cu_seq_lens_q"
        )
    real = mask.bool()
    if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(
            "attention_mask hides tokens before others that it shows: only padding at the end can "
            'be honoured; set tokenizer.padding_side = "right"'
        )
    if (labels[~real] != IGNORED_LABEL).any():
        raise ValueError(
            f"labels count where attention_mask says padding: set them to {IGNORED_LABEL} there, "
            "as DataCollatorForLanguageModeling and DataCollatorForSeq2Seq do"
        )
    return real


def _from_positions(positions: Tensor, tokens: Tensor, real: Tensor) -> list[int]:
    """Boundaries of documents, from positions that start again; padding is a document too."""
    positions = positions.expand_as(tokens)
    starts = torch.ones_like(real)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts &= real
    if (positions[starts] != 0).any():
        first = int(positions[starts][positions[starts] != 0][0])
        raise ValueError(
            f"position_ids start a document at {first}: they must count from 0 in each document, "
            "each token one more than the one before"
        )
    if starts[:, 1:].any():
        starts[:, 1:] |= real[:, :-1] & ~real[:, 1:]
    return _boundaries(starts)


def _from_document_numbers(numbers: Tensor, tokens: Tensor) -> list[int]:
    starts = torch.ones_like(tokens, dtype=torch.bool)
    numbers = numbers.expand_as(tokens)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return _boundaries(starts)


def _boundaries(starts: Tensor) -> list[int]:
    return [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]


def _num_real_tokens(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def _checksum(wholes: Sequence[Mapping[str, Tensor]]) -> int:
    """Of shapes and contents."""
    checksum = 0
    for whole in wholes:
        for key in sorted(whole):
            tensor = whole[key].cpu().contiguous()
            checksum = zlib.crc32(repr((key, tensor.shape, tensor.dtype)).encode(), checksum)
            checksum = zlib.crc32(tensor.numpy().data, checksum)
    return checksum


__all__ = ["Parts", "shard_batches", "whole_batch"]
