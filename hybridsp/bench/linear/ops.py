"""What `hybridsp bench linear` times: the layer's inputs, its bytes, and every way to compute it.

An op takes the inputs of one rank and returns the output. `local` ops know one device: their
tokens are the whole sequence, and a state that is not zero enters, so that they do all that a rank
in the middle of a sequence does. `sequence parallel` ops are the same tokens as one rank's share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.attention import linear_attention
from hybridsp.attention.linear import Method
from hybridsp.collectives.all_scan import Algorithm
from hybridsp.mesh import SPMesh
from hybridsp.ops.gla import gated_linear_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLA = "fla"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer on one rank: B = 1, L tokens, H heads, K and V, one decay per channel or per head."""

    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    decay: str
    dtype: torch.dtype

    def forward_bytes(self) -> int:
        """q, k, v, g read once and o written once; the states are small beside them."""
        return self._element() * self._keys_and_values() + self._decay_bytes()

    def backward_bytes(self) -> int:
        """q, k, v, g and do read once, dq, dk, dv and dg written once."""
        values = self.tokens * self.heads * self.value_dim
        read_and_written = 2 * self._keys_and_values() - values
        return self._element() * read_and_written + 2 * self._decay_bytes()

    def bytes_of(self, passes: str) -> int:
        """Of "fwd" or "fwd+bwd"."""
        backward = self.backward_bytes() if passes == "fwd+bwd" else 0
        return self.forward_bytes() + backward

    def _element(self) -> int:
        return self.dtype.itemsize

    def _keys_and_values(self) -> int:
        """Elements of q, k, v and o."""
        return self.tokens * self.heads * 2 * (self.key_dim + self.value_dim)

    def _decay_bytes(self) -> int:
        width = self.key_dim if self.decay == "vector" else 1
        return self.tokens * self.heads * width * torch.float32.itemsize


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a layer: see `linear_attention`; `state` enters a local op."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    state: Tensor
    dout: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.q, self.k, self.v, self.g]


Op = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random tensors with gates like those of a fresh layer: logsigmoid(x) / 16, fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    length, heads = shape.tokens, shape.heads
    width = shape.key_dim if shape.decay == "vector" else 1

    def random(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    q, k = (random(1, length, heads, shape.key_dim).requires_grad_() for _ in range(2))
    v = random(1, length, heads, shape.value_dim).requires_grad_()
    logits = random(1, length, heads, width, dtype=torch.float32)
    return Inputs(
        q=q,
        k=k,
        v=v,
        g=(F.logsigmoid(logits) / 16).requires_grad_(),
        state=random(1, heads, shape.key_dim, shape.value_dim, dtype=torch.float32),
        dout=random(1, length, heads, shape.value_dim),
    )


def local_op(backend: str) -> Op:
    """The op on one device with a state that enters: one of our backends, or FLA's.

    Raises:
        ValueError: FLA is asked for and is not installed.
    """
    if backend == FLA:
        return _fla_op()

    def ours(x: Inputs) -> Tensor:
        scale = x.q.shape[-1] ** -0.5
        out, _ = gated_linear_attention(
            x.q, x.k, x.v, x.g, scale=scale, initial_state=x.state, backend=backend
        )
        return out

    return ours


def parallel_op(method: str, algorithm: str, backend: str, mesh: SPMesh) -> Op:
    """The layer over the mesh: the tokens are this rank's share of the sequence."""
    # Those that are unknown are refused.
    how, scan = cast("Method", method), cast("Algorithm", algorithm)

    def layer(x: Inputs) -> Tensor:
        return linear_attention(
            x.q, x.k, x.v, x.g, mesh=mesh, method=how, algorithm=scan, backend=backend
        )

    return layer


def forward(op: Op, inputs: Inputs) -> None:
    """The forward of a training step; what it saves is dropped."""
    op(inputs)


def forward_backward(op: Op, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward, then the gradients of q, k, v, g."""
    return torch.autograd.grad(op(inputs), inputs.leaves, inputs.dout)


def _fla_op() -> Op:
    """FLA's chunked op: `chunk_gla`, or `chunk_simple_gla` for one decay per head."""
    if not torch.cuda.is_available():
        raise ValueError("flash-linear-attention needs CUDA")
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ValueError(
            f"flash-linear-attention cannot be imported ({error}): "
            "pip install flash-linear-attention, or hybridsp's extra bench, to compare with it"
        ) from error

    def fla(x: Inputs) -> Tensor:
        options = {
            "scale": x.q.shape[-1] ** -0.5,
            "initial_state": x.state,
            "output_final_state": True,
        }
        if x.g.shape[-1] == 1 < x.q.shape[-1]:
            return chunk_simple_gla(x.q, x.k, x.v, x.g.squeeze(-1), **options)[0]
        return chunk_gla(x.q, x.k, x.v, x.g, **options)[0]

    return fla
