"""Trials of backends: what is wrong is found, blocks and varlen passes each on their own."""

from dataclasses import replace

import pytest
import torch
from softmax_kernels import KIND

from hybridsp.ops.softmax import block_attention, block_attention_backward, plain, trial


def broken(**changes):
    return replace(plain.BACKEND, name="broken", **changes)


def test_a_trial_finds_what_is_wrong():
    def refuses(*args, **options):
        raise RuntimeError("no kernel for this chip\nand a long trace")

    def in_bits(*args, **options):
        out, lse = block_attention(*args, **options)
        return out, lse / 0.6931

    def nan_for_keys(*args, **options):
        dq, dk, dv = block_attention_backward(*args, **options)
        return dq, dk * float("nan"), dv

    def of_its_own_block(dout, q, k, v, out, lse, **options):
        own = block_attention(q, k, v, **options)
        return block_attention_backward(dout, q, k, v, *own, **options)

    def reason(backend, kind=KIND):
        return trial.why_it_fails.__wrapped__(backend, kind)

    assert reason(plain.BACKEND) is None
    assert reason(plain.BACKEND, replace(KIND, windowed=True, value_dim=8)) is None
    raised = "a trial raised RuntimeError: no kernel for this chip"
    assert reason(broken(forward=refuses)) == raised
    assert reason(broken(backward=refuses)) == raised
    assert "trial's out was off" in reason(broken(forward=in_bits))
    assert "trial's dk was off by nan" in reason(broken(backward=nan_for_keys))
    assert "trial's dq was off" in reason(broken(backward=of_its_own_block))


def test_a_trial_leaves_the_seed_alone():
    state = torch.get_rng_state()
    trial.why_it_fails.__wrapped__(plain.BACKEND, KIND)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_does_not_blame_a_backend_for_a_full_gpu():
    def full(*args, **options):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trial.why_it_fails.__wrapped__(broken(forward=full), KIND)


def packed(forward=plain.packed_attention, backward=plain.packed_attention_backward):
    """Why varlen passes of which one is broken fail."""
    varlen = plain.VARLEN._replace(forward=forward, backward=backward)
    return trial.why_varlen_fails.__wrapped__(plain.BACKEND, varlen, KIND)


def test_a_trial_finds_what_is_wrong_with_varlen_passes():
    def refuses(*args, **options):
        raise RuntimeError("no kernel for this chip")

    def block_by_block(q, k, v, packing, **options):
        """As FlashAttention up to 2.6 laid out its lse."""
        out, lse = plain.packed_attention(q, k, v, packing, **options)
        blocks = [lse[0, rows] for rows, _ in packing.blocks()]
        return out, torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)

    def one_document(q, k, v, packing, **options):
        return block_attention(q, k, v, **options)

    def of_the_longest_alone(dout, q, k, v, out, lse, packing, **options):
        grads = plain.packed_attention_backward(dout, q, k, v, out, lse, packing, **options)
        rows, _ = max(packing.blocks(), key=lambda block: block[0].stop - block[0].start)
        mask = torch.zeros(q.shape[1])
        mask[rows] = 1
        return grads[0] * mask[:, None, None], *grads[1:]

    assert packed() is None
    assert packed(forward=refuses) == "a trial raised RuntimeError: no kernel for this chip"
    assert "a trial raised RuntimeError: The size of tensor" in packed(forward=block_by_block)
    assert "trial's out was off" in packed(forward=one_document)
    assert "trial's dq was off" in packed(backward=of_the_longest_alone)
    assert "has no" in trial.why_varlen_fails.__wrapped__(
        plain.BACKEND, plain.VARLEN._replace(why_not=lambda window: "it has no such function"), KIND
    )
