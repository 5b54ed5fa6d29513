"""Attention under activation checkpointing: once forward, same gradients, nothing left behind."""

import contextlib
import functools
import gc
import itertools
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_parallelize import dense_model
from tiny import batch_of, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import hybridsp
from hybridsp.attention import KeepingAttention, ring, softmax_attention
from hybridsp.collectives import RingExchange
from hybridsp.ops.softmax import plain

PRELOAD += DEEPSPEED

LENGTH = 24
BATCHES = [
    batch_of(1, LENGTH, seed=1),
    batch_of(1, LENGTH, seed=2, cu_seqlens=[0, 5, 6, 17, LENGTH]),
]
REENTRANT = {"use_reentrant": True}
NOT_REENTRANT = {"use_reentrant": False}


def llama():
    return dense_model("llama")


MODELS = {"hybrid_gla": tiny_model, "llama": llama}
SOFTMAX_LAYERS = 2  # in either


def parallel(kind, mesh, *, kwargs=None, **options):
    """A parallelized model in training, checkpointed if there are `kwargs` for that."""
    model = MODELS[kind]().train()
    if kwargs is not None:
        model.activation_checkpointing_enable(dict(kwargs))
    hybridsp.parallelize(model, mesh, **options)
    return model


@contextlib.contextmanager
def watched(variant="ring"):
    """Count attention's forwards and the messages of its ring; see what of its results is alive."""
    seen, memory, attend = Counter(), [], ring.attend

    def counted(name, function):
        def call(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return call

    def watched_attend(*args):
        results = attend(*args)
        memory.extend(StorageWeakRef(x.untyped_storage()) for x in results)
        return results

    def alive():
        return sum(not ref.expired() for ref in memory)

    def all_gone():
        """Whether nothing is alive; a thread of gloo may hold what it sent for a moment longer."""
        deadline = time.monotonic() + 1
        while alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        return not alive()

    seen.alive, seen.all_gone = alive, all_gone
    blocks = replace(
        plain.BACKEND,
        forward=counted("blocks", plain.block_attention),
        varlen=plain.VARLEN._replace(forward=counted("blocks", plain.packed_attention)),
    )
    post = counted("messages", RingExchange.post)

    def chosen(*_, **__):  # a Mock would keep what it was called with
        return blocks

    with (
        mock.patch.object(ring, "attend", counted("attention", watched_attend)),
        mock.patch("hybridsp.attention.softmax.choose_backend", chosen),
        mock.patch.object(RingExchange, "post", post),
        mock.patch("hybridsp.attention.softmax.choose_variant", return_value=variant),
    ):
        yield seen


def gradients(model, mesh, batch):
    loss = model(**hybridsp.shard_batch(batch, mesh)).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def step(model, mesh, batch):
    """As `gradients`, by `backward`, which is all that the reentrant kind can do."""
    model.zero_grad()
    loss = model(**hybridsp.shard_batch(batch, mesh)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same_bits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def attention_runs_once(degrees):
    for (r, u), kind, batch in itertools.product(degrees, MODELS, BATCHES):
        mesh = hybridsp.SPMesh(ring=r, ulysses=u)
        for kwargs, variant in (
            (NOT_REENTRANT, "ring"),
            (NOT_REENTRANT, "allgather"),
            (REENTRANT, "ring"),
        ):
            with case((r, u, kind, kwargs, variant)):
                counts, results = {}, {}
                for name, options in {
                    "unchecked": {},
                    "default": {"kwargs": kwargs},
                    "off": {"kwargs": kwargs, "keep_attention": False},
                }.items():
                    model = parallel(kind, mesh, **options)
                    with watched(variant) as seen:
                        results[name] = step(model, mesh, batch)
                    counts[name] = seen
                assert counts["default"] == counts["unchecked"]
                assert counts["default"]["attention"] == SOFTMAX_LAYERS
                assert counts["off"]["attention"] == 2 * SOFTMAX_LAYERS
                assert counts["off"]["blocks"] == 2 * counts["default"]["blocks"] > 0
                if variant == "ring":
                    repeated = counts["off"]["messages"] - counts["default"]["messages"]
                    assert repeated == SOFTMAX_LAYERS * (r - 1)
                assert_same_bits(results["default"], results["off"])
                assert_same_bits(results["default"], results["unchecked"])


@pytest.mark.parametrize(("world", "degrees"), [(1, [(1, 1)]), (2, [(2, 1), (1, 2)])])
def test_attention_runs_once_with_the_same_gradients(world, degrees):
    run_ranks(attention_runs_once, world, degrees, timeout=120)


def the_switch_works_at_any_time():
    mesh = hybridsp.SPMesh()
    model = llama().train()

    def forwards():
        with watched() as seen:
            gradients(model, mesh, BATCHES[0])
        return seen["attention"] // SOFTMAX_LAYERS

    model.activation_checkpointing_enable()
    hybridsp.parallelize(model, mesh)
    assert forwards() == 1
    hybridsp.parallelize(model, mesh, keep_attention=False)
    assert forwards() == 2
    hybridsp.parallelize(model, mesh, keep_attention=True)
    assert [forwards(), forwards()] == [1, 1]
    model.activation_checkpointing_enable({**NOT_REENTRANT, "preserve_rng_state": False})
    assert forwards() == 1
    model.activation_checkpointing_disable()
    assert forwards() == 1
    model = parallel("llama", mesh)
    model.activation_checkpointing_enable()
    assert forwards() == 1


def test_checkpointing_may_be_switched_on_before_or_after():
    run_ranks(the_switch_works_at_any_time, 1)


class PlannedError(Exception):
    pass


def fail(*_, **__):
    raise PlannedError


def memory_is_given_back(kind, kwargs):
    mesh = hybridsp.SPMesh(ring=dist.get_world_size())
    model = parallel(kind, mesh, kwargs=kwargs)
    batch = hybridsp.shard_batch(BATCHES[0], mesh)
    per_step = 2 * SOFTMAX_LAYERS  # out and lse
    with watched() as seen:
        loss = model(**batch).loss
        assert seen.alive() == per_step
        loss.backward()
        assert seen.all_gone(), "while the loss still is"
        loss = model(**batch).loss
        assert seen.alive() == per_step
        del loss
        assert seen.all_gone(), "no backward"

        with torch.no_grad():
            loss = model(**batch).loss
        assert seen.all_gone(), "no gradients"
        model.eval()
        with mock.patch("hybridsp.attention.keep._Call", side_effect=AssertionError):
            loss = model(**batch).loss
        del loss
        assert seen.all_gone()
        model.train()

        norm = model.model.norm
        with (
            mock.patch.object(norm, "forward", fail),
            contextlib.suppress(PlannedError),
        ):
            model(**batch)
        assert seen.all_gone(), "an exception behind the layers"
        mlp = model.model.layers[-1].mlp
        with (
            mock.patch.object(mlp, "forward", fail),
            contextlib.suppress(PlannedError),
        ):
            model(**batch)
        assert seen.all_gone(), "an exception in a checkpointed layer"


def memory_is_given_back_without_garbage_collection():
    for kind, kwargs in itertools.product(MODELS, (NOT_REENTRANT, REENTRANT)):
        gc.collect()
        gc.disable()
        with case((kind, kwargs)):
            memory_is_given_back(kind, kwargs)
        gc.enable()


@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_given_back_at_once(world):
    run_ranks(memory_is_given_back_without_garbage_collection, world)


def micro_batches_in_flight(degrees):
    for (r, u), kind, kwargs in itertools.product(degrees, MODELS, (NOT_REENTRANT, REENTRANT)):
        mesh = hybridsp.SPMesh(ring=r, ulysses=u)
        model = parallel(kind, mesh, kwargs=kwargs)
        parts = [hybridsp.shard_batch(batch, mesh) for batch in BATCHES]
        alone = [step(model, mesh, batch)[1:] for batch in BATCHES]
        for order in ((0, 1), (1, 0)):
            with case((r, u, kind, kwargs, order)), watched() as seen:
                losses = [model(**part).loss for part in parts]
                with torch.no_grad():
                    model(**parts[0])
                for i in order:
                    model.zero_grad()
                    losses[i].backward()
                    assert_same_bits([p.grad for p in model.parameters()], alone[i])
                assert seen["attention"] == 3 * SOFTMAX_LAYERS

        with case((r, u, kind, kwargs, "exception")), watched() as seen:
            loss = model(**parts[0]).loss
            mlp = model.model.layers[-1].mlp
            with (
                mock.patch.object(mlp, "forward", fail),
                pytest.raises(PlannedError),
            ):
                model(**parts[1])
            model.zero_grad()
            loss.backward()
            assert_same_bits([p.grad for p in model.parameters()], alone[0])
            assert_same_bits(step(model, mesh, BATCHES[1])[1:], alone[1])
            assert seen["attention"] == 3 * SOFTMAX_LAYERS


@pytest.mark.parametrize(("world", "degrees"), [(1, [(1, 1)]), (2, [(2, 1), (1, 2)])])
def test_micro_batches_in_flight_do_not_mix(world, degrees):
    run_ranks(micro_batches_in_flight, world, degrees)


def twice(x, mesh):
    """Two attentions of the same shapes in one checkpointed function."""
    for factor in (1.0, 2.0):
        x = softmax_attention(x, x * factor, x.sin(), mesh=mesh).tanh()
    return x


def several_in_one_call():
    mesh = hybridsp.SPMesh(ring=dist.get_world_size())
    x = torch.randn(2, 6, 3, 8, requires_grad=True)
    attend = functools.partial(twice, mesh=mesh)
    want = torch.autograd.grad(attend(x).sum(), x)
    plain = functools.partial(checkpoint, use_reentrant=False)
    keeping = KeepingAttention(plain)

    def forwards(run, count, *, retain_graph=False):
        with watched() as seen:
            loss = run(x).sum()
            for _ in range(1 + retain_graph):
                got = torch.autograd.grad(loss, x, retain_graph=retain_graph)
                assert_same_bits(got, want)
            assert seen["attention"] == count
            del loss, got
            assert seen.all_gone()

    with case("two attentions"):
        forwards(lambda x: keeping(attend, x), 2)
    with case("a graph that is kept is computed anew"):
        forwards(lambda x: keeping(attend, x), 2 + 2, retain_graph=True)
    with case("no early stop"):
        forwards(lambda x: keeping(attend, x, early_stop=False), 2)
    with case("checkpoints in checkpoints"):
        forwards(lambda x: keeping(lambda y: keeping(attend, y), x), 2)
        forwards(lambda x: plain(lambda y: keeping(attend, y), x), 2)
        # An attention is kept by the checkpoint next to it, and this one keeps none.
        forwards(lambda x: keeping(lambda y: plain(attend, y), x), 4)
    with case("frozen inputs"), watched() as seen:
        assert not keeping(attend, x.detach()).requires_grad
        assert seen.all_gone()


@pytest.mark.parametrize("world", [1, 2])
def test_several_attentions_in_one_checkpointed_call(world):
    run_ranks(several_in_one_call, world)


def under_deepspeed(stage):
    """Two steps of two micro-batches each: loss, norm and attention's forwards."""
    mesh = hybridsp.SPMesh(ring=2)
    zero = {"stage": stage, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    results = []
    for keep in (True, False):
        model = parallel("hybrid_gla", mesh, kwargs=NOT_REENTRANT, keep_attention=keep)
        engine = hybridsp.initialize(model, mesh, config)
        parts = [hybridsp.shard_batch(batch, mesh) for batch in BATCHES]
        with watched() as seen:
            steps = [hybridsp.train_step(engine, parts) for _ in range(2)]
        assert seen["attention"] == (1 if keep else 2) * SOFTMAX_LAYERS * 2 * 2
        assert seen.all_gone()
        results.append(steps)
        engine.destroy()
    assert results[0] == results[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_under_deepspeed(stage):
    run_ranks(under_deepspeed, 2, stage, timeout=120)
