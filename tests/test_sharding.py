"""Cutting a batch: laid side by side again, the ranks' parts are the whole, shifted once."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hybridsp.sharding import shard_batch

CPU = torch.device("cpu")
IGNORED = -100
TOKENS = ("input_ids", "shift_labels", "position_ids")


def shards(batch, sp):
    """All ranks' parts; of a mesh, cutting needs no more than the rank's number."""
    before = {name: x.clone() for name, x in batch.items()}
    parts = [
        shard_batch(batch, SimpleNamespace(sp=sp, sp_rank=rank, device=CPU)) for rank in range(sp)
    ]
    for name, x in before.items():
        assert torch.equal(batch[name], x), f"{name} of the caller was changed"
    for part in parts:
        for name in TOKENS:
            assert part[name].shape == parts[0][name].shape
            assert part[name].is_contiguous()
            assert part[name].dtype == torch.int64
    return parts


def whole(parts):
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in TOKENS}


def batch_of(rows, length, **more):
    tokens = torch.arange(1, rows * length + 1).view(rows, length)
    return {"input_ids": tokens, **more}


@pytest.mark.parametrize("sp", [1, 2, 4, 8])
def test_unpacked_rows(sp):
    parts = shards(batch_of(2, 8), sp)
    assert all(set(part) == set(TOKENS) for part in parts)
    got = whole(parts)
    assert got["input_ids"].tolist() == [[*range(1, 9)], [*range(9, 17)]]
    # A rank's last token learns the next rank's first.
    assert got["shift_labels"].tolist() == [[*range(2, 9), IGNORED], [*range(10, 17), IGNORED]]
    assert got["position_ids"].tolist() == [[*range(8)]] * 2


@pytest.mark.parametrize("sp", [1, 2, 4, 8])
def test_labels_are_shifted_before_the_cut(sp):
    labels = 100 + torch.arange(8)[None]
    labels[0, [0, 2, 4]] = IGNORED  # the first is nobody's successor
    got = whole(shards(batch_of(1, 8, labels=labels), sp))
    expected = [101, IGNORED, 103, IGNORED, 105, 106, 107, IGNORED]
    assert got["shift_labels"].tolist() == [expected]


@pytest.mark.parametrize("sp", [2, 3, 4, 5, 7])
def test_padding_counts_nowhere(sp):
    parts = shards(batch_of(2, 7), sp)
    got, pad = whole(parts), -7 % sp
    assert got["input_ids"].shape == (2, 7 + pad)
    assert got["input_ids"][:, :7].tolist() == [[*range(1, 8)], [*range(8, 15)]]
    assert got["shift_labels"][0].tolist() == [2, 3, 4, 5, 6, 7, IGNORED, *[IGNORED] * pad]
    assert got["position_ids"][:, :7].tolist() == [[*range(7)]] * 2
    assert got["position_ids"].min() >= 0


def test_fewer_tokens_than_ranks():
    got = whole(shards(batch_of(1, 1), 4))
    assert got["shift_labels"].tolist() == [[IGNORED] * 4]
    assert got["input_ids"][0, 0] == 1


def packed(bounds, rows=1, total=12, **more):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return batch_of(rows, total // rows, cu_seqlens=cu_seqlens, **more)


DOCUMENTS = {
    "one": [0, 12],
    "cut by rank edges": [0, 5, 12],
    "aligned with rank edges": [0, 3, 6, 9, 12],
    "single tokens": [0, 1, 2, 11, 12],
    "empty": [0, 0, 4, 4, 4, 12, 12],
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sp", [1, 2, 4, 5, 8, 12])
def test_packed_documents(sp, documents):
    bounds = DOCUMENTS[documents]
    parts = shards(packed(bounds), sp)
    got, pad = whole(parts), -12 % sp
    labels, positions = [], []
    for start, stop in pairwise(bounds):
        tokens = range(start + 1, stop + 1)
        labels += [*tokens[1:], IGNORED][: len(tokens)]
        positions += range(stop - start)
    assert got["input_ids"][0, :12].tolist() == [*range(1, 13)]
    assert got["shift_labels"].tolist() == [[*labels, *[IGNORED] * pad]]
    # Padding is a document of its own.
    assert got["position_ids"].tolist() == [[*positions, *range(pad)]]
    expected = [*bounds, 12 + pad] if pad else bounds
    longest = max(stop - start for start, stop in pairwise(expected))
    for part in parts:
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            assert part[name].tolist() == expected
            assert part[name].dtype == torch.int32
            assert part[name].device == CPU
        assert part["max_length_q"] == part["max_length_k"] == longest


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_rows_of_packed_documents_are_laid_end_to_end(sp):
    labels = 100 + torch.arange(12).view(3, 4)
    labels[1, 2] = IGNORED
    got = whole(shards(packed([0, 4, 5, 8, 12], rows=3, labels=labels), sp))
    assert got["input_ids"].tolist() == [[*range(1, 13)]]
    first = [101, 102, 103, IGNORED]
    second = [IGNORED, IGNORED, 107, IGNORED]
    assert got["shift_labels"].tolist() == [[*first, *second, 109, 110, 111, IGNORED]]
    assert got["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3]]


MISTAKES = {
    r"batch has \['attention_mask'\]": batch_of(1, 8, attention_mask=torch.ones(1, 8)),
    r"batch has \['shift_labels'\]": batch_of(1, 8, shift_labels=torch.ones(1, 8)),
    r"batch\['input_ids'\] has shape None": {"labels": torch.ones(1, 8)},
    r"batch\['input_ids'\] has shape \(8,\)": {"input_ids": torch.ones(8)},
    r"batch\['input_ids'\] has shape \(2, 0\)": {"input_ids": torch.ones(2, 0)},
    r"batch\['labels'\] has shape \(1, 7\), input_ids \(1, 8\)": batch_of(
        1, 8, labels=torch.ones(1, 7)
    ),
    r"must rise from 0 to the sequence's 12 tokens": packed([0, 11]),
    r"cu_seqlens = \[1, 12\] must rise from 0": packed([1, 12]),
    r"cu_seqlens = \[0, 7, 5, 12\] must rise": packed([0, 7, 5, 12]),
    r"cu_seqlens = \[0, 13\] must rise": packed([0, 13]),
    r"cu_seqlens = \[0\] must rise": packed([0]),
    r"cu_seqlens has no boundary at 4, the end of a row": packed([0, 5, 8, 12], rows=3),
}


@pytest.mark.parametrize("match", MISTAKES)
def test_mistakes_are_named(match):
    with pytest.raises(ValueError, match=match):
        shards(MISTAKES[match], 2)
