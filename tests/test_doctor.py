"""What `hybridsp doctor` finds on machines that are not this one: each check where it is due."""

import contextlib
import dataclasses
import itertools
import tomllib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from packaging.requirements import Requirement

from hybridsp.doctor import Finding, Status, gpu, host, software
from hybridsp.doctor.finding import amount, exit_status, failing, merge, name_ranks, ok, render
from hybridsp.doctor.finding import warning as warns

MIB, GIB = 2**20, 2**30
TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-63\t0
GPU1\tNV18\t X \tSYS\tNODE\t0-63\t0
GPU2\tSYS\tSYS\t X \tNODE\t64-127\t1
NIC0\tPIX\tNODE\tNODE\t X
"""


def one(findings, name) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# The table


def test_what_ranks_say_alike_is_said_once():
    shared = ok("packages", "torch")
    odd = failing("GPU", "broken", "replace it")
    merged = merge({0: [shared, ok("GPU", "fine")], 3: [odd], 2: [ok("GPU", "fine")]})
    assert merged == [
        shared,
        failing("GPU", "broken (rank 3)", "replace it"),
        ok("GPU", "fine (ranks 0, 2)"),
    ]
    many = merge({rank: [ok("GPU", f"{rank} GiB")] for rank in range(64)})
    assert [finding.found for finding in many][2:] == [
        "2 GiB (rank 2)",
        "61 other answers, all of them well",
    ]
    assert name_ranks([7, 0, 5, 6]) == "ranks 0, 5-7"


def test_table_and_exit_status():
    findings = [ok("disk", "10 GiB"), warns("links", "slow " * 40, "use NVLink")]
    assert exit_status(findings) == 0
    text = render(findings)
    assert text.startswith("ok       disk   10 GiB\nwarning  links  slow slow")
    assert "\n                fix: use NVLink\n" in text
    assert text.endswith("\n1 ok, 1 warning, 0 failing")
    assert max(map(len, text.splitlines())) <= 110
    assert exit_status([*findings, failing("x", "y", "z")]) == 1
    with pytest.raises(AssertionError, match="without a fix"):
        Finding(name="x", status=Status.FAILING, found="y")
    assert [amount(n) for n in (3 * GIB, 64 * MIB, 65536)] == ["3.0 GiB", "64.0 MiB", "64 KiB"]


# The host


@pytest.mark.parametrize(
    ("free", "gpus", "status"),
    [
        (10 * MIB, 8, "failing"),
        (10 * MIB, 1, "warning"),
        (64 * MIB, 8, "warning"),
        (64 * MIB, 0, "ok"),
        (8 * GIB, 8, "ok"),
    ],
)
def test_shared_memory(monkeypatch, free, gpus, status):
    usage = SimpleNamespace(total=max(free, 64 * MIB), free=free)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda path: usage)
    finding = host.shared_memory(gpus)
    assert finding.status == status
    assert amount(free) in finding.found
    assert status == "ok" or "--shm-size" in finding.fix


def test_shared_memory_that_is_not_there(tmp_path):
    assert host.shared_memory(1, tmp_path / "absent").status == "warning"


def test_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (1024, 4096))
    assert host.open_files(8).status == "ok"
    assert "ulimit -n 65536" in host.open_files(256).fix
    card = tmp_path / "infiniband" / "mlx5_0"
    assert host.locked_memory(card.parent).status == "ok"
    card.mkdir(parents=True)
    assert "memlock" in host.locked_memory(card.parent).fix


def test_memory_that_nobody_knows():
    assert host.memory(None).status == "ok"


def test_disk(monkeypatch, tmp_path):
    assert host.disk(tmp_path / "not" / "yet", needed=1).status == "ok"
    too_little = host.disk(tmp_path, needed=2**60)
    assert too_little.status == "warning"
    file = tmp_path / "file"
    file.touch()
    assert host.disk(file / "run").status == "failing"
    monkeypatch.setattr(host.os, "access", lambda *arguments: False)
    assert "cannot be written" in host.disk(tmp_path).found


# GPUs


@contextlib.contextmanager
def fake_gpus(*names, free=0.99, major=9, peers=True, smi=None, memories=None, topology=TOPOLOGY):
    memory = 80 * GIB
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: len(names),
        "mem_get_info": lambda index: (int(free * memory), memory),
        "get_device_name": lambda index: names[index],
        "get_device_properties": lambda index: SimpleNamespace(
            name=names[index], major=major, minor=0, uuid=f"a{index}"
        ),
        "can_device_access_peer": lambda a, b: peers,
    }
    answers = {"topo": topology, "--query-gpu=uuid,memory.free,memory.total": memories}
    with contextlib.ExitStack() as patches:
        for name, fake in fakes.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, fake))
        asked = mock.patch.object(gpu, "nvidia_smi", lambda first, *rest: answers.get(first, smi))
        patches.enter_context(asked)
        yield


def test_no_gpu_is_no_fault_unless_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *arguments: None)
    assert gpu.gpus(used=False) == [ok("GPUs", "none: CPU only, gloo")]
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *arguments: "NVIDIA H100, 535.1\n" * 2)
    for built_for, remedy in ((None, "a CUDA build"), ("13.0", "the driver is recent enough")):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        (finding,) = gpu.gpus(used=False)
        assert finding.status == "failing"
        assert remedy in finding.fix


def test_gpus():
    with fake_gpus("H100", "H100", smi="H100, 570.1\nH100, 570.1"):
        findings = gpu.gpus(used=True)
        assert [finding.name for finding in findings] == ["GPUs", "driver"]
        assert exit_status(findings) == 0
        assert findings[1].found.startswith("570.1; ")
        found = gpu.own(1)
        assert (found.name, found.status) == ("GPU 1", "ok")
        assert found.found.startswith("H100, compute capability 9.0, 79.2 GiB of 80.0 GiB")
        assert "DS_ACCELERATOR" in gpu.gpus(used=False)[0].found
    with fake_gpus("H100", "A100"):
        assert one(gpu.gpus(used=True), "GPUs of a kind").status == "warning"
    with fake_gpus("V100", major=7):
        assert "Ampere" in gpu.own(0).fix
    with fake_gpus("H100", free=0.5):
        assert "nvidia-smi" in gpu.own(0).fix
    broken = mock.patch.object(torch.cuda, "mem_get_info", mock.Mock(side_effect=RuntimeError("x")))
    with fake_gpus("H100"), broken:
        assert gpu.own(0).status == "failing"


def test_all_gpus_are_looked_at_without_a_context():
    """PyTorch's word on free memory takes one; nvidia-smi also lists GPUs that are not visible."""
    no_context = mock.patch.object(torch.cuda, "mem_get_info", mock.Mock(side_effect=SystemError))
    rows = "GPU-other, 1, 81920\nGPU-a1, 40960, 81920\nGPU-a0, 81000, 81920\n"
    with fake_gpus("H100", "H100", memories=rows), no_context:
        found = one(gpu.gpus(used=True), "GPUs")
        assert found.status == "warning"
        assert found.found.endswith("; free of GPU 1 40.0 GiB of 80.0 GiB")
    with fake_gpus("H100", "H100", memories=rows.replace("40960", "81910")), no_context:
        found = one(gpu.gpus(used=True), "GPUs")
        assert found == ok("GPUs", "2 that PyTorch can use; 79.1 GiB or more free of each of 2")
    with fake_gpus("H100", memories="GPU-a0, [N/A], [N/A]"), no_context:
        assert "does not tell" in one(gpu.gpus(used=True), "GPUs").found


def test_links():
    kinds = gpu.link_kinds(TOPOLOGY)
    assert kinds == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    assert gpu.link_kinds("") == {}
    two = "\tGPU0\tGPU1\nGPU0\tX\tNV18\nGPU1\tNV18\tX\n"
    with fake_gpus("a", "a", topology=two):
        assert gpu.links() == [ok("links", "2 GPUs, NV18, peer access between all")]
    with fake_gpus("a", "a", "a"):
        assert "NVLink" in gpu.links()[0].fix
    with fake_gpus("a", "a", "a", peers=False, topology=None):
        (finding,) = gpu.links()
        assert "3 of 3 pairs" in finding.found
        assert "does not tell" in finding.found
    with fake_gpus("a"):
        assert gpu.links() == []


def test_settings_that_hurt(monkeypatch):
    for name in gpu.HURTFUL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert gpu.settings().status == "ok"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert gpu.settings().fix.endswith("unset NCCL_P2P_DISABLE NCCL_ALGO")


def test_an_nvidia_smi_that_hangs_is_none(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu, "SMI_SECONDS", 0.2)
    assert gpu.nvidia_smi("-L") is None
    tool.write_text("#!/bin/sh\necho GPU 0\n")
    monkeypatch.setattr(gpu, "SMI_SECONDS", 20)
    assert gpu.nvidia_smi("-L") == "GPU 0"
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert gpu.nvidia_smi("-L") is None


# Software


def test_versions(tmp_path):
    needs = '["torch>=99", "numpy>=2", "no-such-package>=1.5"]'
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "hybridsp"\ndependencies = {needs}\n'
    )
    findings = software.versions(tmp_path)
    assert [finding.name for finding in findings] == ["torch", "no-such-package", "packages"]
    assert findings[0].fix == "pip install 'torch>=99'"
    assert "not installed, >=1.5 is needed" in findings[1].found
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "hybridsp"\ndependencies = ["torch"]'
    )
    (tmp_path / "constraints.txt").write_text("# pinned\ntorch==9.9  # any build\n")
    assert "(tested with 9.9)" in software.versions(tmp_path)[-1].found


def test_an_installed_package_knows_what_it_needs(tmp_path, monkeypatch):
    lines = ["torch>=2.11", "triton>=3.6; extra == 'cuda'"]
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: lines)
    assert [finding.name for finding in software.versions(tmp_path)] == ["packages"]
    unknown = mock.Mock(side_effect=software.importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(software.importlib.metadata, "requires", unknown)
    assert software.versions(tmp_path)[0].status == "warning"


def test_the_packages_of_every_extra_are_told_of():
    project = tomllib.loads((software.SOURCE_TREE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].items()
    lines = itertools.chain.from_iterable(lines for name, lines in extras if name != "test")
    named = {Requirement(line).name for line in lines}
    assert named <= {*software.OPTIONAL}


def test_optimizer_offload(monkeypatch):
    monkeypatch.setattr(software, "_compile", lambda compiler, source: None)
    monkeypatch.setattr(software.shutil, "which", lambda name: f"/bin/{name}")
    assert software.optimizer_offload(None).status == "ok"
    assert "pinned" in software.optimizer_offload("no room").found
    monkeypatch.setattr(software, "_compile", lambda compiler, source: "no omp.h")
    assert "no omp.h" in software.optimizer_offload(None).found
    monkeypatch.setattr(software.shutil, "which", lambda name: name == "ninja" or None)
    missing = software.optimizer_offload(None, needed=True)
    assert missing.status == "failing"
    assert "apt install g++" in missing.fix
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    assert software.optimizer_offload(None).status == "warning"
    assert "pip install ninja" in software.optimizer_offload(None).fix


def test_the_compiler_is_tried(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: omp.h: no such file' >&2; exit 1\n")
    compiler.chmod(0o755)
    assert "omp.h" in software._compile(str(compiler), software.PROBE)
    compiler.write_text("#!/bin/sh\nexit 0\n")
    assert software._compile(str(compiler), software.PROBE) is None


def test_linear_attention(monkeypatch):
    cpu, device = torch.device("cpu"), torch.device("cuda")
    tensors = software._linear_tensors(cpu)
    triton = pytest.importorskip("hybridsp.ops.gla.triton")
    monkeypatch.setattr(software, "_linear_tensors", lambda device: tensors)
    monkeypatch.setattr(software, "_assembler", lambda device: "ptxas 12.9")

    def kernels(why_not, attend):
        backend = dataclasses.replace(triton.BACKEND, why_not=lambda tokens: why_not)
        monkeypatch.setattr(triton, "BACKEND", backend)
        monkeypatch.setattr(software, "_attend", attend)
        return software.linear_attention(device)

    wrong = kernels("ptxas 12.8 at /x miscompiles them; set TRITON_PTXAS_PATH", None)
    assert wrong.status == "warning"
    assert "plain PyTorch will be used" in wrong.found
    assert "TRITON_PTXAS_PATH" in wrong.found
    results = {"plain": (torch.ones(4),), "triton": (torch.ones(4) * 1.001,)}
    right = kernels(None, lambda device, backend: results[backend])
    assert right.status == "ok"
    results["triton"] = (torch.full((4,), float("nan")),)
    assert kernels(None, lambda device, backend: results[backend]).status == "failing"
    raising = mock.Mock(side_effect=RuntimeError("Failed to find C compiler"))
    assert "C compiler" in kernels(None, raising).found


@pytest.mark.parametrize("varlen", [True, False])
def test_softmax_attention_of_packed_documents(monkeypatch, varlen):
    def choose(q, k, v, lengths_vary=False):
        name = "flash" if lengths_vary else "cudnn"
        return SimpleNamespace(name=name, varlen=object() if varlen and lengths_vary else None)

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.zeros(1))
    monkeypatch.setattr(software.softmax, "choose_backend", choose)
    monkeypatch.setattr(software.softmax, "why_not", lambda *arguments: "not installed")
    monkeypatch.setattr(software, "why_not_varlen", lambda *arguments: "its gradients are off")
    finding = software.softmax_attention(torch.device("cuda"))
    how = "many in a call (varlen)"
    if not varlen:
        how = "one by one, as varlen is not used: its gradients are off"
    assert finding.status == "ok"
    assert finding.found.startswith("cudnn for bf16")
    assert f"packed documents: flash, {how}; not used: " in finding.found
