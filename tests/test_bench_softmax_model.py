"""The cost model of `hybridsp bench softmax`, by hand: compute, messages, what hides them."""

import math

import pytest
from test_bench_softmax import work

from hybridsp.bench.softmax.model import Layer
from hybridsp.collectives.cost import Link

WAYS = [(1, 8, "ring"), (8, 1, "ring"), (4, 2, "ring"), (4, 2, "allgather")]


def layer(passes="fwd", latency=0.0, bandwidth=math.inf, rate=1e9):
    link = Link(latency=latency, bandwidth=bandwidth)
    return Layer(work=work(0, 100), rate=rate, passes=passes, link=link)


def test_the_model_without_messages_is_the_kernel():
    for passes in ("fwd", "fwd+bwd"):
        free = layer(passes)
        for ring, ulysses, variant in WAYS:
            compute = free.compute_seconds(ring * ulysses)
            assert free.seconds(ring, ulysses, variant) == pytest.approx(compute)
        assert free.compute_seconds(1) == work(0, 100).flops(passes) / 1e9
        assert all(share == pytest.approx(1) for line in free.lines().values() for _, share in line)


def test_the_model_without_compute_is_the_messages():
    """L 100, H 4 and 2 of D 8 in fp32: 3,200 bytes per head and rank."""
    wire = layer("fwd", bandwidth=1.0, rate=math.inf)
    head = 100 * 8 * 4
    relayout = 7 / 8 * (4 + 2 * 2 + 4) * head
    assert wire.seconds(8, 1, "ring") == pytest.approx(relayout + 7 * 2 * 2 * head)
    assert wire.seconds(8, 1, "allgather") == pytest.approx(relayout + 7 * 2 * 2 * head)
    assert wire.seconds(4, 2, "ring") == pytest.approx(relayout + 3 * 2 * 1 * 2 * head)
    # 4 Ulysses ranks share 2 KV heads, which therefore travel twice.
    replicated = 7 / 8 * (4 + 2 * 4 + 4) * head
    assert wire.seconds(2, 4, "ring") == pytest.approx(replicated + 2 * 1 * 4 * head)
    both = layer("fwd+bwd", bandwidth=1.0, rate=math.inf)
    around = 7 * 4 * head
    gradients = 4 * head  # fp32, as the keys are here
    ring = 2 * relayout + around + 7 * (4 * head + gradients) + gradients
    assert both.seconds(8, 1, "ring") == pytest.approx(ring)
    gathered = 2 * (relayout + around) + 7 * gradients
    assert both.seconds(8, 1, "allgather") == pytest.approx(gathered)


def test_the_model_hides_what_is_shorter_than_a_step():
    """One message is as long as half a step: only the all-to-alls are seen."""
    step = layer().compute_seconds(8) / 8
    messages = 2 * 2 * 100 * 8 * 4
    linked = layer(bandwidth=messages / (step / 2))
    relayout = 7 / 8 * 12 * 100 * 8 * 4 / linked.link.bandwidth
    assert linked.seconds(8, 1, "ring") == pytest.approx(8 * step + relayout)
    # All seven messages are three and a half steps: one of them hides behind the first step.
    assert linked.seconds(8, 1, "allgather") == pytest.approx(3.5 * step + 7 * step + relayout)


def two_hosts(bandwidth, passes="fwd"):
    """L 100 on 16 ranks, two hosts of 8: slow links between hosts, and links that cost nothing."""
    inside, between = (Link(latency=0.0, bandwidth=b) for b in (math.inf, bandwidth))
    return Layer(work=work(0, 100), rate=1e9, passes=passes, link=inside, host_link=between)


def test_the_model_of_a_double_ring():
    """A message between hosts has a round's time, in a ring a step's."""
    message = 2 * 2 * 100 * 8 * 4  # gradients, in fp32 as the keys are here, are as long
    step = two_hosts(math.inf).compute_seconds(16) / 16
    relayout = 15 / 16 * 12 * 100 * 8 * 4
    slow = two_hosts(message / (8 * step))  # as long as a round
    across = relayout / slow.host_link.bandwidth
    assert slow.seconds(16, 1, "double_ring") == pytest.approx(16 * step + across)
    assert slow.seconds(16, 1, "ring") == pytest.approx(15 * 8 * step + step + across)
    assert slow.seconds(8, 2, "double_ring") < slow.seconds(8, 2, "ring")
    # Each of 8 ranks brings an eighth of what comes from the other host: a message in all.
    gathered = 8 * step + 15 * step + across
    assert slow.seconds(16, 1, "allgather") == pytest.approx(gathered)
    both = two_hosts(slow.host_link.bandwidth, "fwd+bwd")
    # Behind a backward's round of 20 steps, keys and gradients: 16; then what is left of these: 8.
    backward = 2 * 20 * step + 8 * step + across
    forward = slow.seconds(16, 1, "double_ring")
    assert both.seconds(16, 1, "double_ring") == pytest.approx(forward + backward)
    slower = two_hosts(message / (16 * step))
    across = relayout / slower.host_link.bandwidth
    assert slower.seconds(16, 1, "double_ring") == pytest.approx(16 * step + 8 * step + across)
    for ring, ulysses in ((8, 1), (2, 8)):  # on one host, and one rank of a ring to a host
        assert both.seconds(ring, ulysses, "double_ring") == both.seconds(ring, ulysses, "ring")
    assert {label for label in both.lines() if label.startswith("double ring")} == {
        "double ring, U = 1",
        "double ring, U as SPMesh.auto on hosts of 8",
    }
    assert not any("double" in label for label in layer().lines())
