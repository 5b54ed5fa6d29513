"""What `hybridsp doctor` says of a recipe: what it needs, against what is there."""

import json
from pathlib import Path

import pytest

from hybridsp.doctor import Finding
from hybridsp.doctor.finding import exit_status
from hybridsp.doctor.plan import check_plan, read_needs
from hybridsp.host_memory import HostMemory

MIB, GIB = 2**20, 2**30


def one(findings, name) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256}
        (model / "config.json").write_text(json.dumps(config))
        (tmp_path / "data.jsonl").write_text("{}\n")
        settings = {"model": str(model), "data": str(tmp_path / "data.jsonl"), "max_steps": 5}
        settings |= {"output_dir": str(tmp_path / "run"), "seq_length": 4096, "ring": 2}
        settings |= {"learning_rate": 1e-4, "save_every": 2, "deepspeed": "zero2"} | changes
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(settings))
        return file

    return write


def test_plan(recipe):
    needs, findings = read_needs(recipe().parent, None, 0)  # as `hybridsp plan --out` leaves it
    assert [finding.status for finding in findings] == ["ok"]
    assert (needs.ranks, needs.offloads_optimizer, needs.out.name) == (2, False, "run")
    enough = HostMemory(total=2**50, available=2**50)
    assert exit_status(check_plan(needs, enough, 80 * GIB)) == 0
    gpu_memory, host_memory = check_plan(needs, HostMemory(total=MIB, available=MIB), MIB)
    assert gpu_memory.status == host_memory.status == "failing"
    busy = HostMemory(total=2**50, available=MIB)
    assert [finding.status for finding in check_plan(needs, busy, None)] == ["ok", "warning"]
    assert [finding.status for finding in check_plan(needs, None, None)] == ["ok", "ok"]

    more, _ = read_needs(recipe(deepspeed="zero3_offload"), 8, 4)
    assert (more.ranks, more.offloads_optimizer) == (8, True)
    assert more.host > needs.host
    assert "start 2 ranks" in one(read_needs(recipe(), 3, 0)[1], "plan: ranks").fix


def test_a_recipe_that_is_wrong_is_a_finding(recipe):
    needs, findings = read_needs(recipe(data="absent/*.jsonl"), 2, 0)
    assert needs is not None
    assert "matches no file" in one(findings, "plan").found
    needs, (finding,) = read_needs(recipe(seq_lenght=1), 2, 0)
    assert needs is not None
    assert "did you mean 'seq_length'" in finding.found
    needs, (finding,) = read_needs(recipe(ring="two"), 2, 0)
    assert (needs, finding.status) == (None, "failing")
    needs, findings = read_needs(recipe(deepspeed={"no_such_key": 1}), 2, 0)
    assert needs is None
    assert "no_such_key" in one(findings, "plan: memory").found
    assert read_needs(Path("absent.yaml"), 2, 0)[0] is None
    for content in ("- no recipe", "ring: [", "ring: 1\nring: 2", "\x00"):
        file = recipe()
        file.write_text(content)
        needs, (finding,) = read_needs(file, 2, 0)
        assert (needs, finding.status) == (None, "failing"), content
