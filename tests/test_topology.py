"""The probe: positive finite figures, the same on every rank, measured once per group."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from hybridsp.collectives import all_scan
from hybridsp.collectives import topology as probe
from hybridsp.collectives.cost import Link, Topology
from hybridsp.collectives.topology import consecutive_ranks, host_identity, topology

DEVICE = torch.device("cpu")


@pytest.mark.parametrize(
    ("hosts", "ranks"),
    [
        *(("aaaa", 4), ("aabb", 2), ("aaabbbcc", 3), ("abcd", 1), ("a", 1)),
        *(("abab", None), ("aabbb", None), ("abbcc", None), ("aabbaa", None)),
    ],
)
def test_consecutive_ranks(hosts, ranks):
    assert consecutive_ranks(list(hosts)) == ranks


def test_one_process_runs_on_one_host():
    assert host_identity() == host_identity() != ""


def measure(hosts):
    """Ranks that believe they run on `hosts`."""
    probe.host_identity = lambda: hosts[dist.get_rank()]
    measurements = []
    measure_once = probe._measure
    probe._measure = lambda *args: measurements.append(args) or measure_once(*args)
    group = dist.group.WORLD
    # Nobody asks for links where nothing has to be chosen.
    state, decay = torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8)
    all_scan(state, decay, group, algorithm="doubling")
    all_scan(state, decay, group, algorithm="chain", num_blocks=2)
    assert len(measurements) == 0
    expected = torch.full_like(state, dist.get_rank())
    for options in ({}, {"algorithm": "chain"}, {"algorithm": "hierarchical"}):
        if options.get("algorithm") == "hierarchical" and hosts == "abab":
            with pytest.raises(ValueError, match="equally many consecutive ranks"):
                all_scan(state, decay, group, **options)
        else:
            torch.testing.assert_close(all_scan(state, decay, group, **options), expected)
    found = topology(group, DEVICE)
    assert len(measurements) == 1
    return found


@pytest.mark.parametrize("hosts", ["aaaa", "aabb", "aaab", "abcd", "abab"])
def test_all_ranks_measure_the_same(hosts):
    results = run_ranks(measure, 4, hosts)
    assert len(set(results)) == 1
    found = results[0]
    assert found.ranks_per_host == consecutive_ranks(list(hosts))
    assert (found.within is None) == (hosts in ("abcd", "abab"))
    assert (found.between is None) == (hosts == "aaaa")
    for link in filter(None, (found.within, found.between, found.all_gather)):
        for figure in (link.latency, link.bandwidth):
            assert math.isfinite(figure)
            assert figure > 0


def test_links_are_told_in_words():
    link = Link(latency=41.2e-6, bandwidth=361e9)
    slow = Link(latency=1e-4, bandwidth=1.25e9)
    found = Topology(ranks_per_host=2, within=link, between=slow, all_gather=slow)
    assert str(found) == (
        "41 us and 361 GB/s to the next rank of the host, 100 us and 1.25 GB/s to the next host, "
        "100 us and 1.25 GB/s in an all-gather"
    )
    assert "next rank of the host" not in str(replace(found, within=None))


def one_rank():
    probe._measure = None  # would raise if called
    out = all_scan(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8), dist.group.WORLD)
    assert not out.any()


def test_one_rank_measures_nothing():
    run_ranks(one_rank, 1)
