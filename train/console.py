"""What a script of many processes says: one voice, and one line for an error that can be mended.

Every rank runs the same script, and the libraries below it warn on each of them. Here all but rank
0 fall silent, and an error that says by itself what is wrong (a `ValueError`, which in this project
names a value and its remedy, a file's `OSError`, or a failed self-check) ends the job with that
text and exit code 2 instead of as many tracebacks as there are ranks. Errors of other kinds, lost
and hanging ranks are the watchdog's (`hybridsp.faults`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import datasets
import torch.distributed as dist
import transformers

from hybridsp.faults import Position, Watchdog
from hybridsp.launch import COLLECTIVE_TIMEOUT, rank_from_environment
from hybridsp.mesh import SPMesh
from hybridsp.recipe import Recipe, one_line
from hybridsp.self_check import SelfCheckError
from hybridsp.untrusted import redact

logger = logging.getLogger(__name__)

# Errors that say by themselves what the user can mend: the project's own, and a file or disk's.
USER_ERRORS = (ValueError, OSError, SelfCheckError)
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def keep_quiet(is_main: bool) -> None:
    """Let only rank 0 speak, and keep libraries from warning about each other."""
    # DeepSpeed 0.19.8 calls functions that torch 2.13 is about to rename, twice per step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed's schedulers warn about what their own constructors do.
    hide = "Attempting to get learning rate from scheduler before it has started"
    deepspeed_logger = logging.getLogger("DeepSpeed")
    deepspeed_logger.addFilter(lambda record: hide not in record.getMessage())
    if is_main:
        _let_hybridsp_speak()
        return
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # A filter, because DeepSpeed sets its logger's level when it is imported, later on.
    deepspeed_logger.addFilter(lambda record: record.levelno >= logging.ERROR)


def _let_hybridsp_speak() -> None:
    """Show what hybridsp says of its choices: which kernels, which All-Scan, the self-check."""
    log = logging.getLogger("hybridsp")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


@contextlib.contextmanager
def errors_of_users(*, show_traceback: bool) -> Iterator[None]:
    """Turn one of `USER_ERRORS` into a line of rank 0 and exit code 2; ^C likewise, with 130."""
    try:
        yield
    except USER_ERRORS as error:
        if show_traceback:
            raise
        rank = rank_from_environment().rank
        if rank > 0:
            # An error of all ranks is told by rank 0, and the launcher ends the others meanwhile.
            # One that only this rank met would otherwise not be told by anyone.
            time.sleep(3)
        whose = "error" if rank == 0 else f"error on rank {rank}"
        print(f"{whose}: {redact(one_line(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_from_environment().rank == 0:
            print("interrupted: start again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def watched_job(recipe: Recipe, output_dir: str | Path) -> Iterator[tuple[SPMesh, Position]]:
    """The job's ranks as the recipe's mesh, watched; the processes part when all have left it.

    Args:
        recipe: says `ring`, `ulysses` and `hang_timeout`.
        output_dir: where reports of faults go.

    Yields:
        The mesh, and where this rank stands, to be kept up to date.

    Raises:
        ValueError: the ranks do not fill the mesh.
    """
    # The watchdog is the first to lose patience: a collective's own timeout says less.
    patience = max(COLLECTIVE_TIMEOUT, 2 * timedelta(seconds=recipe.hang_timeout))
    mesh = SPMesh(ring=recipe.ring, ulysses=recipe.ulysses, timeout=patience)
    keep_quiet(is_main=mesh.rank == 0)
    logger.info("ranks that have met: %d", mesh.world_size)
    watchdog = Watchdog(mesh, output_dir, hang_timeout=recipe.hang_timeout, user_errors=USER_ERRORS)
    with watchdog:
        yield mesh, watchdog.position
    dist.destroy_process_group()


__all__ = ["USER_ERRORS", "errors_of_users", "keep_quiet", "watched_job"]
