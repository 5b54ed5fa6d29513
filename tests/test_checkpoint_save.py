"""Saves in the background, saves that fail, and what is resumed from when the newest is damaged."""

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_cases import draws, make_engine, rank_zero_only, train, weights
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from distributed import run_ranks

from hybridsp.checkpoint import (
    CheckpointSaver,
    NotEnoughSpaceError,
    capture,
    load_checkpoint,
    save_checkpoint,
)
from hybridsp.checkpoint.manifest import candidates, remove, remove_superseded
from hybridsp.checkpoint.staging import Staging
from hybridsp.host_memory import HostMemory
from hybridsp.mesh import SPMesh

WORLD_SIZE = 2


def held_back(release, write):
    """A writer that waits, as a slow disk does."""

    def save(engine, state_dict, path):
        release.wait(30)
        write(engine, state_dict, path)

    return mock.patch.object(TorchCheckpointEngine, "save", save)


def save_while_training(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    for stage in (2, 3):
        engine, run = make_engine(mesh, stage), directory / str(stage)
        torch.manual_seed(100 + mesh.rank)
        saver = CheckpointSaver(engine, mesh, run, background=True)
        saver.poll()
        train(engine, mesh, 2)
        release = threading.Event()
        with held_back(release, TorchCheckpointEngine.save):
            final = saver.save(2, {"step": 2})
            undisturbed = draws(), train(engine, mesh, 2), weights(engine)
            saver.poll()
            assert not final.exists(), "no file is written yet"
            release.set()
            saver.wait()
        assert final.is_dir()
        # The state of step 2 was written, while the engine was at step 4.
        engine = make_engine(mesh, stage, seed=1)
        assert load_checkpoint(engine, mesh, run) == {"step": 2}
        resumed = draws(), train(engine, mesh, 2), weights(engine)
        assert resumed[:2] == undisturbed[:2]
        torch.testing.assert_close(resumed[2], undisturbed[2], rtol=0, atol=0)


def test_training_goes_on_while_the_state_at_the_save_is_written(tmp_path):
    run_ranks(save_while_training, WORLD_SIZE, tmp_path)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_is_kept_for_the_next_one_and_ties_stay_ties(device):
    weight, view = torch.arange(6.0, device=device), torch.arange(4.0, device=device)
    content = {"a": weight, "tied": weight, "views": [view[:2], view[2:]], "step": 1}
    files = [capture.File(Path("x.pt"), content), capture.File(Path("y.pt"), [weight])]
    staging = Staging(torch.device(device))
    assert staging.bytes_to_get(files) == 4 * (6 + 4)
    first = staging.copy(files)
    assert staging.bytes_to_get(files) == 0
    copied = first[0].content
    assert copied["a"] is copied["tied"] is first[1].content[0]
    assert copied["a"].data_ptr() != weight.data_ptr()
    assert copied["a"].is_pinned() == (device == "cuda")
    weight += 1
    assert torch.equal(copied["a"], weight.cpu() - 1)
    again = staging.copy(files)
    assert [file.path for file in again] == [file.path for file in files]
    assert again[0].content["a"].data_ptr() == copied["a"].data_ptr()
    assert torch.equal(again[0].content["a"], weight.cpu())
    assert torch.equal(torch.cat(again[0].content["views"]), view.cpu())
    assert again[0].content["step"] == 1


def failing_on(rank, error):
    def save(engine, state_dict, path):
        if rank:
            raise error
        torch.save(state_dict, path)

    return mock.patch.object(TorchCheckpointEngine, "save", save)


def collect(errors, call):
    try:
        call()
    except ValueError as error:
        errors.append((type(error).__name__, str(error)))


def fail_in_every_way(directory):
    """Errors of saves; whatever happens, the first checkpoint stays in force."""
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh)
    background = CheckpointSaver(engine, mesh, directory, background=True)
    background.save(1, {"step": 1})
    background.wait()
    root, errors = directory / "checkpoints", []

    with failing_on(mesh.rank, OSError(28, "No space left on device")):
        background.save(2, {"step": 2})
        collect(errors, background.wait)
        collect(errors, lambda: save_checkpoint(engine, mesh, directory, 2, {}))
    little = shutil.disk_usage(root)._replace(free=1000)
    with mock.patch.object(capture.shutil, "disk_usage", return_value=little):
        collect(errors, lambda: background.save(3, {"step": 3}))
        collect(errors, lambda: save_checkpoint(engine, mesh, directory, 3, {}))
    assert sorted(path.name for path in root.glob("step-*")) == ["step-000001"]
    assert load_checkpoint(make_engine(mesh), mesh, directory) == {"step": 1}

    # Without memory for a copy it is saved at once; who has one already needs none.
    memory = HostMemory(total=2000, available=1000)
    release = threading.Event()
    with (
        mock.patch.object(capture, "host_memory", return_value=memory),
        held_back(release, TorchCheckpointEngine.save),
    ):
        in_background = background.save(4, {"step": 4})
        assert not in_background.exists()
        release.set()
        background.wait()
        at_once = CheckpointSaver(engine, mesh, directory, background=True).save(5, {"step": 5})
        assert at_once.is_dir()
    # As beside a GPU where memory cannot be page-locked.
    denied = mock.patch.object(Staging, "copy", side_effect=RuntimeError("cudaHostRegister"))
    with denied if mesh.rank else contextlib.nullcontext():
        at_once = CheckpointSaver(engine, mesh, directory, background=True).save(6, {"step": 6})
    assert at_once.is_dir()
    assert load_checkpoint(make_engine(mesh), mesh, directory) == {"step": 6}
    return errors


def test_an_error_of_one_writer_is_an_error_of_all(tmp_path):
    first, second = run_ranks(fail_in_every_way, WORLD_SIZE, tmp_path)
    assert first == second
    (_, writer), (_, at_once), *full = first
    assert "rank 1: [Errno 28] No space left on device" in writer
    assert "rank 1: [Errno 28] No space left on device" in at_once
    for kind, message in full:
        assert kind == NotEnoughSpaceError.__name__
        assert "a checkpoint needs" in message
        assert "0 MiB free: free some, keep fewer checkpoints" in message


def resume_beside_a_damaged_one(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh)
    for step in (1, 2, 3):
        save_checkpoint(engine, mesh, directory, step, {"step": step}, keep=3)
    newest = directory / "checkpoints" / "step-000003"
    with rank_zero_only(mesh) as alone:
        if alone:
            next(newest.glob("*rank_1*optim*")).write_bytes(b"too short")
            (directory / "checkpoints" / "step-000002" / "manifest.json").write_text("{")
    said = []
    handler = mock.Mock(
        level=logging.NOTSET, handle=lambda record: said.append(record.getMessage())
    )
    logging.getLogger("hybridsp.checkpoint.load").addHandler(handler)
    assert load_checkpoint(make_engine(mesh), mesh, directory) == {"step": 1}
    errors = []
    collect(errors, lambda: load_checkpoint(make_engine(mesh), mesh, directory, str(newest)))
    with rank_zero_only(mesh) as alone:
        if alone:
            (directory / "checkpoints" / "step-000001" / "client_state.json").unlink()
    collect(errors, lambda: load_checkpoint(make_engine(mesh), mesh, directory))
    return said, errors


def test_a_damaged_newest_checkpoint_is_passed_over_loudly_unless_it_was_named(tmp_path):
    (said, errors), (silent, same) = run_ranks(resume_beside_a_damaged_one, WORLD_SIZE, tmp_path)
    assert errors == same
    assert not silent
    newest, second = said
    assert newest.startswith("DAMAGED CHECKPOINT: ")
    assert "optim_states.pt has 9 bytes" in newest
    assert newest.endswith("step-000001 instead")
    assert "step-000002 is no checkpoint" in second
    for _, message in errors:
        assert "optim_states.pt has 9 bytes" in message


def test_an_interrupted_name_of_the_latest_is_as_none(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-00000{step}").mkdir()
        (tmp_path / f"step-00000{step}" / "manifest.json").write_text("{}")
    for content in (b"", b"../../x", b"/etc", b"\0", b"\xff", b"x" * 2**20, b"step-000007"):
        (tmp_path / "latest").write_bytes(content)
        assert candidates(tmp_path, "auto")[0].name == "step-000002"
    (tmp_path / "latest").write_text("step-000001\n")
    assert candidates(tmp_path, "auto")[0].name == "step-000001"
    with pytest.raises(ValueError, match=r"resume = 'never', but .* holds step-000001"):
        candidates(tmp_path, "never")
    (tmp_path / "latest").unlink()
    for name in ("step-999999", "step-1000000", "step-1000000-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert candidates(tmp_path, "auto")[0].name == "step-1000000-2"


def test_a_step_is_not_taken_for_one_whose_number_begins_alike(tmp_path):
    for time, name in enumerate(("step-1000000", "step-100000", "step-100000-2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        os.utime(tmp_path / name / "manifest.json", (time, time))
    remove_superseded(tmp_path / "step-100000-2", 100000, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1000000", "step-100000-2"}


def test_what_cannot_be_removed_is_logged_and_tried_again(tmp_path, caplog):
    for name in ("step-000001", "step-000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    with mock.patch.object(shutil, "rmtree", side_effect=OSError("Device or resource busy")):
        remove_superseded(tmp_path / "step-000002", 2, keep=1)
    assert "cannot remove" in caplog.text
    assert "Device or resource busy" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001.partial", "step-000002"]
    remove(tmp_path / "step-000001.partial")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
