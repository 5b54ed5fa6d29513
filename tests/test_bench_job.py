"""What holds a benchmark's job together: meetings of its ranks, and timing."""

import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from hybridsp.bench import job, timing
from hybridsp.bench.job import attempt
from hybridsp.bench.timing import measure
from hybridsp.mesh import gather_objects

TWO = SimpleNamespace(device=torch.device("cpu"), world_size=2)


def slow_on_the_last_rank():
    """Times of a call that only the last rank takes long for, and what fails on it alone."""
    rank, calls = dist.get_rank(), []

    def call():
        calls.append(None)
        time.sleep(0.01 * rank)

    times = measure(call, TWO, repeats=4, warmup=2)
    assert len(calls) == 4 + 2

    def fail():
        if rank == 1:
            raise torch.OutOfMemoryError("out of\n memory")
        return rank

    def bug():
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        attempt(bug, TWO)
    assert attempt(bug, TWO, foreign=True) == (None, "AssertionError: ours")
    return times, attempt(fail, TWO), attempt(lambda: rank, TWO)


def test_the_slowest_rank_counts_and_failure_is_shared():
    results = run_ranks(slow_on_the_last_rank, 2)
    for rank, (times, failed, fine) in enumerate(results):
        assert 0.01 <= times.p10 <= times.median <= times.p90
        assert times.peak_bytes is None
        assert failed == (None, "rank 1: OutOfMemoryError: out of memory")
        assert fine == (rank, None)
    assert results[0][0] == results[1][0]


def long_on_the_last_rank(which):
    """How often a call is made of which these are long, on the last rank alone; what is told."""
    rank, calls = dist.get_rank(), []

    def call():
        calls.append(None)
        time.sleep(0.3 * rank * (len(calls) in which))

    timing.LONG_CALL_SECONDS = 0.3
    times = measure(call, TWO, repeats=1, warmup=5)
    return len(calls), times.as_json()["warmup_calls"]


@pytest.mark.parametrize(("which", "warmup_calls"), [([1, 3], 3), ([1, 2], 2), ([1], 5)])
def test_long_calls_are_warm_sooner_on_every_rank_alike(which, warmup_calls):
    """The first is not: it may have compiled."""
    assert run_ranks(long_on_the_last_rank, 2, which) == [(warmup_calls + 1, warmup_calls)] * 2


def failing(rank, place):
    """Two attempts: of the first, one rank fails alone; the second shows that all have met."""
    calls = []

    def fail_at(here):
        if (dist.get_rank(), here) == (rank, place):
            raise torch.OutOfMemoryError("out of memory")

    def call():
        calls.append(None)
        fail_at(len(calls))

    def work():
        fail_at("before")
        times = measure(call, TWO, repeats=2)
        fail_at("behind")
        return times

    return attempt(work, TWO), attempt(lambda: gather_objects(dist.get_rank()), TWO)


class Held:
    """Stands for what fills a GPU."""


def test_what_failed_is_let_go_of_before_the_others_are_told(monkeypatch):
    """Telling them takes memory, of which there may be none left."""
    held, alive = [], []

    def work():
        fills = Held()
        held.append(weakref.ref(fills))
        raise torch.OutOfMemoryError("out of memory")

    def gather(value):
        alive.append(held[0]() is not None)
        return [value]

    monkeypatch.setattr(job, "gather_objects", gather)
    assert attempt(work, TWO) == (None, "OutOfMemoryError: out of memory")
    assert alive == [False]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["before", 1, 2, 3, "behind"])
def test_a_rank_that_fails_alone_is_told_of(rank, place):
    reason = f"{'rank 1: ' * rank}OutOfMemoryError: out of memory"
    for failed, next_one in run_ranks(failing, 2, rank, place):
        assert failed == (None, reason)
        assert next_one == ([0, 1], None)
