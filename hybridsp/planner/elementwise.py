"""What a decoder layer computes between its matrix products and attention kernels, and how fast.

Norms, RoPE, silu, residuals: in eager PyTorch each step of them is a kernel of its own, which reads
its operands and writes its result. Most lay all operands out alike, and run at the memory's speed.
The others broadcast an operand (a norm's scale over the hidden size, RoPE's cosines over the heads)
or walk it in another order (the halves of a head, KV heads repeated). Such a kernel works out for
each number where its operands lie, which takes longer than to fetch them: what bounds it is a rate
of numbers, not of bytes, and it is the same on an H100 as on an H200.

A layer's backward is as much again as two forwards (counted: 2.1 to 2.2 times the bytes, 1.6 to 1.7
times the numbers).

Symbols: e bytes of a number (2 or 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridsp.planner.hardware import Cluster
from hybridsp.planner.model import SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What small kernels read and write.

    Attributes:
        plain: bytes of kernels whose operands all lie alike.
        indexed: bytes of those that work out where each number lies.
        numbers: that these write, or sum up.
    """

    plain: float = 0.0
    indexed: float = 0.0
    numbers: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            plain=self.plain + other.plain,
            indexed=self.indexed + other.indexed,
            numbers=self.numbers + other.numbers,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(
            plain=self.plain * times, indexed=self.indexed * times, numbers=self.numbers * times
        )

    @property
    def bytes(self) -> float:
        """Of all kernels."""
        return self.plain + self.indexed

    def seconds(self, cluster: Cluster) -> float:
        """What they take on a GPU."""
        chip = cluster.chip
        walked = max(self.indexed / chip.bandwidth, self.numbers / chip.indexed)
        return self.plain / chip.bandwidth + walked


def layer_traffic(model: ModelShape, setting: Setting, kind: str) -> Traffic:
    """Of one layer's small operations per token, forward."""
    c, e = model.config, setting.dtype_bytes
    total = _norm(e) * (2 * c.hidden_size) + Traffic(plain=6 * e) * c.hidden_size
    total += _gate(e) * c.intermediate_size
    mixer = _softmax_mixer if kind == SOFTMAX else _linear_mixer
    return total + mixer(model, setting)


def _softmax_mixer(model: ModelShape, setting: Setting) -> Traffic:
    c, e = model.config, setting.dtype_bytes
    query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    total = _norm(e) * (bool(c.qk_norm) * (query + kv))
    # Heads come before tokens here, so that the sum of RoPE's two products is of unlike operands.
    rope = Traffic(indexed=10 * e, numbers=4.5)
    total += rope * (bool(c.softmax_rope) * (query + kv))
    # Into the all-to-all and out of it: q, k, v there, the output back.
    packed = Traffic(indexed=4 * e, numbers=2.0)
    return total + packed * ((2 * query + 2 * kv) * (setting.sp > 1))


def _linear_mixer(model: ModelShape, setting: Setting) -> Traffic:
    c, e = model.config, setting.dtype_bytes
    query, key, value = model.linear_widths
    out = c.linear_num_heads * c.linear_value_head_dim
    total = _norm(e) * (bool(c.linear_qk_norm) * (query + key) + bool(c.linear_output_norm) * out)
    # q * cos + cat(-q', q'') * sin
    rope = Traffic(plain=3 * e, indexed=7 * e, numbers=3.5)
    total += rope * (bool(c.linear_rope) * (query + key))
    total += _convolution(c.linear_conv_kernel_dim, e) * (query + key + value)
    if c.linear_num_key_value_heads < c.linear_num_heads:
        # k and v, each repeated for its query heads.
        total += Traffic(indexed=2 * e, numbers=1.0) * (query + out)
    # Logits to fp32, logsigmoid, the division.
    total += Traffic(plain=20 + e) * (model.gates * (c.linear_decay != "fixed"))
    return total + _gate(e) * (bool(c.linear_output_gate) * out)


def _norm(e: int) -> Traffic:
    """RMSNorm per number: to fp32, squared, mean; times its root, back, times the weight."""
    return Traffic(plain=16 + 2 * e, indexed=12 + 2 * e, numbers=3.0)


def _gate(e: int) -> Traffic:
    """silu(a) * b, per number."""
    return Traffic(plain=5 * e)


def _convolution(taps: int, e: int) -> Traffic:
    """A short convolution and silu, per number: what precedes it put in front, products, sums."""
    if not taps:
        return Traffic()
    return Traffic(plain=(3 * (taps - 1) + 2) * e, indexed=2 * (taps + 1) * e, numbers=taps + 1.0)


__all__ = ["Traffic", "layer_traffic"]
