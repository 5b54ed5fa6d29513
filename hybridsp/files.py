"""Folders and files that are complete or absent: written beside their place, moved there last.

A model or a checkpoint is many files, and whoever finds half of them cannot tell. So the folder
gets its name only when everything is in it, and on disk: a system that goes down writes names and
contents in whatever order it likes unless it is told (`sync`), and an empty file of the right name
is worse than none. A process that dies leaves the place as it was, or empty in the instant in which
a new folder takes an older one's place, which not every file system can do in one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appear_at_once(final: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A folder to write into that becomes `final` if the block succeeds and vanishes if not.

    Behind the block it survives a loss of power. What other hosts write into it they have to `sync`
    themselves, in the block: this one syncs what it knows of.

    Args:
        final: where the folder is to be.
        overwrite: replace what is there; otherwise nothing may be there.

    Yields:
        The folder to write into, beside `final`.

    Raises:
        OSError: the files cannot be written, or the place is taken.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.with_name(f".{final.name}.{os.getpid()}.new")
    # A process that had this one's number, as in a container that is started again, was killed.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        _share_as_usual(work)
        for path in (*work.rglob("*"), work):
            sync(path)
        if overwrite:
            _replace_folder(work, final)
        else:
            os.replace(work, final)
            sync(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that has its old content until it has all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk: one does not imply the other."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; an older `final` is removed, or restored if that fails."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    replacing = final.exists()
    if replacing:
        shutil.rmtree(aside, ignore_errors=True)  # left over, as in `appear_at_once`
        os.replace(final, aside)
    try:
        os.replace(new, final)
    except OSError:
        if replacing:
            os.replace(aside, final)
        raise
    sync(final.parent)
    if replacing:
        shutil.rmtree(aside)


def _share_as_usual(folder: Path) -> None:
    """Give files the permissions that the user's umask says; safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


__all__ = ["appear_at_once", "sync", "write_atomically"]
