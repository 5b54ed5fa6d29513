"""Which ptxas the Triton kernels are assembled with, and that its code is sound on Hopper."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from fresh_interpreter import in_fresh_interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

PATH = "TRITON_PTXAS_PATH"
HOPPER = (9, 0)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)\s*(.*?);")
REGISTER = re.compile(r"UR\d+")


def fake_ptxas(folder, release):
    """A program that says it is ptxas of this release."""
    path = folder / f"ptxas-{release}"
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.0"\n')
    path.chmod(0o755)
    return path


def asked(capability):
    """The answer, and which assembler Triton goes to after it."""
    from triton import knobs

    from hybridsp.ops.gla.triton import assembler

    return assembler.why_not(tuple(capability)), knobs.nvidia.ptxas.path


def test_hopper_gets_a_sound_one():
    reason, path = in_fresh_interpreter(asked, HOPPER, timeout=60)
    assert reason is None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", version).groups()
    assert (int(major), int(minor)) >= (12, 9)


def test_a_sound_one_that_the_user_chose_is_kept(tmp_path):
    chosen = str(fake_ptxas(tmp_path, "13.1"))
    assert in_fresh_interpreter(asked, HOPPER, timeout=60, **{PATH: chosen}) == [None, chosen]


def test_processes_started_from_this_one_get_it_too():
    (reason, path), inherited = in_fresh_interpreter(asked_in_a_child, timeout=60)
    assert reason is None
    assert inherited == path


def asked_in_a_child():
    answer = asked(HOPPER)
    return answer, os.environ[PATH]


def test_where_all_are_unsound_the_kernels_are_refused(tmp_path):
    unsound = str(fake_ptxas(tmp_path, "12.8"))
    tools = {PATH: unsound, "TRITON_PTXAS_BLACKWELL_PATH": unsound, "PATH": "/bin"}
    reason, path = in_fresh_interpreter(asked, HOPPER, timeout=60, **tools)
    assert path == unsound
    assert f"ptxas 12.8 at {unsound} miscompiles" in reason
    assert "CUDA 12.9 or later" in reason


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)], ids=str)
def test_other_chips_keep_what_triton_takes(capability, tmp_path):
    chosen = str(fake_ptxas(tmp_path, "12.8"))
    answer = in_fresh_interpreter(asked, capability, timeout=60, **{PATH: chosen})
    assert answer == [None, chosen]


def mixed_up_halves(machine_code):
    """Additions in 64 bits, by uniform registers, whose high half reads a register of the low.

    Such a register holds one half of an address or the other, and nothing is written to it in
    between: what the sum is good for is a random number.
    """
    found, written, low_half = [], {}, {}
    for line in machine_code.splitlines():
        if (match := INSTRUCTION.search(line)) is None:
            continue
        op, arguments = match.groups()
        target, *rest = (a.strip().split(".")[0] for a in arguments.split(","))
        sources = {(r, written.get(r, 0)) for r in rest if REGISTER.fullmatch(r)}
        carries = [a for a in rest if re.fullmatch(r"UP\d", a)]
        if op == "UIADD3.X":
            found += [line for carry in carries if sources & low_half.get(carry, set())]
        elif op == "UIADD3" and carries and rest[0] == carries[0]:
            low_half[carries[0]] = sources
        if REGISTER.fullmatch(target):
            first = int(target[2:])
            for number in range(first, first + (2 if ".64" in op else 1)):
                written[f"UR{number}"] = written.get(f"UR{number}", 0) + 1
    return found


def machine_code(sound):
    """Of a kernel in which the start of shared memory holds an operand of wgmma; and the tool."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton_signatures import source_of

    from hybridsp.ops.gla.triton import assembler
    from hybridsp.ops.gla.triton.gradients import gradient_kernel

    if sound:
        assert assembler.why_not(HOPPER) is None
    known = {"H": 16, "K": 64, "V": 64, "G": 64, "C": 64, "BK": 32, "BG": 32, "BV": 64}
    known |= {"V_PARTS": 1, "CHANNELS": True, "STRONG": True, "DOCUMENTS": False}
    known |= {"PRECISION": "bf16x3"}
    source = source_of(gradient_kernel, known | {"SUM": triton.language.float32}, "*bf16")
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text, knobs.nvidia.ptxas.version


def test_descriptors_of_operands_are_sound(tmp_path):
    text, _ = in_fresh_interpreter(machine_code, True, timeout=120, TRITON_CACHE_DIR=str(tmp_path))
    assert "HGMMA" in text
    assert mixed_up_halves(text) == []


def test_what_is_avoided(tmp_path):
    """If this fails with a ptxas 12.8, the others above guard against nothing."""
    folder = str(tmp_path)
    text, version = in_fresh_interpreter(machine_code, False, timeout=120, TRITON_CACHE_DIR=folder)
    if version != "12.8":
        pytest.skip(f"Triton takes ptxas {version} here, only 12.8 is known to be unsound")
    assert mixed_up_halves(text) != []
