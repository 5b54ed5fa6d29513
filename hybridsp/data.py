"""From documents on disk to the packed batches of each data-parallel rank.

Long-context training wants rows of exactly ``T`` tokens, and documents have every length. So they
are *packed*: tokenised whole, each closed by the end-of-sequence token, laid end to end and cut
every ``T`` tokens. A sample remembers the lengths of the documents in it; from them come the
``cu_seqlens`` that keep attention and recurrent states from crossing a document start. Training
then reads the samples in an order that depends only on the seed and the epoch, so that a run can
stop at any step and go on with another number of ranks:

    documents = load_documents("corpus/**/*.py")
    samples = pack_documents(documents, tokenizer, seq_length=131072)
    loader = PackedLoader(samples, dp_rank=mesh.dp_rank, dp=mesh.dp, micro_batch_size=1, seed=0)
    batch = hybridsp.shard_batch(next(loader), mesh)

The ranks of one sequence-parallel group share a ``dp_rank``, hence receive the same rows.
"""

import hashlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from hybridsp.documents import load_documents
from hybridsp.untrusted import shown

logger = logging.getLogger(__name__)

TOKENS = List(Value("int32"))
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")

# A row may hold a million tokens: keep far fewer in memory than the libraries' default of 1000.
DOCUMENTS_PER_BATCH = 16
TOKENS_PER_WRITE = 2**20

FINGERPRINTED_SAMPLES = 64


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    *,
    add_eos: bool = True,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> Dataset:
    """Tokenise documents and lay them end to end in samples of exactly ``seq_length`` tokens.

    A document that crosses the end of a sample is cut there; its remainder opens the next sample
    as a document of its own. Tokens after the last full sample are dropped, and how many is
    logged. Documents without text are skipped.

    The result depends on the documents, the tokenizer, ``seq_length`` and ``add_eos`` alone: only
    the tokenisation, one row per document, runs in batches and processes; one pass in document
    order then cuts the samples. Both are cached under a key made of these four, behind a lock: of
    the ranks that share a cache directory the first one packs, the others read its files.

    Args:
        documents: a dataset with a ``"text"`` column (``load_documents``).
        tokenizer: the model's tokenizer; it adds its usual special tokens to each document.
        seq_length: tokens per sample, ``T``.
        add_eos: close each document with ``tokenizer.eos_token_id``.
        num_proc: processes for the tokenisation.
        vocab_size: tokens that the model has embeddings for; None leaves unchecked whether the
            tokenizer knows more. (A token without embedding ends a GPU's program in mid-run.)

    Returns:
        A memory-mapped dataset of ``{"input_ids": int32 [T], "document_lengths": int32 [n]}``
        with ``sum(document_lengths) == T``.

    Raises:
        ValueError: there is no ``"text"`` column, ``seq_length < 1``, the tokenizer lacks the
            end-of-sequence token, the corpus is shorter than one sample, or has tokens that the
            model has no embedding for.
    """
    if "text" not in documents.column_names:
        raise ValueError(f"documents have {documents.column_names}, but need a 'text' column")
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length} must be at least 1")
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token_id to close documents with; "
            "set tokenizer.eos_token, or pass add_eos=False"
        )
    eos_token_id = tokenizer.eos_token_id if add_eos else None
    tokens_key = _cache_key(documents, tokenizer, eos_token_id)
    samples_key = f"{tokens_key}-{seq_length}"
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"pack_documents-{samples_key}.lock"):
        tokens = documents.map(
            _tokenize,
            fn_kwargs={"tokenizer": tokenizer, "eos_token_id": eos_token_id},
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            writer_batch_size=DOCUMENTS_PER_BATCH,
            remove_columns=documents.column_names,
            features=Features({"input_ids": TOKENS}),
            num_proc=num_proc,
            new_fingerprint=tokens_key,
            desc="tokenising",
        )
        available = int(_row_lengths(tokens, "input_ids").sum())
        if available < seq_length:
            raise ValueError(
                f"the corpus has {available} tokens in {len(documents)} documents, but one sample "
                f"needs seq_length={seq_length}; add documents or shorten the sequence"
            )
        samples = Dataset.from_generator(
            _cut_samples,
            gen_kwargs={"documents": tokens, "seq_length": seq_length},
            features=Features({"input_ids": TOKENS, "document_lengths": TOKENS}),
            writer_batch_size=max(1, min(1000, TOKENS_PER_WRITE // seq_length)),
            fingerprint=samples_key,
        )
    if vocab_size is not None:
        _check_tokens(samples, tokenizer, vocab_size)
    logger.info(
        f"packed {len(documents)} documents into {len(samples)} samples of {seq_length} tokens; "
        f"dropped the last {available % seq_length} of {available} tokens"
    )
    return samples


def _check_tokens(samples: Dataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for, which few tokenizers could make at all."""
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return
    highest = _extreme(samples, "input_ids", "max")
    if highest >= vocab_size:
        raise ValueError(
            f"the documents hold token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), "
            f"but the model's vocabulary ends at {vocab_size - 1}: tokenizer and model do not "
            "belong together, or the model's embeddings have to be resized first"
        )


def _extreme(dataset: Dataset, column: str, which: str) -> int:
    """The least ("min") or highest ("max") number in the lists of a column."""
    batches = dataset.select_columns(column).with_format("arrow").iter(batch_size=1000)
    found = [pc.min_max(pc.list_flatten(batch[column]))[which].as_py() for batch in batches]
    return {"min": min, "max": max}[which](one for one in found if one is not None)


def _cache_key(documents: Dataset, tokenizer: PreTrainedTokenizerBase, eos: int | None) -> str:
    """Digest of all that decides the tokens and where they are cut, the code included."""
    # A fast tokenizer's serialised form: the object itself also holds state that calls change.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer if backend is None else backend.to_str()
    code = [inspect.getsource(function) for function in (_tokenize, _cut_samples)]
    return Hasher.hash([documents._fingerprint, vocabulary, eos, code])


def _tokenize(
    batch: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase, eos_token_id: int | None
) -> dict[str, list[np.ndarray]]:
    """Token ids of each document that has text, closed by ``eos_token_id`` if it is not yet."""
    texts = [text for text in batch["text"] if text]
    # The tokenizer takes no empty list, and without `verbose` warns of each long document.
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False) if texts else {}
    documents = encoded.get("input_ids", [])
    for ids in documents:
        if eos_token_id is not None and ids[-1:] != [eos_token_id]:
            ids.append(eos_token_id)
    return {"input_ids": [np.asarray(ids, dtype=np.int32) for ids in documents]}


def _cut_samples(documents: Dataset, seq_length: int) -> Iterator[dict[str, Any]]:
    """Lay tokenised documents end to end and yield every full sample."""
    pieces: list[np.ndarray] = []
    room = seq_length
    for document in documents.with_format("numpy"):
        rest = document["input_ids"]
        while rest.size:
            piece, rest = rest[:room], rest[room:]
            pieces.append(piece)
            room -= piece.size
            if room == 0:
                lengths = [piece.size for piece in pieces]
                yield {"input_ids": np.concatenate(pieces), "document_lengths": lengths}
                pieces, room = [], seq_length


def _row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The length of each list of ``column``; reads Arrow's offsets, not the values."""
    batches = dataset.select_columns(column).with_format("arrow").iter(batch_size=1000)
    lengths = [pc.list_value_length(batch[column]).to_numpy() for batch in batches]
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)


class PackedLoader:
    """An endless, resumable iterator over the packed rows of one data-parallel rank.

    Each epoch is a permutation of the samples that depends on ``(seed, epoch)`` alone. A step
    takes the next ``dp * micro_batch_size`` samples of it and rank ``dp_rank`` its share, in
    order, so ranks are disjoint and a run resumed with another ``dp`` reads on where it stopped.
    What is left of an epoch when a whole step no longer fits is skipped.

    Each item is one micro-batch of ``B = micro_batch_size`` rows of ``T`` tokens:
        input_ids   int64 [B, T]
        labels      int64 [B, T], not shifted; the samples' own ``labels`` (-100: no loss) if they
                    have that column, else a copy of ``input_ids``
        cu_seqlens  int32 [n + 1], document boundaries in the flattened ``B * T`` tokens; a row
                    always starts a document

    Args:
        dataset: samples with ``input_ids`` and ``document_lengths`` (``pack_documents``), and
            optionally ``labels``.
        dp_rank, dp: this rank among the data-parallel ranks.
        micro_batch_size: rows per rank and micro-batch, ``B``.
        seed: of the permutation, in ``[0, 2**32)``.
        shuffle: False reads every epoch in the dataset's order.

    Raises:
        ValueError: an argument is out of range; samples are malformed or too few for one step.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        dp_rank: int,
        dp: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        if dp < 1 or not 0 <= dp_rank < dp:
            raise ValueError(f"dp_rank={dp_rank} must be in [0, dp), with dp={dp} at least 1")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must be in [0, 2**32)")
        if len(dataset) < dp * micro_batch_size:
            raise ValueError(
                f"the dataset has {len(dataset)} samples, but a step over dp={dp} ranks of "
                f"micro_batch_size={micro_batch_size} needs {dp * micro_batch_size}; "
                "add documents or shorten the sequence"
            )
        self.dataset = _checked_samples(dataset).with_format("torch")
        self.dp_rank = dp_rank
        self.dp = dp
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = _content_fingerprint(self.dataset)
        self.epoch = self.position = 0
        self._order = self._epoch_order()

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches that each rank receives in one pass over the samples."""
        return len(self.dataset) // (self.dp * self.micro_batch_size)

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        step = self.dp * self.micro_batch_size
        if self.position + step > len(self.dataset):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        first = self.position + self.dp_rank * self.micro_batch_size
        rows = [self.dataset[int(i)] for i in self._order[first : first + self.micro_batch_size]]
        self.position += step
        input_ids = torch.stack([row["input_ids"] for row in rows])
        labels = torch.stack([row["labels"] for row in rows]) if "labels" in rows[0] else input_ids
        ends = torch.cat([row["document_lengths"] for row in rows]).cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return {"input_ids": input_ids, "labels": labels.clone(), "cu_seqlens": cu_seqlens}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on all ranks: ``position`` samples of ``epoch`` are consumed."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch before ``state``, at any ``dp`` and ``micro_batch_size``.

        Raises:
            ValueError: the state is incomplete, or of another dataset, seed or order.
        """
        identity = self._identity()
        if not isinstance(state, dict):
            raise ValueError(f"the data state is {shown(state)}, not what state_dict returns")
        if missing := {"epoch", "position", *identity} - state.keys():
            raise ValueError(f"the data state lacks {sorted(missing)}")
        for name, here in identity.items():
            if state[name] != here:
                raise ValueError(
                    f"the data state has {name}={shown(state[name])}, but this run has {here!r}; "
                    "resume with the same data, seq_length, seed and order, or start a new one"
                )
        for name, end in (("epoch", 2**32), ("position", len(self.dataset) + 1)):
            if type(state[name]) is not int or not 0 <= state[name] < end:
                raise ValueError(
                    f"the data state has {name}={shown(state[name])}, which must be a whole number "
                    f"from 0 to {end - 1}: start a new data state"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._epoch_order()

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same sample."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_samples": len(self.dataset),
            "fingerprint": self.fingerprint,
        }

    def _epoch_order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        # RandomState's stream is frozen; numpy's newer Generator may change between versions.
        return np.random.RandomState([self.seed, self.epoch]).permutation(len(self.dataset))


def _checked_samples(dataset: Dataset) -> Dataset:
    """The columns to train on, if all samples have one length and their documents fill it."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}: give a datasets.Dataset")
    if missing := {"input_ids", "document_lengths"} - set(dataset.column_names):
        raise ValueError(
            f"packed samples need the columns {sorted(missing)}, but the dataset has "
            f"{dataset.column_names}; see pack_documents"
        )
    per_token = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    for name in (*per_token, "document_lengths"):
        _check_integers(dataset, name)
    tokens = {name: _row_lengths(dataset, name) for name in per_token}
    documents = dataset.select_columns("document_lengths").with_format("numpy")
    rows = [row["document_lengths"].astype(np.int64) for row in documents]
    tokens["document_lengths"] = np.array([lengths.sum() for lengths in rows])
    for number, lengths in enumerate(rows):
        if lengths.size and lengths.min() < 0:
            raise ValueError(f"document_lengths of sample {number} holds {lengths.min()}")
    seq_length = tokens["input_ids"][0]
    for name, counts in tokens.items():
        if (wrong := np.flatnonzero(counts != seq_length)).size:
            raise ValueError(
                f"{name} of sample {wrong[0]} covers {counts[wrong[0]]} tokens, but sample 0 has "
                f"{seq_length}; every sample needs the same number"
            )
    if seq_length == 0:
        raise ValueError("the samples hold no tokens: pack documents into at least 1 each")
    return dataset.select_columns([*per_token, "document_lengths"])


def _check_integers(dataset: Dataset, name: str) -> None:
    """Refuse a column that is not a list of whole numbers in every row."""
    kind = dataset.features[name]
    if not isinstance(kind, List) or getattr(kind.feature, "dtype", "") not in INTEGERS:
        raise ValueError(f"the column {name} holds {kind}: give lists of int32 or int64")
    column = dataset.data.column(name)
    if column.null_count or pc.list_flatten(column).null_count:
        raise ValueError(f"the column {name} has null values: drop those samples")


def _content_fingerprint(dataset: Dataset) -> str:
    """Digest of the sample count and of samples spread evenly over the dataset.

    Taken from the content, not from file names or cache keys, so that the same data on another
    machine is the same. A change in a document's length moves all tokens behind it and is seen.
    """
    digest = hashlib.sha256(f"{len(dataset)} {sorted(dataset.column_names)}".encode())
    spread = np.linspace(0, len(dataset) - 1, min(len(dataset), FINGERPRINTED_SAMPLES), dtype=int)
    rows = dataset.with_format("numpy")
    for row in (rows[int(index)] for index in spread):
        for name in sorted(row):
            digest.update(np.ascontiguousarray(row[name], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


__all__ = ["PackedLoader", "load_documents", "pack_documents"]
