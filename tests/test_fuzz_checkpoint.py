"""Checkpoints of a run, damaged at random: a whole one is resumed, or an error says why not.

In half of the cases the manifest is made to fit the damage, as somebody who means harm would do; in
half it is resumed at another ZeRO stage, for which the files are cut anew.
"""

import hashlib
import json
import shutil

import torch
from checkpoint_cases import make_engine, weights
from distributed import run_ranks
from fuzzing import USUAL, cases, damaged, damaged_bytes, outcome, register_profiles, scalars, wild
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridsp.checkpoint import load_checkpoint, save_checkpoint
from hybridsp.mesh import SPMesh

STEP = "step-000001"
names = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "../..",
        "/etc",
        "step-000001/../../other",
        "a" * 300,
        "\x00",
        "step-000009",
    ]
)


@st.composite
def damage(draw, whole):
    """What to write over which file: {name relative to the folder of checkpoints: bytes}."""
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    victim = draw(st.sampled_from(files))
    name, content = str(victim.relative_to(whole)), victim.read_bytes()
    if name == "latest":
        return {name: draw(names | st.text(max_size=9)).encode("utf-8", "surrogatepass")}
    if victim.suffix == ".json" and draw(st.booleans()):
        fields = json.loads(content)
        changes = st.dictionaries(
            st.sampled_from(sorted(fields)) | st.text(max_size=4), wild | scalars
        )
        new = json.dumps(draw(changes.map(lambda some: {**fields, **some}) | wild)).encode()
    elif victim.suffix == ".json":
        new = draw(damaged(content.decode())).encode("utf-8", "surrogatepass")
    else:
        new = draw(damaged_bytes(content))
    return {name: new}


def fit(folder, name):
    """Make the manifest fit a file."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / STEP / "manifest.json").read_text())
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][name.removeprefix(f"{STEP}/")] = entry
    (folder / STEP / "manifest.json").write_text(json.dumps(manifest))


def resume_what_is_damaged(directory, thorough):
    register_profiles()
    settings.load_profile(thorough)
    mesh = SPMesh()
    engines = [make_engine(mesh, stage) for stage in (1, 2)]
    save_checkpoint(engines[0], mesh, directory / "whole", 1, {"step": 1})
    whole = directory / "whole" / "checkpoints"
    before = weights(engines[0])
    loaded = 0

    @cases(40)
    @given(damage(whole), st.booleans(), st.sampled_from(engines))
    def try_to_resume(files, fits, engine):
        nonlocal loaded
        shutil.rmtree(directory / "run", ignore_errors=True)
        folder = shutil.copytree(whole, directory / "run" / "checkpoints")
        for name, content in files.items():
            (folder / name).write_bytes(content)
            if fits and name.startswith(STEP) and not name.endswith("manifest.json"):
                fit(folder, name)
        state, error = outcome(load_checkpoint, engine, mesh, directory / "run")
        loaded += error is None
        assert error is not None or state is None or isinstance(state, dict)
        if not fits:
            torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
        else:
            with torch.no_grad():
                for name, parameter in engine.module.named_parameters():
                    parameter.copy_(before[name])

    try_to_resume()
    return loaded


def test_a_damaged_checkpoint_is_resumed_or_refused(tmp_path):
    thorough = settings.default.max_examples > USUAL
    profile, timeout = ("thorough", 900) if thorough else ("usual", 60)
    run_ranks(resume_what_is_damaged, 1, tmp_path, profile, timeout=timeout)
