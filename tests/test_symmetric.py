"""Symmetric All-Scan: the kernel under Triton's interpreter, its machine code, and whole GPUs."""

import gc
import itertools
import math
import multiprocessing
import re
import sys
import tempfile
import time
import weakref
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks
from fresh_interpreter import in_fresh_interpreter
from scan_oracle import naive_scan

from hybridsp.collectives import symmetric
from hybridsp.collectives.symmetric import (
    PATIENCE,
    UnavailableError,
    hand_on,
    mailboxes,
    symmetric_scan,
    why_not,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def states_and_decays(ranks, shape, decay_rows, device="cpu"):
    """Of all ranks, the same on every one that asks: [P, B, H, K, V] and [P, B, H, K or 1]."""
    state = torch.randn(ranks, *shape)
    decay = torch.rand(ranks, *shape[:2], decay_rows)
    decay[-1, 0] = 0  # a document starts there
    return state.to(device), decay.to(device)


SLICE, SLOTS = 16, 12
# Uneven slices, a slice of one number, fewer slices than programs, more.
SHAPES = [((2, 3, 7, 4), 7), ((2, 3, 7, 4), 1), ((1, 1, 1, 1), 1), ((1, 2, 17, 1), 17)]


class Ranks:
    """Ranks on one CPU, whose neighbours' memory is just memory."""

    def __init__(self, ranks):
        self.buffers = torch.zeros(ranks, 2, SLOTS * (SLICE + 2))
        self.boxes = [mailboxes(buffer, SLICE) for buffer in self.buffers]

    def run(self, rank, state, decay, reverse, patience=PATIENCE):
        step = -1 if reverse else 1
        of = dict(enumerate(box[reverse] for box in self.boxes)).get
        boxes = of(rank), of(rank - step), of(rank + step)
        return hand_on(state[rank], decay[rank], *boxes, programs=3, patience=patience)

    def flags(self):
        return torch.cat([f for box in self.boxes for x in box for f in (x.arrived, x.occupied)])


def emulate():
    """Calls of all ranks in orders in which none has to wait."""
    torch.manual_seed(0)
    for count in (2, 3, 4):
        ranks = Ranks(count)
        for (shape, rows), reverse in [(s, r) for s in SHAPES for r in (False, True)]:
            with case(f"{count} ranks, {shape}, {rows} decays, reverse {reverse}"):
                state, decay = states_and_decays(count, shape, rows)
                order = range(count)[:: -1 if reverse else 1]
                got = {p: ranks.run(p, state, decay, reverse) for p in order}
                expected = dict(enumerate(naive_scan(state, decay, reverse=reverse)))
                torch.testing.assert_close(got, expected, **CLOSE)
                assert not ranks.flags().any()
        with case(f"{count} ranks, the first ones a call ahead"):
            calls = [states_and_decays(count, *SHAPES[call % 2]) for call in range(5)]
            order = sorted((2 * call + p, call, p) for call in range(5) for p in range(count))
            got = {(call, p): ranks.run(p, *calls[call], False) for _, call, p in order}
            for call, inputs in enumerate(calls):
                expected = list(naive_scan(*inputs))
                torch.testing.assert_close([got[call, p] for p in range(count)], expected, **CLOSE)
            assert not ranks.flags().any()


def race():
    """Ranks that are processes: they wait in earnest, and run ahead as far as they can."""
    torch.manual_seed(0)
    directions = [bool(x) for x in torch.randint(2, (24,))]
    # The first shape fits the first mailboxes; with the next ones they grow.
    calls = [(states_and_decays(3, *SHAPES[3 - i % 4]), back) for i, back in enumerate(directions)]
    fork = multiprocessing.get_context("fork").Process
    with tempfile.TemporaryDirectory() as path:
        racers = [fork(target=run, args=(rank, path, calls), daemon=True) for rank in range(3)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
            assert racer.exitcode == 0


class Files:
    """Symmetric memory of processes on one CPU: files that all of them map."""

    def __init__(self, path, rank):
        self.path, self.rank, self.generation = Path(path), rank, 0

    def allocate(self, slots, device):
        self.generation += 1
        return self.get_buffer(self.rank, (2, slots * (SLICE + 2)), torch.float32)

    def rendezvous(self, buffer, group):
        return self

    def get_buffer(self, rank, shape, dtype):
        file = str(self.path / f"{self.generation} of {rank}")
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def run(rank, path, calls):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{path}/store", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    group, files = dist.group.WORLD, Files(path, rank)
    memory = {"_allocate": files.allocate, "_rendezvous": files.rendezvous}
    cuda = dict.fromkeys(("synchronize", "Event", "device", "current_stream"), mock.MagicMock())
    got = []
    with (
        mock.patch.multiple(symmetric, SLICE=SLICE, SLOTS_STEP=4, **memory),
        mock.patch.multiple(torch.cuda, **cuda),
    ):
        connection = symmetric._Connection(group, None)
        for call, ((state, decay), reverse) in enumerate(calls):
            time.sleep(0.02 * ((call // 6 + rank) % 3))  # each is the slowest for a while
            got.append(connection.scan(state[rank], decay[rank], group, reverse))
    assert files.generation == 2
    expected = [naive_scan(*inputs, reverse=reverse)[rank] for inputs, reverse in calls]
    torch.testing.assert_close(got, expected, **CLOSE)
    dist.barrier()
    for box in connection._mailboxes[rank]:
        assert not box.arrived.any()
        assert not box.occupied.any()


def lose_a_rank():
    """Who waits for a message, or for its own to be read, gives up and says so."""
    from triton.runtime import interpreter

    # The interpreter knows assertions, and leaves them out of kernels that ask for them.
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    state, decay = states_and_decays(3, *SHAPES[0])
    with pytest.raises(Exception, match="a neighbouring rank is missing"):
        Ranks(3).run(1, state, decay, reverse=False, patience=5)
    ranks = Ranks(3)
    ranks.run(2, state, decay, reverse=True)
    with pytest.raises(Exception, match="a neighbouring rank is missing"):
        ranks.run(2, state, decay, reverse=True, patience=5)
    ranks.run(0, state, decay, reverse=False)  # the other direction has its own mailbox


@needs_triton
@pytest.mark.parametrize("function", [emulate, race])
def test_values_and_flow_control(function):
    in_fresh_interpreter(function, timeout=120, TRITON_INTERPRET="1")


@needs_triton
def test_a_missing_neighbour_ends_the_wait():
    in_fresh_interpreter(lose_a_rank, timeout=120, TRITON_INTERPRET="1")


def order_of_memory_accesses():
    """In the code for an H100, flags guard data."""
    from triton import compile as compile_ahead
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hybridsp.collectives.symmetric_kernel import scan_hop

    data = ["state", "decay", "incoming", "inbox", "next_inbox"]
    flags = ["arrived", "occupied", "next_arrived", "previous_occupied"]
    types = dict.fromkeys(data, "*fp32") | dict.fromkeys(flags, "*i32")
    types |= {"numel": "i32", "patience": "i32"}
    constants = {"SPAN": 128, "SLICE": symmetric.SLICE, "HAS_PREVIOUS": True, "HAS_NEXT": True}
    names = scan_hop.arg_names
    source = ASTSource(
        fn=scan_hop,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in [*data, "numel"]},
    )
    options = {"num_warps": symmetric.NUM_WARPS, "debug": True, "sanitize_overflow": False}
    code = compile_ahead(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = re.findall(r"(bar\.sync|(?:ld|st|atom)\.global\S*)", code)
    before, after = zip(*itertools.pairwise(found), strict=True)
    assert [name for name in found if "atom" in name and ".sys." not in name] == []
    acquired = [b for a, b in zip(before, after, strict=True) if "acquire" in a]
    assert acquired == ["bar.sync"] * 2, found
    released = [a for a, b in zip(before, after, strict=True) if "release" in b]
    assert released == ["bar.sync", "atom.global.sys.release.exch.b32"], found
    assert "call.uni __assertfail" in code
    # Nothing may be read through the cache that is never told of others' writes.
    assert not re.search(r"ld\.global\S*\.nc", code)
    assert "st.global.v4.b32" in found


@needs_triton
def test_order_of_memory_accesses():
    in_fresh_interpreter(order_of_memory_accesses, timeout=120)


def test_the_cpu_has_no_symmetric_memory():
    state = torch.zeros(1, 1, 2, 2)
    assert why_not(state, None) == "the state is on cpu: symmetric memory needs CUDA"
    with pytest.raises(ValueError, match=r"cannot run here: the state is on cpu.*; use"):
        symmetric_scan(state, state[..., 0], None)


def test_triton_is_asked_for_by_name():
    with (
        mock.patch.dict(sys.modules, {"triton": None}),
        pytest.raises(UnavailableError, match="triton cannot be imported"),
    ):
        symmetric._check_software()


def reasons():
    """What groups of CPU ranks are told who say that they have GPUs."""
    rank, device = dist.get_rank(), torch.device("cuda", 0)

    def fail_on_rank_1():
        if rank == 1:
            raise RuntimeError("out of order")

    found = []
    for patches in (
        {"_check_software": fail_on_rank_1},
        {"_place": lambda device: (f"host {rank // 2}", f"GPU {rank}")},
        {"_place": lambda device: ("host", f"GPU {rank // 2}")},
    ):
        group = dist.new_group()
        with mock.patch.multiple(symmetric, **{"_check_software": lambda: None, **patches}):
            found.append(symmetric._connection_of(group, device))
        if rank == 0:  # the answer is kept: nobody else is asked again
            assert symmetric._connection_of(group, device) == found[-1]
        dist.destroy_process_group(group)
    alive = weakref.ref(group)
    del group
    gc.collect()
    assert alive() is None
    return found


def test_ranks_agree_on_the_reason():
    assert run_ranks(reasons, 3) == 3 * [
        [
            "rank 1: out of order",
            "the ranks are on 2 hosts, not on one",
            "several ranks share a GPU",
        ]
    ]


# The last two need larger mailboxes; with the last, each program loops over slices.
GPU_SHAPES = [
    ((2, 3, 7, 5), 7),
    ((1, 4, 96, 33), 1),
    ((2, 16, 128, 128), 128),
    ((8, 16, 128, 256), 1),
]


def scans_on_gpus(calls):
    """Scans in a row, with ranks that dawdle in turn; then on a side stream beside products."""
    torch.manual_seed(0)
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    inputs = [states_and_decays(ranks, *shape, device="cuda") for shape in GPU_SHAPES]
    assert why_not(inputs[0][0], group) is None
    expected = {
        (i, reverse): naive_scan(*pair, reverse=reverse)[rank]
        for i, pair in enumerate(inputs)
        for reverse in (False, True)
    }
    got = []
    for call in range(calls):
        # Small shapes first, so that the mailboxes grow under way; then all in turn.
        which = call // 5 if call < 20 else call % 4, call % 3 == 0
        state, decay = (x[rank] for x in inputs[which[0]])
        torch.cuda._sleep(200_000 * ((rank + call) % 3))
        got.append((which, symmetric_scan(state, decay, group, reverse=which[1])))
    side, square = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for which in ((2, False), (3, True)):
            state, decay = (x[rank] for x in inputs[which[0]])
            got.append((which, symmetric_scan(state, decay, group, reverse=which[1])))
    for _ in range(20):
        square = (square @ square).clamp(-1, 1)
    # While those are in flight, one more on this stream: it waits for them by itself.
    turned = inputs[2][0][rank].mT.contiguous().mT
    got.append(((2, True), symmetric_scan(turned, inputs[2][1][rank], group, reverse=True)))
    torch.cuda.synchronize()
    for call, (which, incoming) in enumerate(got):
        with case(f"call {call}, {GPU_SHAPES[which[0]]}, reverse {which[1]}"):
            torch.testing.assert_close(incoming, expected[which], **CLOSE)
    # Once the neighbours are through too, nothing is left over for the next scan to stumble upon.
    dist.barrier()
    for boxes in symmetric._connections(group)[inputs[0][0].device]._mailboxes[rank]:
        assert not boxes.arrived.any()
        assert not boxes.occupied.any()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_scans_on_gpus(ranks, monkeypatch):
    monkeypatch.setenv(
        "TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"
    )  # not needed, and not always healthy
    run_ranks(scans_on_gpus, ranks, 50, backend="nccl", timeout=120)
