"""Batches of Hugging Face collators, as they are cut."""

import pytest
import torch
from trainer_cases import COLLATORS, Documents, pad_right
from transformers import DataCollatorWithFlattening

from hybridsp.trainer.batches import whole_batch

SAMPLES = [Documents()[index] for index in (0, 2, 6)]  # of 9, 5 and 3 tokens
IDS = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
        DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
        COLLATORS["flattened"],
    ],
    ids=["positions", "numbers", "boundaries", "all of them"],
)
def test_documents_are_found_however_they_are_told(collator):
    whole = whole_batch(collator(SAMPLES))
    assert whole["cu_seqlens"].tolist() == [0, 9, 14, 17]
    assert set(whole) == {"input_ids", "labels", "cu_seqlens"}


def test_a_row_of_one_document_needs_no_boundaries():
    positions = torch.arange(8)[None].expand(2, 8)
    tokens = IDS["input_ids"].expand(2, 8)
    whole = whole_batch({"input_ids": tokens, "labels": tokens, "position_ids": positions})
    assert set(whole) == {"input_ids", "labels"}


def test_padding_at_the_end_is_left_to_the_labels():
    batch = pad_right(SAMPLES)
    whole = whole_batch(batch)
    assert set(whole) == {"input_ids", "labels"}
    assert whole["input_ids"].shape == (3, 9)
    # Positions that go on, or stay, in the padding tell of nothing.
    for positions in (torch.arange(9).expand(3, 9), batch["attention_mask"].cumsum(1) - 1):
        assert whole_batch({**batch, "position_ids": positions}).keys() == whole.keys()


def test_padding_behind_documents_is_a_document():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])
    labels = IDS["labels"].clone()
    labels[0, 6:] = -100
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    whole = whole_batch(
        {**IDS, "labels": labels, "position_ids": positions, "attention_mask": mask}
    )
    assert whole["cu_seqlens"].tolist() == [0, 3, 6, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "DataCollatorWithFlattening"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}, "padding_side"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])}, "padding_side"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])}, "other than 0 and 1"),
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, r"has shape \(1, 1, 8, 8\)"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])}, "labels count where"),
        ({"labels": torch.ones(1, 1), "attention_mask": torch.ones(1, 8)}, "one label per token"),
        ({"position_ids": torch.arange(1, 9)[None]}, "start a document at 1"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 8]), "seq_idx": torch.zeros(1, 8)},
            "cu_seqlens and seq_idx tell of different documents",
        ),
        ({"attention_mask": [1, 1]}, r"attention_mask is \[1, 1\]: give a tensor"),
        ({"cu_seqlens": [0, 8]}, r"cu_seqlens is \[0, 8\]: give a tensor"),
        ({"position_ids": torch.zeros(1, 8, dtype=torch.complex64)}, "is torch.complex64: give"),
        ({"position_ids": torch.arange(9)[None]}, r"position_ids has shape \(1, 9\), input_ids"),
        ({"seq_idx": torch.zeros(3)}, r"seq_idx has shape \(3,\), input_ids \(1, 8\)"),
        ({"input_ids": torch.ones(1, 0), "labels": torch.ones(1, 0)}, "have no tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        whole_batch({**IDS, **change})
