"""GPUs, the links between them, NCCL, and settings from the environment that slow or break it.

PyTorch says what it can use, `nvidia-smi` what there is; where the two differ, that is the finding.
A rank asks PyTorch for the free memory of its own GPU only: the question takes a CUDA context, half
a gigabyte for as long as the process lives. That of the others is `nvidia-smi`'s to say.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import torch

from hybridsp.doctor.finding import Finding, amount, failing, ok, warning
from hybridsp.launch import variables

SMI_SECONDS = 30  # of a hung driver there is no answer at all
FULL = 0.9  # share of a GPU that should be free; a process of ours takes half a gigabyte
DRIVER_FILE = Path("/proc/driver/nvidia/version")

# variable -> the values that hurt (None: any), and what they do
HURTFUL: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "NCCL_P2P_DISABLE": (("1",), "GPUs of a host talk through its memory, several times slower"),
    "NCCL_P2P_LEVEL": (("LOC", "0"), "GPUs of a host talk through its memory"),
    "NCCL_SHM_DISABLE": (("1",), "GPUs without peer access talk through sockets"),
    "NCCL_IB_DISABLE": (("1",), "hosts talk over TCP and not over InfiniBand or RoCE"),
    "NCCL_NET_GDR_LEVEL": (("LOC", "0"), "network cards do not read GPU memory directly"),
    "NCCL_ALGO": (None, "NCCL cannot choose the algorithm by size"),
    "NCCL_PROTO": (None, "NCCL cannot choose the protocol by size, which costs small messages"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "NCCL writes a log on every rank"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "nothing overlaps: the host waits for every kernel"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "the host waits in every collective"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a rank that dies leaves the others waiting"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "every collective is preceded by a comparison"),
}
NVLINK = re.compile(r"NV(\d+)")


def gpus(used: bool) -> list[Finding]:
    """The GPUs of this host together, without a context on any.

    Args:
        used: whether this process works on them (DS_ACCELERATOR may keep it off).
    """
    smi = nvidia_smi("--query-gpu=name,driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        return [_no_gpu(smi)]
    count = torch.cuda.device_count()
    if not used:
        return [ok("GPUs", f"{count}, not used: DS_ACCELERATOR = cpu")]
    findings = [_free_memory(count)]
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    if len(names) > 1:
        findings.append(
            warning(
                "GPUs of a kind",
                f"{len(names)} kinds: {', '.join(sorted(names))}",
                "choose GPUs of one kind with CUDA_VISIBLE_DEVICES: all ranks wait for the slowest",
            )
        )
    return [*findings, ok("driver", _driver(smi))]


def _free_memory(count: int) -> Finding:
    """What `nvidia-smi` says is free of the GPUs that PyTorch sees; indices are PyTorch's."""
    there = f"{count} that PyTorch can use"
    fields = "--query-gpu=uuid,memory.free,memory.total"
    by_uuid = memory_by_uuid(nvidia_smi(fields, "--format=csv,noheader,nounits") or "")
    uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    known = {index: by_uuid[uuid] for index, uuid in enumerate(uuids) if uuid in by_uuid}
    if not known:
        return ok("GPUs", f"{there}; nvidia-smi does not tell what is free of them")
    full = [index for index, (free, total) in known.items() if free < FULL * total]
    if full:
        lines = [f"GPU {i} {amount(known[i][0])} of {amount(known[i][1])}" for i in full]
        return warning(
            "GPUs",
            f"{there}; free of {', '.join(lines)}",
            "end the processes that hold the rest; nvidia-smi lists those of this host",
        )
    least = min(free for free, _ in known.values())
    return ok("GPUs", f"{there}; {amount(least)} or more free of each of {len(known)}")


def memory_by_uuid(rows: str) -> dict[str, tuple[int, int]]:
    """Bytes free and in all, from nvidia-smi's `uuid, memory.free, memory.total` in MiB."""
    found = {}
    for row in rows.splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 3 and cells[1].isdigit() and cells[2].isdigit():  # else [N/A]
            found[cells[0]] = (int(cells[1]) * 2**20, int(cells[2]) * 2**20)
    return found


def own(index: int) -> Finding:
    """The GPU that this process works on. Makes a context on it."""
    name = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:  # an earlier job's fault, or another process has it alone
        return failing(
            name,
            f"cannot be used: {str(error).splitlines()[0]}",
            "see nvidia-smi -q and dmesg; choose others with CUDA_VISIBLE_DEVICES",
        )
    chip = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    found = f"{chip}, {amount(free)} of {amount(total)} free"
    if properties.major < 8:
        return warning(
            name,
            f"{found}: the kernels need 8.0, so PyTorch's own operations are used",
            "use an Ampere GPU or a later one",
        )
    if free < FULL * total:
        return warning(
            name, found, "end the processes that hold the rest; nvidia-smi lists those of this host"
        )
    return ok(name, found)


def _no_gpu(smi: str | None) -> Finding:
    if smi is None:
        return ok("GPUs", "none: CPU only, gloo")
    there = f"{len(smi.splitlines())} that nvidia-smi sees, none that PyTorch can use"
    if torch.version.cuda is None:
        return failing(
            "GPUs",
            f"{there}: torch {torch.__version__} is built for the CPU",
            "install a CUDA build of PyTorch (pytorch.org says which command)",
        )
    return failing(
        "GPUs",
        f"{there} (built for CUDA {torch.version.cuda}; {_driver(smi)})",
        "check CUDA_VISIBLE_DEVICES, and that the driver is recent enough for this CUDA",
    )


def _driver(smi: str | None) -> str:
    built = f"PyTorch built for CUDA {torch.version.cuda}"
    if smi:
        versions = sorted({line.rpartition(",")[2].strip() for line in smi.splitlines()})
        return f"{', '.join(versions)}; {built}"
    match = re.search(r"\s(\d+\.[\d.]+)\s", _text_of(DRIVER_FILE))
    return f"{match[1] if match else 'version unknown (no nvidia-smi here)'}; {built}"


def links() -> list[Finding]:
    """How the GPUs of this host reach each other."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return []
    pairs = list(combinations(range(count), 2))
    without = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    kinds = link_kinds(nvidia_smi("topo", "-m") or "")
    wires = ", ".join(sorted(set(kinds.values()))) or "unknown wires (nvidia-smi does not tell)"
    found = f"{count} GPUs, {wires}"
    if without:
        a, b = without[0]
        return [
            warning(
                "links",
                f"{found}; {len(without)} of {len(pairs)} pairs have no peer access, GPUs {a} and "
                f"{b} for one, and talk through host memory",
                "switch ACS and the IOMMU off in the BIOS, or give the container all GPUs",
            )
        ]
    if kinds and not all(NVLINK.fullmatch(kind) for kind in kinds.values()):
        return [
            warning(
                "links",
                f"{found}, peer access between all; not every pair has NVLink",
                "let Ulysses stay among GPUs with NVLink (nvidia-smi topo -m), by ring and ulysses",
            )
        ]
    return [ok("links", f"{found}, peer access between all")]


def link_kinds(topology: str) -> dict[tuple[int, int], str]:
    """The pairs of GPUs in `nvidia-smi topo -m` and what connects them: NV18, PIX, SYS, ..."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    lines = [line.split() for line in plain.splitlines()]
    header: list[str] = next((line for line in lines if line[:1] == ["GPU0"]), [])
    is_gpu = re.compile(r"GPU\d+").fullmatch
    # The header, too, is a line that begins with GPU0.
    rows = [line for line in lines if line and is_gpu(line[0]) and line is not header]
    columns = [cell for cell in header if is_gpu(cell)]
    kinds = {}
    for row in rows:
        for column, cell in zip(columns, row[1:], strict=False):
            a, b = int(row[0][3:]), int(column[3:])
            if a < b:
                kinds[a, b] = cell
    return kinds


def settings() -> Finding:
    """Variables of the environment that slow NCCL or PyTorch down, or hide their errors."""
    there = variables("NCCL_", "TORCH_", "CUDA_")
    hits = []
    for name, (values, harm) in HURTFUL.items():
        value = there.get(name)
        if value is not None and (values is None or value.upper() in values):
            hits.append((name, f"{name}={value}: {harm}"))
    if not hits:
        return ok("environment", "no setting of NCCL, CUDA or PyTorch that hurts")
    return warning(
        "environment",
        "; ".join(what for _, what in hits),
        f"unless you know why: unset {' '.join(name for name, _ in hits)}",
    )


def nccl() -> Finding:
    """NCCL's version."""
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    return ok("NCCL", f"version {version}")


def pinned_memory() -> str | None:
    """Why no host memory can be pinned for copies, or None if it can."""
    try:
        torch.empty(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def nvidia_smi(*arguments: str) -> str | None:
    """What `nvidia-smi` prints, or None where there is none that answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


__all__ = [
    "gpus",
    "link_kinds",
    "links",
    "memory_by_uuid",
    "nccl",
    "nvidia_smi",
    "own",
    "pinned_memory",
    "settings",
]
