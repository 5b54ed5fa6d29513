"""Ops against their oracles in fp64: outputs and every gradient."""

import torch


def assert_near(got, right, rtol=1e-5):
    """Equal to 1e-5 of itself or, where a sum has cancelled, of the largest element (or of 1)."""
    atol = 1e-5 * max(right.abs().max().item(), 1.0)
    torch.testing.assert_close(got.double(), right, rtol=rtol, atol=atol)


def compare(op, oracle, inputs, rtol=1e-5):
    """Outputs and, for one random direction, gradients of op against the oracle in fp64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs, expected = op(*inputs), oracle(*exact)
    douts = [torch.randn(x.shape).to(x.dtype) for x in outs]
    for out, right in zip(outs, expected, strict=True):
        assert_near(out, right, rtol)
    # An initial state of an empty first document reaches nothing.
    grads = torch.autograd.grad(outs, inputs, douts, materialize_grads=True)
    right_douts = [x.double() for x in douts]
    right_grads = torch.autograd.grad(expected, exact, right_douts, materialize_grads=True)
    for x, grad, right in zip(inputs, grads, right_grads, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, right, rtol)
