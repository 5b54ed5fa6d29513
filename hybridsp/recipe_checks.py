"""What is asked of a recipe beyond types and ranges: right names, and files that are there.

A key that nobody reads is a typing error, or the name that another trainer has for it. The files
are looked at before a process group exists: the model and the data have to be there, and the place
for results has to be one that can be written and that holds nothing to be kept.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from hybridsp.untrusted import MAX_SHOWN, shown

if TYPE_CHECKING:
    from hybridsp.recipe import Recipe

# What other trainers call keys of a recipe; a product of several here has several.
DEGREE = "ring", "ulysses"
OTHER_NAMES = {
    "lr": ("learning_rate",),
    "batch_size": ("micro_batch_size",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "train_micro_batch_size_per_gpu": ("micro_batch_size",),
    "train_batch_size": ("micro_batch_size", "gradient_accumulation_steps"),
    "max_length": ("seq_length",),
    "max_seq_length": ("seq_length",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "steps": ("max_steps",),
    "bf16": ("dtype",),
    "sequence_parallel_size": DEGREE,
    "sequence_parallel": DEGREE,
    "context_parallel_size": DEGREE,
    "sp_size": DEGREE,
    "sp": DEGREE,
}


def check_files(recipe: Recipe) -> None:
    """Check the files that a recipe names; raises as `Recipe.check_files`."""
    for name in ("model", "data", "eval_data", "output_dir", "resume"):
        try:
            _check_path(recipe, name)
        except OSError as error:
            value = shown(getattr(recipe, name))
            raise ValueError(f"{name} = {value} is no path: {error.strerror}") from None


def _check_path(recipe: Recipe, name: str) -> None:
    value = getattr(recipe, name)
    said = f"{name} = {shown(value)}"
    if value is None:
        return
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{said} is no path: write one")
    if name == "model" and not (Path(value) / "config.json").is_file():
        remedy = "download the checkpoint first (hf download NAME --local-dir DIRECTORY)"
        raise ValueError(f"{said} holds no config.json: {remedy}")
    if name in ("data", "eval_data") and not glob(value, recursive=True):
        raise ValueError(f"{said} matches no file from {Path.cwd()}")
    if name == "output_dir":
        _check_output(recipe, Path(value))
    if name == "resume" and value not in ("auto", "never") and not Path(value).is_dir():
        remedy = "write auto, never, or the directory of a checkpoint"
        raise ValueError(f"{said} is no directory: {remedy}")


def _check_output(recipe: Recipe, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        raise ValueError(f"output_dir = {shown(str(folder))}: {there} {why}: choose another")
    for written in (folder / "model", folder / "adapter"):
        if written.resolve() == Path(recipe.model).resolve():
            raise ValueError(
                f"output_dir = {shown(str(folder))} would write {written} over the model that "
                "is trained: choose another output_dir"
            )
    record = folder / "metrics.jsonl"
    if recipe.resume == "never" and record.exists():
        remedy = "choose another output_dir, or write auto"
        raise ValueError(f"resume = 'never', but {record} is there from another run: {remedy}")


def refuse_unknown(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the first key that is not known, with the nearest one that is."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            alias = [name for name in OTHER_NAMES.get(str(key), ()) if name in known]
            near = alias or difflib.get_close_matches(str(key)[:MAX_SHOWN], known, n=1)
            mean = " and ".join(map(repr, near))
            hint = f"did you mean {mean}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} {shown(key)}; {hint}")


def one_line(error: Exception) -> str:
    """The message of an error, its line breaks removed."""
    return " ".join(str(error).split())


__all__ = ["check_files", "one_line", "refuse_unknown"]
