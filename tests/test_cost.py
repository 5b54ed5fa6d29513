"""The cost model of All-Scan: block counts, formulas, and what is chosen where."""

import pytest

from hybridsp.collectives.cost import (
    Link,
    Plan,
    Topology,
    all_gather_seconds,
    chain_plan,
    chain_seconds,
    choose,
    doubling_seconds,
    hierarchical_plan,
    hierarchical_seconds,
)

NVLINK = Link(latency=40e-6, bandwidth=360e9)
ETHERNET = Link(latency=100e-6, bandwidth=10e9)
WIRE = Link(latency=0.0, bandwidth=1e9)
ROWS = 300


def one_host(link=NVLINK):
    return Topology(ranks_per_host=1024, within=link, between=None, all_gather=link)


def hosts_of(ranks):
    return Topology(ranks_per_host=ranks, within=NVLINK, between=ETHERNET, all_gather=ETHERNET)


@pytest.mark.parametrize("num_bytes", [100, 10**6, 10**8])
@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_chain_has_the_number_of_blocks_of_the_formula(ranks, num_bytes):
    """The fastest of 1 .. K is where the derivative of the formula for equal links is zero."""
    for link in (NVLINK, ETHERNET, Link(latency=1e-9, bandwidth=1e9)):
        seconds, plan = chain_plan(one_host(link), ranks, num_bytes, ROWS)
        formula = ((ranks - 2) * num_bytes / (link.latency * link.bandwidth)) ** 0.5
        assert abs(plan.num_blocks - min(max(formula, 1), ROWS)) <= 1
        blocks = plan.num_blocks
        assert seconds == pytest.approx(
            (ranks - 2 + blocks) * (link.latency + num_bytes / blocks / link.bandwidth)
        )


def test_seconds_on_one_host():
    topology = one_host(WIRE)
    assert chain_seconds(topology, 8, 10**9, blocks=1) == pytest.approx(7)
    assert chain_seconds(topology, 8, 10**9, blocks=10) == pytest.approx(1.6)
    assert doubling_seconds(topology, 8, 10**9, 10**7) == pytest.approx(3.03)
    assert doubling_seconds(topology, 9, 10**9, 10**7) == pytest.approx(4.04)
    assert all_gather_seconds(topology, 8, 10**9, 10**7) == pytest.approx(7.07)
    assert hierarchical_seconds(topology, 8, 10**9, 0, 1, 8) == pytest.approx(3)


def test_one_rank_costs_nothing():
    topology = one_host(WIRE)
    assert chain_seconds(topology, 1, 10**9, blocks=3) == 0
    assert doubling_seconds(topology, 1, 10**9, 10**7) == 0
    assert all_gather_seconds(topology, 1, 10**9, 10**7) == 0
    assert hierarchical_seconds(topology, 1, 10**9, 0, 3, 1) == 0


def test_slow_links_between_hosts():
    """Two seconds a state between hosts, one inside."""
    slow = Link(latency=0.0, bandwidth=0.5e9)
    topology = Topology(ranks_per_host=4, within=WIRE, between=slow, all_gather=slow)
    # 8 ranks: 6 hops inside, one between; the blocks behind the first go at the slow pace.
    assert chain_seconds(topology, 8, 10**9, blocks=1) == pytest.approx(8)
    assert chain_seconds(topology, 8, 10**9, blocks=2) == pytest.approx(5)
    # Every step of doubling has some pair on different hosts.
    assert doubling_seconds(topology, 8, 10**9, 0) == pytest.approx(6)
    # 2 steps inside, 2 between, 3 copies inside.
    assert hierarchical_seconds(topology, 8, 10**9, 0, 1, 4) == pytest.approx(2 + 3 + 3)
    assert hierarchical_seconds(topology, 4, 10**9, 0, 1, 4) == pytest.approx(2)


def test_hosts_alone_or_in_disorder():
    alone = Topology(ranks_per_host=1, within=None, between=WIRE, all_gather=WIRE)
    disorder = Topology(ranks_per_host=None, within=NVLINK, between=WIRE, all_gather=WIRE)
    for topology in (alone, disorder):
        assert chain_seconds(topology, 4, 10**9, blocks=1) == pytest.approx(3)
        assert doubling_seconds(topology, 4, 10**9, 0) == pytest.approx(2)
        assert choose(topology, 64, 10**6, 10**4, 128).algorithm != "hierarchical"
    assert hierarchical_seconds(alone, 4, 10**9, 0, 1, 1) == pytest.approx(3)


def test_the_blocks_between_hosts_are_the_fastest():
    seconds, plan = hierarchical_plan(hosts_of(8), 256, 10**8, 10**4, ROWS, ranks_per_host=8)
    assert plan.ranks_per_host == 8
    each = [hierarchical_seconds(hosts_of(8), 256, 10**8, 10**4, n, 8) for n in range(1, ROWS + 1)]
    assert seconds == min(each) == each[plan.num_blocks - 1]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64, 1024])
@pytest.mark.parametrize("num_bytes", [2**10, 2**20, 2**30])
def test_the_choice_is_the_fastest(ranks, num_bytes):
    decay_bytes, rows = num_bytes // 128, 128
    for topology in (one_host(), hosts_of(8)):
        plan = choose(topology, ranks, num_bytes, decay_bytes, rows)
        seconds = {
            "chain": chain_plan(topology, ranks, num_bytes, rows)[0],
            "doubling": doubling_seconds(topology, ranks, num_bytes, decay_bytes),
            "allgather": all_gather_seconds(topology, ranks, num_bytes, decay_bytes),
        }
        if topology.between and ranks > 8:
            hierarchical = hierarchical_plan(topology, ranks, num_bytes, decay_bytes, rows, 8)
            seconds["hierarchical"] = hierarchical[0]
        assert seconds[plan.algorithm] == min(seconds.values())


def test_each_has_its_place():
    def algorithm(topology, ranks, num_bytes):
        return choose(topology, ranks, num_bytes, num_bytes // 128, 128).algorithm

    assert algorithm(one_host(), 8, 2**10) == "allgather"  # one latency
    assert algorithm(one_host(), 64, 2**21) == "doubling"  # few steps, not 63 states
    assert algorithm(one_host(), 8, 2**30) == "chain"  # one state
    assert algorithm(hosts_of(8), 64, 2**21) == "hierarchical"  # few messages between hosts


def test_a_plan_says_everything():
    plan = choose(hosts_of(8), 64, 2**21, 2**14, 128)
    assert (plan.algorithm, plan.ranks_per_host) == ("hierarchical", 8)
    assert plan.num_blocks > 1
    assert choose(one_host(), 8, 2**30, 2**23, 128).num_blocks > 1
    assert choose(one_host(), 64, 2**21, 2**14, 128) == Plan(algorithm="doubling")
