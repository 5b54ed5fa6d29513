"""Documents, samples and data states at random: every token arrives once, or an error names it."""

import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from fuzzing import cases, damaged, damaged_bytes, outcome, refusal, scalars, wild
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hybridsp.data import PackedLoader, load_documents, pack_documents

WORDS = 50


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def write(name, content):
    for old in Path().glob("source*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    Path(name).write_bytes(content)
    os.utime(name)
    return name


rows_of_a_table = st.lists(
    st.dictionaries(st.sampled_from(["text", "t", "x"]), wild, max_size=2) | wild, max_size=4
)
GOOD_ROWS = "".join(json.dumps({"text": f"w{i} w{i + 1}"}) + "\n" for i in range(1, 5))


@cases(40)
@given(
    st.sampled_from(["source.jsonl", "source.json", "source.csv", "source.parquet", "source.txt"]),
    st.one_of(
        st.binary(max_size=60),
        damaged(GOOD_ROWS).map(lambda text: text.encode("utf-8", "surrogatepass")),
        rows_of_a_table.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
        rows_of_a_table.map(lambda rows: json.dumps(rows).encode()),
    ),
)
def test_a_file_of_documents_is_read_or_refused(name, content):
    documents, error = outcome(load_documents, write(name, content))
    if error is None:
        assert documents.column_names == ["text"]
        assert all(isinstance(text, str) for text in documents["text"])
    else:
        assert "source" in str(error)


@cases(30)
@given(st.data())
def test_a_saved_dataset_is_read_or_refused(data):
    shutil.rmtree("saved", ignore_errors=True)
    Dataset.from_dict({"text": ["w1 w2", "w3"]}).save_to_disk("saved")
    victim = data.draw(st.sampled_from(sorted(Path("saved").iterdir())))
    content = victim.read_bytes()
    if victim.suffix == ".json" and data.draw(st.booleans()):
        fields = json.loads(content)
        changed = data.draw(st.sampled_from(sorted(fields)))
        names = st.sampled_from([[{"filename": "../x.arrow"}], [{"filename": "/etc/passwd"}], [{}]])
        victim.write_text(json.dumps({**fields, changed: data.draw(wild | names)}))
    else:
        victim.write_bytes(data.draw(damaged_bytes(content)))
    documents, error = outcome(load_documents, "saved")
    assert error is not None or documents.column_names == ["text"]


def test_a_saved_dataset_reads_no_files_of_others(tmp_path):
    Dataset.from_dict({"text": ["secret"]}).save_to_disk("other")
    Dataset.from_dict({"text": ["w1"]}).save_to_disk("saved")
    state = json.loads(Path("saved/state.json").read_text())
    for name in ("../other/data-00000-of-00001.arrow", str(tmp_path / "other/data.arrow"), 3, None):
        state["_data_files"] = [{"filename": name}]
        Path("saved/state.json").write_text(json.dumps(state))
        assert "state.json" in refusal(load_documents, "saved")


@cases(25)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 9), st.booleans())
def test_packing_keeps_every_token_and_boundary(tokenizer, lengths, seq_length, add_eos):
    number, texts, laid_out = 0, [], []
    for length in lengths:
        words = [(number + i) % (WORDS - 1) + 1 for i in range(length)]
        number += length
        texts.append(" ".join(f"w{word}" for word in words))
        if words:
            laid_out.append(words + [0] * add_eos)
    flat = [token for document in laid_out for token in document]
    owner = [i for i, document in enumerate(laid_out) for _ in document]
    documents = Dataset.from_dict({"text": texts})
    packed, error = outcome(
        pack_documents, documents, tokenizer, seq_length, add_eos=add_eos, vocab_size=WORDS
    )
    assert (error is None) == (len(flat) >= seq_length)
    if error is not None:
        return
    assert len(packed) == len(flat) // seq_length
    for number, sample in enumerate(packed):
        here = slice(number * seq_length, (number + 1) * seq_length)
        assert sample["input_ids"] == flat[here]
        runs = [owner[here].count(document) for document in dict.fromkeys(owner[here])]
        assert sample["document_lengths"] == runs


def test_tokens_without_embedding_are_refused(tokenizer):
    documents = Dataset.from_dict({"text": ["w1 w2 w30 w4"]})
    message = refusal(pack_documents, documents, tokenizer, 2, vocab_size=30)
    assert "token 30 ('w30')" in message
    pack_documents(documents, tokenizer, 2, vocab_size=31)


def samples(count, seq_length, widths):
    lengths = [widths] * count
    return {
        "input_ids": [[i] * seq_length for i in range(count)],
        "document_lengths": [[*some, seq_length - sum(some)] for some in lengths],
    }


@cases(60)
@given(
    count=st.integers(1, 12),
    dp=st.integers(1, 4),
    micro=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.booleans(),
    steps=st.integers(1, 8),
)
def test_ranks_read_each_sample_once_an_epoch(count, dp, micro, seed, shuffle, steps):
    dataset = Dataset.from_dict(samples(count, 4, [1, 0, 2]))
    options = {"micro_batch_size": micro, "seed": seed, "shuffle": shuffle}
    made = [outcome(PackedLoader, dataset, dp_rank=rank, dp=dp, **options) for rank in range(dp)]
    assert all((error is None) == (count >= dp * micro) for _, error in made)
    if count < dp * micro:
        return
    ranks = [loader for loader, _ in made]
    read = []
    for step in range(steps):
        for loader in ranks:
            batch = next(loader)
            read += batch["input_ids"][:, 0].tolist()
            assert batch["cu_seqlens"].tolist()[-1] == micro * 4
            assert set(range(0, micro * 4 + 1, 4)) <= set(batch["cu_seqlens"].tolist())
        if step == steps // 2:
            fresh = PackedLoader(dataset, dp_rank=0, dp=dp, **options)
            fresh.load_state_dict(json.loads(json.dumps(ranks[0].state_dict())))
            ranks[0] = fresh
    whole = count // (dp * micro) * dp * micro
    for epoch in range(0, len(read), whole):
        order = read[epoch : epoch + whole]
        assert len(set(order)) == len(order)
        drawn = np.random.RandomState([seed, epoch // whole]).permutation(count)
        assert order == (drawn if shuffle else np.arange(count)).tolist()[: len(order)]


columns = st.one_of(
    st.lists(st.lists(st.integers(-3, 9), max_size=4), min_size=1, max_size=3),
    st.lists(
        st.lists(st.none() | st.integers(0, 3), max_size=3) | st.none(), min_size=1, max_size=3
    ),
    st.lists(st.floats(0, 4), min_size=1, max_size=3),
    st.lists(st.lists(st.floats(0, 4), max_size=3), min_size=1, max_size=3),
    st.lists(st.text(max_size=3), min_size=1, max_size=3),
    st.lists(st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2), min_size=1, max_size=3),
)


@cases(120)
@given(
    st.dictionaries(
        st.sampled_from(["input_ids", "document_lengths", "labels", "x"]), columns, max_size=4
    )
)
def test_samples_of_a_user_are_read_or_refused(table):
    rows = min(map(len, table.values()), default=0)
    dataset = Dataset.from_dict({name: column[:rows] for name, column in table.items()})
    made, error = outcome(PackedLoader, dataset, dp_rank=0, dp=1, micro_batch_size=1, seed=0)
    if error is None:
        for _ in range(2 * rows):
            batch = next(made)
            assert batch["input_ids"].shape == batch["labels"].shape
            edges = batch["cu_seqlens"].tolist()
            assert edges == sorted(edges)
            assert (edges[0], edges[-1]) == (0, batch["input_ids"].numel())


@cases(150)
@given(
    st.dictionaries(
        st.sampled_from(["epoch", "position", "seed", "shuffle", "num_samples", "fingerprint"]),
        wild | scalars,
        max_size=3,
    ),
    st.booleans(),
)
def test_a_data_state_is_resumed_or_refused(changes, whole):
    loader = PackedLoader(SIX, dp_rank=0, dp=1, micro_batch_size=1, seed=3)
    state = {**loader.state_dict(), **changes} if whole else changes
    _, error = outcome(loader.load_state_dict, state)
    if error is None:
        assert 0 <= loader.position <= 6
        assert next(loader)["input_ids"].shape == (1, 4)
    refusal(loader.load_state_dict, list(changes))


SIX = Dataset.from_dict(samples(6, 4, [1]))
