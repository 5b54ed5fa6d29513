"""Evaluation: every figure against one written out plainly, and the same on any number of ranks."""

import random
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from tiny_hybrid_gla import tiny_model
from tiny_tokenizer import character_tokenizer
from torch.nn import functional as F

from hybridsp.evaluate import scores
from hybridsp.evaluate.agreement import score_text
from hybridsp.evaluate.needle import NeedleSettings, _question, _questions, find_needles
from hybridsp.evaluate.positions import edges_up_to, loss_by_context, loss_by_position
from hybridsp.evaluate.statistics import clustered_mean, wilson_interval
from hybridsp.evaluate.subject import Subject
from hybridsp.evaluate.text import HeldOut
from hybridsp.mesh import SPMesh
from hybridsp.prepare import check_same_tokenizer

VOCAB = 100
NEEDLES = NeedleSettings(keys=2, depths=2, samples=1)
NEEDLE_LENGTH = 230


def models():
    torch.manual_seed(0)
    student = tiny_model(vocab_size=VOCAB, linear_conv_kernel_dim=4)
    teacher = tiny_model(vocab_size=VOCAB, layer_types=["full_attention"] * 4)
    return teacher, student


def held_out() -> HeldOut:
    generator = torch.Generator().manual_seed(1)
    return HeldOut([torch.randint(0, VOCAB, (n,), generator=generator) for n in (70, 13, 141, 66)])


def all_answers() -> dict[str, torch.Tensor]:
    """What one rank says of a hybrid model and its teacher, over all tasks."""
    world = torch.distributed.get_world_size()
    mesh = SPMesh(ring=max(1, world // 2), ulysses=min(2, world))
    teacher, student = (Subject("tiny", model, mesh) for model in models())
    text = held_out()
    by_position = loss_by_position(student, text.windows(66))
    by_context = loss_by_context(student, text.windows(66))
    needles = find_needles(student, text, character_tokenizer(), NEEDLE_LENGTH, NEEDLES)
    found = vars(score_text(student, text.packed(70), teacher))
    return {
        **found,
        "position_sums": by_position.sums,
        "position_counts": by_position.counts,
        "context_sums": by_context.sums,
        "context_counts": by_context.counts,
        "needle_log_probability": needles.log_probability,
        "needle_found": needles.found,
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return run_ranks(all_answers, 1)[0]


@pytest.mark.parametrize(
    ("world", "backend"),
    [(2, "gloo"), (4, "gloo"), *(pytest.param(n, "nccl", marks=pytest.mark.gpu) for n in (1, 2))],
)
def test_answers_do_not_depend_on_the_number_of_ranks(alone, world, backend):
    for answers in run_ranks(all_answers, world, backend=backend):
        assert answers.keys() == alone.keys()
        for name, values in answers.items():
            torch.testing.assert_close(values, alone[name], rtol=2e-5, atol=1e-4, msg=name)


def losses_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of each token of one document but the first, by an unparallelized model."""
    with torch.no_grad():
        logits = model(tokens[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none")


def test_text_is_what_documents_one_by_one_say(alone):
    teacher, student = models()
    stream, lengths = torch.cat(held_out().documents), (70, 13, 57, 70, 14, 56)
    rows = torch.tensor([0, 1, 1, 2, 3, 3])
    expected = torch.zeros(4, 5, dtype=torch.float64)
    with torch.no_grad():
        for row, piece in zip(rows, stream[:280].split(lengths), strict=True):
            ours, theirs = (
                m(piece[None], use_cache=False).logits[0, :-1] for m in (student, teacher)
            )
            p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
            hits = (ours.argmax(-1) == piece[1:]).sum()
            same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
            kl = (p.exp() * (p - q)).sum()
            loss = losses_of(student, piece).sum()
            expected[row] += torch.tensor([len(piece) - 1, loss, hits, kl, same]).double()
    names = ("tokens", "loss", "hits", "divergence", "same")
    for name, column in zip(names, expected.T, strict=True):
        torch.testing.assert_close(alone[name], column, rtol=2e-5, atol=1e-4, msg=name)


def test_positions_are_those_of_each_window(alone):
    _, student = models()
    windows = held_out().windows(66)
    assert windows.documents.tolist() == [0, 2, 2, 3]
    sums = torch.stack([losses_of(student, window).sum() for window in windows.tokens])
    torch.testing.assert_close(alone["position_sums"][:, 0], sums.double(), rtol=2e-5, atol=1e-4)
    assert alone["position_counts"].tolist() == [[65]] * 4


def test_context_scores_the_same_tokens_with_more_in_view(alone):
    _, student = models()
    tokens = held_out().windows(66).tokens
    expected = [
        [losses_of(student, window[-edge:])[-16:].sum() for edge in (32, 64, 66)]
        for window in tokens
    ]
    torch.testing.assert_close(
        alone["context_sums"], torch.tensor(expected).double(), rtol=2e-5, atol=1e-4
    )
    assert alone["context_counts"].tolist() == [[16, 16, 16]] * 4


def test_needles_are_scored_as_the_whole_model_scores_them(alone):
    _, student = models()
    tokenizer = character_tokenizer()
    questions = list(_questions(held_out(), tokenizer, NEEDLE_LENGTH, NEEDLES))
    expected = [-losses_of(student, q.tokens)[-q.answer :].mean().double() for q in questions]
    torch.testing.assert_close(
        alone["needle_log_probability"], torch.stack(expected), rtol=2e-5, atol=1e-4
    )


def test_buckets_double_and_end_at_the_length():
    assert edges_up_to(1000, 256) == [256, 512, 1000]
    assert edges_up_to(1024, 256) == [256, 512, 1024]
    assert edges_up_to(100, 256) == [100]


class Knowing:
    """Stands in for a model: `choose(tokens)` says which token it holds to follow each."""

    class mesh:
        device = torch.device("cpu")
        sp_rank = 0

    name = "knowing"
    head = torch.eye(VOCAB)

    def __init__(self, choose):
        self.choose = choose

    def rows_per_batch(self, length):
        return 2

    def hidden(self, batch):
        tokens, labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
        following = F.one_hot(self.choose(tokens), VOCAB).float() * 30
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return following, F.pad(labels[:, 1:], (0, 1), value=-100), positions

    def total(self, values):
        return values


def test_a_model_that_knows_the_answer_finds_it_and_one_wrong_digit_does_not_count():
    tokenizer, text = character_tokenizer(), held_out()
    settings = NeedleSettings(keys=3, depths=3, samples=2)
    right = find_needles(Knowing(lambda t: t.roll(-1, 1)), text, tokenizer, 300, settings)
    assert right.found.all()
    assert right.summary()["found"] == right.summary()["asked"] == 6
    assert [at["depth"] for at in right.summary()["by_depth"]] == [0.0, 0.5, 1.0]
    assert right.log_probability.tolist() == pytest.approx([0.0] * 6, abs=1e-6)

    def last_digit_wrong(tokens):
        following = tokens.roll(-1, 1)
        following[:, -2] = (following[:, -2] + 1) % VOCAB
        return following

    wrong = find_needles(Knowing(last_digit_wrong), text, tokenizer, 300, settings)
    assert not wrong.found.any()


def test_positions_put_each_token_into_its_bucket():
    windows = HeldOut([torch.randint(0, VOCAB, (1000,))]).windows(1000)
    # The head knows the next token only where 512 come before.
    curve = loss_by_position(
        Knowing(lambda t: torch.where(torch.arange(1000) >= 512, t.roll(-1, 1), t * 0)), windows
    )
    assert curve.edges == [256, 512, 1000]
    assert curve.counts.tolist() == [[256, 256, 487]]
    assert curve.point(1)["loss"] > 5
    assert curve.point(2)["loss"] < 1e-6
    assert curve.point(0)["standard_error"] is None  # one document


def test_a_change_is_paired_within_windows():
    text = HeldOut([torch.randint(0, VOCAB, (200,)) for _ in range(6)])
    curve = loss_by_context(Knowing(lambda t: t.roll(-1, 1)), text.windows(64))
    level = torch.arange(18.0, dtype=torch.float64)[:, None] * 100  # windows differ far more ...
    step = torch.tensor([[0.0, 16.0]], dtype=torch.float64)  # ... than context changes them
    curve = replace(curve, sums=level + step, counts=torch.full((18, 2), 16))
    change = curve.change(32, 64)
    assert change["change"] == pytest.approx(1.0)
    assert change["standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert curve.point(0)["standard_error"] > 1


def test_a_question_has_its_needle_at_its_depth_once():
    tokenizer, text = character_tokenizer(), HeldOut([torch.full((1000,), 90)])
    for depth in (0.0, 0.5, 1.0):
        question = _question(text, tokenizer, 400, 3, depth, random.Random(3))
        assert len(question.tokens) == 400
        written = tokenizer.decode(question.tokens).replace(" ", "")
        _, _, asked = written.rpartition("Thesecretnumberofthe")
        sentence = f"Thesecretnumberofthe{asked}."
        assert written.count(sentence) == 1
        before = written[: written.index(sentence)].count(tokenizer.decode([90]))
        total = written.count(tokenizer.decode([90]))
        assert before == pytest.approx(depth * total, abs=1)
        assert question.answer == 7  # a space and six digits
        assert written.count("Thesecretnumberofthe") == 4


def test_questions_are_the_same_each_time_and_differ_from_each_other():
    tokenizer, text = character_tokenizer(), held_out()
    settings = NeedleSettings(keys=2, depths=2, samples=2)
    one, two = (list(_questions(text, tokenizer, 250, settings)) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    assert len({tuple(q.tokens.tolist()) for q in one}) == 4
    other = list(_questions(text, tokenizer, 250, replace(settings, seed=1)))
    assert not torch.equal(one[0].tokens, other[0].tokens)


def test_scores_in_tiles_are_those_of_all_at_once(monkeypatch):
    hidden, head = torch.randn(2, 9, 4), torch.randn(11, 4)
    other_hidden, other_head = torch.randn(2, 9, 5), torch.randn(11, 5)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :4], labels[1, 8] = -100, -100
    whole = (
        *scores.label_scores(hidden, head, labels),
        *scores.disagreement((hidden, head), (other_hidden, other_head), labels),
    )
    p, q = (hidden @ head.T).log_softmax(-1), (other_hidden @ other_head.T).log_softmax(-1)
    valid = labels != -100
    loss = -p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    expected = [
        loss,
        p.argmax(-1) == labels,
        (p.exp() * (p - q)).sum(-1),
        p.argmax(-1) == q.argmax(-1),
    ]
    for got, want in zip(whole, expected, strict=True):
        torch.testing.assert_close(got, want * valid)
    monkeypatch.setattr(scores, "TOKENS_PER_TILE", 3)
    tiled = (
        *scores.label_scores(hidden, head, labels),
        *scores.disagreement((hidden, head), (other_hidden, other_head), labels),
    )
    for got, want in zip(tiled, whole, strict=True):
        torch.testing.assert_close(got, want)


def test_packed_rows_keep_documents_apart_and_spread_evenly():
    text = HeldOut([torch.arange(5), torch.arange(10, 22), torch.arange(30, 33)])
    packed = text.packed(6)
    assert packed.tokens.tolist() == [
        [0, 1, 2, 3, 4, 10],
        [11, 12, 13, 14, 15, 16],
        [17, 18, 19, 20, 21, 30],
    ]
    assert packed.boundaries == [[0, 5, 6], [0, 6], [0, 5, 6]]
    assert packed.batch(slice(1, 3))["cu_seqlens"].tolist() == [0, 6, 11, 12]
    assert text.packed(6, most_tokens=13).tokens[:, 0].tolist() == [0, 11]
    assert text.packed(6, most_tokens=1).tokens.shape == (1, 6)
    with pytest.raises(ValueError, match=r"length = 21, but the text has 20 tokens"):
        text.packed(21)


def test_windows_lie_in_one_document():
    text = HeldOut([torch.arange(5), torch.arange(10, 22), torch.arange(30, 33)])
    windows = text.windows(4)
    assert windows.tokens[:, 0].tolist() == [0, 10, 14, 18]
    assert windows.documents.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"length = 13, but the longest document has 12"):
        text.windows(13)
    assert text.stream(18, 4).tolist() == [31, 32, 0, 1]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (0, 1, 0.0, 0.7935)],
)
def test_wilson_intervals_of_the_tables(hits, trials, low, high):
    assert wilson_interval(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_a_share_lies_in_its_interval():
    for trials in range(1, 200):
        for hits in range(trials + 1):
            low, high = wilson_interval(hits, trials)
            assert 0 <= low <= hits / trials <= high <= 1, (hits, trials)


def test_standard_errors_count_clusters_not_values():
    values = torch.tensor([1.0, 1.0, 3.0, 3.0])
    once, alike = torch.arange(4), torch.tensor([0, 0, 1, 1])
    mean, error = clustered_mean(values, torch.ones(4), once)
    assert mean == 2
    assert error == pytest.approx(values.std().item() / 2)
    # Two clusters, with the means 1 and 3: a standard deviation of sqrt(2) over sqrt(2).
    assert clustered_mean(values, torch.ones(4), alike)[1] == pytest.approx(1.0)
    assert clustered_mean(values, torch.tensor([1.0, 1, 0, 0]), once)[0] == 1
    assert clustered_mean(values, torch.ones(4), torch.zeros(4, dtype=torch.long))[1] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys": 0}, "keys = 0 must be at least 1"),
        ({"samples": -1}, "samples = -1 must be at least 1"),
        ({"keys": 1000}, "keys = 1000, but there are names for"),
    ],
)
def test_impossible_needles_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        NeedleSettings(**wrong)


def test_a_haystack_without_room_is_named():
    with pytest.raises(ValueError, match=r"length = 60 tokens have no room for 4 sentences"):
        find_needles(
            Knowing(lambda t: t), held_out(), character_tokenizer(), 60, NeedleSettings(keys=4)
        )


def test_different_tokenizers_are_refused():
    one, two = character_tokenizer(), character_tokenizer()
    check_same_tokenizer("a", one, "b", two, "mend it")
    two.add_tokens(["HybridSP"])
    with pytest.raises(ValueError, match=r"a and b have different tokenizers .*HybridSP.*mend it"):
        check_same_tokenizer("a", one, "b", two, "mend it")
