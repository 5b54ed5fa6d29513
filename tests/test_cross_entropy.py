"""Tiled cross-entropy against PyTorch's on whole logits, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from hybridsp.ops import cross_entropy as cross_entropy_module
from hybridsp.ops.cross_entropy import tiled_cross_entropy

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BATCH, LENGTH, DIM, VOCABULARY = 2, 7, 6, 11


def inputs(dtype=torch.float32, spread=1.0):
    hidden = (spread * torch.randn(BATCH, LENGTH, DIM)).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels[0, 2:5] = -100
    return hidden, weight, labels


def right_loss(hidden, weight, labels):
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def right_gradients(hidden, weight, labels):
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    return torch.autograd.grad(right_loss(*exact, labels), exact)


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("tokens_per_tile", [1, 3, 7, 13, 14, 1000])
def test_every_tile_size_and_upstream_gradient(tokens_per_tile, upstream):
    hidden, weight, labels = inputs()
    loss = tiled_cross_entropy(hidden, weight, labels, tokens_per_tile=tokens_per_tile)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), right_loss(hidden, weight, labels), **CLOSE)
    grads = torch.autograd.grad(upstream * loss, (hidden, weight))
    for grad, right in zip(grads, right_gradients(hidden, weight, labels), strict=True):
        torch.testing.assert_close(grad.double(), upstream * right, **CLOSE)


@pytest.mark.parametrize("tokens_per_tile", [3, 1000])
def test_no_valid_label_is_zero_and_not_nan(tokens_per_tile):
    hidden, weight, labels = inputs()
    labels = torch.full_like(labels, -100)
    loss = tiled_cross_entropy(hidden, weight, labels, tokens_per_tile=tokens_per_tile)
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert grad.count_nonzero() == 0  # NaN is not zero


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    *arguments, labels = inputs()
    arguments[frozen] = arguments[frozen].detach()
    right = right_gradients(*arguments, labels)[1 - frozen]
    loss = tiled_cross_entropy(*arguments, labels, tokens_per_tile=4)
    (grad,) = torch.autograd.grad(loss, arguments[1 - frozen])
    torch.testing.assert_close(grad.double(), right, **CLOSE)


def test_without_gradients_none_is_computed(monkeypatch):
    hidden, weight, labels = inputs()

    def must_not_run(*_):
        raise AssertionError("a gradient was computed that nobody wants")

    monkeypatch.setattr(cross_entropy_module, "cross_entropy_gradient", must_not_run)
    with torch.no_grad():
        loss = tiled_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), right_loss(hidden, weight, labels), **CLOSE)


def test_logits_beyond_the_range_of_exp():
    hidden, weight, labels = inputs(spread=100.0)
    loss = tiled_cross_entropy(hidden, weight, labels, tokens_per_tile=5)
    torch.testing.assert_close(loss.double(), right_loss(hidden, weight, labels), **CLOSE)
    grads = torch.autograd.grad(loss, (hidden, weight))
    scale = {"rtol": 1e-5, "atol": 1e-3}  # gradients of the weight are of the order of 100
    for grad, right in zip(grads, right_gradients(hidden, weight, labels), strict=True):
        torch.testing.assert_close(grad.double(), right, **scale)


def test_hidden_states_that_are_not_contiguous():
    hidden, weight, labels = inputs()
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loss = tiled_cross_entropy(turned, weight, labels, tokens_per_tile=4)
    (grad,) = torch.autograd.grad(loss, turned)
    right = right_gradients(hidden, weight, labels)[0]
    torch.testing.assert_close(grad.double(), right, **CLOSE)


def test_bf16_is_as_exact_as_bf16_logits_allow():
    """Against logits rounded to bf16, as a head in bf16 makes them."""
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = tiled_cross_entropy(hidden, weight, labels, tokens_per_tile=4)
    logits = (hidden @ weight.T).float().flatten(0, 1)
    right = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, right, **CLOSE)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for grad, right_grad in zip(grads, right_gradients(hidden, weight, labels), strict=True):
        assert grad.dtype == torch.bfloat16
        error = (grad.double() - right_grad).norm() / right_grad.norm()
        assert error < 2**-7, error


def test_bf16_gradients_are_scaled_by_the_upstream_gradient_and_not_by_its_rounding():
    """1/300 rounds down by 0.21% in bf16: such a factor on every gradient is no rounding error."""
    hidden, weight, labels = inputs(torch.bfloat16)
    once, scaled = (
        torch.autograd.grad(c * tiled_cross_entropy(hidden, weight, labels), (hidden, weight))
        for c in (1.0, 1 / 300)
    )
    torch.testing.assert_close(scaled[0], (once[0].float() / 300).bfloat16(), rtol=0, atol=0)
    # dweight is kept in fp32 and rounded once: twice rounded, it may differ in its last bit.
    torch.testing.assert_close(scaled[1].float(), once[1].float() / 300, rtol=2**-7, atol=0)


def test_what_an_ignored_token_has_never_reaches_the_loss():
    hidden, weight, labels = inputs()
    right = right_loss(hidden, weight, labels).item()
    hidden = hidden.detach().clone()
    hidden[0, 2:5] = torch.inf  # logits inf, -inf and NaN under the ignored labels
    assert tiled_cross_entropy(hidden, weight.detach(), labels).item() == pytest.approx(right)


def test_errors_name_what_does_not_fit():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"labels have shape \(2, 6\)"):
        tiled_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="tokens_per_tile = 0"):
        tiled_cross_entropy(hidden, weight, labels, tokens_per_tile=0)
