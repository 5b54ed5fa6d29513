"""Block attention: softmax attention of some queries over some keys, and its gradients.

contract    what a backend does: (out, lse) forward, gradients from the merged ones backward
calls       the calls that compute a list of blocks: one for many where the backend can
plain       PyTorch, any device
torch_ops   cuDNN and FlashAttention-2 through PyTorch's own operators
flash_attn  FlashAttention-2, -3 and -4 from their packages
trial       whether a backend is right on this machine
choose      which one is used
"""

from hybridsp.ops.softmax.calls import Call, calls_of
from hybridsp.ops.softmax.choose import choose_backend, why_not
from hybridsp.ops.softmax.contract import BACKENDS, Backend
from hybridsp.ops.softmax.plain import block_attention, block_attention_backward

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "block_attention",
    "block_attention_backward",
    "calls_of",
    "choose_backend",
    "why_not",
]
