"""RingExchange and KVGather: messages of any shape go where they should; misuse is caught."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from hybridsp.collectives import KVGather, RingExchange
from hybridsp.collectives.message import pack, pack_padded, unpack


def message(rank, step):
    """Two tensors whose shapes and values tell which rank sent them, and when."""
    shapes = (2, rank + 1, 3), (rank, abs(step) + 1)
    return [torch.full(shape, 10.0 * rank + step) for shape in shapes]


def shapes(tensors):
    return [x.shape for x in tensors]


def length(tensors):
    return sum(x.numel() for x in tensors)


def once_around():
    """Pass on what came, as the ring of attention does; every rank sees every message."""
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange, held = RingExchange(dist.group.WORLD), pack(message(rank, 0))
    for step in range(1, size + 1):
        expected = message((rank - step) % size, 0)
        exchange.post(held, length(expected))
        held = exchange.wait()
        got = unpack(held, shapes(expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def straight_home():
    """To the rank that a message belongs to, however far."""
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = RingExchange(dist.group.WORLD)
    for shift in [*range(1 - size, 0), *range(1, size)]:
        expected = message((rank - shift) % size, shift)
        exchange.post(pack(message(rank, shift)), length(expected), shift=shift)
        assert exchange.in_flight
        got = unpack(exchange.wait(), shapes(expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert not exchange.in_flight


def in_halves():
    """Two rings in one group, each on its own; in a group that does not divide there are none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size % 2:
        with pytest.raises(AssertionError, match="rings of unequal size"):
            RingExchange(dist.group.WORLD, ranks=2)
        return
    half = size // 2
    for shift in range(1, half):
        exchange = RingExchange(dist.group.WORLD, ranks=half)
        source = rank // half * half + (rank - shift) % half
        expected = message(source, shift)
        exchange.post(pack(message(rank, shift)), length(expected), shift=shift)
        got = unpack(exchange.wait(), shapes(expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def gathered_and_given_back():
    """What every rank holds, unequal in shape, to all; shares of it back, summed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = [message(source, 0) for source in range(size)]
    gather = KVGather(dist.group.WORLD, [shapes(tensors) for tensors in everything])
    for _ in range(2):
        mine = message(rank, 0)
        gather.post(mine)
        for x in mine:
            x.fill_(float("nan"))  # the gather keeps its own copy
        torch.testing.assert_close(gather.wait(), everything, rtol=0, atol=0)
    shares = [[x + rank for x in tensors] for tensors in everything]
    expected = [size * x + sum(range(size)) for x in everything[rank]]
    torch.testing.assert_close(gather.give_back(shares), expected, rtol=0, atol=0)


def two_in_flight():
    """Posted in another order by one rank than by the others; each tag gets its own message."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first, second = RingExchange(dist.group.WORLD), RingExchange(dist.group.WORLD, tag=1)
    left = (rank - 1) % size
    for step in range(0, 6, 2):
        posts = [(first, step), (second, step + 1)]
        for exchange, number in posts if rank else reversed(posts):
            exchange.post(pack(message(rank, number)), length(message(left, number)))
        got = second.wait(), first.wait()
        expected = pack(message(left, step + 1)), pack(message(left, step))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def strided_and_narrow():
    """A transposed bf16 tensor arrives as it looks, not as it lies in memory."""
    exchange = RingExchange(dist.group.WORLD)
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T + dist.get_rank()
    exchange.post(pack([x]), x.numel())
    (got,) = unpack(exchange.wait(), [x.shape])
    assert got.dtype == torch.bfloat16
    left = (dist.get_rank() - 1) % dist.get_world_size()
    torch.testing.assert_close(got, x - dist.get_rank() + left, rtol=0, atol=0)


def packed():
    """A message is a copy; what is unpacked are views; messages of one length may be padded."""
    tensors, narrow = message(1, 1), [torch.ones(1, 3)]
    laid, padded = pack(tensors), pack_padded([tensors, narrow], 20)
    assert laid.tolist() == [11.0] * (12 + 2)
    assert padded.tolist() == [*[11.0] * 14, *[0.0] * 6, *[1.0] * 3, *[0.0] * 17]
    for x in tensors:
        x.fill_(float("nan"))
    for whole in (laid, padded):
        torch.testing.assert_close(unpack(whole, shapes(tensors)), message(1, 1), rtol=0, atol=0)
    unpack(laid, shapes(tensors))[0].fill_(2)
    assert laid.tolist() == [*[2.0] * 12, *[11.0] * 2]


def everything():
    packed()
    once_around()
    straight_home()
    in_halves()
    gathered_and_given_back()
    two_in_flight()
    strided_and_narrow()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ring(ranks):
    run_ranks(everything, ranks)


def misuse():
    exchange, x = RingExchange(dist.group.WORLD), torch.ones(2)
    with pytest.raises(AssertionError, match="to oneself"):
        exchange.post(x, 2, shift=2)
    with pytest.raises(AssertionError, match="wait called without post"):
        exchange.wait()
    exchange.post(x, 2)
    with pytest.raises(AssertionError, match="post called twice without wait"):
        exchange.post(x, 2)
    exchange.wait()
    with pytest.raises(AssertionError, match="wait called without post"):
        exchange.wait()
    gather = KVGather(dist.group.WORLD, [[x.shape]] * 2)
    with pytest.raises(AssertionError, match="wait called without post"):
        gather.wait()
    gather.post([x])
    with pytest.raises(AssertionError, match="post called twice without wait"):
        gather.post([x])
    gather.wait()


def test_misuse_is_caught():
    run_ranks(misuse, 2)
