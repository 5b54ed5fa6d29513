"""Packing loses no token; loading visits every sample once an epoch, at any dp, across restarts."""

import logging

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hybridsp.data import PackedLoader, load_documents, pack_documents

EOS = 0
VOCABULARY = {"<eos>": EOS} | {f"w{i}": i for i in range(1, 1000)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test packs into a cache of its own, not into the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    """One word, one token: "w7" is 7. No end-of-sequence token unless it is added."""
    words = Tokenizer(WordLevel(VOCABULARY))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def text(start, length):
    return " ".join(f"w{i}" for i in range(start, start + length))


def documents(*lengths):
    """Documents of so many words, numbered through the corpus so that no two tokens are equal."""
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    return Dataset.from_dict({"text": [text(s, n) for s, n in zip(starts, lengths, strict=True)]})


def samples(count, seq_length=4):
    """Samples whose tokens all name the sample, each of one document of 1 and one of the rest."""
    return Dataset.from_dict(
        {
            "input_ids": [[i] * seq_length for i in range(count)],
            "document_lengths": [[1, seq_length - 1]] * count,
        }
    )


def loader(dataset, dp_rank=0, dp=1, micro_batch_size=1, seed=7, **options):
    return PackedLoader(
        dataset, dp_rank=dp_rank, dp=dp, micro_batch_size=micro_batch_size, seed=seed, **options
    )


def numbers(batch):
    """Which samples a batch holds."""
    return batch["input_ids"][:, 0].tolist()


def global_steps(loaders, steps):
    """The samples of each global step, in the order of the ranks."""
    return [[i for rank in loaders for i in numbers(next(rank))] for _ in range(steps)]


def test_a_directory_and_a_glob_are_read_in_sorted_order(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / "b.py").write_text("second\n")
    (root / "a [1]*.py").write_text("first\n")
    (root / "sub" / "c.py").write_text("third\n")
    (root / "empty.py").write_text("")
    (root / ".hidden.py").write_text("hidden\n")
    assert load_documents(root)["text"][:] == ["first\n", "second\n", "third\n"]
    assert load_documents(root / "*.py")["text"][:] == ["first\n", "second\n"]
    assert load_documents(str(root / "**/*.py"))["text"][:] == ["first\n", "second\n", "third\n"]
    assert load_documents(root / "b.py")["text"][:] == ["second\n"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_tables_give_one_document_per_row(tmp_path, suffix):
    table = Dataset.from_dict({"body": ["one\ntwo", "three"], "id": [1, 2]})
    path = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        table.to_csv(path)
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=suffix == "jsonl")
    loaded = load_documents(path, text_field="body")
    assert loaded.column_names == ["text"]
    assert loaded["text"][:] == ["one\ntwo", "three"]


def test_a_saved_dataset_is_loaded(tmp_path):
    Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert load_documents(tmp_path / "saved")["text"][:] == ["one", "two"]


def test_a_dataset_of_several_splits_is_refused(tmp_path):
    split = Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="several splits"):
        load_documents(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "text_field", "message"),
    [
        (None, b"", "text", "names no file with content"),
        ("a.txt", b"", "text", "names no file with content"),
        ("a.json", b"[]", "text", "cannot be read"),
        ("a.jsonl", b"{no json", "text", "cannot be read: JSON"),
        ("a.txt", b"\xff\xfe", "text", "cannot be read: 'utf-8'"),
        ("a.txt", b"words", "body", "text_field='body'.* the columns are \\['text'\\]"),
        ("a.jsonl", b'{"text": 1}', "text", "holds int64, not text"),
        ("a.jsonl", b'{"text": ["a"]}', "text", "not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', "text", "1 null values"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, content, text_field, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(tmp_path / (name or "missing"), text_field=text_field)


def test_a_mixture_of_tables_and_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.jsonl").write_text('{"text": "words"}')
    with pytest.raises(ValueError, match="mixes files of the formats"):
        load_documents(tmp_path)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # Lengths without the eos that each document gets; seq_length is 4.
        pytest.param([10, 4], [[4], [4], [3, 1], [4]], id="longer-than-several-samples"),
        pytest.param([3, 3], [[4], [4]], id="exactly-one-sample"),
        pytest.param([7], [[4], [4]], id="exactly-two-samples"),
        pytest.param([1, 1, 1, 1, 1], [[2, 2], [2, 2]], id="one-word-documents"),
        pytest.param([0, 3, 0, 0, 3, 0], [[4], [4]], id="without-text-skipped"),
        pytest.param([2, 4, 1, 1, 3], [[3, 1], [4], [2, 2], [4]], id="cut-and-whole"),
    ],
)
def test_documents_are_cut_where_samples_end(tokenizer, lengths, expected):
    packed = pack_documents(documents(*lengths), tokenizer, 4)
    assert packed["document_lengths"][:] == expected
    stream = []
    for i, length in enumerate(lengths):
        first = 1 + sum(lengths[:i])
        stream += [*range(first, first + length), EOS] if length else []
    assert [t for ids in packed["input_ids"][:] for t in ids] == stream[: 4 * len(expected)]
    assert {len(ids) for ids in packed["input_ids"][:]} == {4}


def test_one_token_documents_without_eos(tokenizer):
    packed = pack_documents(documents(1, 1, 1, 1, 1), tokenizer, 2, add_eos=False)
    assert packed["input_ids"][:] == [[1, 2], [3, 4]]
    assert packed["document_lengths"][:] == [[1, 1], [1, 1]]


def test_an_eos_in_the_text_is_not_doubled(tokenizer):
    closed = Dataset.from_dict({"text": ["w1 w2 <eos>", "w3"]})
    assert pack_documents(closed, tokenizer, 5)["input_ids"][0] == [1, 2, EOS, 3, EOS]


def test_no_token_is_lost_between_batches_or_processes(tokenizer, tmp_path, monkeypatch):
    corpus = documents(*[7] * 50)  # several tokenisation batches, 400 tokens
    one = pack_documents(corpus, tokenizer, 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other_cache")
    two = pack_documents(corpus.select(range(50)), tokenizer, 4, num_proc=2)
    assert len(one) == 100
    assert two[:] == one[:]


def test_the_cache_distinguishes_what_decides_the_samples(tokenizer):
    corpus = documents(3, 3)
    assert pack_documents(corpus, tokenizer, 4)[0]["input_ids"] == [1, 2, 3, EOS]
    assert pack_documents(corpus, tokenizer, 2)[0]["input_ids"] == [1, 2]
    assert pack_documents(corpus, tokenizer, 4, add_eos=False)[0]["input_ids"] == [1, 2, 3, 4]
    assert pack_documents(documents(2, 5), tokenizer, 4)[0]["input_ids"] == [1, 2, EOS, 3]
    tokenizer.eos_token = "w9"
    assert pack_documents(corpus, tokenizer, 4)[0]["input_ids"] == [1, 2, 3, 9]


def test_dropped_tokens_are_logged_also_when_cached(tokenizer, caplog):
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hybridsp.data"):
            pack_documents(documents(3, 5), tokenizer, 4)
        assert "2 samples of 4 tokens; dropped the last 2 of 10 tokens" in caplog.text


def test_a_tokenizer_without_eos_is_refused_unless_told(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos_token_id.*add_eos=False"):
        pack_documents(documents(3), tokenizer, 2)
    assert len(pack_documents(documents(4), tokenizer, 2, add_eos=False)) == 2


def test_bad_corpora_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"9 tokens in 2 documents.*seq_length=10"):
        pack_documents(documents(3, 4), tokenizer, 10)
    with pytest.raises(ValueError, match="0 tokens in 2 documents"):
        pack_documents(documents(0, 0), tokenizer, 10)
    with pytest.raises(ValueError, match="seq_length=0"):
        pack_documents(documents(3), tokenizer, 0)
    with pytest.raises(ValueError, match="need a 'text' column"):
        pack_documents(Dataset.from_dict({"body": ["w1"]}), tokenizer, 2)


def test_a_batch_has_rows_labels_and_boundaries(tokenizer):
    packed = pack_documents(documents(2, 4, 1, 1, 3), tokenizer, 4)
    batch = next(loader(packed, micro_batch_size=3, shuffle=False))
    assert batch["input_ids"].tolist() == [[1, 2, EOS, 3], [4, 5, 6, EOS], [7, EOS, 8, EOS]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 8, 10, 12]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1


def test_labels_of_the_samples_are_kept():
    dataset = samples(3).add_column("labels", [[-100, -100, i, i] for i in range(3)])
    dataset = dataset.add_column("source", ["a", "b", "c"])
    batch = next(loader(dataset, micro_batch_size=2, shuffle=False))
    assert batch["labels"].tolist() == [[-100, -100, 0, 0], [-100, -100, 1, 1]]
    assert batch.keys() == {"input_ids", "labels", "cu_seqlens"}


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_dp_reads_the_same_global_order(micro_batch_size):
    dataset = samples(24)
    orders = []
    for dp in (1, 2, 4):
        ranks = [loader(dataset, r, dp, micro_batch_size) for r in range(dp)]
        steps = global_steps(ranks, 2 * 24 // (dp * micro_batch_size))
        assert all(len(set(step)) == dp * micro_batch_size for step in steps)
        orders.append([i for step in steps for i in step])
    assert orders[0] == orders[1] == orders[2]
    first, second = orders[0][:24], orders[0][24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != sorted(first)


def test_the_order_depends_on_the_seed_and_never_changes():
    dataset = samples(6)
    assert global_steps([loader(dataset, seed=7)], 6) == global_steps([loader(dataset, seed=7)], 6)
    assert global_steps([loader(dataset, seed=8)], 6) != global_steps([loader(dataset, seed=7)], 6)
    # Written down, so that a new version of a library cannot reorder a run that is resumed.
    assert global_steps([loader(dataset, seed=7)], 6) == [[1], [4], [5], [3], [2], [0]]
    unshuffled = loader(dataset, seed=7, shuffle=False)
    assert global_steps([unshuffled], 8) == [[0], [1], [2], [3], [4], [5], [0], [1]]


def test_what_is_left_of_an_epoch_is_skipped():
    ranks = [loader(samples(7), r, 2, 1, shuffle=False) for r in range(2)]
    assert ranks[0].steps_per_epoch == 3
    assert global_steps(ranks, 4) == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert ranks[0].state_dict()["epoch"] == 1


@pytest.mark.parametrize("stop", [0, 3, 5, 6], ids=["start", "mid-epoch", "epoch-end", "epoch-2"])
def test_a_resumed_loader_continues_exactly(stop):
    dataset = samples(11)
    uninterrupted = loader(dataset, 1, 2, 1)
    for _ in range(stop):
        next(uninterrupted)
    state = uninterrupted.state_dict()
    resumed = loader(dataset, 1, 2, 1)
    next(resumed)  # a loader that already ran is set back too
    resumed.load_state_dict(state)
    for _ in range(8):
        expected, batch = next(uninterrupted), next(resumed)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert resumed.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_resumed_run_may_change_dp(dp):
    dataset = samples(16)
    before = [loader(dataset, r, 2, 2) for r in range(2)]
    consumed = global_steps(before, 1)[0]
    states = [rank.state_dict() for rank in before]
    assert states[0] == states[1]
    after = [loader(dataset, r, dp, 1) for r in range(dp)]
    for rank in after:
        rank.load_state_dict(states[0])
    rest = [i for step in global_steps(after, 12 // dp) for i in step]
    assert consumed + rest == [i for step in global_steps([loader(dataset)], 16) for i in step]


def test_states_of_other_data_or_order_are_refused():
    state = loader(samples(8)).state_dict()
    changed = samples(8).map(lambda row: {"input_ids": [*row["input_ids"][:3], 99]})
    for other, name in [
        (loader(samples(8), seed=8), "seed"),
        (loader(samples(8), shuffle=False), "shuffle"),
        (loader(samples(9)), "num_samples"),
        (loader(changed), "fingerprint"),
    ]:
        before = other.state_dict()
        with pytest.raises(ValueError, match=f"data state has {name}="):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(ValueError, match=r"lacks \['position'\]"):
        loader(samples(8)).load_state_dict({k: v for k, v in state.items() if k != "position"})


def test_the_fingerprint_is_the_content_not_the_file(tmp_path):
    dataset = samples(100)
    dataset.save_to_disk(tmp_path / "moved")
    moved = datasets.load_from_disk(tmp_path / "moved")
    loader(moved).load_state_dict(loader(dataset).state_dict())
    reordered = dataset.select([*range(98), 99, 98])
    assert loader(reordered).fingerprint != loader(dataset).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_rank": 2, "dp": 2}, "dp_rank=2"),
        ({"dp_rank": -1, "dp": 2}, "dp_rank=-1"),
        ({"dp": 0}, "dp=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"dp": 3, "micro_batch_size": 3}, "8 samples.*dp=3.*micro_batch_size=3 needs 9"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader(samples(8), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[1, 2], [1, 2, 3]]}, "input_ids of sample 1 covers 3 tokens"),
        ({"labels": [[1, 2], [1]]}, "labels of sample 1 covers 1 tokens"),
        ({"document_lengths": [[2], [2, 1]]}, "document_lengths of sample 1 covers 3 tokens"),
        ({"document_lengths": None}, r"need the columns \['document_lengths'\]"),
    ],
)
def test_malformed_samples_are_refused(change, message):
    columns = {"input_ids": [[1, 2], [3, 4]], "document_lengths": [[2], [1, 1]]} | change
    dataset = Dataset.from_dict({name: rows for name, rows in columns.items() if rows})
    with pytest.raises(ValueError, match=message):
        loader(dataset)
