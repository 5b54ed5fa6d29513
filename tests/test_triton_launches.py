"""The kernels' machine code, compiled ahead for chips that are not here."""

from importlib.util import find_spec

import pytest
import torch
from triton_signatures import source_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def shared_bytes_of_the_widest_kernel(key_dim, value_dim, dtype, capability):
    """Of "output" in reverse, as the backward launches it by the rule of thumb."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hybridsp.ops.gla.triton.states import walk_kernel
    from hybridsp.ops.gla.triton.tuning import rule_of_thumb

    launch = rule_of_thumb("output", key_dim, value_dim, dtype)
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
    from hybridsp.ops.gla.triton.tuning import shared_bytes

    major, minor = capability
    needed = shared_bytes_of_the_widest_kernel(*head, dtype, 10 * major + minor)
    assert needed <= shared_bytes(head[0], dtype, capability)
