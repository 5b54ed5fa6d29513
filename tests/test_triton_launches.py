"""The kernels' machine code, compiled ahead for chips that are not here; how many run at a time."""

from importlib.util import find_spec

import pytest
import torch
from triton_signatures import source_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


H100 = {"processors": 132, "shared_bytes": 228 * 1024}
RESERVED_BYTES = 1024  # of shared memory, for each program


def shared_bytes_of_the_widest_kernel(key_dim, value_dim, dtype, capability, launch):
    """Of "output" in reverse, as the backward launches it."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hybridsp.ops.gla.triton.states import walk_kernel

    blocks = {"BK": launch.BK, "BG": launch.BK, "BV": launch.BV, "C": 64}
    flags = dict.fromkeys(("REVERSE", "ENTER", "INCOMING", "OUTPUT", "KEEP"), True)
    precision = "tf32" if dtype == torch.bfloat16 else "tf32x3"
    known = {"H": 4, "K": key_dim, "V": value_dim, "G": key_dim, **blocks, **flags}
    known |= {"CROSS": False, "PRECISION": precision}
    if dtype == torch.float32:
        known["dtails"] = None
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    source = source_of(walk_kernel, known, element)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.metadata.shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("head", [(64, 64), (128, 128), (256, 512)], ids=str)
def test_no_launch_takes_more_shared_memory_than_the_table_says(head, capability, dtype):
    """What `why_not` goes by: a launch that does not fit would be an error in training."""
    from hybridsp.ops.gla.triton.tuning import rule_of_thumb, shared_bytes

    major, minor = capability
    launch = rule_of_thumb("output", *head, dtype)
    needed = shared_bytes_of_the_widest_kernel(*head, dtype, 10 * major + minor, launch)
    assert needed <= shared_bytes(head[0], dtype, capability)


@pytest.mark.parametrize("head", [(16, 128, 128), (4, 256, 512)], ids=str)
def test_a_part_of_the_backward_fills_one_wave(head):
    """What `WORKSPACE_BYTES` was chosen for: a second wave of a few programs takes as long."""
    from hybridsp.ops.gla.contract import Tokens
    from hybridsp.ops.gla.triton.plan import Plan
    from hybridsp.ops.gla.triton.tuning import KERNELS, launch_of

    heads, key_dim, value_dim = head
    shape, options = (1, 2**18, heads), {"device": "meta", "dtype": torch.bfloat16}
    q, v = torch.empty(*shape, key_dim, **options), torch.empty(*shape, value_dim, **options)
    sizes = key_dim, value_dim, True, torch.bfloat16
    launches = {kernel: launch_of(kernel, *sizes, "NVIDIA H100") for kernel in KERNELS}
    plan = Plan(Tokens(q=q, k=q, v=v, g=q.float(), scale=1.0, segments=None), launches)
    output = launches["output"]
    taken = shared_bytes_of_the_widest_kernel(key_dim, value_dim, torch.bfloat16, 90, output)
    at_once = H100["processors"] * (H100["shared_bytes"] // (taken + RESERVED_BYTES))
    for part in plan.parts():
        programs = plan.blocks(output) * len(part.stretches) * len(part.heads)
        assert 0.95 * at_once < programs <= at_once
