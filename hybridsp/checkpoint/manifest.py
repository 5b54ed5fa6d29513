"""What a checkpoint consists of, and whether it still does.

The manifest is written last and names every file with its size and sha256, so a folder that has
one is complete, and a byte that has changed since is found before anything is loaded. Its names
are doubted as any file's are: they may not lead out of the folder, and no `.pt` file may hold
pickled code, only tensors, plain values and the DeepSpeed classes of `allowed_classes`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hybridsp.files import sync
from hybridsp.mesh import SPMesh
from hybridsp.untrusted import MAX_SHOWN, inside, read_json, read_text, reading, shown

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CLIENT_STATE = "client_state.json"
LATEST = "latest"
PARTIAL = ".partial"
FORMAT = 2
MAX_NAME_BYTES = 255
REMEDY = "resume from another checkpoint"
# Optimizers that understand each other's state: the second is the first one's for the host.
SAME_STATE = {"AdamW", "DeepSpeedCPUAdam"}


def describe_run(engine: Any, mesh: SPMesh) -> dict[str, Any]:
    """What a checkpoint says of the run that saved it.

    A run can resume it that has the same `model`, `dtype` and kind of `optimizer`; the other values
    say how the files are cut.
    """
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
        "optimizer": type(engine.basic_optimizer).__name__,
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
        complete = manifest["format"] == FORMAT and CLIENT_STATE in manifest["files"]
        if complete:
            _check_types(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory} is no checkpoint: {path} cannot be read ({error})") from None
    if not complete:
        raise ValueError(f"{path} is not of format {FORMAT}: resume with the version that saved it")
    return manifest


def _check_types(manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    if type(manifest["step"]) is not int or not isinstance(files, dict):
        raise TypeError("its step is no number, or its files are no mapping")
    for name, digest in files.items():
        if type(digest["size"]) is not int or type(digest["sha256"]) is not str:
            raise TypeError(f"size or sha256 of {shown(name)} is of a wrong type")


def check_same_model(directory: Path, manifest: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse the checkpoint of another model, precision or optimizer.

    Raises:
        ValueError: it is one, or the manifest lacks how it was saved.
    """
    if lacking := sorted(run.keys() - manifest.keys()):
        raise ValueError(f"{directory / MANIFEST} lacks {', '.join(lacking)}: choose another")
    if wrong := [name for name in run if type(manifest[name]) is not type(run[name])]:
        found = shown(manifest[wrong[0]])
        raise ValueError(f"{directory / MANIFEST} has {wrong[0]} = {found}: choose another")
    different = [name for name in ("model", "dtype") if manifest[name] != run[name]]
    if manifest["optimizer"] != run["optimizer"]:
        both = {manifest["optimizer"], run["optimizer"]}
        different += [] if both <= SAME_STATE else ["optimizer"]
    if different:
        then = ", ".join(f"{name} = {manifest[name]:.{MAX_SHOWN}}" for name in different)
        now = ", ".join(f"{name} = {run[name]}" for name in different)
        raise ValueError(
            f"{directory} was saved at {then}, but this run has {now}: resume with the same, "
            "or start from an exported model"
        )


def share_of(mesh: SPMesh, files: dict[str, Any]) -> dict[str, Any]:
    """The files that this rank reads on behalf of all."""
    return {name: files[name] for name in sorted(files)[mesh.rank :: mesh.world_size]}


def digest_all(directory: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, which are on disk and not only in memory when this returns."""
    for path in paths:
        sync(path)
    return {str(path.relative_to(directory)): _digest(path) for path in paths}


def verify(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check files of a checkpoint against what its manifest says of them.

    Raises:
        ValueError: a file is missing, is not what was saved, or holds code.
    """
    remedy = "delete that directory to resume from the checkpoint before it"
    for name, expected in files.items():
        path = inside(directory, name, str(directory / MANIFEST))
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if (size := path.stat().st_size) != expected["size"]:
            raise ValueError(f"{path} has {size} bytes, not {expected['size']}: {remedy}")
        if _digest(path)["sha256"] != expected["sha256"]:
            raise ValueError(f"{path} is not what was saved (sha256 differs): {remedy}")
        if path.suffix == ".pt":
            with reading(path, "types", remedy):
                _refuse_code(path)


def allowed_classes() -> list[Any]:
    """What DeepSpeed's files hold beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def candidates(root: Path, which: str) -> list[Path]:
    """The checkpoints to try, best first: what `latest` names, then the others by age.

    Args:
        root: the run's folder of checkpoints.
        which: as for `load_checkpoint`.

    Raises:
        ValueError: `which` is `never`, but there is a checkpoint.
    """
    if which not in ("auto", "never"):
        return [Path(which).resolve()]  # "." has no name, by which DeepSpeed is to find it
    there = sorted(complete(root), key=age, reverse=True)
    latest = _latest(root, there)
    if which == "never" and latest is not None:
        remedy = "set resume: auto, choose another output_dir, or delete its checkpoints"
        raise ValueError(f"resume = 'never', but {root} holds {latest.name}: {remedy}")
    return [] if latest is None else [latest, *(path for path in there if path != latest)]


def complete(root: Path) -> list[Path]:
    """The complete checkpoints in a folder."""
    return [m.parent for m in root.glob(f"step-*/{MANIFEST}") if m.parent.suffix != PARTIAL]


def age(directory: Path) -> int:
    """When a checkpoint was completed, in ns: after a return to an earlier step, not its number."""
    return (directory / MANIFEST).stat().st_mtime_ns


def remove_superseded(newest: Path, step: int, keep: int) -> None:
    """Drop older checkpoints of the same step, and the oldest beyond `keep`."""
    name = f"step-{step:06d}"
    there = sorted(complete(newest.parent), key=age)
    same = [path for path in there if path.name == name or path.name.startswith(f"{name}-")]
    kept = [path for path in there if path not in same or path == newest][-keep:]
    for directory in there:
        if directory != newest and directory not in kept:
            remove(directory)


def remove(folder: Path) -> None:
    """Remove a checkpoint, or what there is of one, that no run needs any more.

    What a file system will not let go of now (NFS keeps open files) is no reason to end a run: it
    is logged, and the next save tries again.
    """
    # Under this name the next save removes what a crash now may leave.
    doomed = folder.with_name(folder.name.removesuffix(PARTIAL) + PARTIAL)
    try:
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("cannot remove %s, which nothing needs any more: %s", folder, error)


def _latest(root: Path, there: list[Path]) -> Path | None:
    """What `latest` names; without it, as after its deletion, the highest complete step."""
    with suppress(ValueError):  # missing, no text, too long: as if it were deleted
        name = read_text(root / LATEST, MAX_NAME_BYTES).strip()
        if re.fullmatch(r"step-[0-9]+(-[0-9]+)?", name) and (root / name).is_dir():
            return root / name
    return max(there, key=_numbers, default=None)


def _numbers(directory: Path) -> list[int]:
    """Of `step-000010-2` 10 and 2; as text a step of seven digits would be less than one of six."""
    return [int(number) for number in re.findall("[0-9]+", directory.name)]


def _digest(path: Path) -> dict[str, Any]:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            sha256.update(chunk)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}


def _refuse_code(path: Path) -> None:
    allowed = {f"{c.__module__}.{c.__qualname__}" for c in allowed_classes()}
    if found := set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed:
        raise ValueError(f"{path} holds code ({', '.join(sorted(found))}): do not trust it")


__all__ = [
    "REMEDY",
    "allowed_classes",
    "candidates",
    "check_same_model",
    "describe_run",
    "digest_all",
    "read_manifest",
    "remove_superseded",
    "share_of",
    "verify",
]
