"""One job of many ranks that speaks with one voice.

Every rank runs the same benchmark. What the user did wrong is found by all of them and told by one;
what cannot run on some rank becomes a reason that all of them know, so that none goes on alone into
the next case. A rank that fails tells the others where they meet next (`meet`), be it inside of a
case or at its end; that works between collectives, not inside of them: see `attempt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh, gather_objects

C = TypeVar("C")
T = TypeVar("T")


@dataclass(frozen=True)
class Failed:
    """What a rank brings to a meeting to which it comes because its work has failed."""

    reason: str


class RankFailedError(RuntimeError):
    """Some rank has failed, and all have met since: whoever catches this need tell nobody."""


@contextmanager
def job() -> Iterator[SPMesh]:
    """All ranks of the job as one SP group; a job of one where there is no launcher.

    Raises:
        ValueError: the launcher's variables do not fit this host.
    """
    ours = not dist.is_initialized()
    yield SPMesh(ring=rank_from_environment().world_size)
    # Not after an error: to leave a group waits for the others, who may be waiting for this rank.
    if ours:
        dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Around what fails on every rank alike: rank 0 raises the error, the others exit with 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if rank_from_environment().rank == 0:
            raise
        raise SystemExit(2) from error


def attempt_each(
    cases: Iterable[C], work: Callable[[C], T], mesh: SPMesh, *, name: str
) -> Iterator[tuple[C, T | None, str | None]]:
    """Every case with what `work(case)` returns, or the reason why it cannot run. Collective.

    Args:
        cases: one after another, the same on every rank.
        work: see `attempt`.
        mesh: the job; its first rank shows the progress.
        name: of the benchmark.
    """
    for case in tqdm(cases, desc=name, unit="case", disable=mesh.rank > 0):
        yield case, *attempt(partial(work, case), mesh)


def attempt(
    work: Callable[[], T], mesh: SPMesh, *, foreign: bool = False
) -> tuple[T | None, str | None]:
    """What `work()` returns, or the reason why it cannot run on some rank. Collective.

    A rank that fails where the others, in `work`, `meet` next is told of, and so is one behind
    whose failure `work` does not communicate any more. One that fails alone before some other
    collective, for lack of memory say, leaves the others waiting in that, where nobody can tell
    them: they fail at the group's timeout, by an error or, under NCCL, by the end of the process;
    at once if they gather objects there, and cannot read its message.

    Refusals and lack of memory are reasons, and whatever else PyTorch reports as a RuntimeError;
    other errors are bugs of ours and are raised. Of `foreign` code every error is a reason.
    """
    reasons_here = (Exception,) if foreign else (ValueError, RuntimeError, ImportError)
    result, failed, reason = None, None, None
    try:
        result = work()
    except RankFailedError as error:
        reason = str(error)
    except reasons_here as error:
        speaks = isinstance(error, (ValueError, ImportError))
        text = str(error) if speaks else f"{type(error).__name__}: {error}"
        failed = Failed(" ".join(text.split()))
    # Behind the handlers, which hold on to all that `work` had on the GPU.
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    if reason is None:
        reason = _first_failure(gather_objects(failed))
    return (result if reason is None else None), reason


def meet(value: T) -> list[T]:
    """Every rank's value, in rank order. Collective over the world, inside of an `attempt`.

    Raises:
        RankFailedError: a rank came whose work has failed; every rank learns of the same one.
    """
    brought = gather_objects(value)
    if (reason := _first_failure(brought)) is not None:
        raise RankFailedError(reason)
    return brought


def _first_failure(brought: Sequence[object]) -> str | None:
    told = [(rank, each.reason) for rank, each in enumerate(brought) if isinstance(each, Failed)]
    if not told:
        return None
    rank, reason = told[0]
    return reason if rank == 0 else f"rank {rank}: {reason}"
