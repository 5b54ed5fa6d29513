"""Held-out documents as tokens: packed rows, and windows that lie in one document.

Two questions need two cuts. The mean loss is asked of *all* documents, packed as in training. What
a token's position does to its loss is asked of windows that lie in one document from end to end:
then every position is measured in the same documents, and a difference between positions is not one
between long documents and short ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridsp.data import load_documents

DOCUMENTS_PER_CALL = 16


@dataclass(frozen=True)
class Packed:
    """Documents laid end to end and cut into rows.

    Attributes:
        tokens: int64 [n, T].
        boundaries: of each row, where its documents begin, and T.
    """

    tokens: Tensor
    boundaries: list[list[int]]

    def batch(self, rows: slice) -> dict[str, Tensor]:
        """Some rows as `shard_batch` takes them."""
        tokens = self.tokens[rows]
        length = tokens.shape[1]
        bounds = [
            row * length + start
            for row, starts in enumerate(self.boundaries[rows])
            for start in starts[:-1]
        ]
        cu_seqlens = torch.tensor([*bounds, tokens.numel()], dtype=torch.int32)
        return {"input_ids": tokens, "cu_seqlens": cu_seqlens}


@dataclass(frozen=True)
class Windows:
    """Stretches of documents, each inside one.

    Attributes:
        tokens: int64 [n, T].
        documents: int64 [n], which document each is of.
    """

    tokens: Tensor
    documents: Tensor


@dataclass(frozen=True)
class HeldOut:
    """Documents as token ids, int64 [tokens] each."""

    documents: list[Tensor]

    def packed(self, length: int, most_tokens: int | None = None) -> Packed:
        """All documents in rows of `length` tokens; what remains after the last full row is left.

        Args:
            length: tokens of a row.
            most_tokens: keep so many, in rows spread evenly over all; None for all.

        Raises:
            ValueError: the documents together are shorter than one row.
        """
        stream = torch.cat(self.documents)
        count = len(stream) // length
        if count == 0:
            raise ValueError(
                f"length = {length}, but the text has {len(stream)} tokens in all: give more text "
                "or a shorter --length"
            )
        rows = _spread(count, length, most_tokens)
        starts = np.array([0, *accumulate(map(len, self.documents))][:-1])
        boundaries = []
        for row in rows.tolist():
            inside = starts[(starts > row * length) & (starts < (row + 1) * length)] - row * length
            boundaries.append([0, *inside.tolist(), length])
        return Packed(stream[: count * length].view(count, length)[rows], boundaries)

    def windows(self, length: int, most_tokens: int | None = None) -> Windows:
        """Windows of `length` tokens, side by side from each document's start.

        Args:
            length: tokens of a window.
            most_tokens: keep so many, in windows spread evenly over all; None for all.

        Raises:
            ValueError: no document is so long.
        """
        cut = [document[: len(document) // length * length] for document in self.documents]
        tokens = torch.cat([document.view(-1, length) for document in cut])
        owners = [torch.full((len(part) // length,), i) for i, part in enumerate(cut)]
        if not len(tokens):
            longest = max(map(len, self.documents))
            raise ValueError(
                f"length = {length}, but the longest document has {longest} tokens: a window has "
                "to lie in one document; give longer documents or a shorter --length"
            )
        kept = _spread(len(tokens), length, most_tokens)
        return Windows(tokens[kept], torch.cat(owners)[kept])

    def stream(self, start: int, length: int) -> Tensor:
        """`length` tokens of all documents laid in a circle, from token `start` on; int64."""
        everything = torch.cat(self.documents)
        return everything[(start + torch.arange(length)) % len(everything)]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))


def load_held_out(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Documents of a file or folder as tokens, with the special tokens that the tokenizer adds.

    Raises:
        ValueError: the source cannot be read or holds no text.
    """
    texts = [text for text in load_documents(source)["text"] if text]
    documents = []
    for first in range(0, len(texts), DOCUMENTS_PER_CALL):
        some = texts[first : first + DOCUMENTS_PER_CALL]
        encoded = tokenizer(some, return_attention_mask=False, verbose=False)["input_ids"]
        documents += [torch.tensor(ids) for ids in encoded if ids]
    if not documents:
        raise ValueError(f"text = {str(source)!r} holds no document with text: give another file")
    return HeldOut(documents)


def _spread(count: int, length: int, most_tokens: int | None) -> Tensor:
    """Indices of rows to keep, spread evenly over `count`; at least one."""
    kept = count if most_tokens is None else min(count, max(1, most_tokens // length))
    return torch.arange(kept) * count // kept


__all__ = ["HeldOut", "Packed", "Windows", "load_held_out"]
