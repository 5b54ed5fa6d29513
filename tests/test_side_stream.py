"""Work on a side stream: nobody overwrites what it reads, nor what it gives, and nobody waits.

Every hazard is provoked on one GPU: kernels are held up by a sleep on the GPU, and whatever memory
the allocator takes to be free meanwhile is taken and overwritten.
"""

from functools import partial

import pytest
import torch

from hybridsp.collectives.side_stream import Enqueued

pytestmark = pytest.mark.gpu

NUMEL = 2**20
CYCLES = 50_000_000  # some 30 ms, in which the host enqueues a whole test


def full(value):
    return torch.full((NUMEL,), value, device="cuda")


def slowly_doubled(x):
    torch.cuda._sleep(CYCLES)
    return 2 * x


def started(value):
    """Written late on the current stream, read late on the side stream, and dropped at once."""
    x = full(0.0)
    torch.cuda._sleep(CYCLES)
    x.fill_(value)
    return Enqueued(partial(slowly_doubled, x), [x])


def overwrite():
    """NaN in all the memory that the current stream may take; nothing here waits for a sleep."""
    return [full(float("nan")) for _ in range(8)]


@pytest.fixture(autouse=True)
def _warm():
    """Kernels are loaded by their first launch, which waits for the GPU."""
    Enqueued(partial(slowly_doubled, x := full(1.0)), [x]).wait().clone().fill_(1.0)
    torch.cuda.synchronize()


def test_two_in_flight_whose_inputs_are_dropped():
    first = started(1.0)
    junk = overwrite()
    second = started(2.0)
    junk += overwrite()
    got = [pending.wait().clone() for pending in (first, second)]
    assert not first._done.query(), "the host has waited for the GPU"
    assert [x.unique().tolist() for x in got] == [[2.0], [4.0]]
    assert all(x.isnan().all() for x in junk)


def test_several_waits_from_several_streams():
    pending, other = started(3.0), torch.cuda.Stream()
    here = pending.wait().clone()
    with torch.cuda.stream(other):
        there = pending.wait().clone()
    again = pending.wait()
    assert again is pending.wait()
    torch.cuda.synchronize()
    for x in (here, there, again):
        assert x.unique().tolist() == [6.0]


def test_a_result_that_is_dropped_while_another_stream_reads_it():
    pending, other = started(4.0), torch.cuda.Stream()
    with torch.cuda.stream(other):
        result = pending.wait()
        torch.cuda._sleep(3 * CYCLES)
        copy = result.clone()
    del result, pending
    like = full(0.0)
    # Their memory is the side stream's too, which does not wait for the other stream.
    junk = [Enqueued(partial(torch.full_like, like, float("nan")), [like]) for _ in range(8)]
    torch.cuda.synchronize()
    assert copy.unique().tolist() == [8.0]
    assert all(x.wait().isnan().all() for x in junk)
