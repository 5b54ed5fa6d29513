"""Loading: every byte is checked before any is used, and any mesh will do.

The ranks share the work of hashing and agree on the outcome: either all load, or all raise the
same error and nothing was touched. With as many ranks as before and the same ZeRO stage the files
fit as they are, and the run goes on bit for bit. Otherwise they are cut anew while they are read
(`hybridsp.checkpoint.reshape`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridsp.checkpoint.generators import restore_generators, seed_generators_anew
from hybridsp.checkpoint.manifest import (
    CLIENT_STATE,
    REMEDY,
    candidates,
    check_same_model,
    describe_run,
    read_manifest,
    share_of,
    verify,
)
from hybridsp.checkpoint.reshape import check_readable, load_reshaped
from hybridsp.checkpoint.save import check_engine
from hybridsp.checkpoint.shards import load_plain
from hybridsp.mesh import SPMesh
from hybridsp.untrusted import read_json, reading

logger = logging.getLogger(__name__)


def load_checkpoint(
    engine: Any, mesh: SPMesh, output_dir: str | Path, which: str = "auto"
) -> dict[str, Any] | None:
    """Restore a checkpoint into a fresh engine. Collective over the world.

    It may have been saved at another mesh, by another number of ranks, and at another of the ZeRO
    stages 1, 2 and 3. Random generators go on where they were if the number of ranks is the same,
    and are seeded anew if it is not.

    Args:
        engine: a DeepSpeed engine that has neither trained nor saved yet.
        mesh: its mesh.
        output_dir: the run's directory.
        which: `auto`: the latest checkpoint in `output_dir`, if there is one; where that is
            damaged, the one before, with a warning. `never`: none, and there must be none. Else
            the directory of a checkpoint.

    Returns:
        The `client_state` that was saved, or None if there is nothing to resume from.

    Raises:
        ValueError: the checkpoint (with `auto`, every one) is damaged: a file is missing,
            truncated, changed or holds code; it is of another model or dtype; ZeRO 0 would have
            to be reshaped; or `which` is `never` and there are checkpoints. Every rank raises,
            and none has loaded anything.
    """
    check_engine(engine)
    found = mesh.on_rank_zero(candidates, Path(output_dir) / "checkpoints", which)
    if not found:
        return None
    directory, manifest = _first_sound(mesh, found)
    client_state = mesh.on_rank_zero(read_json, directory / CLIENT_STATE)
    run = describe_run(engine, mesh)
    mesh.on_rank_zero(check_same_model, directory, manifest, run)
    same_cut = all(manifest[name] == run[name] for name in ("world_size", "zero_stage"))
    if same_cut or _is_uncut(manifest, run):
        with reading(directory, "state", REMEDY), _weights_only(engine):
            loaded, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
        assert loaded is not None, "the manifest lists every file that DeepSpeed saved"
    else:
        mesh.on_rank_zero(_check_reshapes, directory, manifest, run, engine)
        names = sorted(manifest["files"])
        mesh.on_every_rank(check_readable, engine, directory, names)
        with reading(directory, "state", REMEDY):
            load_reshaped(engine, directory, names)
        _say(mesh, "%s was saved at %s; it is cut anew for %s", directory, *_cuts(manifest, run))
    _restore_generators(mesh, directory, manifest)
    if mesh.rank == 0:
        logger.info("resumed from %s", directory)
    return client_state


def _first_sound(mesh: SPMesh, found: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The first checkpoint of which every file is what was saved, and its manifest."""
    failures = []
    for directory in found:
        try:
            manifest = mesh.on_rank_zero(read_manifest, directory)
            mesh.on_every_rank(verify, directory, share_of(mesh, manifest["files"]))
        except ValueError as error:  # the same on every rank
            failures.append(error)
            continue
        for failure in failures:
            _say(mesh, "DAMAGED CHECKPOINT: %s. Resuming from %s instead", failure, directory)
        return directory, manifest
    raise failures[0]


def _is_uncut(manifest: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether every rank has, and needs, all of the optimizer's state, in a plain optimizer."""
    uncut = manifest["zero_stage"] == 0 and run["zero_stage"] == 0
    return uncut and run["dtype"] == "float32"


def _check_reshapes(
    directory: Path, manifest: dict[str, Any], run: dict[str, Any], engine: Any
) -> None:
    then, now = _cuts(manifest, run)
    if 0 in (manifest["zero_stage"], run["zero_stage"]):
        raise ValueError(
            f"{directory} was saved at {then}, but this run has {now}: only ZeRO 1, 2 and 3 can be "
            "exchanged for each other; resume with the same"
        )
    if engine.zero_nvme_offload_optimizer() or (directory / "offloaded_tensors").exists():
        raise ValueError(
            f"{directory} was saved at {then}, but this run has {now}: optimizer states on NVMe "
            "cannot be cut anew; resume with the same"
        )


def _cuts(manifest: dict[str, Any], run: dict[str, Any]) -> tuple[str, str]:
    """How the files are cut, and how this run needs them, for people."""
    text = "dp {dp} x ring {ring} x ulysses {ulysses}, ZeRO {zero_stage}"
    return text.format(**manifest), text.format(**run)


def _restore_generators(mesh: SPMesh, directory: Path, manifest: dict[str, Any]) -> None:
    if manifest["world_size"] == mesh.world_size:
        mesh.on_every_rank(restore_generators, directory, mesh.rank)
        return
    step = manifest["step"]
    seed = mesh.on_every_rank(seed_generators_anew, directory, step, mesh.rank)
    then, now = manifest["world_size"], mesh.world_size
    message = "%d ranks go on for %d: random generators are seeded from seed %d, step %d and rank"
    _say(mesh, message, now, then, seed, step)


@contextlib.contextmanager
def _weights_only(engine: Any) -> Iterator[None]:
    """Let DeepSpeed load without running pickled code; by itself it allows any."""
    engine.checkpoint_engine.load = lambda path, map_location=None: load_plain(path)
    try:
        yield
    finally:
        del engine.checkpoint_engine.load


def _say(mesh: SPMesh, message: str, *values: Any) -> None:
    if mesh.rank == 0:
        logger.warning(message, *values)


__all__ = ["load_checkpoint"]
