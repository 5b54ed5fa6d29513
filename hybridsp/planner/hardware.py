"""What GPUs, links and hosts do per second: the constants of the time model.

"Measured" is measured by this project, on an H100 80GB or an H200 (the same multiprocessors with
other memory); the rest is from data sheets, or a share of a data sheet's figure that the measured
chip reaches of its own. A plan says which is which.

    figure       measured on                how                               share of data sheet
    matmul       H200  752 TFLOP/s          bf16 GEMM 8192^3                  0.76 of 989
    attention    H200  579 and 542 TFLOP/s  cuDNN, causal, 64K tokens, D 128  0.55 of 989 (542)
    memory       H100  2.974 TB/s           copy, read and write              0.89 of 3.35
                 H200  4.3 TB/s             copy, read and write              0.90 of 4.8
    nvlink       H200  361 GB/s             send/recv of 256 MiB in 743 us    0.80 of 450
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from hybridsp.collectives.cost import Link, Topology

GIB = 2**30
MOST_GPUS = 1024
MATMUL_SHARE, ATTENTION_SHARE, MEMORY_SHARE, NVLINK_SHARE = 0.76, 0.55, 0.89, 0.80
# Numbers per second of kernels that broadcast an operand or walk it in another order
# (`elementwise`), from the profile of one step (H200, 128K tokens): its small kernels take 634 ms,
# of which the bytes of the others are 243, the starts of all 14,554 are 87, and what tiles copy and
# sum is 10. The rest is 133e9 such numbers. Per clock and multiprocessor (132 at 1.98 GHz):
INDEXED = 450e9
INDEXED_PER_CLOCK = INDEXED / (132 * 1.98e9)
# Of PCIe's and the network's nominal rate, by assumption: headers and protocol take the rest.
PCIE_SHARE, NETWORK_SHARE = 0.85, 0.85

# A message of no bytes: NCCL costs 35 to 45 us a call below 4 MiB on NVLink (measured, H200); what
# the network adds is an assumption.
NVLINK_LATENCY, NETWORK_LATENCY = 40e-6, 60e-6
# Of a host, by assumption: two sockets with 8 channels of DDR5-4800 have 614 GB/s nominally, of
# which CPUAdam, which reads and writes, gets about a third.
HOST_MEMORY_BANDWIDTH = 200e9


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One chip. Rates are per second: FLOP, or bytes in one direction.

    Attributes:
        memory: bytes that a process can allocate.
        peak: bf16 products by the data sheet; MFU is a share of this.
        matmul, attention_forward, attention: bf16 rates that are reached; `attention` over
            forward and backward together.
        float32: rate of fp32 products, without tensor cores.
        bandwidth: of device memory, read and written bytes together.
        indexed: numbers, of kernels that work out where each one's operands lie.
        nvlink, pcie: to a neighbour, and to the host.
        measured: names of the fields above that this project measured.
    """

    memory: float
    peak: float
    matmul: float
    attention_forward: float
    attention: float
    float32: float
    bandwidth: float
    indexed: float
    nvlink: float
    pcie: float
    measured: frozenset[str] = frozenset()


def _from_data_sheet(
    memory: float,
    peak: float,
    float32: float,
    bandwidth: float,
    clocks: float,
    nvlink: float,
    pcie: float,
) -> GPU:
    return GPU(
        memory=memory,
        peak=peak,
        matmul=MATMUL_SHARE * peak,
        attention_forward=ATTENTION_SHARE * peak,
        attention=ATTENTION_SHARE * peak,
        float32=MATMUL_SHARE * float32,
        bandwidth=MEMORY_SHARE * bandwidth,
        indexed=INDEXED_PER_CLOCK * clocks,
        nvlink=NVLINK_SHARE * nvlink,
        pcie=PCIE_SHARE * pcie,
    )


# The H200's figures serve the H100, whose multiprocessors, clocks and links are the same.
_HOPPER = {
    "peak": 989e12,  # NVIDIA H100 and H200 data sheets, SXM, dense
    "matmul": 752e12,
    "attention_forward": 579e12,
    "attention": 542e12,
    "float32": MATMUL_SHARE * 67e12,  # data sheet
    "indexed": INDEXED,
    "nvlink": 361e9,
    "pcie": PCIE_SHARE * 64e9,  # PCIe 5 x16
}

GPUS = {
    # NVIDIA A100 80GB data sheet, SXM: 312 TFLOP/s bf16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s
    # both ways, PCIe 4 x16; 108 multiprocessors at 1.41 GHz.
    "a100-80": _from_data_sheet(79 * GIB, 312e12, 19.5e12, 2039e9, 108 * 1.41e9, 300e9, 32e9),
    # 78 GiB and 139 GiB: what PyTorch can allocate, measured.
    "h100-80": GPU(
        memory=78 * GIB, bandwidth=2.974e12, measured=frozenset({"memory", "bandwidth"}), **_HOPPER
    ),
    "h200-141": GPU(
        memory=139 * GIB,
        bandwidth=4.3e12,
        measured=frozenset(
            {"memory", "matmul", "attention_forward", "attention", "bandwidth", "nvlink"}
        ),
        **_HOPPER,
    ),
    # NVIDIA DGX B200 data sheet, per GPU: 180 of the chip's 192 GB, 2.25 PFLOP/s dense bf16, 8
    # TB/s, NVLink 1.8 TB/s both ways, PCIe 5 x16; fp32 75 TFLOP/s from the HGX data sheet, hence
    # 148 multiprocessors at 1.98 GHz.
    "b200-192": _from_data_sheet(180e9, 2250e12, 75e12, 8e12, 148 * 1.98e9, 900e9, 64e9),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a job.

    Attributes:
        gpu: name in GPUS.
        gpus: in all.
        gpus_per_node: in one host; `gpus` is a multiple of it.
        network: bytes per second of a GPU's own network card, one direction, nominal.
        host_memory: bytes of one host.

    Raises:
        ValueError: an unknown GPU, or counts that do not fit.
    """

    gpu: str
    gpus: int
    gpus_per_node: int = 8
    network: float = 400e9 / 8
    host_memory: float = 1024 * GIB

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            near = get_close_matches(self.gpu.lower(), GPUS, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"gpu = {self.gpu!r} is unknown; {guess}known are {', '.join(GPUS)}")
        if not 1 <= self.gpus <= MOST_GPUS:
            raise ValueError(f"gpus = {self.gpus} is out of range; plan for 1 to {MOST_GPUS}")
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node = {self.gpus_per_node} must be at least 1")
        for name in ("network", "host_memory"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            whole = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise ValueError(
                f"gpus = {self.gpus} is no multiple of gpus_per_node = {self.gpus_per_node}; "
                f"use {whole} or {whole + self.gpus_per_node}, or say how many a node has"
            )

    @property
    def chip(self) -> GPU:
        """What one GPU does."""
        return GPUS[self.gpu]

    @property
    def local(self) -> int:
        """Ranks on one host."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Hosts."""
        return self.gpus // self.local

    @property
    def wire(self) -> float:
        """Bytes per second of a GPU to another host."""
        return NETWORK_SHARE * self.network

    def collective_bandwidth(self, ranks: int) -> float:
        """Bytes per second that a rank receives in a ring collective over consecutive ranks.

        On several hosts each byte enters a host once, over all its network cards together.
        """
        if ranks <= self.local:
            return self.chip.nvlink
        return min(self.chip.nvlink, self.local * self.wire)

    def topology(self, ranks: int) -> Topology:
        """The links of a group of consecutive ranks, as the scans' cost model wants them."""
        within = Link(latency=NVLINK_LATENCY, bandwidth=self.chip.nvlink)
        between = Link(latency=NETWORK_LATENCY, bandwidth=self.wire)
        several = ranks > self.local
        return Topology(
            ranks_per_host=self.local,
            within=within if self.local > 1 else None,
            between=between if several or self.local == 1 else None,
            all_gather=Link(
                latency=NETWORK_LATENCY if several else NVLINK_LATENCY,
                bandwidth=self.collective_bandwidth(ranks),
            ),
        )


__all__ = ["GIB", "GPU", "GPUS", "HOST_MEMORY_BANDWIDTH", "MOST_GPUS", "Cluster"]
