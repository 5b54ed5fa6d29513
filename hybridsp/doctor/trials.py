"""Each collective that training uses, once: does it end, is its result right, what does it take?

Every rank sends numbers from which any rank can compute what must arrive, so nothing has to be
gathered to check it. A call is made twice: the first one connects, compiles and measures, the
second one shows the time of those that follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives import RingExchange, all_scan, left_halo
from hybridsp.collectives.scan_plan import ALGORITHMS, Options, plan_scan
from hybridsp.collectives.torch_names import all_gather, reduce_scatter
from hybridsp.mesh import SPMesh

NUMBERS = 2**16  # per rank or per pair of ranks: 256 KiB
STATE = (1, 16, 128, 128)  # [B, H, K, V] of a layer of 16 heads: 1 MiB
STATE_TEXT = "a state of 1 MiB"
# That a job can run without: what cannot be had here is no fault.
OPTIONAL = ("hierarchical", "symmetric")
TOLERANCE = 1e-4  # of a sum of P terms in fp32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A collective to try.

    Attributes:
        name: in the report.
        prepare: mesh -> the call and what it must return on this rank.
        optional: a ValueError of the call says why it cannot be had, and that is all right.
        note: mesh -> what else to tell, once it has run.
    """

    name: str
    prepare: Callable[[SPMesh], tuple[Callable[[], Tensor], Tensor]]
    optional: bool = False
    note: Callable[[SPMesh], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a trial on one rank.

    Attributes:
        seconds: of the second call.
        first: of the first one.
        note: what else to tell.
        refused: why an optional one cannot be had.
        error: what went wrong.
        stuck: it had not returned when the time was over.
    """

    seconds: float = 0.0
    first: float = 0.0
    note: str = ""
    refused: str = ""
    error: str = ""
    stuck: bool = False

    def as_json(self) -> dict[str, object]:
        """The fields as JSON takes them."""
        return asdict(self)


def all_trials() -> Iterator[Trial]:
    """Those of a job, the simplest first and what is most likely to hang last."""
    yield Trial(name="all_reduce", prepare=_all_reduce)
    yield Trial(name="all_gather", prepare=_all_gather)
    yield Trial(name="reduce_scatter", prepare=_reduce_scatter)
    yield Trial(name="all_to_all", prepare=_all_to_all)
    yield Trial(name="send/recv ring", prepare=_ring)
    yield Trial(name="halo", prepare=_halo)
    for algorithm in ALGORITHMS:
        yield Trial(
            name=f"All-Scan {algorithm}",
            prepare=_scan(algorithm),
            optional=algorithm in OPTIONAL,
            note=_chosen_scan if algorithm == "auto" else None,
        )


def attempt(trial: Trial, mesh: SPMesh) -> Outcome:
    """Make the calls and check their results."""
    call, expected = trial.prepare(mesh)
    try:
        first, result = _timed(call, mesh.device)
    except ValueError as error:
        if not trial.optional:
            raise
        return Outcome(refused=" ".join(str(error).split()))
    if problem := _difference(result, expected):
        return Outcome(first=first, error=f"returned wrong values: {problem}")
    seconds, result = _timed(call, mesh.device)
    if problem := _difference(result, expected):
        return Outcome(first=first, error=f"returned wrong values the second time: {problem}")
    note = trial.note(mesh) if trial.note is not None else ""
    return Outcome(seconds=seconds, first=first, note=note)


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _difference(result: Tensor, expected: Tensor) -> str:
    """What is wrong with a result; empty if nothing."""
    if result.shape != expected.shape:
        return f"shape {tuple(result.shape)}, not {tuple(expected.shape)}"
    if torch.allclose(result, expected, rtol=TOLERANCE, atol=TOLERANCE):
        return ""
    return f"off by {(result - expected).abs().max().item():g}"


def _pattern(rank: int, mesh: SPMesh) -> Tensor:
    """What a rank sends: [NUMBERS], other numbers in each place and on each rank, all exact."""
    return torch.arange(NUMBERS, device=mesh.device) % 1024 + 1024.0 * (rank % 64)


def _all_reduce(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    def call() -> Tensor:
        summed = _pattern(mesh.rank, mesh)
        dist.all_reduce(summed, group=mesh.sp_group)
        return summed

    return call, _sum_of_patterns(mesh)


def _sum_of_patterns(mesh: SPMesh) -> Tensor:
    rest = sum(rank % 64 for rank in range(mesh.sp))
    return mesh.sp * _pattern(0, mesh) + 1024.0 * rest


def _all_gather(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    def call() -> Tensor:
        sent = _pattern(mesh.rank, mesh)
        received = sent.new_empty(mesh.sp * NUMBERS)
        all_gather(received, sent, group=mesh.sp_group)
        return received

    return call, torch.cat([_pattern(rank, mesh) for rank in range(mesh.sp)])


def _reduce_scatter(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    def call() -> Tensor:
        sent = torch.cat([(target + 1) * _pattern(mesh.rank, mesh) for target in range(mesh.sp)])
        received = sent.new_empty(NUMBERS)
        reduce_scatter(received, sent, group=mesh.sp_group)
        return received

    return call, (mesh.sp_rank + 1) * _sum_of_patterns(mesh)


def _all_to_all(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    def call() -> Tensor:
        sent = torch.cat([target + _pattern(mesh.rank, mesh) for target in range(mesh.sp)])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=mesh.sp_group)
        return received

    return call, torch.cat([mesh.sp_rank + _pattern(rank, mesh) for rank in range(mesh.sp)])


def _ring(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    exchange = RingExchange(mesh.sp_group)

    def call() -> Tensor:
        exchange.post(_pattern(mesh.rank, mesh), NUMBERS)
        return exchange.wait()

    return call, _pattern((mesh.sp_rank - 1) % mesh.sp, mesh)


def _halo(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
    def tokens(rank: int) -> Tensor:
        return _pattern(rank, mesh).view(1, 256, -1)

    def call() -> Tensor:
        return left_halo(tokens(mesh.rank), 3, mesh.sp_group)

    left = tokens(max(mesh.sp_rank - 1, 0))[:, -3:]
    return call, left if mesh.sp_rank else torch.zeros_like(left)


def _scan(algorithm: str) -> Callable[[SPMesh], tuple[Callable[[], Tensor], Tensor]]:
    def prepare(mesh: SPMesh) -> tuple[Callable[[], Tensor], Tensor]:
        state, decay = _scan_input(mesh.sp_rank, mesh)

        def call() -> Tensor:
            return all_scan(state, decay, mesh.sp_group, algorithm=algorithm)  # type: ignore[arg-type]

        return call, _entering(mesh)

    return prepare


def _scan_input(rank: int, mesh: SPMesh) -> tuple[Tensor, Tensor]:
    """S_p and d_p: one base for all ranks, times p + 1; decays that differ by channel and rank."""
    batch, heads, key_dim, value_dim = STATE
    base = torch.linspace(-1, 1, value_dim, device=mesh.device).expand(STATE)
    decay = torch.linspace(0.1, 0.9, heads * key_dim, device=mesh.device)
    decay = decay.view(batch, heads, key_dim)
    return (rank + 1) * base.contiguous(), decay if rank % 2 else decay.flip(-1).contiguous()


def _entering(mesh: SPMesh) -> Tensor:
    """In(p) by its definition, In(p+1) = d_p In(p) + S_p; so it is the base times one number."""
    base = _scan_input(0, mesh)[0]
    factor = torch.zeros(STATE[:3], dtype=torch.float64, device=mesh.device)
    for rank in range(mesh.sp_rank):
        decay = _scan_input(rank, mesh)[1]
        factor = decay.double() * factor + rank + 1
    return (factor[..., None] * base).float()


def _chosen_scan(mesh: SPMesh) -> str:
    """What "auto" takes; the call before has measured the links and agreed on it."""
    state, decay = _scan_input(mesh.sp_rank, mesh)
    plan = plan_scan(state, decay, mesh.sp_group, Options())
    blocks = f" in {plan.num_blocks} blocks" if plan.num_blocks else ""
    return f"takes {plan.algorithm}{blocks} for {STATE_TEXT}"


__all__ = ["Outcome", "Trial", "all_trials", "attempt"]
