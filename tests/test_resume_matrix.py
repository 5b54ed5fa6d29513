"""A run saved at one mesh, world size and ZeRO stage goes on at another with the same losses.

A few pairs that meet every mesh and stage from both sides; `tests/resume_matrix.py` prints all 144.
"""

import pytest
import torch
from distributed import run_ranks
from resume_cases import resume_all, save_all, world_of

SOURCES = [("dp4", 3), ("sp4", 2), ("world 2", 1)]
TARGETS = [("sp4", 1), ("dp2 x sp2", 3), ("dp4", 2), ("world 2", 3)]
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
    undisturbed, resumed = {}, {}
    for world in (2, 4):
        if cases := [case for case in sources if world_of(case) == world]:
            first, *_ = run_ranks(save_all, world, tmp_path, cases, dtype, timeout=240)
            undisturbed |= first
    for world in (2, 4):
        pairs = [(s, t) for s in sources for t in targets if world_of(t) == world]
        first, *_ = run_ranks(resume_all, world, tmp_path, pairs, dtype, timeout=240)
        resumed |= first
    assert len(resumed) == len(sources) * len(targets)
    for (source, target), losses in resumed.items():
        tolerance = TOLERANCE[dtype]
        assert losses == pytest.approx(undisturbed[source], rel=tolerance), (source, target)
