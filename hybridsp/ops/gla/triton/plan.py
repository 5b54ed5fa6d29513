"""How a span is cut for the kernels: chunks, stretches, parts; and what is launched how.

A stretch is as long as it may be while every multiprocessor still gets several of them: longer
ones mean less to scan, shorter ones more programs side by side. Parts bound the backward's
workspace: some heads, or, where the states of a single head are too many, some of its stretches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from hybridsp.ops.gla.contract import Tokens
from hybridsp.ops.gla.triton.tuning import Kernel, Launch, launch_of

CHUNK = 64
LONGEST_STRETCH = 64  # chunks
PROGRAMS_PER_PROCESSOR = 4
# Chunks, over all heads, whose pairs are made while a state travels: some 0.1 ms on an H100.
CHUNKS_IN_FLIGHT = 4096
# States of chunks that the backward holds at a time: with this much, one walk of a part of heads of
# 128 x 128 or 256 x 512 is just below one wave of programs on an H100; with 2**30 it was 1.5 waves.
WORKSPACE_BYTES = 2**30 * 2 // 3


@dataclass(frozen=True)
class Part:
    """Some of a span's B * H heads, and some of their stretches."""

    heads: range
    stretches: range


class Plan:
    """The sizes of one call, and its inputs laid out for the kernels.

    H, K, V, C as everywhere; G is K with a decay per channel and 1 with a decay per head. q, k, v
    and g are contiguous. `launches` are used before those of `tuning`.
    """

    def __init__(self, tokens: Tokens, launches: Mapping[Kernel, Launch] | None = None) -> None:
        self.launches = launches or {}
        self.q, self.k, self.v, self.g = (
            x.contiguous() for x in (tokens.q, tokens.k, tokens.v, tokens.g)
        )
        self.scale, self.device = tokens.scale, tokens.q.device
        self.batch, self.length, self.H, self.K = self.q.shape
        self.V, self.G, self.C = self.v.shape[-1], self.g.shape[-1], CHUNK
        self.channels = self.G > 1
        self.heads, self.num_heads = (self.batch, self.H), self.batch * self.H
        self.chunks = -(-self.length // CHUNK)
        self.shape = {"H": self.H, "K": self.K, "V": self.V, "G": self.G, "C": CHUNK}
        self.segments = None if tokens.segments is None else tokens.segments.contiguous()
        exact = self.q.dtype == torch.float32
        self.precision = {"PRECISION": "tf32x3" if exact else "tf32"}
        # In `gradient_kernel` products run over tokens, a layout in which tf32 has to be turned
        # in registers; three bf16 products do not, and are more exact.
        self.gradient_precision = {"PRECISION": "tf32x3" if exact else "bf16x3"}
        # A weak gate behind a strong one is a small difference of large sums.
        self.sums = {"SUM": tl.float64 if exact else tl.float32}
        self.documents = {"DOCUMENTS": tokens.segments is not None}
        programs = self.chunks * self.num_heads * self.blocks(self.launch("output"))
        wanted = PROGRAMS_PER_PROCESSOR * _processors(self.device)
        self.stretch_chunks = min(max(programs // wanted, 1), LONGEST_STRETCH)
        self.stretches = -(-self.chunks // self.stretch_chunks)
        in_flight = min(-(-CHUNKS_IN_FLIGHT // self.num_heads), self.chunks)
        self.all_chunks = range(self.chunks)
        self.chunks_at_once = self.all_chunks[: self.chunks - in_flight]
        self.chunks_in_flight = self.all_chunks[self.chunks - in_flight :]
        self.whole = Part(range(self.num_heads), range(self.stretches))

    def launch(self, kernel: Kernel) -> Launch:
        """How to launch `kernel`."""
        if kernel in self.launches:
            return self.launches[kernel]
        chip = _chip(self.device)
        return launch_of(kernel, self.K, self.V, self.channels, self.q.dtype, chip)

    def blocks(self, launch: Launch) -> int:
        """Blocks of BK x BV in a state."""
        return -(-self.K // launch.BK) * -(-self.V // launch.BV)

    def blocks_of(self, launch: Launch) -> dict[str, int]:
        """The kernels' block sizes."""
        return {"BK": launch.BK, "BG": launch.BK if self.channels else 1, "BV": launch.BV}

    def compiler(self, launch: Launch) -> dict[str, int | None]:
        """Triton's launch options."""
        return {
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "maxnreg": launch.maxnreg,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the span's device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def parts(self) -> Iterator[Part]:
        """The span in parts whose states fit the workspace, as far as a stretch allows."""
        in_states = self.v_parts * self.K * torch.float32.itemsize
        tails = 0 if self.q.dtype == torch.float32 else torch.int8.itemsize
        each = (2 * self.q.element_size() + tails) * self.K * self.V + in_states
        chunks = max(WORKSPACE_BYTES // each, 1)
        heads = max(chunks // self.chunks, 1)
        stretches = max(chunks // self.stretch_chunks, 1)
        for first in range(0, self.num_heads, heads):
            some = range(first, min(first + heads, self.num_heads))
            for start in range(0, self.stretches, stretches):
                yield Part(some, range(start, min(start + stretches, self.stretches)))

    @property
    def v_parts(self) -> int:
        """Blocks of V in which a walk sums S x D."""
        return -(-self.V // self.launch("states").BV)

    def first_chunk(self, part: Part) -> int:
        """Where a part begins."""
        return part.stretches.start * self.stretch_chunks

    def num_chunks(self, part: Part) -> int:
        """Chunks of a part."""
        stop = min(part.stretches.stop * self.stretch_chunks, self.chunks)
        return stop - self.first_chunk(part)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=8)
def _chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
