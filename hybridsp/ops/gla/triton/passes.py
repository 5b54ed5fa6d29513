"""The passes of gated linear attention on a GPU, kernel after kernel.

    forward   end_state       prepare, walk from zero, scan          -> All-Scan
              intra_chunk     pairs                                  while it is in flight
              output          walk
    backward  start_gradient  prepare and pairs, walk from zero, scan, reversed  -> reverse All-Scan
              intra_chunk     walk from zero, scan                   while it is in flight
              gradients       walk reversed (dv, dstates), walk (states, crossed), gradients

Between forward and backward nothing is kept but the inputs and the state that entered; what the
kernels need is computed again, because reading q, k, v and the gates costs less than storing a
state for every chunk. The backward does hold states of chunks, but of a part of the span at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridsp.ops.gla.contract import Tokens
from hybridsp.ops.gla.triton.gradients import gradient_kernel
from hybridsp.ops.gla.triton.plan import Part, Plan
from hybridsp.ops.gla.triton.prepare import prepare_kernel
from hybridsp.ops.gla.triton.states import scan_kernel, walk_kernel


class TritonForward:
    """`contract.ForwardPass`, by Triton kernels."""

    def __init__(self, tokens: Tokens) -> None:
        self.plan = Plan(tokens)

    def end_state(self) -> tuple[Tensor, Tensor]:
        """The span's end state from zero, and its decay."""
        self.prepared = Prepared(self.plan)
        # One pass over q, k and g makes both what states need and pairs; pairs of the last chunks
        # are left to do while the state travels.
        self.prepared.make(self.plan.chunks_at_once, states=True, pairs=True)
        self.prepared.make(self.plan.chunks_in_flight, states=True)
        self.span = Span(self.plan, self.prepared, self.plan.v, reverse=False)
        return self.span.end, self.span.decay

    def intra_chunk(self) -> None:
        """What the tokens of a chunk read from each other."""
        self.prepared.make(self.plan.chunks_in_flight, pairs=True)
        self.prepared.mend_strong()

    def output(self, incoming: Tensor | None) -> Tensor:
        """O [B, L, H, V]."""
        out = torch.empty_like(self.plan.v)
        self.span.walk(self.plan.whole, incoming, out=out)
        return out


class TritonBackward:
    """`contract.BackwardPass`, by Triton kernels."""

    def __init__(self, tokens: Tokens, dout: Tensor, incoming: Tensor | None) -> None:
        self.plan = Plan(tokens)
        self.dout, self.incoming = dout.contiguous(), incoming

    def start_gradient(self) -> tuple[Tensor, Tensor]:
        """Gradient of the state that enters, through this span's outputs; and the decay."""
        self.prepared = Prepared(self.plan)
        # Pairs are not needed yet, but one pass over q, k and g makes both; what is left to do
        # while the scan is in flight, `intra_chunk`, takes as long as a state takes to travel.
        self.prepared.make(self.plan.all_chunks, states=True, pairs=True)
        self.prepared.mend_strong()
        self.gradient = Span(self.plan, self.prepared, self.dout, reverse=True)
        return self.gradient.end, self.gradient.decay

    def intra_chunk(self) -> None:
        """The states once more."""
        self.span = Span(self.plan, self.prepared, self.plan.v, reverse=False)

    def gradients(self, outgoing: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv, dg."""
        plan, dv = self.plan, torch.empty_like(self.plan.v)
        results = Gradients(plan, self.prepared)
        for part in plan.parts():
            chunks = ChunkStates(plan, part)
            self.gradient.walk(part, outgoing, out=dv, chunks=chunks)
            self.span.walk(part, self.incoming, chunks=chunks)
            results.compute(part, self.dout, chunks)
        return results.dq, results.dk, dv, results.gates()


class Prepared:
    """What `prepare_kernel` makes; attributes have its arguments' names."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        shape = (*plan.heads, plan.chunks)
        self.read, self.written = torch.empty_like(plan.q), torch.empty_like(plan.k)
        self.kept = plan.empty(*shape, plan.G)
        self.pairs = plan.empty(*shape, plan.C, plan.C)
        self.strong = plan.empty(*shape, dtype=torch.int8)

    def make(self, chunks: range, *, states: bool = False, pairs: bool = False) -> None:
        """Fill, for some chunks, read, written and kept; or pairs and strong; or all."""
        self._launch(chunks, states=states, pairs=pairs)

    def mend_strong(self) -> None:
        """Fill the pairs of strong chunks, once all pairs are made."""
        if self.plan.channels:
            self._launch(self.plan.all_chunks, pairs=True, strong=True)

    def _launch(
        self, chunks: range, *, states: bool = False, pairs: bool = False, strong: bool = False
    ) -> None:
        if not chunks:
            return
        plan, launch = self.plan, self.plan.launch("prepare")
        prepare_kernel[(len(chunks), plan.num_heads)](
            plan.q, plan.k, plan.g, plan.segments, self.read, self.written, self.kept,
            self.pairs, self.strong, plan.scale, plan.length, plan.chunks, chunks.start,
            H=plan.H, K=plan.K, G=plan.G, C=plan.C, BK=launch.BK,
            BG=launch.BK if plan.channels else 1, CHANNELS=plan.channels,
            STATES=states, PAIRS=pairs, STRONG=strong, **plan.documents, **plan.sums,
            **plan.precision, **plan.compiler(launch),
        )  # fmt: skip


class Span:
    """The states along a span, or, reversed, their gradients.

    `states` [B, H, stretches, K, V] and `until` [B, H, stretches, G] as in `scan_kernel`; `end`
    [B, H, K, V] and `decay` [B, H, G] are the span's own. All fp32.
    """

    def __init__(self, plan: Plan, prepared: Prepared, y: Tensor, *, reverse: bool) -> None:
        self.plan, self.prepared, self.y, self.reverse = plan, prepared, y, reverse
        shape = (*plan.heads, plan.stretches)
        self.states = plan.empty(*shape, plan.K, plan.V)
        self.decays, self.until = plan.empty(*shape, plan.G), plan.empty(*shape, plan.G)
        self.end = plan.empty(*plan.heads, plan.K, plan.V)
        self.decay = plan.empty(*plan.heads, plan.G)
        self._walk(plan.whole, None, None, None, enter=False)
        launch = plan.launch("scan")
        scan_kernel[(plan.blocks(launch), plan.num_heads)](
            self.states, self.decays, self.until, self.end, self.decay, plan.scale,
            plan.stretches,
            K=plan.K, V=plan.V, G=plan.G, **plan.blocks_of(launch), REVERSE=reverse,
            **plan.compiler(launch),
        )  # fmt: skip

    def walk(
        self,
        part: Part,
        incoming: Tensor | None,
        *,
        out: Tensor | None = None,
        chunks: ChunkStates | None = None,
    ) -> None:
        """Walk again, now with what enters; fill `out` and its part of `chunks`, if given."""
        self._walk(part, incoming, out, chunks, enter=True)

    def _walk(
        self,
        part: Part,
        incoming: Tensor | None,
        out: Tensor | None,
        chunks: ChunkStates | None,
        *,
        enter: bool,
    ) -> None:
        plan, prepared = self.plan, self.prepared
        launch = plan.launch("states" if out is None else "output")
        keep = None if chunks is None else chunks.dstates if self.reverse else chunks.states
        walk_kernel[(plan.blocks(launch), len(part.stretches), len(part.heads))](
            prepared.read, prepared.written, prepared.kept, self.y, prepared.pairs,
            self.states, self.until, None if incoming is None else incoming.contiguous(),
            out, keep, None if chunks is None else chunks.dstates,
            None if chunks is None else chunks.dtails,
            None if chunks is None else chunks.crossed, self.states, self.decays,
            plan.scale, plan.length, plan.chunks, plan.stretch_chunks, plan.stretches,
            part.heads.start, part.stretches.start, plan.num_chunks(part),
            **plan.shape, **plan.blocks_of(launch), REVERSE=self.reverse, ENTER=enter,
            INCOMING=incoming is not None, OUTPUT=out is not None, KEEP=chunks is not None,
            CROSS=chunks is not None and not self.reverse, **plan.precision,
            **plan.compiler(launch),
        )  # fmt: skip


class ChunkStates:
    """States and gradients at the chunks of a part, in the dtype of products.

    `states`, `dstates` [heads, chunks, K, V], `dtails` like them, int8, or None where dstates are
    fp32, `crossed` [blocks of V, heads, chunks, K] fp32 as in `walk_kernel`, which fills dstates
    first.
    """

    def __init__(self, plan: Plan, part: Part) -> None:
        shape = (len(part.heads), plan.num_chunks(part), plan.K)
        self.states = plan.empty(*shape, plan.V, dtype=plan.q.dtype)
        self.dstates = plan.empty(*shape, plan.V, dtype=plan.q.dtype)
        exact = plan.q.dtype == torch.float32
        self.dtails = None if exact else plan.empty(*shape, plan.V, dtype=torch.int8)
        self.crossed = plan.empty(plan.v_parts, *shape)


class Gradients:
    """dq, dk and what becomes dg, filled part by part.

    dq and dk take the place of `prepared.read` and `prepared.written`, which have their shapes and
    which no kernel asks for once the states of a part are there.
    """

    def __init__(self, plan: Plan, prepared: Prepared) -> None:
        self.plan, self.strong = plan, prepared.strong
        self.dq, self.dk = prepared.read, prepared.written
        self.k_blocks = -(-plan.K // plan.launch("gradient").BK)
        # Heads that share a decay among their channels get one part from each block of K.
        parts = (self.k_blocks, *plan.g.shape)
        self.dg = torch.empty_like(plan.g) if plan.channels else plan.empty(*parts)

    def compute(self, part: Part, dout: Tensor, chunks: ChunkStates) -> None:
        """`gradient_kernel` for a part, with the states of its chunks."""
        for strong in (False, True) if self.plan.channels else (False,):
            self.launch(part, dout, chunks, strong=strong)

    def launch(self, part: Part, dout: Tensor, chunks: ChunkStates, *, strong: bool) -> None:
        """Do the mild chunks, or the strong ones."""
        plan, launch = self.plan, self.plan.launch("gradient")
        gradient_kernel[(plan.num_chunks(part) * self.k_blocks, len(part.heads))](
            plan.q, plan.k, plan.v, plan.g, dout, plan.segments, self.strong,
            chunks.states, chunks.dstates, chunks.crossed, self.dq, self.dk, self.dg,
            plan.scale, plan.length, plan.chunks, part.heads.start, plan.first_chunk(part),
            plan.num_chunks(part), plan.batch * plan.length,
            **plan.shape, **plan.blocks_of(launch), V_PARTS=plan.v_parts,
            CHANNELS=plan.channels, STRONG=strong, **plan.documents, **plan.sums,
            **plan.gradient_precision, **plan.compiler(launch),
        )  # fmt: skip

    def gates(self) -> Tensor:
        """The gradient of g, in its shape and dtype."""
        return self.dg if self.plan.channels else self.dg.sum(dim=0).to(self.plan.g.dtype)
