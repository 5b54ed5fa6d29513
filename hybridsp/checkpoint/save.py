"""Saving: one rename makes a checkpoint of what is complete.

    1. the files go into `step-N.partial`, every rank its own
    2. each rank has them on disk, and their sha256
    3. rank 0 writes the manifest, renames the folder to `step-N`, and lets `latest` name it

Whatever interrupts this before the rename leaves the checkpoint before in force. In the background
(`CheckpointSaver(background=True)`) the tensors are copied to the host's memory, step 1 and 2 are
done by a thread of each rank while training goes on, and step 3 at the first `poll` at which all
threads are done. Threads only write; all communication is the caller's, so none can get between
the collectives of training, and an error that one thread meets is raised on every rank at the same
`poll`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridsp.checkpoint.capture import (
    File,
    Room,
    capture,
    check_disk,
    measure,
    writer_of,
)
from hybridsp.checkpoint.generators import generators_file, generators_state
from hybridsp.checkpoint.manifest import (
    CLIENT_STATE,
    FORMAT,
    LATEST,
    MANIFEST,
    PARTIAL,
    describe_run,
    digest_all,
    remove,
    remove_superseded,
)
from hybridsp.checkpoint.staging import Staging
from hybridsp.files import sync, write_atomically
from hybridsp.mesh import SPMesh, gather_objects

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: Any,
    mesh: SPMesh,
    output_dir: str | Path,
    step: int,
    client_state: dict[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Save everything a run needs to go on as if it had never stopped. Collective over the world.

    Args:
        engine: the DeepSpeed engine.
        mesh: its mesh; the degrees are recorded.
        output_dir: the run's directory.
        step: optimizer steps taken so far.
        client_state: plain JSON values, the same on every rank, that `load_checkpoint` returns.
        keep: number of newest checkpoints to keep, this one included.

    Returns:
        The directory of the checkpoint.

    Raises:
        NotEnoughSpaceError: the disk has no room for it.
        ValueError: `client_state` is no JSON, DeepSpeed's checkpoint engine writes in the
            background, or a file cannot be written.
    """
    return CheckpointSaver(engine, mesh, output_dir, keep=keep).save(step, client_state)


class CheckpointSaver:
    """Saves the checkpoints of a run, if asked in the background. Its methods are collective.

    Args:
        engine: the DeepSpeed engine.
        mesh: its mesh.
        output_dir: the run's directory.
        keep: number of newest checkpoints to keep.
        background: return from `save` as soon as everything is copied to the host's memory, which
            is kept for the next save. Call `poll` after every step, and `wait` at the end. A save
            for whose copy a host has not the memory is done at once, with a warning.
    """

    def __init__(
        self,
        engine: Any,
        mesh: SPMesh,
        output_dir: str | Path,
        *,
        keep: int = 2,
        background: bool = False,
    ) -> None:
        self.root = Path(output_dir) / "checkpoints"
        self.keep = keep
        self.background = background
        self._engine, self._mesh = engine, mesh
        self._staging = Staging(mesh.device)
        self._pending: _Save | None = None

    def save(self, step: int, client_state: dict[str, Any]) -> Path:
        """Save a checkpoint, after the one before is complete; as `save_checkpoint`.

        Raises:
            NotEnoughSpaceError: the disk has no room for it.
            ValueError: as for `save_checkpoint`; also what the save before met.
        """
        self.wait()
        mesh, engine = self._mesh, self._engine
        check_engine(engine)
        final = mesh.on_rank_zero(_prepare, self.root, step, client_state, self.keep)
        partial = self.root / (final.name + PARTIAL)
        files = capture(engine, self.root, partial.name)
        room = measure(files, self._staging.bytes_to_get(files))
        check_disk(mesh, partial, room)
        files.append(File(partial / generators_file(mesh.rank), generators_state()))
        state = json.dumps(client_state, indent=2) if mesh.rank == 0 else None
        run = describe_run(engine, mesh)
        save = _Save(final, partial, step, run, files, state, mesh.rank, writer_of(engine))
        if self.background and self._copied_to_memory(save, room):
            save.start()
            self._pending = save
            return final
        save.run()
        self._complete(save)
        return final

    def _copied_to_memory(self, save: _Save, room: Room) -> bool:
        """Let a save write from a copy, if every host can have one; whether they all do."""
        if room.hosts_without_memory:
            why = f"no memory for it on {', '.join(room.hosts_without_memory)}"
        else:
            try:
                save.files = self._mesh.on_every_rank(self._staging.copy, save.files)
            except ValueError as error:  # of all ranks; memory that cannot be page-locked, say
                why = str(error)
            else:
                return True
        _say(self._mesh, "step %d is saved now, not in the background: %s", save.step, why)
        return False

    def poll(self) -> None:
        """Complete a save in the background whose files are written on every rank.

        Costs one small all-reduce while there is such a save, and nothing otherwise.

        Raises:
            ValueError: a rank could not write its files; on every rank.
        """
        if self._pending is None:
            return
        writing = torch.tensor(int(self._pending.is_running()), device=self._mesh.device)
        dist.all_reduce(writing, group=self._mesh.data_group)
        if not writing.item():
            self.wait()

    def wait(self) -> None:
        """Complete the save in the background, if there is one.

        Raises:
            ValueError: a rank could not write its files; on every rank.
        """
        save, self._pending = self._pending, None
        if save is not None:
            save.join()
            self._complete(save)

    def _complete(self, save: _Save) -> None:
        mesh = self._mesh
        parts = gather_objects(mesh.on_every_rank(save.outcome))
        digests = {name: digest for part in parts for name, digest in part.items()}
        manifest = {"format": FORMAT, "step": save.step, **save.run_description, "files": digests}
        mesh.on_rank_zero(_publish, save.partial, save.final, manifest, self.keep)


@dataclass
class _Save:
    """One rank's part of a save."""

    final: Path
    partial: Path
    step: int
    run_description: dict[str, Any]
    files: list[File]
    client_state: str | None
    rank: int
    write: Callable[[Any, str], None]
    _digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failure: Exception | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Write the files in a thread. It dies with the process: an incomplete save is nothing."""
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Write this rank's files, and note how it went."""
        try:
            self._digests = self._write()
        except Exception as error:  # noqa: BLE001 - none is lost: `outcome` raises it
            self._failure = error
        self.files = []  # their memory is needed elsewhere

    def is_running(self) -> bool:
        assert self._thread is not None, "it was started"
        return self._thread.is_alive()

    def join(self) -> None:
        assert self._thread is not None, "it was started"
        self._thread.join()

    def outcome(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of this rank's files; raises what stood in their way."""
        if self._failure is not None:
            raise self._failure
        return self._digests

    def _write(self) -> dict[str, dict[str, Any]]:
        paths = [file.path for file in self.files]
        for file in self.files:
            try:
                self.write(file.content, str(file.path))
            except RuntimeError as error:
                # torch.save speaks of positions in its archive where a disk is full.
                message = f"{file.path} cannot be written; is the disk full? ({error})"
                raise OSError(message) from error
        if self.client_state is not None:
            paths.append(self.partial / CLIENT_STATE)
            paths[-1].write_text(self.client_state, encoding="utf-8")
        # What DeepSpeed itself has copied from NVMe.
        offloaded = self.partial / "offloaded_tensors" / f"rank{self.rank:02d}"
        paths += [path for path in offloaded.rglob("*") if path.is_file()]
        return digest_all(self.partial, paths)


def check_engine(engine: Any) -> None:
    """Refuse settings of DeepSpeed under which checkpoints could not be verified.

    Raises:
        ValueError: it has one.
    """
    what = "the DeepSpeed configuration's checkpoint"
    if engine.checkpoint_engine.is_decoupled():
        why = "it would still write after its files were hashed"
        raise ValueError(f"{what}.writer.decoupled is true: {why}; set it to false")
    if engine.use_node_local_storage():
        why = "every rank must see all files to verify them"
        raise ValueError(f"{what}.use_node_local_storage is true: {why}; set it to false")


def _prepare(root: Path, step: int, client_state: dict[str, Any], keep: int) -> Path:
    """Make room for a save; returns the place that it is to have."""
    if keep < 1:
        raise ValueError(f"keep = {keep} must be at least 1")
    try:
        json.dumps(client_state)
    except TypeError as error:
        raise ValueError(f"client_state must hold plain JSON values: {error}") from None
    root.mkdir(parents=True, exist_ok=True)
    for abandoned in root.glob(f"*{PARTIAL}"):
        remove(abandoned)
    # A step that is saved again gets a place of its own: no moment without a checkpoint.
    place, again = root / f"step-{step:06d}", 1
    while place.exists() or place.with_name(place.name + PARTIAL).exists():
        again += 1
        place = root / f"step-{step:06d}-{again}"
    return place


def _publish(partial: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Turn a complete save into the latest checkpoint, and drop the oldest."""
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2))
    os.replace(partial, final)
    sync(final.parent)
    write_atomically(final.parent / LATEST, final.name)
    # Only now, when the new one would be found after a loss of power as well.
    remove_superseded(final, manifest["step"], keep)


def _say(mesh: SPMesh, message: str, *values: Any) -> None:
    if mesh.rank == 0:
        logger.warning(message, *values)


__all__ = ["CheckpointSaver", "check_engine", "save_checkpoint"]
