"""Offloaded activations: the same bits come back, the device holds none meanwhile, pages go round.

On the CPU a copy is made at once or, if it is to be late, when it is waited for: whoever reads
what has not been waited for reads NaN. On a GPU the copies are held up by a sleep on their stream.
"""

import contextlib
import gc
import itertools
import weakref
from unittest import mock

import pytest
import torch
from cases import case
from distributed import run_ranks
from tiny import batch_of, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hybridsp
from hybridsp.attention import keep
from hybridsp.memory import ActivationOffload, OffloadingCheckpoint, offload

LAYERS, WIDTH = 4, 8
PAGE = 96  # bytes, of which no tensor here is a multiple
KINDS = [{"use_reentrant": False}, {"use_reentrant": True}]


class LateTransfer:
    """A copy that is made when it is waited for, behind all that were asked for before it."""

    queue: list = []  # noqa: RUF012 - one stream

    def __init__(self, device, copy):
        self.copy = copy
        self.queue.append(self)

    def wait(self):
        while self in self.queue:
            self.queue.pop(0).copy()


@contextlib.contextmanager
def late_copies():
    LateTransfer.queue.clear()
    with mock.patch.object(offload, "_Transfer", LateTransfer):
        yield


class Stack(nn.Module):
    """Layers under checkpointing; `offloaded` is None where they are not offloaded."""

    def __init__(self, kind, offloaded=None, layers=LAYERS, width=WIDTH, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.offloaded = offloaded
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers)).to(device)
        self.checkpoints = []
        for i in range(layers):

            def plain(function, *args):
                return checkpoint(function, *args, **kind)

            wrapped = plain
            if offloaded is not None:
                wrapped = OffloadingCheckpoint(plain, offloaded, is_last=i == layers - 1)
            self.checkpoints.append(wrapped)

    def forward(self, x):
        for layer, run in zip(self.layers, self.checkpoints, strict=True):
            x = run(lambda x, layer=layer: x + layer(x).tanh().sin(), x)
        return x


def of_length(length, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, WIDTH, generator=generator)
    return x.to(device).requires_grad_()


def step(model, x, loss=None):
    model.zero_grad()
    x.grad = None
    loss = model(x).square().sum() if loss is None else loss
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same_bits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def all_free(model):
    pages = model.offloaded.pages
    return len(pages._free) == pages.num_pages


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_bits_and_no_more_pages_after_the_first_step(kind, late):
    plain, model = Stack(kind), Stack(kind, ActivationOffload(PAGE))
    pages = set()
    with late_copies() if late else contextlib.nullcontext():
        for length in (7, 7, 3, 7, 1):
            x = of_length(length, seed=length)
            assert_same_bits(step(model, x), step(plain, x))
            assert all_free(model)
            pages.add(model.offloaded.pages.num_pages)
    assert pages == {LAYERS * -(-2 * 7 * WIDTH * 4 // PAGE)}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_micro_batches_in_flight(kind, late):
    plain, model = Stack(kind), Stack(kind, ActivationOffload(PAGE))
    inputs = [of_length(7, 1), of_length(4, 2), of_length(6, 3)]
    want = [step(plain, x) for x in inputs]
    with late_copies() if late else contextlib.nullcontext():
        for order in itertools.permutations(range(3)):
            losses = [model(x).square().sum() for x in inputs]
            for i in order:
                with case((order, i)):
                    assert_same_bits(step(model, inputs[i], losses[i]), want[i])
            del losses
            assert all_free(model)


@pytest.mark.parametrize("late", [False, True])
def test_a_graph_that_is_kept(late):
    kind = KINDS[0]
    plain, model = Stack(kind), Stack(kind, ActivationOffload(PAGE))
    x = of_length(7)
    want = step(plain, x)
    with late_copies() if late else contextlib.nullcontext():
        loss = model(x).square().sum()
        for _ in range(2):
            grads = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
            assert_same_bits(list(grads), want[1:])
        del loss
        assert all_free(model)


def test_what_lies_differently_in_memory_and_what_is_no_float():
    run = OffloadingCheckpoint(
        lambda f, *args: checkpoint(f, *args, **KINDS[0]), ActivationOffload(PAGE), is_last=True
    )
    x = of_length(7).transpose(1, 2).detach().requires_grad_()
    numbers, empty = torch.arange(WIDTH), torch.empty(0, 3)
    y = run(
        lambda x, numbers, empty: (x.sin() * numbers[:, None]).sum() + empty.sum(),
        x,
        numbers,
        empty,
    )
    (grad,) = torch.autograd.grad(y, x)
    assert_same_bits(grad, x.detach().cos() * numbers[:, None])


class PlannedError(Exception):
    pass


def fail(*_):
    raise PlannedError


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_dropped_gives_its_pages_back(kind):
    model = Stack(kind, ActivationOffload(PAGE))
    x = of_length(7)
    gc.collect()
    gc.disable()
    try:
        loss = model(x).sum()
        assert not all_free(model)
        del loss
        assert all_free(model), "no backward"
        with torch.no_grad():
            model(x)
        assert all_free(model), "no gradients"
        failing = mock.patch.object(model.layers[2], "forward", fail)
        with failing, contextlib.suppress(PlannedError):
            model(x)
        assert all_free(model), "an exception in the forward"
        loss = model(x).sum()
        model.layers[1].register_forward_hook(fail)
        with pytest.raises(PlannedError):
            loss.backward()
        del loss
        gc.collect()  # what an exception's traceback held
        assert all_free(model), "an exception in the backward"
    finally:
        gc.enable()


class Storages(TorchDispatchMode):
    """What operations have allocated: how many tensors of a size are still alive."""

    def __init__(self, numel, device="cpu"):
        super().__init__()
        self.numel, self.device, self.seen = numel, device, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() == self.numel:
                storage = x.untyped_storage()
                self.seen[storage.data_ptr()] = StorageWeakRef(storage)
        return out

    def alive(self):
        return sum(not ref.expired() for ref in self.seen.values())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_between_forward_and_backward_the_device_holds_none(kind):
    held = {}
    for layers, offloaded in itertools.product((3, 6), (False, True)):
        model = Stack(kind, ActivationOffload(PAGE) if offloaded else None, layers=layers)
        x = of_length(7)
        with Storages(x.numel()) as storages:
            y = model(x)
            held[layers, offloaded] = storages.alive()
        del y
    # The output and x, which the test holds; without offload what the other layers started from.
    assert held == {(3, False): 4, (6, False): 7, (3, True): 2, (6, True): 2}


def test_on_the_way_back_two_layers_at_most():
    model = Stack(KINDS[0], ActivationOffload(PAGE), layers=6)
    x = of_length(7)
    events, count = [], 0
    fetch, take = offload._Away.fetch, offload._Away.take

    def watched_fetch(away):
        was = away._coming
        fetch(away)
        if away._coming is not None and was is None:
            events.append(("fetch", numbers[away]))

    def watched_take(away):
        events.append(("take", numbers[away]))
        return take(away)

    numbers = weakref.WeakKeyDictionary()
    init = offload._Away.__init__

    def numbered(away, *args):
        nonlocal count
        init(away, *args)
        numbers[away] = count
        count += 1

    with (
        mock.patch.object(offload._Away, "__init__", numbered),
        mock.patch.object(offload._Away, "fetch", watched_fetch),
        mock.patch.object(offload._Away, "take", watched_take),
    ):
        step(model, x)
    ahead = itertools.chain(*((("take", i), ("fetch", i - 1)) for i in range(5, 0, -1)))
    assert events == [("fetch", 5), *ahead, ("take", 0)]


def gpu_step(model, x, sleep):
    """A step whose copies are all late; the memory that anyone may take meanwhile is NaN."""
    junk = []
    copy = offload._copy

    def late(*args, **kwargs):
        torch.cuda._sleep(sleep)
        copy(*args, **kwargs)

    def overwrite(*_):
        junk.extend(torch.full_like(x, float("nan")) for _ in range(2))
        del junk[:-4]

    hooks = [layer.register_forward_hook(overwrite) for layer in model.layers]
    with mock.patch.object(offload, "_copy", late):
        got = step(model, x)
    for hook in hooks:
        hook.remove()
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_late_copies_on_a_gpu(kind):
    """Nobody reads too early, overwrites what is still to be read, or waits on the host."""
    plain, model = (Stack(kind, o, device="cuda") for o in (None, ActivationOffload(2**16)))
    for seed, length in enumerate((4096, 4096, 1000)):
        x = of_length(length, seed, device="cuda")
        want = step(plain, x)
        assert_same_bits(gpu_step(model, x, 20_000_000), want)
        assert all_free(model)


@pytest.mark.gpu
def test_the_host_never_waits():
    model = Stack(KINDS[0], ActivationOffload(2**20), device="cuda")
    x = of_length(4096, device="cuda")
    step(model, x)  # pins the pages, loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        begun = torch.cuda.Event()
        begun.record()
        loss = model(x).square().sum()
        loss.backward()
        assert not begun.query(), "the host has waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_graph_that_is_dropped_while_a_copy_comes_back():
    """Its memory may be taken at once, and what is then written there stays."""
    model = Stack(KINDS[0], ActivationOffload(2**20), device="cuda")
    x = of_length(2**16, device="cuda")
    want = step(model, x)
    copy = offload._copy

    def late(*args, out):
        torch.cuda._sleep(0 if out else 50_000_000)
        copy(*args, out=out)

    with mock.patch.object(offload, "_copy", late):
        loss = model(x).square().sum()
        hook = model.layers[-1].register_forward_hook(fail)  # by then layer 2 is on its way
        with pytest.raises(PlannedError):
            loss.backward()
        hook.remove()
        del loss
        gc.collect()
        junk = [torch.full_like(x, 7.0) for _ in range(2 * LAYERS)]
        torch.cuda.synchronize()
    assert all((x == 7).all() for x in junk)
    assert_same_bits(step(model, x), want)


@pytest.mark.gpu
def test_peak_memory_does_not_grow_with_the_layers():
    width, length = 64, 2**16
    one = 2 * length * width * 4
    peaks = {}
    for layers, offloaded in itertools.product((4, 12), (False, True)):
        offload_or_none = ActivationOffload() if offloaded else None
        model = Stack(KINDS[0], offload_or_none, layers=layers, width=width, device="cuda")
        x = torch.randn(2, length, width, device="cuda", requires_grad=True)
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step(model, x)
        peaks[layers, offloaded] = torch.cuda.max_memory_allocated() / one
        del model
    assert peaks[12, False] - peaks[4, False] == pytest.approx(8, abs=0.1)
    assert peaks[12, True] - peaks[4, True] == pytest.approx(0, abs=0.1)


def attention_is_offloaded_too():
    """Its output and log-sum-exp come back with the layer's input, and it still runs once."""
    mesh = hybridsp.SPMesh()
    batch = hybridsp.shard_batch(batch_of(1, 24, seed=1), mesh)
    results = []
    for offloaded in (False, True):
        model = tiny_model().train()
        model.activation_checkpointing_enable()
        hybridsp.parallelize(model, mesh, offload_activations=offloaded)
        first_run, memory = keep._Call._keep, []

        def watched(*args, first_run=first_run, memory=memory):
            kept = first_run(*args)
            memory.extend(StorageWeakRef(x.untyped_storage()) for x in kept)
            return kept

        with late_copies(), mock.patch.object(keep._Call, "_keep", watched):
            loss = model(**batch).loss
            alive = sum(not ref.expired() for ref in memory)
            assert (len(memory), alive) == (4, 0 if offloaded else 4)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            assert len(memory) == 4
        results.append([loss.detach(), *grads])
    assert_same_bits(results[1], results[0])


def test_kept_attention_is_offloaded_too():
    run_ranks(attention_is_offloaded_too, 1)
