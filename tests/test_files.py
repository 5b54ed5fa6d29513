"""A file is replaced whole: what interrupts that leaves the old one, and nothing beside it."""

import os
from pathlib import Path

import pytest

from hybridsp import files
from hybridsp.files import write_atomically


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "step"), [(Path, "write_text"), (files, "sync"), (os, "replace")]
)
def test_what_is_interrupted_leaves_the_old_file(owner, step, error, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def interrupt(path, *_args, **_kwargs):
        if step == "write_text":
            path.write_bytes(b"ne")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, interrupt)
        with pytest.raises(error):
            write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "old")]
    write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "new")]
