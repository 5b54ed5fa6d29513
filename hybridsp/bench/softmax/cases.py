"""The rows of `hybridsp bench softmax`: which ways to compute attention there are, and their ops.

local      a backend on one device, over one rank's number of tokens
sp         the layer over the whole job: every split of the ranks in ring x Ulysses, every
           variant of the ring
emulated   a ring's block calls on one device (`--emulate-ring`), over the tokens of `local`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hybridsp.attention.ring_choice import choose_variant
from hybridsp.bench.softmax.ops import EmulatedRing, Inputs, Op, Parallel, Raw, backend_for
from hybridsp.bench.softmax.work import DTYPES, Work, document_bounds
from hybridsp.collectives.ring_links import ring_links
from hybridsp.layout import head_shares, ring_layout
from hybridsp.mesh import SPMesh
from hybridsp.ops.softmax import BACKENDS

LOCAL, PARALLEL, EMULATED = "local", "sp", "emulated"
AUTO, DOUBLE = "auto", "double_ring"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute attention.

    Attributes:
        method: local, sp or emulated.
        backend: by name.
        ring: degree; None for local.
        mesh: of sp; None elsewhere.
        variant: of a ring that is one; None elsewhere.
        ranks_per_host: of a double ring, if not what the hosts have; None elsewhere.
    """

    method: str
    backend: str
    ring: int | None = None
    mesh: SPMesh | None = None
    variant: str | None = None
    ranks_per_host: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "method": self.method,
            "backend": self.backend,
            "ring": self.ring,
            "ulysses": None if self.mesh is None else self.mesh.ulysses,
            "variant": self.variant,
        }

    @property
    def ranks(self) -> int:
        """Over which the tokens are cut."""
        return 1 if self.mesh is None else self.mesh.sp

    def op(self, inputs: Inputs, work: Work) -> Op:
        """What is timed; `ValueError` where it refuses."""
        if self.method == LOCAL:
            return Raw(inputs, work, self.backend)
        if self.method == EMULATED:
            assert self.ring is not None
            return EmulatedRing(inputs, work, self.backend, ring=self.ring)
        assert self.mesh is not None
        return Parallel(
            inputs,
            work,
            self.backend,
            variant=self.variant or AUTO,
            ranks_per_host=self.ranks_per_host,
            mesh=self.mesh,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a way to compute, and what; the work's tokens are those of all ranks."""

    way: Way
    tokens_per_rank: int
    work: Work


def plan(args: argparse.Namespace, ways: list[Way]) -> list[Case]:
    """All rows, `local` before what is compared with it.

    Raises:
        ValueError: more documents than tokens.
    """
    local = [way for way in ways if way.method == LOCAL]
    others = [way for way in ways if way.method != LOCAL]
    # One document on one device is what every rate is a percentage of, asked for or not.
    groups = {1: local} | {documents: [*local, *others] for documents in args.documents}
    return [
        Case(way=way, tokens_per_rank=tokens, work=work_of(args, tokens * way.ranks, documents))
        for tokens in args.tokens_per_rank
        for documents, its_ways in groups.items()
        for way in its_ways
    ]


def all_ways(args: argparse.Namespace, mesh: SPMesh) -> list[Way]:
    """Every method, backend, split and variant that was asked for. Collective."""
    meshes = [SPMesh(ring=ring, ulysses=ulysses) for ring, ulysses in splits(mesh.world_size)]
    default = default_backend(args, mesh.device)
    parallel = args.backends or (default,)
    # Where kernels can do the job, the CPU's backend would only take hours.
    local = args.backends or [b for b in BACKENDS if b != "plain" or default == "plain"]
    ways = [Way(method=LOCAL, backend=name) for name in local]
    ways += [
        Way(
            method=PARALLEL,
            backend=backend,
            ring=split.ring,
            mesh=split,
            variant=variant,
            ranks_per_host=args.ranks_per_host if variant == DOUBLE else None,
        )
        for split in meshes
        for variant in (args.variants if split.ring > 1 else (None,))
        for backend in parallel
    ]
    if args.emulate_ring is not None:
        emulated = {"method": EMULATED, "ring": args.emulate_ring, "variant": "ring"}
        ways += [Way(**emulated, backend=backend) for backend in parallel]
    return ways


def splits(ranks: int) -> Iterator[tuple[int, int]]:
    """(ring, ulysses) of every mesh of so many ranks, all Ulysses first."""
    return ((ring, ranks // ring) for ring in range(1, ranks + 1) if ranks % ring == 0)


def default_backend(args: argparse.Namespace, device: torch.device) -> str:
    """What the layer chooses for the longest sequence."""
    tokens = max(args.tokens_per_rank)
    # Only shapes matter: one element, expanded.
    one = torch.zeros(1, 1, 1, 1, device=device, dtype=DTYPES[args.dtype])
    q, k = (one.expand(1, tokens, heads, args.head_dim) for heads in (args.heads, args.kv_heads))
    return backend_for(Inputs(q=q, k=k, v=k, dout=q), args.window, None).name


def work_of(args: argparse.Namespace, tokens: int, documents: int) -> Work:
    """What the options describe, over so many tokens in so many documents."""
    return Work(
        bounds=document_bounds(tokens, documents, args.seed),
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        window=args.window,
        dtype=DTYPES[args.dtype],
    )


def chosen_variant(case: Case) -> str | None:
    """What "auto" stands for in a row, on its first rank; None for other rows."""
    mesh, work = case.way.mesh, case.work
    if mesh is None or case.way.variant != AUTO:
        return None
    share = head_shares(work.heads, work.kv_heads, mesh.ulysses)[0]
    return choose_variant(
        ring_layout(work.bounds, mesh.ring),
        row_bytes=len(share.kv) * 2 * work.head_dim * work.dtype.itemsize,
        pair_flops=len(share.q) * 4 * work.head_dim,
        causal=True,
        links=ring_links(mesh),
    )
