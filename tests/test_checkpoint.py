"""Stopping, going on and exporting: nothing changes, and nothing damaged is ever loaded."""

import hashlib
import json
import os
import random
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checkpoint_cases import BASE, draws, make_engine, rank_zero_only, train, weights
from distributed import run_ranks
from tiny import batch_of, reference_loss_sum, tiny_model
from transformers import AutoModelForCausalLM

import hybridsp
from hybridsp.checkpoint import export_pretrained, load_checkpoint, save_checkpoint
from hybridsp.mesh import SPMesh

WORLD_SIZE = 2


def resume_at_every_stage(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    for name, stage, changes in (
        ("0", 0, {}),
        ("1-bf16", 1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        ("2", 2, {}),
        ("3", 3, {}),
        ("3-bf16", 3, {"bf16": {"enabled": True}}),
    ):
        engine = make_engine(mesh, stage, **changes)
        torch.manual_seed(100 + mesh.rank)
        train(engine, mesh, 2)
        random.gauss(0, 1)  # leaves a second value in Python's generator
        saved = save_checkpoint(engine, mesh, directory / name, 2, {"position": [1, 2]})
        assert saved == directory / name / "checkpoints" / "step-000002"
        uninterrupted = draws(), train(engine, mesh, 2), weights(engine)

        engine = make_engine(mesh, stage, seed=1, **changes)
        with mock.patch("torch.load", wraps=torch.load) as loads:
            assert load_checkpoint(engine, mesh, directory / name) == {"position": [1, 2]}
        assert loads.call_count >= 2
        assert all(call.kwargs["weights_only"] is True for call in loads.call_args_list)
        assert engine.global_steps == 2
        resumed = draws(), train(engine, mesh, 2), weights(engine)
        assert resumed[:2] == uninterrupted[:2], name
        torch.testing.assert_close(resumed[2], uninterrupted[2], rtol=0, atol=0)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    run_ranks(resume_at_every_stage, WORLD_SIZE, tmp_path)


def damage_one_file_at_a_time(directory, damages):
    """For each damage: the error of this rank, and whether the engine is as it was."""
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh)
    save_checkpoint(engine, mesh, directory / "whole", 1, {})
    reports = []
    for name, damage in damages:
        run = directory / damage.__name__ / name
        with rank_zero_only(mesh) as alone:
            if alone:
                shutil.copytree(directory / "whole", run)
                damage(run / "checkpoints" / "step-000001", name)
        before = weights(engine)
        try:
            load_checkpoint(engine, mesh, run)
            reports.append("loaded")
        except ValueError as error:
            reports.append(str(error))
        torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
    return reports


def truncate(step, name):
    os.truncate(step / name, (step / name).stat().st_size - 1)


def flip_a_bit(step, name):
    content = bytearray((step / name).read_bytes())
    content[len(content) // 2] ^= 1
    (step / name).write_bytes(content)


def remove(step, name):
    (step / name).unlink()


def plant_code(step, name):
    class Payload:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"torch": Payload()}, step / name)
    edit_manifest(step, files={name: digest_of(step / name)})


def digest_of(path):
    return {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def edit_manifest(step, files=None, **changes):
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"].update(files or {})
    (step / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def save_another_model(step, name):
    edit_manifest(step, model="Other with parameters 0123")


def lead_out_of_the_folder(step, name):
    edit_manifest(step, files={"../latest": {"size": 1, "sha256": ""}})


def save_in_another_dtype(step, name):
    edit_manifest(step, dtype="bfloat16")


def save_at_stage_zero(step, name):
    edit_manifest(step, zero_stage=0)


def save_with_another_optimizer(step, name):
    edit_manifest(step, optimizer="FusedAdam")


def save_in_another_format(step, name):
    edit_manifest(step, format=1)


OPTIM = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
DAMAGES = [
    (OPTIM, truncate, r"optim_states.pt has \d+ bytes, not \d+: delete that directory"),
    (OPTIM, flip_a_bit, r"optim_states.pt is not what was saved \(sha256 differs\)"),
    ("rng-00001.pt", flip_a_bit, r"rng-00001.pt is not what was saved"),
    ("client_state.json", remove, r"client_state.json is missing: delete that directory"),
    (OPTIM, plant_code, r"optim_states.pt holds code \((posix|nt).system\)"),
    ("rng-00000.pt", plant_code, r"rng-00000.pt holds code \((posix|nt).system\)"),
    ("manifest.json", truncate, r"step-000001 is no checkpoint: .*manifest.json cannot be read"),
    ("manifest.json", remove, r"step-000001 is no checkpoint: .*No such file"),
    ("manifest.json", save_in_another_format, "is not of format 2"),
    ("manifest.json", lead_out_of_the_folder, "manifest.json names '../latest', which is no file"),
    ("manifest.json", save_another_model, "saved at model = Other .*, but .* model = Llama"),
    ("manifest.json", save_in_another_dtype, "saved at dtype = bfloat16, but .* = float32"),
    ("manifest.json", save_with_another_optimizer, "optimizer = FusedAdam, but .* = AdamW"),
    ("manifest.json", save_at_stage_zero, "saved at .* ZeRO 0, but .* ZeRO 3: only ZeRO 1, 2 and"),
]


def test_damage_is_one_error_on_every_rank_and_nothing_is_loaded(tmp_path):
    damages = [(name, damage) for name, damage, _ in DAMAGES]
    first, second = run_ranks(damage_one_file_at_a_time, WORLD_SIZE, tmp_path, damages)
    assert first == second
    for report, (name, damage, message) in zip(first, DAMAGES, strict=True):
        with pytest.raises(ValueError, match=message):
            raise ValueError(report)
        assert name in report, damage.__name__


def save_several(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh)
    root = directory / "checkpoints"
    assert load_checkpoint(engine, mesh, directory) is None
    assert load_checkpoint(engine, mesh, directory, which="never") is None
    for step in (1, 2, 3):
        save_checkpoint(engine, mesh, directory, step, {"step": step}, keep=2)
    names = {p.name for p in root.iterdir() if p.is_dir()}
    assert names == {"step-000002", "step-000003"}
    return root


def lifetimes(directory):
    """What happens between saves: interruptions, deletions, returns to an earlier step."""
    root = save_several(directory)
    mesh = SPMesh(ring=WORLD_SIZE)
    engine = make_engine(mesh)

    def load(which="auto"):
        return load_checkpoint(make_engine(mesh), mesh, directory, which=which)["step"]

    # Killed after DeepSpeed has written everything, before the rename.
    engine.save_checkpoint(str(root), tag="step-000004.partial", save_latest=False)
    assert load() == 3
    # Killed between the rename and the update of `latest`; a missing `latest` finds the newest.
    assert load(str(root / "step-000002")) == 2
    with rank_zero_only(mesh) as alone:
        if alone:
            (root / "latest").unlink()
    assert load() == 3
    # A damaged newest checkpoint was deleted, as its error advises.
    with rank_zero_only(mesh) as alone:
        if alone:
            (root / "latest").write_text("step-000003")
            shutil.rmtree(root / "step-000003")
    assert load() == 2
    # The same step again, beside the first one until it is complete; what was abandoned goes.
    save_checkpoint(engine, mesh, directory, 2, {"step": 22}, keep=2)
    assert load() == 22
    assert {p.name for p in root.iterdir() if p.is_dir()} == {"step-000002-2"}
    # After a return to an earlier step, the abandoned later ones are the older ones.
    save_checkpoint(engine, mesh, directory, 9, {"step": 9}, keep=3)
    save_checkpoint(engine, mesh, directory, 3, {"step": 33}, keep=2)
    save_checkpoint(engine, mesh, directory, 4, {"step": 44}, keep=2)
    assert load() == 44
    assert {p.name for p in root.iterdir() if p.is_dir()} == {"step-000003", "step-000004"}
    errors = []
    for call in (
        lambda: load("never"),
        lambda: load(str(directory / "nowhere")),
        lambda: save_checkpoint(engine, mesh, directory, 5, {"step": {1, 2}}),
        lambda: save_checkpoint(engine, mesh, directory, 5, {}, keep=0),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    assert load() == 44
    return errors


def test_interrupted_saves_deletions_and_returns(tmp_path):
    first, second = run_ranks(lifetimes, WORLD_SIZE, tmp_path)
    assert first == second
    never, nowhere, not_json, keep = first
    assert keep == "keep = 0 must be at least 1"
    assert "resume = 'never', but" in never
    assert "holds step-000004: set resume: auto" in never
    assert "nowhere is no checkpoint" in nowhere
    assert not_json.startswith("client_state must hold plain JSON values")


def export(directory):
    mesh = SPMesh(ring=WORLD_SIZE)
    found = {}
    for stage in (1, 3):
        for tied in (False, True):
            bf16 = {"bf16": {"enabled": True}} if tied else {}
            engine = make_engine(mesh, stage, tied=tied, **bf16)
            train(engine, mesh, 1)
            out = directory / f"{stage}-{tied}"
            export_pretrained(engine, mesh, out)
            train(engine, mesh, 1)
            assert export_pretrained(engine, mesh, out) == out
            found[out] = weights(engine)
    return found


def test_an_export_is_an_ordinary_checkpoint_with_the_trained_weights(tmp_path):
    expected, _ = run_ranks(export, WORLD_SIZE, tmp_path)
    assert len(expected) == 4
    for path, weights_of_run in expected.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        state = model.state_dict()
        torch.testing.assert_close(state, weights_of_run, rtol=0, atol=0)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == path.name.endswith("True")
        assert model.dtype == (torch.bfloat16 if tied else torch.float32)
        assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name)) == [
            path.name
        ]


BATCH = batch_of(1, 32, seed=5, cu_seqlens=[0, 20, 32])


def export_sequence_parallel(directory):
    mesh = hybridsp.SPMesh(ring=WORLD_SIZE)
    model = tiny_model()
    hybridsp.parallelize(model, mesh)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4096}
    engine = hybridsp.initialize(model, mesh, {**BASE, "zero_optimization": zero})
    batches = [hybridsp.shard_batch(BATCH, mesh)]
    hybridsp.train_step(engine, batches)
    export_pretrained(engine, mesh, directory)
    return hybridsp.eval_step(engine, batches)


def test_nothing_of_sequence_parallelism_is_left_in_an_export(tmp_path):
    loss, _ = run_ranks(export_sequence_parallel, WORLD_SIZE, tmp_path / "exported")
    tiny_model().save_pretrained(tmp_path / "plain")
    names = [{p.name for p in (tmp_path / kind).iterdir()} for kind in ("exported", "plain")]
    assert names[0] == names[1]
    for name in names[0] - {"model.safetensors"}:
        assert (tmp_path / "exported" / name).read_text() == (tmp_path / "plain" / name).read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    expected, labels = reference_loss_sum(model, BATCH)
    assert loss == pytest.approx(expected.item() / labels, rel=1e-5)


@pytest.mark.parametrize(
    ("decoupled", "node_local", "message"),
    [
        (True, False, "checkpoint.writer.decoupled is true: it would still write"),
        (False, True, "checkpoint.use_node_local_storage is true: every rank must see"),
    ],
)
def test_checkpoints_that_could_not_be_verified_are_refused(decoupled, node_local, message):
    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(is_decoupled=lambda: decoupled),
        use_node_local_storage=lambda: node_local,
    )
    mesh = SimpleNamespace(device=torch.device("cpu"))
    for call in (
        lambda: load_checkpoint(engine, mesh, "run"),
        lambda: save_checkpoint(engine, mesh, "run", 1, {}),
    ):
        with pytest.raises(ValueError, match=message):
            call()
