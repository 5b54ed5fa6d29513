"""What a benchmark leaves behind to count with: one JSON file.

It says what was asked, on what it ran, and has every case with its figures or the reason why it has
none. It is written anew after every case, so that a run that is cut off leaves what it has, and
says at its end that it is complete. Numbers in it are in SI units and their names say so; a number
that is not finite is null.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridsp.bench.job import one_voice
from hybridsp.files import write_atomically
from hybridsp.mesh import SPMesh, gather_objects

logger = logging.getLogger(__name__)


def environment(mesh: SPMesh) -> dict[str, Any]:
    """On what and when a benchmark runs. Collective over the world.

    Returns:
        chip, world, hosts, backend, threads (of the CPU), the versions of what computes, date
        (local, with its offset from UTC), commit (None outside a git tree; "+" behind one with
        changes) and command.
    """
    hosts = gather_objects(socket.gethostname())
    on_gpu = mesh.device.type == "cuda"
    return {
        "chip": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "world": mesh.world_size,
        "hosts": len(set(hosts)),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "flash-linear-attention": _version("flash-linear-attention"),
        "hybridsp": _version("hybridsp"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": " ".join(["hybridsp", *sys.argv[1:]]),
    }


def make_folder(name: str, out: Path | None) -> Path:
    """The folder for the results, made now: a place that cannot be written is told at once.

    Raises:
        OSError: it cannot be made.
    """
    folder = out or Path("bench_results") / f"{name}-{datetime.now():%Y-%m-%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"results go to {folder}", file=sys.stderr, flush=True)
    return folder


class Record:
    """What a run has found so far, on every rank; rank 0 keeps its file up to date.

    Args:
        mesh: the job.
        path: of the file.
        content: what it begins with; more is put into it as it is found.
    """

    def __init__(self, mesh: SPMesh, path: Path, content: dict[str, Any]) -> None:
        self.content = {**content, "complete": False}
        self._mesh, self._path = mesh, path
        self.save()  # in the place of another run's

    def save(self) -> None:
        """Write what there is. A file that cannot be written now costs the run no figures."""
        if self._mesh.rank > 0:
            return
        try:
            write_json(self._path, self.content)
        except OSError as error:
            logger.warning("%s is not up to date: %s", self._path, error)

    def finish(self) -> None:
        """Write the whole record: show it first, in case that fails. Collective over the world.

        Raises:
            ValueError: the file cannot be written; the other ranks exit with 2.
        """
        self.content["complete"] = True
        with one_voice():
            self._mesh.on_rank_zero(write_json, self._path, self.content)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a benchmark's record; see the module's text. Cut off, it leaves the older one whole."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    write_atomically(path, text + "\n")


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name as Linux tells it; "CPU" elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _commit() -> str | None:
    """The commit of the source tree that runs, if it is one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git here, or none that answers: the record does without
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package can lie inside somebody else's tree; ours tracks this file.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return f"{commit}+" if changes else commit
