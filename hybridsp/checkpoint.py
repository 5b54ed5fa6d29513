"""Stopping and going on: checkpoints of a run, and the trained model for everyone else.

    output_dir/checkpoints/
      latest                    name of the newest complete checkpoint
      step-000010/
        *.pt                    what DeepSpeed saves: each rank its share of weights and optimizer
        rng-00000.pt ...        each rank's random generators
        client_state.json       what the training script wants back (step, place in the data)
        manifest.json           degrees it was saved at, size and sha256 of every file above
      step-000020.partial/      a save that has not finished, or never will

A save becomes a checkpoint by one rename, after every file is on disk and listed in the manifest;
whatever interrupts it earlier leaves the one before in force. A load first checks every file
against the manifest, the ranks sharing the work, and agrees on the outcome: either all ranks load,
or all raise the same error and nothing was touched. Pickled code is never run: files may hold only
tensors, plain values and the three DeepSpeed classes of `_allowed_classes`.

All ranks must see the same file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hybridsp.files import appear_at_once
from hybridsp.mesh import SPMesh

MANIFEST = "manifest.json"
CLIENT_STATE = "client_state.json"
PARTIAL = ".partial"
FORMAT = 2


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
        ValueError: `client_state` is no JSON, DeepSpeed's checkpoint engine writes in the
            background, or a file of ours cannot be written. If one of DeepSpeed's cannot, the
            rank that meets it raises, and the others when the launcher or a timeout ends them.
    """
    root = Path(output_dir) / "checkpoints"
    _check_engine(engine)
    final = mesh.on_rank_zero(_prepare, root, step, client_state, keep)
    partial = root / (final.name + PARTIAL)
    engine.save_checkpoint(str(root), tag=partial.name, client_state={}, save_latest=False)
    mesh.on_every_rank(_save_rank_state, partial, mesh.rank, client_state)
    digests = _digest_together(mesh, partial)
    manifest = {"format": FORMAT, "step": step, **_degrees(engine, mesh), "files": digests}
    mesh.on_rank_zero(_publish, partial, final, manifest, keep)
    return final


def load_checkpoint(
    engine: Any, mesh: SPMesh, output_dir: str | Path, which: str = "auto"
) -> dict[str, Any] | None:
    """Restore a checkpoint into a fresh engine. Collective over the world.

    Args:
        engine: a DeepSpeed engine that has neither trained nor saved yet.
        mesh: its mesh.
        output_dir: the run's directory.
        which: `auto`: the latest checkpoint in `output_dir`, if there is one. `never`: none, and
            there must be none. Else the directory of a checkpoint.

    Returns:
        The `client_state` that was saved, or None if there is nothing to resume from.

    Raises:
        ValueError: a file of the checkpoint is missing, truncated, changed or holds code, or the
            checkpoint was saved at other degrees, ZeRO stage or dtype; or `which` is `never` and
            there are checkpoints. Every rank raises, and none has loaded anything.
    """
    _check_engine(engine)
    directory = mesh.on_rank_zero(_choose, Path(output_dir) / "checkpoints", which)
    if directory is None:
        return None
    manifest = mesh.on_rank_zero(_read_manifest, directory, _degrees(engine, mesh))
    mesh.on_every_rank(_verify, directory, _share(mesh, manifest["files"]))
    with _weights_only(engine):
        loaded, _ = engine.load_checkpoint(str(directory.parent), tag=directory.name)
    assert loaded is not None, "the manifest lists every file that DeepSpeed saved"
    _restore_rng(torch.load(directory / _rng_file(mesh.rank), weights_only=True))
    return json.loads((directory / CLIENT_STATE).read_text(encoding="utf-8"))


def export_pretrained(
    engine: Any, mesh: SPMesh, output_dir: str | Path, tokenizer: Any = None
) -> Path:
    """Write the model as a Hugging Face checkpoint. Collective over the world.

    The result is complete or absent: it is written beside its place and renamed. It is an ordinary
    checkpoint of the architecture; of sequence parallelism nothing remains in it. Of a model with
    adapters (`hybridsp.lora`) it is the adapters alone, in the format of `peft`.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage.
        mesh: its mesh.
        output_dir: directory the model is to be in; an earlier model there is replaced.
        tokenizer: saved with it, if given.

    Returns:
        `output_dir`.

    Raises:
        ValueError: the files cannot be written.
    """
    final = Path(output_dir)
    weights = gathered_weights(engine)

    def write() -> None:
        with appear_at_once(final) as folder:
            engine.module.save_pretrained(folder, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

    mesh.on_rank_zero(write)
    return final


def gathered_weights(engine: Any) -> dict[str, Any] | None:
    """The weights to save, on rank 0, where ZeRO-3 has cut them. Collective over the world.

    None where they are not cut: the module has them. Of a model with adapters (`peft`) they are
    those that were trained.
    """
    if engine.zero_optimization_stage() != 3:
        return None
    # Frozen weights are those of the base model: nobody has to gather them.
    adapters = getattr(engine.module, "_hf_peft_config_loaded", False)
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters)


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
        shutil.rmtree(abandoned)
    # A step that is saved again gets a place of its own: no moment without a checkpoint.
    place, again = root / f"step-{step:06d}", 1
    while place.exists():
        again += 1
        place = root / f"step-{step:06d}-{again}"
    return place


def _save_rank_state(partial: Path, rank: int, client_state: dict[str, Any]) -> None:
    torch.save(_rng_state(), partial / _rng_file(rank))
    if rank == 0:
        (partial / CLIENT_STATE).write_text(json.dumps(client_state, indent=2), encoding="utf-8")


def _publish(partial: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Turn a complete save into the latest checkpoint, and drop the oldest."""
    _write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2))
    os.replace(partial, final)
    _write_atomically(final.parent / "latest", final.name)
    for superseded in final.parent.glob(f"step-{manifest['step']:06d}*"):
        if superseded != final:
            shutil.rmtree(superseded)
    by_age = sorted(_complete(final.parent), key=lambda d: (d / MANIFEST).stat().st_mtime_ns)
    for directory in by_age[:-keep]:
        if directory != final:
            shutil.rmtree(directory)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _choose(root: Path, which: str) -> Path | None:
    """The checkpoint to load, if any."""
    if which not in ("auto", "never"):
        return Path(which)
    found = _latest(root)
    if which == "never" and found is not None:
        remedy = "set resume: auto, choose another output_dir, or delete its checkpoints"
        raise ValueError(f"resume = 'never', but {root} holds {found.name}: {remedy}")
    return found


def _latest(root: Path) -> Path | None:
    """What `latest` names; without it, as after its deletion, the highest complete step."""
    pointer = root / "latest"
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    return max(_complete(root), default=None)


def _complete(root: Path) -> list[Path]:
    return [m.parent for m in root.glob(f"step-*/{MANIFEST}") if m.parent.suffix != PARTIAL]


def _degrees(engine: Any, mesh: SPMesh) -> dict[str, Any]:
    """What a checkpoint's files are cut by: they fit a run with the same values only."""
    # ZeRO-3 leaves nothing of a parameter's shape but ds_shape.
    shapes = {
        n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()
    }
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    return {
        "model": f"{type(engine.module).__name__} with parameters {digest[:12]}",
        "world_size": mesh.world_size,
        "dp": mesh.dp,
        "ring": mesh.ring,
        "ulysses": mesh.ulysses,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
    }


def _read_manifest(directory: Path, degrees: dict[str, Any]) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest["format"] == FORMAT and CLIENT_STATE in manifest["files"]
        saved = {name: manifest[name] for name in degrees} if complete else {}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} is no checkpoint: {path} cannot be read ({error})") from None
    if not complete:
        raise ValueError(f"{path} is not of format {FORMAT}: resume with the version that saved it")
    if different := [name for name, here in degrees.items() if saved[name] != here]:
        then = ", ".join(f"{name} = {saved[name]}" for name in different)
        now = ", ".join(f"{name} = {degrees[name]}" for name in different)
        raise ValueError(
            f"{directory} was saved at {then}, but this run has {now}: resume with the same, "
            "or start from an exported model"
        )
    return manifest


def _digest_together(mesh: SPMesh, directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a directory, each hashed by one rank. Collective."""
    paths = mesh.on_rank_zero(lambda: [p for p in directory.rglob("*") if p.is_file()])
    share = _share(mesh, {str(path.relative_to(directory)): path for path in paths})
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, mesh.on_every_rank(_digest_all, share))
    return {name: digest for part in gathered for name, digest in part.items()}


def _share(mesh: SPMesh, files: dict[str, Any]) -> dict[str, Any]:
    """The files this rank reads on behalf of all."""
    return {name: files[name] for name in sorted(files)[mesh.rank :: mesh.world_size]}


def _digest_all(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # `latest` must not name what is only in memory yet
    return {name: _digest(path) for name, path in files.items()}


def _digest(path: Path) -> dict[str, Any]:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            sha256.update(chunk)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}


def _verify(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    remedy = "delete that directory to resume from the checkpoint before it"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if (size := path.stat().st_size) != expected["size"]:
            raise ValueError(f"{path} has {size} bytes, not {expected['size']}: {remedy}")
        if _digest(path) != expected:
            raise ValueError(f"{path} is not what was saved (sha256 differs): {remedy}")
        if path.suffix == ".pt":
            _refuse_code(path)


def _refuse_code(path: Path) -> None:
    allowed = {f"{c.__module__}.{c.__qualname__}" for c in _allowed_classes()}
    if found := set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed:
        raise ValueError(f"{path} holds code ({', '.join(sorted(found))}): do not trust it")


def _allowed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def _weights_only(engine: Any) -> Iterator[None]:
    """Let DeepSpeed load without running pickled code; by itself it allows any."""

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_allowed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        yield
    finally:
        del engine.checkpoint_engine.load


def _check_engine(engine: Any) -> None:
    what = "the DeepSpeed configuration's checkpoint"
    if engine.checkpoint_engine.is_decoupled():
        why = "it would still write after its files were hashed"
        raise ValueError(f"{what}.writer.decoupled is true: {why}; set it to false")
    if engine.use_node_local_storage():
        why = "every rank must see all files to verify them"
        raise ValueError(f"{what}.use_node_local_storage is true: {why}; set it to false")


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _rng_state() -> dict[str, Any]:
    """The random generators' states as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


__all__ = ["export_pretrained", "gathered_weights", "load_checkpoint", "save_checkpoint"]
