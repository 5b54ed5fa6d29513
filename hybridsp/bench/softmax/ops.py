"""What `hybridsp bench softmax` times: a raw kernel, the layer over a mesh, a ring on one device.

    Raw           one causal call of a backend per document, and nothing else: what all others are
                  held against
    Parallel      `softmax_attention` over the mesh; the inputs are this rank's share
    EmulatedRing  the layer's ring, all ranks one after another: its block calls, the merges of
                  outputs and the sums of gradients, but no messages: what cutting attention in
                  blocks costs, which one device can tell

Each has a forward and a forward with backward, which are timed, and `results`, which are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridsp.attention import softmax_attention
from hybridsp.attention.ring import attend, differentiate
from hybridsp.attention.ring_plan import RingPlan
from hybridsp.attention.ring_transport import Visits, add, take
from hybridsp.bench.softmax.work import Work
from hybridsp.layout import ring_layout
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import Backend, choose_backend, why_not

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""out, dq, dk, dv, in the order of the tokens."""
Pair = tuple[Tensor, Tensor]
"""Keys and values, or their gradients."""


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
        backend, variant, ranks_per_host: as in `softmax_attention`.
        mesh: its SP degree is the world.
    """

    def __init__(
        self,
        inputs: Inputs,
        work: Work,
        backend: str,
        *,
        variant: str,
        ranks_per_host: int | None,
        mesh: SPMesh,
    ) -> None:
        self._leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        self._dout = inputs.dout
        packed = len(work.bounds) > 2
        self._options: dict[str, Any] = {
            "mesh": mesh,
            "cu_seqlens": torch.tensor(work.bounds, dtype=torch.int32) if packed else None,
            "window": work.window,
            "variant": variant,
            "ranks_per_host": ranks_per_host,
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
    """A ring on one device, one rank after another: `attention.ring` itself, without messages.

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
        packed = len(work.bounds) > 2
        chosen = backend_for(inputs, None, backend, packed=packed)
        layout = ring_layout(work.bounds, ring)
        device = inputs.q.device
        self._positions = [_index(spans, device) for spans in layout.spans]
        self._ranks = [inputs.rows(positions) for positions in self._positions]
        self._plans = [
            RingPlan(
                rank=rank,
                layout=layout,
                causal=True,
                window=None,
                scale=work.head_dim**-0.5,
                variant="ring",
                backend=chosen,
            )
            for rank in range(ring)
        ]
        rows = [layout.shared_rows(rank) for rank in range(ring)]
        keys = [(take(x.k, r), take(x.v, r)) for x, r in zip(self._ranks, rows, strict=True)]
        mail: list[list[Pair]] = [[] for _ in range(ring)]
        self._transports = [OneDevice(plan, keys, mail) for plan in self._plans]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """(out, lse) of each rank."""
        return [attend(x.q, x.k, x.v, plan, transport) for x, plan, transport in self._each()]

    def forward_backward(self) -> list[Results]:
        """(out, dq, dk, dv) of each rank."""
        merged = self.forward()
        gradients = [
            differentiate(x.dout, x.q, x.k, x.v, out, lse, plan, transport)
            for (x, plan, transport), (out, lse) in zip(self._each(), merged, strict=True)
        ]
        for transport, (_, dk, dv) in zip(self._transports, gradients, strict=True):
            transport.collect(dk, dv)  # what later ranks had for this one
        return [
            (out, dq.to(out.dtype), dk.to(out.dtype), dv.to(out.dtype))
            for (out, _), (dq, dk, dv) in zip(merged, gradients, strict=True)
        ]

    def results(self) -> Results:
        """The ranks' results in the order of the tokens."""
        order = torch.cat(self._positions).argsort()
        out, dq, dk, dv = (
            torch.cat(parts, dim=1)[:, order]
            for parts in zip(*self.forward_backward(), strict=True)
        )
        return out, dq, dk, dv

    def _each(self) -> Iterator[tuple[Inputs, RingPlan, OneDevice]]:
        return zip(self._ranks, self._plans, self._transports, strict=True)


class OneDevice:
    """The `Transport` of a ring whose ranks take turns on one device: nothing has to travel.

    Args:
        plan: of one rank.
        keys: what each rank shares.
        mail: for each rank, what others have for its keys and it has not collected.
    """

    def __init__(self, plan: RingPlan, keys: list[Pair], mail: list[list[Pair]]) -> None:
        self._plan, self._keys, self._mail = plan, keys, mail
        self._rows = plan.layout.shared_rows(plan.rank)

    def visits(self, k: Tensor, v: Tensor) -> Visits:
        """Own keys, then those that others share."""
        yield 0, k, v
        for step in range(1, self._plan.steps):
            yield step, *self._keys[self._plan.owner(step)]

    def send_home(
        self, step: int, step_dk: Tensor, step_dv: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Leave them for the owner of the step's keys."""
        self._mail[self._plan.owner(step)].append((step_dk, step_dv))

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Add what ranks whose turn has been have left."""
        while self._mail[self._plan.rank]:
            for whole, share in zip((dk, dv), self._mail[self._plan.rank].pop(), strict=True):
                add(whole, self._rows, share)


def backend_for(
    inputs: Inputs, window: int | None, name: str | None, *, packed: bool = False
) -> Backend:
    """The backend of that name, or the one that the layer would choose for `packed` documents.

    Raises:
        ValueError: the backend cannot do these; says no more than why.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    reason = None if name is None else why_not(name, q, k, v, window)
    if reason is not None:
        raise ValueError(reason)
    return choose_backend(q, k, v, window=window, name=name, lengths_vary=packed)


def _index(spans: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat([torch.arange(0, device=device), *parts])  # there may be no span
