"""One job of many ranks that speaks with one voice.

Every rank runs the same benchmark. What the user did wrong is found by all of them and told by one;
what cannot run on some rank becomes a reason that all of them know, so that none goes on alone into
the next case. That works between collectives, not inside of them: see `attempt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh, gather_objects

C = TypeVar("C")
T = TypeVar("T")


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

    A rank that fails before `work` communicates, or after, or where all ranks fail, is told of. One
    that fails alone between two collectives of `work`, for lack of memory say, leaves the others
    waiting in the second, where nobody can tell them: they fail at the group's timeout, by an error
    or, under NCCL, by the end of the process.

    Refusals and lack of memory are reasons, and whatever else PyTorch reports as a RuntimeError;
    other errors are bugs of ours and are raised. Of `foreign` code every error is a reason.
    """
    reasons_here = (Exception,) if foreign else (ValueError, RuntimeError, ImportError)
    result, reason = None, None
    try:
        result = work()
    except reasons_here as error:
        speaks = isinstance(error, (ValueError, ImportError))
        text = str(error) if speaks else f"{type(error).__name__}: {error}"
        reason = " ".join(text.split())
    reasons = gather_objects(reason)
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    told = [(rank, text) for rank, text in enumerate(reasons) if text is not None]
    if not told:
        return result, None
    rank, text = told[0]
    return None, text if rank == 0 else f"rank {rank}: {text}"
