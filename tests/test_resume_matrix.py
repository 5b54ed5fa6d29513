"""A run saved at one mesh, world size and ZeRO stage goes on at another with the same losses.

A few pairs that meet every mesh and stage from both sides; `tests/resume_matrix.py` prints all 144.
"""

import pytest
import torch
from distributed import run_ranks
from resume_cases import resume_all, save_all, world_of

SOURCES = [("dp4", 3), ("sp4", 2), ("world 2", 1)]
TARGETS = [("sp4", 1), ("dp2 x sp2", 3), ("dp4", 2), ("world 2", 3)]
SOURCES_ON_GPUS = [("dp2", 3), ("world 2", 2), ("ulysses 2", 1), ("one", 3)]
TARGETS_ON_GPUS = [("dp2", 1), ("world 2", 3), ("ulysses 2", 2), ("one", 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.mark.parametrize(
    ("dtype", "sources", "targets"),
    [
        (torch.float32, SOURCES, TARGETS),
        (torch.bfloat16, SOURCES[:2], TARGETS[2:]),
    ],
    ids=["fp32", "bf16"],
)
def test_a_run_goes_on_at_another_mesh_world_and_stage(dtype, sources, targets, tmp_path):
    check(dtype, sources, targets, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_a_run_goes_on_at_another_mesh_world_and_stage_on_gpus(dtype, tmp_path):
    check(dtype, SOURCES_ON_GPUS, TARGETS_ON_GPUS, tmp_path, backend="nccl")


def check(dtype, sources, targets, directory, backend="gloo"):
    options = {"timeout": 240, "backend": backend}
    undisturbed, resumed = {}, {}
    for world in sorted(set(map(world_of, sources))):
        cases = [case for case in sources if world_of(case) == world]
        undisturbed |= run_ranks(save_all, world, directory, cases, dtype, **options)[0]
    for world in sorted(set(map(world_of, targets))):
        pairs = [(s, t) for s in sources for t in targets if world_of(t) == world]
        resumed |= run_ranks(resume_all, world, directory, pairs, dtype, **options)[0]
    assert len(resumed) == len(sources) * len(targets)
    for (source, target), losses in resumed.items():
        tolerance = TOLERANCE[dtype]
        assert losses == pytest.approx(undisturbed[source], rel=tolerance), (source, target)
