"""The All-Scan of GPUs that see each other's memory: one kernel per rank and scan, no NCCL.

Within a host NVLink lets a GPU store into another one's memory (PyTorch calls an allocation mapped
by all ranks symmetric memory). So a rank needs no library call to hand on a state: its kernel waits
until the previous rank has written the state that enters, computes d * In + S, and stores that
straight into the next rank's memory. Everything is enqueued on the current stream; the host waits
for nothing. NCCL costs 35-45 us per hop under 4 MiB, most of it launch.

The state is cut into slices of SLICE numbers, and each slice travels alone: while one is on its
way, the next is updated. A rank has one *mailbox* per direction, and per slice in it

    inbox      SLICE numbers, written by the previous rank, read by this one
    arrived    1 from when the previous rank has written the slice until this one has seen it
    occupied   about the *next* rank's inbox: 1 from when this rank claims the slot until the next
               one has read it

Rank 0 waits for nobody's state, so it may be many calls ahead: `occupied` holds it back until its
last message in that slot is read. Both flags are polled by the rank in whose memory they lie and
turned by its neighbour, and both are 0 when all calls are done, so a mailbox serves every later
call, layer after layer, without a count of calls anywhere.

Nobody waits for ever. Call n of rank r waits for call n of the rank before it, for what the rank
after it has read in earlier calls, and for its own earlier calls: all scans of a group on a rank,
either direction, run one after the other, whatever their streams. All of these come earlier in the
order (call, rank along the scan), provided that all ranks make the same calls in the same order,
as with every collective; and so it makes no difference which programs the GPU runs first, or how
many at once. At most PROGRAMS of them poll, so matrix products have the rest of the GPU.
A rank that dies or leaves out a call is another matter: its neighbour gives up after PATIENCE polls
of one flag (a quarter to half an hour), and its kernel fails with an assertion, which ends the
process. A wrong state is never returned.

The mailboxes are allocated at the first call and grow when a larger state comes; both are
collective and wait for the GPU. The kernel uses stores, loads and atomics on a peer's memory, no
multicast. (PyTorch also maps a multicast object where the driver has one;
TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in the environment keeps it from that.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.collectives.per_group import per_group
from hybridsp.collectives.topology import host_identity
from hybridsp.mesh import gather_objects

SLICE = 4096  # numbers per message: 16 KiB
PROGRAMS = 64  # that run at a time, each a loop over slices: a half of the SMs of an H100
NUM_WARPS = 8
PATIENCE = 2**31 - 1  # polls, of half a microsecond or so each
SLOTS_STEP = 64  # mailboxes hold a multiple of this many slices: 1 MiB

Result = TypeVar("Result")


class UnavailableError(RuntimeError):
    """Symmetric memory cannot be had; raised on every rank of the group, with the same reason."""


@dataclass(frozen=True, kw_only=True)
class Mailbox:
    """A rank's mailbox of one direction.

    Attributes:
        inbox: [slots, slice] fp32.
        arrived: [slots] int32 flags.
        occupied: [slots] int32 flags.
    """

    inbox: Tensor
    arrived: Tensor
    occupied: Tensor


def mailboxes(buffer: Tensor, slice_numel: int) -> tuple[Mailbox, Mailbox]:
    """Cut a rank's buffer [2, slots * (slice_numel + 2)] fp32 into its forward and reverse mailbox.

    All-zero bits are empty mailboxes.
    """
    slots = buffer.shape[1] // (slice_numel + 2)
    both = []
    for half in buffer:
        inbox, arrived, occupied = half.split([slots * slice_numel, slots, slots])
        flags = arrived.view(torch.int32), occupied.view(torch.int32)
        inbox = inbox.view(slots, slice_numel)
        both.append(Mailbox(inbox=inbox, arrived=flags[0], occupied=flags[1]))
    return both[0], both[1]


def hand_on(
    state: Tensor,
    decay: Tensor,
    mine: Mailbox,
    previous: Mailbox | None,
    following: Mailbox | None,
    *,
    programs: int = PROGRAMS,
    patience: int = PATIENCE,
) -> Tensor:
    """Enqueue one rank's part of a scan.

    Args:
        state: S_p [B, H, K, V] fp32, contiguous.
        decay: d_p [B, H, K] or [B, H, 1] fp32, contiguous.
        mine: the mailbox of this rank, with a slot for every slice of the state.
        previous: that of the rank from which In comes; None for the first rank.
        following: that of the rank that takes d * In + S; None for the last rank.
        programs: how many programs share the slices.
        patience: polls of one flag before the kernel fails.

    Returns:
        In(p) [B, H, K, V] fp32.
    """
    from hybridsp.collectives.symmetric_kernel import scan_hop  # imports triton

    incoming = torch.empty_like(state)
    slice_numel = mine.inbox.shape[1]
    slices = -(-state.numel() // slice_numel)
    # A neighbour that is not there is never written to; its place takes any pointer.
    to, source = following or mine, previous or mine
    scan_hop[min(slices, programs),](
        state,
        decay,
        incoming,
        mine.inbox,
        mine.arrived,
        mine.occupied,
        to.inbox,
        to.arrived,
        source.occupied,
        state.numel(),
        patience,
        SPAN=state.numel() // decay.numel(),
        SLICE=slice_numel,
        HAS_PREVIOUS=previous is not None,
        HAS_NEXT=following is not None,
        num_warps=NUM_WARPS,
        sanitize_overflow=False,  # with assertions on, Triton would check every sum of integers
    )
    return incoming


def why_not(state: Tensor, group: dist.ProcessGroup) -> str | None:
    """Why `symmetric_scan` cannot be used, or None where it can.

    The first call for a group and a device is collective and waits for the GPU: the ranks agree on
    one answer, which is kept as long as the group lives.

    Args:
        state: anything on the device of the states.
        group: the ranks of the scan.

    Returns:
        The reason as a sentence without a full stop, the same on all ranks.
    """
    if state.device.type != "cuda":
        return f"the state is on {state.device.type}: symmetric memory needs CUDA"
    if group.size() == 1:
        return None
    found = _connection_of(group, state.device)
    return found if isinstance(found, str) else None


def require_symmetric(state: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError, on every rank alike, where `why_not` has a reason; collective as that."""
    if reason := why_not(state, group):
        raise ValueError(
            f"algorithm = 'symmetric' cannot run here: {reason}; use algorithm = 'auto'"
        )


def symmetric_scan(
    state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool = False
) -> Tensor:
    """The state that enters this rank; not differentiable.

    Enqueued on the current stream. Waits for the GPU only in the group's first call and where the
    state is larger than any before it; these are collective, so all ranks must agree on the shape.

    Args:
        state: S_p [B, H, K, V] fp32 on CUDA, of the same shape on all ranks.
        decay: d_p [B, H, K] or [B, H, 1] fp32.
        group: the ranks, in sequence order.
        reverse: scan from the last rank to the first.

    Returns:
        In(p) [B, H, K, V] fp32; zero on the first rank (the last one if `reverse`).

    Raises:
        ValueError: it cannot run here (`require_symmetric`), or a state too large for the kernel's
            32-bit indices.
        UnavailableError: no memory was left for larger mailboxes.
    """
    require_symmetric(state, group)
    if state.numel() > 2**31 - SLICE:
        raise ValueError(
            f"state {tuple(state.shape)} has {state.numel()} numbers, and algorithm = 'symmetric' "
            f"takes at most {2**31 - SLICE}; use algorithm = 'chain'"
        )
    if group.size() == 1 or state.numel() == 0:
        return torch.zeros_like(state)
    connection = _connection_of(group, state.device)
    assert isinstance(connection, _Connection)
    return connection.scan(state.contiguous(), decay.contiguous(), group, reverse)


class _Connection:
    """The mailboxes of one group's ranks on one device, as this rank sees them.

    It does not hold the group, whose life ends it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self._last_stream: torch.cuda.Stream | None = None
        self._grow(SLOTS_STEP, group)

    def scan(self, state: Tensor, decay: Tensor, group: dist.ProcessGroup, reverse: bool) -> Tensor:
        needed = -(-state.numel() // SLICE)
        if needed > self._slots:
            self._grow(max(-(-needed // SLOTS_STEP) * SLOTS_STEP, 2 * self._slots), group)
        step = -1 if reverse else 1
        mine, previous, following = (
            self._mailboxes.get(rank, (None, None))[reverse]
            for rank in (group.rank(), group.rank() - step, group.rank() + step)
        )
        assert mine is not None
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last_stream not in (None, stream):
                stream.wait_event(self._done)
            incoming = hand_on(state, decay, mine, previous, following)
            self._done.record(stream)
            self._last_stream = stream
        return incoming

    def _grow(self, slots: int, group: dist.ProcessGroup) -> None:
        # Ranks and their neighbours have made the same calls, so this ends; after it nothing here
        # reads or writes the old mailboxes. A neighbour may yet turn a flag in this rank's old
        # ones, through a mapping of its own, which keeps the memory until it lets go of it too.
        torch.cuda.synchronize(self._device)
        buffer = _on_all_ranks(group, lambda: _allocate(slots, self._device))
        handle = _on_all_ranks(group, lambda: _rendezvous(buffer, group))
        nearby = range(max(group.rank() - 1, 0), min(group.rank() + 2, group.size()))
        self._mailboxes = {
            rank: mailboxes(handle.get_buffer(rank, buffer.shape, buffer.dtype), SLICE)
            for rank in nearby
        }
        # The mailboxes are views of this memory and do not keep it.
        self._memory = buffer, handle
        self._slots = slots


@per_group
def _connections(_group: dist.ProcessGroup) -> dict[torch.device, _Connection | str]:
    """What was found for each device: a connection, or why there is none."""
    return {}


def _connection_of(group: dist.ProcessGroup, device: torch.device) -> _Connection | str:
    of_group = _connections(group)
    if device not in of_group:
        try:
            _check_ranks(group, device)
            of_group[device] = _Connection(group, device)
        except UnavailableError as error:
            of_group[device] = str(error)
    return of_group[device]


def _check_ranks(group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise UnavailableError where the group's ranks lack what a rendezvous takes for granted."""
    _on_all_ranks(group, _check_software)
    places = gather_objects(_place(device), group)
    hosts = {host for host, _ in places}
    if len(hosts) > 1:
        raise UnavailableError(f"the ranks are on {len(hosts)} hosts, not on one")
    if len(set(places)) < group.size():
        raise UnavailableError("several ranks share a GPU")


def _check_software() -> None:
    for module in ("torch.distributed._symmetric_memory", "triton"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UnavailableError(f"{module} cannot be imported ({error})") from error


def _place(device: torch.device) -> tuple[str, str]:
    """This rank's host and GPU."""
    return host_identity(), str(torch.cuda.get_device_properties(device).uuid)


def _allocate(slots: int, device: torch.device) -> Tensor:
    """An empty buffer of its own; `symmetric_memory.empty` would cut it out of a pool.

    The pool's offset may differ from rank to rank, and a peer's address is computed with ours.
    """
    from torch.distributed._symmetric_memory import _SymmetricMemory

    shape = (2, slots * (SLICE + 2))
    buffer = _SymmetricMemory.empty_strided_p2p(shape, (shape[1], 1), torch.float32, device)
    buffer.zero_()
    torch.cuda.synchronize(device)  # no neighbour writes before the zeros are there
    return buffer


def _rendezvous(buffer: Tensor, group: dist.ProcessGroup) -> Any:
    from torch.distributed._symmetric_memory import rendezvous

    return rendezvous(buffer, group)


def _on_all_ranks(group: dist.ProcessGroup, step: Callable[[], Result]) -> Result:
    """The result of `step`, which is done on all ranks when this returns.

    Raises UnavailableError on every rank where it fails on one, so that none is left waiting.
    """
    problem = None
    try:
        result = step()
    except RuntimeError as error:  # what PyTorch raises when CUDA refuses, out of memory included
        problem = f"rank {group.rank()}: {error}"
    if problems := [other for other in gather_objects(problem, group) if other]:
        raise UnavailableError(problems[0])
    return result


__all__ = [
    "Mailbox",
    "UnavailableError",
    "hand_on",
    "mailboxes",
    "require_symmetric",
    "symmetric_scan",
    "why_not",
]
