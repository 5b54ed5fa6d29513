"""Sequence-parallel layers: mathematics from `ops` and communication from `collectives`, composed.

`linear.py` is ZeCO: local states, All-Scan, output. `softmax.py` is USP: Ulysses around a ring.
Both take the global document boundaries and this rank's contiguous tokens. Under activation
checkpointing by `KeepingAttention` softmax attention is not computed again (`keep.py`).
"""

from hybridsp.attention.keep import KeepingAttention
from hybridsp.attention.linear import linear_attention, short_convolution
from hybridsp.attention.softmax import softmax_attention

__all__ = ["KeepingAttention", "linear_attention", "short_convolution", "softmax_attention"]
