"""The tiled divergence against one that holds both sets of logits, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from hybridsp.distill import tiled_divergence

TOKENS, WORDS = 13, 31


def inputs(dtype=torch.float32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    labels = torch.randint(WORDS, (1, TOKENS), generator=generator)
    labels[0, ::4] = -100
    hidden, weight = normal(1, TOKENS, 8), normal(WORDS, 8)
    return hidden, weight, normal(1, TOKENS, 6), normal(WORDS, 6), labels


def oracle(hidden, weight, teacher_hidden, teacher_weight, labels, temperature, ce_weight):
    """(loss, KL, CE), sums, from whole logits."""
    counts = labels.flatten() != -100
    logits = (hidden @ weight.T)[0][counts]
    wished = (teacher_hidden @ teacher_weight.T)[0][counts]
    log_q = F.log_softmax(logits / temperature, dim=-1)
    log_p = F.log_softmax(wished / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    ce = F.cross_entropy(logits, labels.flatten()[counts], reduction="sum")
    return temperature**2 * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("tokens_per_tile", [1, 5, 1024])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.3)])
def test_sums_and_gradients_equal_whole_logits(temperature, ce_weight, tokens_per_tile):
    hidden, weight, *rest, labels = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    got = tiled_divergence(
        hidden,
        weight,
        *rest,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        tokens_per_tile=tokens_per_tile,
    )
    # A factor in front, as the token mean's: what is stored is only scaled.
    grads = torch.autograd.grad(3 * got[0], leaves)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = oracle(*exact, *(x.double() for x in rest), labels, temperature, ce_weight)
    wanted = torch.autograd.grad(3 * want[0], exact)
    torch.testing.assert_close([x.item() for x in got], [x.item() for x in want], rtol=1e-5, atol=0)
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-5)


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn():
    hidden, weight, _, _, labels = inputs()
    hidden.requires_grad_()
    loss, kl, ce = tiled_divergence(hidden, weight, hidden.detach(), weight, labels)
    (grad,) = torch.autograd.grad(loss, [hidden])
    assert abs(kl.item()) < 1e-5
    assert grad.abs().max() < 1e-6
    assert ce > 0


def test_ignored_labels_count_for_nothing_whatever_is_there():
    hidden, weight, of_teacher, teacher_weight, labels = inputs()
    want = tiled_divergence(hidden, weight, of_teacher, teacher_weight, labels, ce_weight=1.0)
    for x in (hidden, of_teacher):
        x[:, ::4] = float("inf")
    hidden.requires_grad_()
    got = tiled_divergence(hidden, weight, of_teacher, teacher_weight, labels, ce_weight=1.0)
    assert [x.item() for x in got] == [x.item() for x in want]
    (grad,) = torch.autograd.grad(got[0], [hidden])
    assert grad[:, 1].abs().sum() > 0

    nothing = torch.full_like(labels, -100)
    loss, kl, ce = tiled_divergence(hidden, weight, of_teacher, teacher_weight, nothing)
    assert (loss.item(), kl.item(), ce.item()) == (0, 0, 0)


def test_a_word_that_the_teacher_holds_impossible_costs_nothing():
    hidden, weight, of_teacher, teacher_weight, labels = inputs()
    loss, *_ = tiled_divergence(
        hidden.requires_grad_(), weight, 1e4 * of_teacher, teacher_weight, labels
    )
    (grad,) = torch.autograd.grad(loss, [hidden])
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_bf16_gradients_are_no_worse_than_from_whole_logits_in_bf16():
    hidden, weight, *rest, labels = inputs(torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    right = torch.autograd.grad(
        oracle(*exact, *(x.double() for x in rest), labels, 1.0, 0.0)[0], exact
    )
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    plain = torch.autograd.grad(oracle(*leaves, *rest, labels, 1.0, 0.0)[0], leaves)
    loss, *_ = tiled_divergence(*leaves, *rest, labels)
    assert loss.dtype == torch.float32
    for got, naive, want in zip(torch.autograd.grad(loss, leaves), plain, right, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 1.1 * (naive - want).norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, r"all need the same \[B, L\]"),
        ({"teacher_weight": torch.zeros(7, 6)}, "the student has 31 words, the teacher 7"),
        ({"temperature": 0.0}, "temperature = 0.0 must be positive"),
        ({"ce_weight": -1.0}, "ce_weight = -1.0"),
        ({"tokens_per_tile": 0}, "tokens_per_tile = 0 at least 1"),
    ],
)
def test_misuse_is_refused(change, message):
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    arguments = dict(zip(names, inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        tiled_divergence(**arguments)
