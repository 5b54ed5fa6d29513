"""Versions, and which code will compute: linear attention, softmax attention, offloaded AdamW.

Whether a kernel is right depends on the chip and on versions of half a dozen things, so it is not
looked up in a table: the backends are asked, as a layer would ask them, and what they compute is
held against plain PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch import Tensor

from hybridsp.doctor.finding import Finding, Status, failing, ok, warning
from hybridsp.ops import gla, softmax
from hybridsp.ops.gla.contract import Tokens
from hybridsp.ops.softmax.choose import why_not_varlen

NAMED = ("torch", "transformers", "deepspeed", "accelerate")
OPTIONAL = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "flash-linear-attention",
    "peft",
)
SOURCE_TREE = Path(__file__).parents[2]
COMPILE_SECONDS = 120
COMPARED = ("triton", "plain")  # backends of linear attention
LIMIT = 0.05  # of a result's norm; bf16 comes to 0.01, what is miscompiled to more than 1

# What DeepSpeed compiles CPUAdam with, in a few lines.
PROBE = "#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


def versions(source_tree: Path = SOURCE_TREE) -> list[Finding]:
    """What is installed, against what this project asks for and was tested with."""
    requirements = list(_requirements(source_tree))
    tested = dict(_tested(source_tree / "constraints.txt"))
    findings, shown = [], []
    for requirement in requirements:
        name, wanted = requirement.name, requirement.specifier
        found = _version(name)
        install = f"pip install '{name}{wanted}'"
        if found is None:
            findings.append(failing(name, f"not installed, {wanted} is needed", install))
        elif not wanted.contains(found, prereleases=True):
            findings.append(failing(name, f"{found} is not {wanted}", install))
        elif name in NAMED:
            differs = tested.get(name) not in (None, found.partition("+")[0])
            shown.append(f"{name} {found}" + f" (tested with {tested.get(name)})" * differs)
    if not requirements:
        findings.append(
            warning(
                "packages",
                "hybridsp is not installed as a package, so what it needs is unknown",
                "pip install -e . in its source tree",
            )
        )
    extras = [f"{name} {version}" for name in OPTIONAL if (version := _version(name))]
    shown.append(f"optional: {', '.join(extras) or 'none'}")
    return [*findings, ok("packages", "; ".join(shown))]


def _requirements(source_tree: Path) -> Iterator[Requirement]:
    """What must be there; a source tree's own file knows better than what an install once noted."""
    project = source_tree / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if table["name"] == "hybridsp":
            yield from map(Requirement, table["dependencies"])
            return
    try:
        lines = importlib.metadata.requires("hybridsp") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _tested(constraints: Path) -> Iterator[tuple[str, str]]:
    for line in constraints.read_text().splitlines() if constraints.is_file() else []:
        name, equals, version = line.partition("#")[0].strip().partition("==")
        if equals:
            yield name, version


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def linear_attention(device: torch.device) -> Finding:
    """What will compute the linear layers, tried forward and backward."""
    name = "linear attention"
    if device.type != "cuda":
        return ok(name, "plain PyTorch, as always on the CPU")
    q, k, v, g = _linear_tensors(device)
    slow = "plain PyTorch will be used, which is slow on a GPU"
    try:
        from hybridsp.ops.gla.triton import BACKEND
    except ImportError as error:
        return warning(name, f"{slow}: {error}", "pip install 'triton>=3.6'")
    reason = BACKEND.why_not(Tokens(q=q, k=k, v=v, g=g, scale=0.125, segments=None))
    if reason is not None:
        return warning(name, f"{slow}: {reason}", "mend what is said here")
    assembler = _assembler(device)
    try:
        off = max(_off(a, b) for a, b in zip(*(_attend(device, x) for x in COMPARED), strict=True))
    # Triton needs a C compiler and the driver's library when it first runs; its errors are many.
    except Exception as error:  # noqa: BLE001 - whatever it is, layers will meet it too
        return failing(
            name,
            f"{assembler}; a trial raised {type(error).__name__}: {_first_line(error)}",
            "install a C compiler (apt install gcc) and see that ~/.triton can be written",
        )
    if not off < LIMIT:  # written so that NaN fails
        return failing(
            name,
            f"{assembler}; a trial was off by {off:.1%}",
            "set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9 or later, and rm -r ~/.triton/cache",
        )
    return ok(name, f"triton; {assembler}; a trial was off by {off:.2%}")


def _linear_tensors(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 200, 2, 64, generator=generator) for _ in range(4))
    tensors = [x.to(device, torch.bfloat16) for x in (q, k, v)]
    return [*tensors, torch.nn.functional.logsigmoid(g).to(device)]


def _attend(device: torch.device, backend: str) -> tuple[Tensor, ...]:
    """Output and gradients of a small layer."""
    tensors = [x.requires_grad_() for x in _linear_tensors(device)]
    out, _ = gla.gated_linear_attention(*tensors, scale=0.125, backend=backend)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)


def _off(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def _assembler(device: torch.device) -> str:
    """Triton's version and the ptxas that it uses for this chip."""
    from triton import knobs

    major = torch.cuda.get_device_capability(device)[0]
    names = ("ptxas_blackwell", "ptxas") if major >= 10 else ("ptxas",)
    tool = next(getattr(knobs.nvidia, name) for name in names if hasattr(knobs.nvidia, name))
    return f"Triton {_version('triton')}, ptxas {tool.version} at {tool.path}"


def softmax_attention(device: torch.device) -> Finding:
    """What will compute the softmax layers, and why not the others, each one tried."""
    name = "softmax attention"
    if device.type != "cuda":
        return ok(name, "plain PyTorch, as always on the CPU")
    q, k, v = (
        torch.empty(1, 64, heads, 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    chosen = softmax.choose_backend(q, k, v).name
    packed = softmax.choose_backend(q, k, v, lengths_vary=True)
    others = [x for x in softmax.BACKENDS if x not in (chosen, packed.name, "plain")]
    reasons = {other: softmax.why_not(other, q, k, v) for other in others}
    usable = [other for other, reason in reasons.items() if reason is None]
    found = f"{chosen} for bf16, 8 query and 2 KV heads of 128; packed documents: "
    found += f"{packed.name}, {_how_packed(packed, q, k, v)}"
    if usable:
        found += f"; slower on this chip: {', '.join(usable)}"
    refused = "; ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
    found += f"; not used: {refused}" if refused else ""
    if "plain" in (chosen, packed.name):
        return warning(name, found, "install a CUDA build of PyTorch 2.11 or later, with cuDNN")
    return ok(name, found)


def _how_packed(packed: softmax.Backend, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Whether a backend computes the blocks of packed documents at once, and if not, why."""
    if packed.varlen is not None:
        return "many in a call (varlen)"
    reason = why_not_varlen(packed.name, q, k, v)
    return f"one by one, as varlen is not used: {reason}"


def optimizer_offload(pinning_fails: str | None, *, needed: bool = False) -> Finding:
    """Whether DeepSpeed can build CPUAdam, the optimizer of `zero3_offload`.

    Args:
        pinning_fails: why host memory cannot be pinned, if so.
        needed: whether the run offloads.
    """
    bad = Status.FAILING if needed else Status.WARNING
    name = "optimizer offload"
    version = _version("deepspeed")
    problem = _why_no_cpu_adam()
    if problem is None and pinning_fails is None:
        return ok(name, f"possible: DeepSpeed {version} can build CPUAdam")
    what, fix = problem or (
        f"host memory cannot be pinned ({pinning_fails})",
        "raise the container's memory limit, or set pin_memory to false",
    )
    found = f"not possible with DeepSpeed {version}: {what}"
    return Finding(name=name, status=bad, found=found, fix=fix)


def _why_no_cpu_adam() -> tuple[str, str] | None:
    """What is missing to compile it, and how to get it. DeepSpeed itself takes seconds to ask."""
    deepspeed = importlib.util.find_spec("deepspeed")
    if deepspeed is None or deepspeed.origin is None:
        return "it is not installed", "pip install deepspeed"
    if any((Path(deepspeed.origin).parent / "ops/adam").glob("cpu_adam_op*.so")):
        return None  # was compiled when DeepSpeed was installed
    if shutil.which("ninja") is None:
        return "ninja is not in PATH", "pip install ninja, in the environment that the job runs in"
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} is not in PATH", "apt install g++, or set CXX"
    complaint = _compile(compiler, PROBE)
    if complaint is not None:
        fix = "install what its message misses: python3-dev for Python.h, libgomp for omp.h"
        return f"{compiler} fails ({complaint})", fix
    return None


def _compile(compiler: str, source: str) -> str | None:
    """What the compiler complains of, or None."""
    include = sysconfig.get_path("include")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.cpp"
        file.write_text(source)
        command = [compiler, "-fopenmp", "-fsyntax-only", f"-I{include}", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return _first_line(error)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return (errors or [f"exit code {done.returncode}"])[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


__all__ = ["linear_attention", "optimizer_offload", "softmax_attention", "versions"]
