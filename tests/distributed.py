"""Run one function on several ranks, each a process of its own: the harness of every test.

    def body(x):                                   # module level: the ranks import it by name
        torch.distributed.all_reduce(x)
        return x

    def test_all_reduce():
        assert run_ranks(body, 2, torch.ones(3))[0].tolist() == [2, 2, 2]

A rank is forked from a *fork server* that has imported the heavy libraries once, so it is
isolated like a fresh interpreter and ready in tenths of a second. (Spawning costs an import of
torch per rank; a pool of living ranks is faster still, but one rank that hangs poisons every
later test.) The ranks meet through a file, so tests that run side by side cannot collide.

No rank leaves before all have reported. What the parent reports is therefore the original
failure, never the "connection reset" with which its neighbours would follow, and a rank that
waits for one that never comes shows up as what it is: a hang, with the line where each rank stands.
"""

import contextlib
import faulthandler
import functools
import io
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.testing

SEED = 1234

# What the fork server imports before the first rank, so that no rank has to: these, and of the
# packages below whatever the test modules have imported by then (pytest collects them all first).
# A test module whose ranks import more says so at its top: `PRELOAD += DEEPSPEED`.
PRELOAD = ["pytest", "numpy", "torch", "torch.distributed", "torch.testing", __name__]
SLOW_PACKAGES = {"accelerate", "datasets", "deepspeed", "hybridsp", "transformers"}
# `deepspeed.initialize` imports the second, and with it torch's inductor: 10 s.
DEEPSPEED = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]

# DeepSpeed's default buckets reserve gigabytes that it never touches; poison would make them real.
MAX_POISONED_NUMEL = 2**24

# For the other ranks to report after the first failure, and for a rank to write its stack.
GRACE_SECONDS = 0.5

_context = multiprocessing.get_context("forkserver")


class RankFailedError(AssertionError):
    """A rank raised or died; the message carries its traceback."""


class RankTimeoutError(AssertionError):
    """Not every rank reported in time; the message says where each one stands."""


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Seed everything, make our own warnings errors, fill uninitialised memory with NaN."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    with warnings.catch_warnings(), _poisoned_memory():
        warnings.filterwarnings("error", module=r"(hybridsp|train)(\.|$)")
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        # Exact type: a FakeTensor or a DTensor has no memory of its own to poison.
        has_memory = type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda")
        if has_memory and tensor.is_floating_point() and tensor.numel() <= MAX_POISONED_NUMEL:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_nan


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Whoever reads what `torch.empty` returned, reads NaN and not the zeros of a fresh page."""
    # `with torch.device("meta")` recognises allocators in a set that torch builds on first use;
    # built under the patch it would hold our wrappers and ignore the device.
    with torch.device("cpu"):
        torch.empty(0)
    with contextlib.ExitStack() as patches:
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            owner = torch.Tensor if name.startswith("new_") else torch
            poisoning = _poisoning(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, poisoning))
        yield


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    backend: str | None = "gloo",
    threads: int = 1,
    **kwargs: Any,
) -> list[Any]:
    """Return what `fn(*args, **kwargs)` returned on each of `world_size` ranks, in rank order.

    `fn` is a module-level function; arguments and results travel pickled, tensors on the CPU.
    torch.distributed is initialised before `fn` (rank r uses cuda:r with backend "nccl"; None
    leaves initialising to `fn`), the environment is the parent's plus what a launcher sets.

    Raises RankFailedError with the traceback of the rank that failed first, RankTimeoutError
    `timeout` seconds after the start (imports of the fork server not counted).
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, found {torch.cuda.device_count()}")
    _start_fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        task = _dump((fn, args, kwargs))
        launch = _Launch(task, Path(directory), world_size, backend, threads, _free_port())
        ranks: list[_Rank] = []
        try:
            ranks.extend(_Rank(rank, launch) for rank in range(world_size))
            _collect(ranks, timeout)
        finally:
            for rank in ranks:
                rank.release()
            for rank in ranks:
                rank.end()
    return [rank.result for rank in ranks]


def expect_raises(
    fn: Callable[..., Any],
    world_size: int,
    exception: type[BaseException],
    match: str,
    *args: Any,
    timeout: float = 30,
    **kwargs: Any,
) -> list[str]:
    """Assert that every rank raises `exception` with a message in which `match` is found.

    Nothing but the rank's own error counts: a rank that waits for one that has raised is a hang.
    Returns the messages in rank order.
    """
    messages = run_ranks(_message_of, world_size, fn, exception, *args, timeout=timeout, **kwargs)
    for rank, message in enumerate(messages):
        if message is None:
            raise RankFailedError(f"rank {rank} raised nothing, expected {exception.__name__}")
        if not re.search(match, message):
            raise RankFailedError(f"rank {rank}: {match!r} is not found in the message: {message}")
    return messages


def _message_of(fn: Callable[..., Any], exception: Any, *args: Any, **kwargs: Any) -> str | None:
    try:
        fn(*args, **kwargs)
    except exception as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Launch:
    """What all ranks of one call share."""

    task: bytes
    directory: Path  # rendezvous, stacks and logs
    world_size: int
    backend: str | None
    threads: int
    port: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def path(self, rank: int, kind: str) -> Path:
        return self.directory / f"rank{rank}.{kind}"


@dataclass(order=True)
class _Failure:
    time: float  # seconds of CLOCK_MONOTONIC, one clock for all processes
    headline: str
    details: str


class _Rank:
    """The parent's end of one rank."""

    def __init__(self, rank: int, launch: _Launch):
        self.rank = rank
        self.launch = launch
        self.reported = False
        self.result: Any = None
        self.failure: _Failure | None = None
        self.connection, far = _context.Pipe()
        self.process = _context.Process(target=_rank_main, args=(rank, launch, far), daemon=True)
        self.process.start()
        far.close()

    def receive(self) -> None:
        """Take the rank's report, or note that it died without one."""
        self.reported = True
        try:
            self.result, self.failure = _load(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            headline = f"rank {self.rank} died with exit code {self.process.exitcode}"
            self.failure = _Failure(time.monotonic(), headline, self.stack())

    def stack(self) -> str:
        """What faulthandler wrote: on request (SIGUSR1) or because of a fatal signal."""
        path = self.launch.path(self.rank, "stack")
        return path.read_text() if path.exists() else ""

    def where(self) -> str:
        """One line saying where a rank stands that has not reported, then its whole stack."""
        stack = self.stack()
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', stack)
        libraries = ("site-packages", str(Path(os.__file__).parent), "<frozen", __file__)
        ours = [frame for frame in frames if not any(name in frame[0] for name in libraries)]
        if not frames:
            return f"rank {self.rank} has not reached the test function"
        path, line, function = (ours or frames)[0]
        return f"rank {self.rank} stands at {path}:{line} in {function}\n{stack.rstrip()}"

    def release(self) -> None:
        """Let a rank that has returned tear its process group down; kill any other."""
        if self.reported and self.failure is None:
            with contextlib.suppress(BrokenPipeError):
                self.connection.send(None)
        else:
            self.process.kill()

    def end(self) -> None:
        """Leave no process behind, and print what the rank printed."""
        self.process.join(timeout=GRACE_SECONDS)
        self.process.kill()
        self.process.join()
        self.connection.close()
        path = self.launch.path(self.rank, "log")
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            print(f"[rank {self.rank}] {line}")


def _collect(ranks: list[_Rank], timeout: float) -> None:
    _receive_until(ranks, time.monotonic() + timeout, stop_at_failure=True)
    if any(rank.failure for rank in ranks):
        _receive_until(ranks, time.monotonic() + GRACE_SECONDS, stop_at_failure=False)
    missing = [rank for rank in ranks if not rank.reported]
    _ask_for_stacks(missing)
    places = [rank.where() for rank in missing]
    if failures := sorted(rank.failure for rank in ranks if rank.failure):
        also = [failure.headline for failure in failures[1:]]
        lines = [failures[0].headline, failures[0].details, *also, *places]
        raise RankFailedError("\n".join(lines))
    if missing:
        headline = f"{len(missing)} of {len(ranks)} ranks did not finish within {timeout:g} s"
        done = [f"rank {rank.rank} has finished" for rank in ranks if rank.reported]
        raise RankTimeoutError("\n".join([headline, *done, *places]))


def _receive_until(ranks: list[_Rank], deadline: float, *, stop_at_failure: bool) -> None:
    while waiting := {rank.connection: rank for rank in ranks if not rank.reported}:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            waiting[connection].receive()  # type: ignore[index]
        if not ready or (stop_at_failure and any(rank.failure for rank in ranks)):
            return


def _ask_for_stacks(ranks: list[_Rank]) -> None:
    for rank in ranks:
        # A rank without its stack file has no handler yet: the signal would kill it.
        if rank.process.is_alive() and rank.launch.path(rank.rank, "stack").exists():
            os.kill(rank.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
    if ranks:
        time.sleep(GRACE_SECONDS)


@functools.cache
def _start_fork_server() -> None:
    """Start it, and return when its imports are done, so that no test's timeout pays for them."""
    modules = PRELOAD + [name for name in sys.modules if name.split(".")[0] in SLOW_PACKAGES]
    if torch.cuda.is_available():  # importing DeepSpeed picks the accelerator: each rank's choice
        modules = [name for name in modules if "deepspeed" not in name]
    _context.set_forkserver_preload(modules)
    # Python < 3.13 does not hand sys.path to the server's preloads.
    path = os.pathsep.join(sys.path)
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}):
        forkserver.ensure_running()
    probe = _context.Process(target=os.getpid)
    probe.start()
    probe.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _rank_main(rank: int, launch: _Launch, connection: Connection) -> None:
    _redirect_output(launch.path(rank, "log"))
    # Kept open by this name for as long as the process lives: faulthandler holds only its number.
    stack_file = launch.path(rank, "stack").open("w")
    faulthandler.enable(stack_file)
    faulthandler.register(signal.SIGUSR1, stack_file)
    _set_environment(rank, launch)
    thread_failures: list[threading.ExceptHookArgs] = []

    def remember(failure: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(failure)  # printed now, in case the thread's silence is a hang
        thread_failures.append(failure)

    threading.excepthook = remember
    try:
        torch.set_num_threads(launch.threads)
        with strict():
            _initialize(rank, launch)
            fn, args, kwargs = _load(launch.task)
            result = fn(*args, **kwargs)
        for failure in thread_failures:
            raise failure.exc_value or failure.exc_type()
        report = _dump((result, None))
    # Whatever ends a rank belongs to the parent: pytest's own outcomes are BaseExceptions.
    except BaseException as error:  # noqa: BLE001
        headline = f"rank {rank} raised {type(error).__name__}: {error}"
        report = _dump((None, _Failure(time.monotonic(), headline, traceback.format_exc())))
    connection.send_bytes(report)
    connection.recv()
    if dist.is_initialized():
        dist.destroy_process_group()


def _redirect_output(path: Path) -> None:
    """Send stdout and stderr, those of C++ libraries too, to the file that the parent prints."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _set_environment(rank: int, launch: _Launch) -> None:
    """The environment of the test, and on top what a launcher on one host sets."""
    os.environ.clear()
    os.environ.update(launch.environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_WORLD_SIZE=str(launch.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(launch.port),
        OMP_NUM_THREADS=str(launch.threads),
        DS_ACCELERATOR="cuda" if launch.backend == "nccl" else "cpu",
        GLOO_SOCKET_IFNAME="lo",  # a host name that does not resolve must not fail a test
    )


def _initialize(rank: int, launch: _Launch) -> None:
    if launch.backend is None:
        return
    device = torch.device("cuda", rank) if launch.backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    store = dist.FileStore(str(launch.directory / "rendezvous"), launch.world_size)
    dist.init_process_group(
        launch.backend, store=store, rank=rank, world_size=launch.world_size, device_id=device
    )


def _dump(value: Any) -> bytes:
    """Pickle by value; multiprocessing's own pickler would share tensors by descriptor."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
