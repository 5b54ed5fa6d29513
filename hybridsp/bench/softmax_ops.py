"""What `hybridsp bench softmax` times: a raw kernel, the layer over a mesh, a ring on one device.

    Raw           one causal call of a backend per document, and nothing else: what all others are
                  held against
    Parallel      `softmax_attention` over the mesh; the inputs are this rank's share
    EmulatedRing  the block calls of all ranks of a ring, one rank after another, with the merges of
                  outputs and the sums of gradients but without messages: what cutting attention in
                  blocks costs, which one device can tell

Each has a forward and a forward with backward, which are timed, and `results`, which are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridsp.attention import softmax_attention
from hybridsp.attention.ring_plan import num_steps, step_blocks
from hybridsp.bench.softmax_work import Work
from hybridsp.layout import Block, ring_layout
from hybridsp.mesh import SPMesh
from hybridsp.ops.merge import merge_attention
from hybridsp.ops.softmax import Backend, choose_backend, why_not

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""out, dq, dk, dv, in the order of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q [1, L, Hq, D], k, v [1, L, Hkv, D] and the gradient of the output, like q."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def rows(self, index: Any) -> Inputs:
        """Some of the tokens."""
        return Inputs(**{name: x[:, index] for name, x in vars(self).items()})

    def to(self, dtype: torch.dtype) -> Inputs:
        """In another dtype."""
        return Inputs(**{name: x.to(dtype) for name, x in vars(self).items()})


def make_inputs(work: Work, tokens: int, device: torch.device, seed: int) -> Inputs:
    """Random tensors for so many of the work's tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(heads: int) -> Tensor:
        sizes = 1, tokens, heads, work.head_dim
        return torch.randn(sizes, generator=generator, device=device, dtype=work.dtype)

    q, dout = random(work.heads), random(work.heads)
    return Inputs(q=q, k=random(work.kv_heads), v=random(work.kv_heads), dout=dout)


class Op(Protocol):
    """One way to compute attention of its inputs."""

    def forward(self) -> object:
        """The forward of a training step."""

    def forward_backward(self) -> object:
        """Forward, and the gradients of q, k, v."""

    def results(self) -> Results:
        """What `forward_backward` computes."""


class Raw:
    """A backend on one device.

    Args:
        inputs: all of the work's tokens.
        work: documents and window.
        backend: by name.

    Raises:
        ValueError: the backend cannot do these.
    """

    def __init__(self, inputs: Inputs, work: Work, backend: str) -> None:
        self._backend = backend_for(inputs, work.window, backend)
        self._documents = [inputs.rows(slice(start, stop)) for start, stop in pairwise(work.bounds)]
        self._options: dict[str, Any] = {
            "scale": work.head_dim**-0.5,
            "causal": True,
            "window": work.window,
        }

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(out, lse) of each document."""
        return [self._backend.forward(x.q, x.k, x.v, **self._options) for x in self._documents]

    def forward_backward(self) -> list[Results]:
        """(out, dq, dk, dv) of each document."""
        return [
            (out, *self._backend.backward(x.dout, x.q, x.k, x.v, out, lse, **self._options))
            for x, (out, lse) in zip(self._documents, self.forward(), strict=True)
        ]

    def results(self) -> Results:
        """The documents' results side by side."""
        out, dq, dk, dv = (
            torch.cat(parts, dim=1) for parts in zip(*self.forward_backward(), strict=True)
        )
        return out, dq, dk, dv


class Parallel:
    """The layer over a mesh.

    Args:
        inputs: this rank's share of the work's tokens.
        work: the whole sequence's.
        backend, variant: as in `softmax_attention`.
        mesh: its SP degree is the world.
    """

    def __init__(
        self, inputs: Inputs, work: Work, backend: str, *, variant: str, mesh: SPMesh
    ) -> None:
        self._leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        self._dout = inputs.dout
        packed = len(work.bounds) > 2
        self._options: dict[str, Any] = {
            "mesh": mesh,
            "cu_seqlens": torch.tensor(work.bounds, dtype=torch.int32) if packed else None,
            "window": work.window,
            "variant": variant,
            "backend": backend,
        }

    def forward(self) -> Tensor:
        """The layer's output, with what its backward needs."""
        return softmax_attention(*self._leaves, **self._options)

    def forward_backward(self) -> Results:
        """As of one training step."""
        out = self.forward()
        dq, dk, dv = torch.autograd.grad(out, self._leaves, self._dout)
        return out.detach(), dq, dk, dv

    def results(self) -> Results:
        """Of this rank's tokens."""
        return self.forward_backward()


class EmulatedRing:
    """A ring's block calls on one device, as `attention.ring` makes them with variant "ring".

    Args:
        inputs: all of the work's tokens.
        work: documents; no window, which no ring does.
        backend: by name.
        ring: ranks of the ring.

    Raises:
        ValueError: a window, or a backend that cannot do these.
    """

    def __init__(self, inputs: Inputs, work: Work, backend: str, *, ring: int) -> None:
        if work.window is not None:
            raise ValueError(f"window = {work.window} with a ring of {ring}: a ring has no window")
        self._backend = backend_for(inputs, None, backend)
        self._scale, self._layout = work.head_dim**-0.5, ring_layout(work.bounds, ring)
        device = inputs.q.device
        self._positions = [_index(spans, device) for spans in self._layout.spans]
        self._ranks = [inputs.rows(positions) for positions in self._positions]
        self._shared_rows = [self._layout.shared_rows(rank) for rank in range(ring)]
        self._shared = [
            x.rows(_index(((part.start, part.stop) for part in rows), device))
            for x, rows in zip(self._ranks, self._shared_rows, strict=True)
        ]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(out, lse) of each rank."""
        return [self._attend(rank) for rank in range(len(self._ranks))]

    def forward_backward(self) -> list[Results]:
        """(out, dq, dk, dv) of each rank."""
        merged = self.forward()
        own = [self._own_gradients(rank, *merged[rank]) for rank in range(len(self._ranks))]
        for rank, x in enumerate(self._ranks):
            out, lse = merged[rank]
            for source, blocks in self._later_steps(rank):
                keys = self._shared[source]
                dk = torch.zeros(keys.k.shape, dtype=torch.float32, device=keys.k.device)
                dv = torch.zeros(keys.v.shape, dtype=torch.float32, device=keys.v.device)
                for block in blocks:
                    gradients = self._differentiate(x, keys, out, lse, block)
                    _add_to(own[rank][0], block.q, gradients[0])
                    _add_to(dk, block.k, gradients[1])
                    _add_to(dv, block.k, gradients[2])
                self._send_home(source, own[source], dk, dv)
        return [
            (out, dq.to(out.dtype), dk.to(out.dtype), dv.to(out.dtype))
            for (out, _), (dq, dk, dv) in zip(merged, own, strict=True)
        ]

    def results(self) -> Results:
        """The ranks' results in the order of the tokens."""
        order = torch.cat(self._positions).argsort()
        out, dq, dk, dv = (
            torch.cat(parts, dim=1)[:, order]
            for parts in zip(*self.forward_backward(), strict=True)
        )
        return out, dq, dk, dv

    def _later_steps(self, rank: int) -> list[tuple[int, tuple[Block, ...]]]:
        """The rank whose keys each step brings, and what is computed of them."""
        ring = len(self._ranks)
        sources = [(rank - step) % ring for step in range(1, num_steps(self._layout, "ring"))]
        return [(s, step_blocks(self._layout, rank, s, causal=True)) for s in sources]

    def _attend(self, rank: int) -> tuple[Tensor, Tensor]:
        x = self._ranks[rank]
        out = torch.empty(x.dout.shape, dtype=torch.float32, device=x.q.device)
        lse = torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
        for block in step_blocks(self._layout, rank, rank, causal=True):
            out[:, block.q], lse[:, block.q] = self._forward(x, x, block)
        for source, blocks in self._later_steps(rank):
            for block in blocks:
                out[:, block.q], lse[:, block.q] = merge_attention(
                    out[:, block.q], lse[:, block.q], *self._forward(x, self._shared[source], block)
                )
        return out.to(x.q.dtype), lse

    def _own_gradients(self, rank: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in fp32 of a rank's queries over its own keys."""
        x = self._ranks[rank]
        dq, dk, dv = (torch.empty(y.shape, device=y.device) for y in (x.q, x.k, x.v))
        for block in step_blocks(self._layout, rank, rank, causal=True):
            rows = block.q
            dq[:, rows], dk[:, rows], dv[:, rows] = self._differentiate(x, x, out, lse, block)
        return dq, dk, dv

    def _send_home(self, source: int, own: Sequence[Tensor], dk: Tensor, dv: Tensor) -> None:
        """Add a step's gradients to those of the keys' owner."""
        rows = self._shared_rows[source]
        for total, share in zip(own[1:], (dk, dv), strict=True):
            parts = share.split([part.stop - part.start for part in rows], dim=1)
            for part, values in zip(rows, parts, strict=True):
                _add_to(total, part, values)

    def _forward(self, x: Inputs, keys: Inputs, block: Block) -> tuple[Tensor, Tensor]:
        k, v = keys.k[:, block.k], keys.v[:, block.k]
        return self._backend.forward(x.q[:, block.q], k, v, scale=self._scale, causal=block.causal)

    def _differentiate(
        self, x: Inputs, keys: Inputs, out: Tensor, lse: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backend.backward(
            x.dout[:, block.q],
            x.q[:, block.q],
            keys.k[:, block.k],
            keys.v[:, block.k],
            out[:, block.q],
            lse[:, block.q],
            scale=self._scale,
            causal=block.causal,
        )


def backend_for(inputs: Inputs, window: int | None, name: str | None) -> Backend:
    """The backend of that name, or the one that the layer would choose.

    Raises:
        ValueError: the backend cannot do these; says no more than why.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    reason = None if name is None else why_not(name, q, k, v, window)
    if reason is not None:
        raise ValueError(reason)
    return choose_backend(q, k, v, window=window, name=name)


def _add_to(total: Tensor, rows: slice, part: Tensor) -> None:
    total[:, rows] += part


def _index(spans: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat([torch.arange(0, device=device), *parts])  # there may be no span
