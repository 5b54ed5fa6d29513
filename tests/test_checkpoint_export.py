"""A model cut by ZeRO-3 is exported file by file, and no rank ever holds all of it."""

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_cases import make_engine, train, weights
from distributed import run_ranks
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hybridsp import files
from hybridsp.checkpoint import export, export_pretrained
from hybridsp.files import appear_at_once
from hybridsp.mesh import SPMesh

WORLD_SIZE = 2
SHARD_BYTES = 4000


def export_in_shards(directory):
    """The weights, and the bytes of the files that this rank wrote."""
    mesh = SPMesh(ring=WORLD_SIZE)
    found, written = {}, []
    save_file = export.save_file

    def spy(tensors, path, metadata):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    for tied in (False, True):
        bf16 = {"bf16": {"enabled": True}} if tied else {}
        engine = make_engine(mesh, 3, tied=tied, **bf16)
        engine.module.generation_config.max_new_tokens = 17
        train(engine, mesh, 1)
        gather_all = mock.patch.object(engine, "_zero3_consolidated_16bit_state_dict")
        with gather_all as gathered, mock.patch.object(export, "save_file", spy):
            out = directory / str(tied)
            export_pretrained(engine, mesh, out, max_shard_size=SHARD_BYTES)
        gathered.assert_not_called()
        found[out] = weights(engine)
    return found, written


def test_shards_are_written_by_all_ranks_and_load_as_any_model(tmp_path):
    (expected, first), (_, second) = run_ranks(export_in_shards, WORLD_SIZE, tmp_path)
    assert len(first) > 1 < len(second)
    assert max(first + second) <= SHARD_BYTES
    for path, weights_of_run in expected.items():
        tied = path.name == "True"
        model = AutoModelForCausalLM.from_pretrained(path)
        torch.testing.assert_close(model.state_dict(), weights_of_run, rtol=0, atol=0)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.dtype == (torch.bfloat16 if tied else torch.float32)
        assert model.generation_config.max_new_tokens == 17
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = {p.name for p in path.glob("*.safetensors")}
        assert files == set(index["weight_map"].values())
        assert index["metadata"]["total_parameters"] == model.num_parameters()
        # What transformers says of the same model, which it may lay out in another order.
        model.save_pretrained(path / "again", max_shard_size=SHARD_BYTES)
        again = json.loads((path / "again" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == again["metadata"]
        assert index["weight_map"].keys() == again["weight_map"].keys()
        for name in files:
            with safe_open(path / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}


def fail_while_writing(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh, 3)
    export_pretrained(engine, mesh, directory)
    before = (directory / "config.json").stat().st_mtime_ns
    error = OSError(28, "No space left on device")
    broken = mock.patch.object(export, "save_file", side_effect=error if mesh.rank else None)
    with broken, pytest.raises(ValueError, match=r"rank 1: \[Errno 28\] No space left on device"):
        export_pretrained(engine, mesh, directory, max_shard_size=SHARD_BYTES)
    mesh.agree(None)
    assert (directory / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_failed_export_leaves_the_earlier_model(tmp_path):
    run_ranks(fail_while_writing, WORLD_SIZE, tmp_path / "model")


@contextlib.contextmanager
def events_of_disk():
    """What is synced and renamed while the block runs, in order: ("sync" or "rename", path)."""
    events = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def note_rename(old, new):
        replace(old, new)
        events.append(("rename", Path(new)))

    with mock.patch("os.fsync", note_sync), mock.patch("os.replace", note_rename):
        yield events


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path, overwrite):
    final = tmp_path / "model"
    if overwrite:
        final.mkdir()
        (final / "old").touch()
    with events_of_disk() as events, appear_at_once(final, overwrite=overwrite) as work:
        (work / "part").mkdir()
        for name in ("a", "part/b"):
            (work / name).write_text(name)
    named = events.index(("rename", final))
    before, after = events[:named], events[named + 1 :]
    assert {path for what, path in before if what == "sync"} == {
        work,
        work / "a",
        work / "part",
        work / "part/b",
    }
    assert after == [("sync", tmp_path)]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model", "part"]


def test_an_older_folder_stays_until_the_name_of_the_new_one_is_on_disk(tmp_path):
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").touch()
    there = []

    def look(path):
        there.append(any(tmp_path.glob("*/old")))

    with mock.patch.object(files, "sync", look), appear_at_once(final):
        pass
    assert there == [True, True]
    assert not any(tmp_path.glob("*/old"))


def export_and_note(directory):
    """The files of weights that this rank synced."""
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh, 3)
    with events_of_disk() as events:
        export_pretrained(engine, mesh, directory, max_shard_size=SHARD_BYTES)
    return {path.name for what, path in events if what == "sync" and path.suffix == ".safetensors"}


def test_every_rank_syncs_the_shards_that_it_writes(tmp_path):
    first, second = run_ranks(export_and_note, WORLD_SIZE, tmp_path / "model")
    shards = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert first == shards, "rank 0 syncs the folder"
    assert second == set(sorted(shards)[1::WORLD_SIZE])


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    for left in ("new", "old"):
        folder = tmp_path / f".model.{os.getpid()}.{left}"
        folder.mkdir()
        (folder / "half").touch()
    for text in ("first", "second"):
        with appear_at_once(tmp_path / "model") as folder:
            (folder / "file").write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "file"]
    assert (tmp_path / "model" / "file").read_text() == "second"
