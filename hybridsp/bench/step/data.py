"""The tokens that a step reads: random ones, or those of a text; and the documents they are.

What softmax attention costs depends on where documents begin: a sequence of short ones has few
pairs of tokens to look at, one document of a million has half a million million. So a sequence says
how it is cut, and the planner and the count of operations go by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hybridsp.data import load_documents, pack_documents
from hybridsp.planner.kernels import pairs_of
from hybridsp.prepare import load_tokenizer

# All tokens are one document; or the documents are the text's own.
ONE, OWN = "one", "own"


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The tokens of a step.

    Attributes:
        tokens: int64 [1, T].
        lengths: of the documents packed in it; None for one document.
    """

    tokens: Tensor
    lengths: tuple[int, ...] | None

    @property
    def pairs(self) -> float | None:
        """The part of one document's pairs that there are; None for one document."""
        return None if self.lengths is None else pairs_of(list(self.lengths))

    @property
    def batch(self) -> dict[str, Tensor]:
        """What `hybridsp.shard_batch` takes: every token but the first of a document is learnt."""
        batch = {"input_ids": self.tokens, "labels": self.tokens}
        if self.lengths is not None:
            bounds = [0, *accumulate(self.lengths)]
            batch["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        return batch

    def first(self, tokens: int) -> Sequence:
        """Its first tokens."""
        if self.lengths is None:
            return Sequence(tokens=self.tokens[:, :tokens], lengths=None)
        ends = [min(end, tokens) for end in accumulate(self.lengths)]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return Sequence(tokens=self.tokens[:, :tokens], lengths=tuple(n for n in lengths if n))


def random_sequence(vocabulary: int, length: int, *, documents: str | int, seed: int) -> Sequence:
    """Random tokens below `vocabulary`; `documents` is ONE, or tokens per document."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    return Sequence(tokens=tokens, lengths=_even_lengths(length, documents))


def text_sequence(text: str, folder: str, length: int, *, documents: str | int) -> Sequence:
    """The first tokens of a text.

    Args:
        text: documents as `hybridsp.data.load_documents` takes them.
        folder: a checkpoint; its tokenizer is used.
        length: T.
        documents: OWN, ONE (the documents, each closed by its end-of-sequence token, are read as
            one), or tokens per document.

    Raises:
        ValueError: text or tokenizer cannot be read, or the text has fewer tokens.
    """
    try:
        samples = pack_documents(load_documents(text), load_tokenizer(folder), length)
    except ValueError as error:
        raise ValueError(f"--text {text}: {error}") from error
    row = samples.with_format("torch")[0]
    own = tuple(row["document_lengths"].tolist())
    lengths = own if documents == OWN else _even_lengths(length, documents)
    return Sequence(tokens=row["input_ids"].long()[None], lengths=lengths)


def _even_lengths(length: int, documents: str | int) -> tuple[int, ...] | None:
    if not isinstance(documents, int):
        return None
    whole, rest = divmod(length, documents)
    return (documents,) * whole + (rest,) * bool(rest)


__all__ = ["ONE", "OWN", "Sequence", "random_sequence", "text_sequence"]
