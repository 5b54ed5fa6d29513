"""The arithmetic behind the benchmarks' figures: bytes, fits, floors, overlap, tables."""

import argparse
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks

from hybridsp.bench import report, timing, trace
from hybridsp.bench.all_scan import cost_model
from hybridsp.bench.all_scan.cases import shape_of
from hybridsp.bench.all_scan.cost_model import Measured, Scan
from hybridsp.bench.linear import check as linear_check
from hybridsp.bench.linear.ops import Shape, make_inputs
from hybridsp.bench.options import human_bytes, names, size, sizes
from hybridsp.collectives.all_scan import all_scan
from hybridsp.collectives.cost import Link
from hybridsp.collectives.scans import Line

HEADS, ROWS, COLUMNS = 2, 6, 5
STATE, DECAY = 4 * HEADS * ROWS * COLUMNS, 4 * HEADS * ROWS


def scan(algorithm, ranks=8, state_bytes=2**20, **options):
    return Scan(
        algorithm=algorithm,
        ranks=ranks,
        state_bytes=state_bytes,
        decay_bytes=state_bytes // 128,
        rows=128,
        **options,
    )


def bytes_sent(scans):
    """What this rank sends in each scan, counted where messages are made."""
    sent = []
    state, decay = torch.randn(1, HEADS, ROWS, COLUMNS), torch.rand(1, HEADS, ROWS)
    send = Line.send
    for options in scans:
        with case(options), mock.patch.object(Line, "send", autospec=True) as counting:
            counting.side_effect = send
            all_scan(state, decay, dist.group.WORLD, **options)
            sent.append(sum(call.args[1].nbytes for call in counting.call_args_list))
    return sent


@pytest.mark.parametrize("ranks", [4, 6])
def test_bytes_sent_are_those_of_the_scans(ranks):
    asked = [{"algorithm": "doubling"}, {"algorithm": "chain", "num_blocks": 3}]
    asked += [
        {"algorithm": "hierarchical", "num_blocks": 2, "ranks_per_host": local}
        for local in (1, 2, 3, 4, 5, 6)
    ]
    counted = zip(*run_ranks(bytes_sent, ranks, asked), strict=True)
    for options, of_ranks in zip(asked, counted, strict=True):
        known = {"state_bytes": STATE, "decay_bytes": DECAY, "rows": ROWS}
        with case(options):
            assert Scan(ranks=ranks, **known, **options).bytes_sent() == max(of_ranks)


def test_bytes_and_messages():
    assert scan("allgather").bytes_sent() == 7 * (2**20 + 2**13)
    assert scan("symmetric").bytes_sent() == 2**20
    assert scan("doubling", 5).messages() == 3
    assert scan("allgather").messages() == scan("symmetric").messages() == 7
    assert scan("chain", num_blocks=4).messages() == 8 - 2 + 4
    # 2 inside a host, 1 + 3 between the two of them, 1 to the other ranks.
    assert scan("hierarchical", num_blocks=3, ranks_per_host=4).messages() == 2 + 3 + 1
    assert scan("hierarchical", num_blocks=3, ranks_per_host=8).messages() == 3


LINK = Link(latency=30e-6, bandwidth=200e9)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "chain", "num_blocks": 4},
        {"algorithm": "doubling"},
        {"algorithm": "allgather"},
        {"algorithm": "symmetric"},
        {"algorithm": "hierarchical", "num_blocks": 2, "ranks_per_host": 4},
    ],
)
def test_the_fit_finds_the_link_again(options):
    scans = [scan(state_bytes=2**power, **options) for power in (16, 20, 22, 26)]
    fitted = cost_model.fit([Measured(scan=s, seconds=s.seconds(LINK)) for s in scans])
    assert fitted.link.latency == pytest.approx(LINK.latency, rel=1e-6)
    assert fitted.link.bandwidth == pytest.approx(LINK.bandwidth, rel=1e-6)
    assert fitted.error < 1e-6


def test_the_fit_weighs_relative_errors():
    """10% more on each of a small and a large message is 10% on both unknowns."""
    scans = [scan("doubling", state_bytes=size) for size in (2**12, 2**28)]
    fitted = cost_model.fit([Measured(scan=s, seconds=1.1 * s.seconds(LINK)) for s in scans])
    assert fitted.link.latency == pytest.approx(1.1 * LINK.latency)
    assert fitted.link.bandwidth == pytest.approx(LINK.bandwidth / 1.1)


def test_the_fit_has_its_limits():
    constant = [
        Measured(scan=scan("doubling", state_bytes=2**p), seconds=1.0 - p / 100) for p in (10, 20)
    ]
    fitted = cost_model.fit(constant)
    assert fitted.link.bandwidth == math.inf, "falling times know no bandwidth"
    assert 0.2 < fitted.link.latency < 0.4
    assert cost_model.fit([]) is None
    assert cost_model.fit(constant[:1]) is None
    assert cost_model.fit(2 * constant[:1]) is None, "one size says nothing of the other unknown"
    assert cost_model.fit_all(constant[:1]) == {}


def test_the_model_at_other_ranks():
    chain = scan("chain", num_blocks=4)
    far = chain.at(1024, LINK)
    assert (far.ranks, far.state_bytes) == (1024, chain.state_bytes)
    few, many = chain.at(4, LINK), far
    assert few.num_blocks < many.num_blocks, "a longer chain wants smaller blocks"
    assert many.seconds(LINK) < scan("chain", 1024, num_blocks=1).seconds(LINK)
    assert scan("hierarchical", num_blocks=1, ranks_per_host=4).at(1024, LINK).num_blocks > 1
    assert scan("doubling").at(1024, LINK).seconds(LINK) == pytest.approx(
        10 * (LINK.latency + (2**20 + 2**13) / LINK.bandwidth)
    )


def test_the_picture_tells_model_from_measurement(tmp_path, monkeypatch):
    panels = []

    def watched(count):
        figure, axes = report.new_figure(count)
        panels.extend(axes)
        return figure, axes

    monkeypatch.setattr(cost_model, "new_figure", watched)
    points = [
        Measured(scan=scan("doubling", ranks, state), seconds=1e-4)
        for ranks in (2, 8)
        for state in (2**20, 2**21)
    ]
    wire = [{"name": "send/recv", "state_bytes": 2**20, "seconds": 3e-5}]
    cost_model.draw(points, wire, cost_model.fit_all(points), tmp_path / "x.png", "title")
    labels = [axes.get_legend_handles_labels()[1] for axes in panels]
    ours = ["doubling, measured", "doubling, model"]
    assert labels[0] == [*ours, "send/recv, the raw wire, measured"]
    assert labels[1] == [*ours, "AllGather: ZeCO paper, H100", "All-Scan: ZeCO paper, H100"]
    model = panels[1].get_lines()[1]
    assert model.get_linestyle() == "--"
    assert (min(model.get_xdata()), max(model.get_xdata())) == (2, 1024)
    assert list(panels[1].get_lines()[0].get_xdata()) == [2, 8]
    cost_model.draw([], [], {}, tmp_path / "empty.png", "nothing could run")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_floor_bytes():
    """H16 K128 V128, bf16 with fp32 gates, at 262,144 tokens: 6.4 GB forward, 18.3 GB in all."""
    shape = Shape(
        tokens=2**18, heads=16, key_dim=128, value_dim=128, decay="vector", dtype=torch.bfloat16
    )
    tensor = 2**18 * 16 * 128 * 2
    assert shape.bytes_of("fwd") == (4 + 2) * tensor
    assert shape.bytes_of("fwd+bwd") == (4 + 2) * tensor + (4 + 2) * tensor + (3 + 2) * tensor
    scalar = Shape(tokens=10, heads=3, key_dim=8, value_dim=4, decay="scalar", dtype=torch.float32)
    inputs = make_inputs(scalar, torch.device("cpu"), seed=0)
    tensors = [*inputs.leaves, inputs.dout]
    assert scalar.bytes_of("fwd") == sum(x.nbytes for x in tensors)
    both = sum(x.nbytes for x in [*tensors, *tensors, *inputs.leaves])
    assert scalar.bytes_of("fwd+bwd") == both


def test_gates_of_the_check():
    logits = torch.linspace(-4, 4, 10_000)
    assert (linear_check.strong(logits) < linear_check.ordinary(logits)).all()
    assert not linear_check.all_at_one(logits).any()
    share = (linear_check.mixed(torch.randn(100_000)) == -100).double().mean().item()
    assert share == pytest.approx(1 / 16, rel=0.1)
    zero = torch.zeros(3, dtype=torch.float64)
    assert linear_check.relative_error(zero + 2, zero) == pytest.approx(2 * 3**0.5)
    assert linear_check.relative_error(torch.full((3,), 1.1), zero + 1) == pytest.approx(0.1)


def kernel(stream, start, duration, name="kernel"):
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"stream": stream},
    }


def test_overlap_in_a_trace():
    events = [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500},
        kernel(7, 0, 100),
        kernel(7, 100, 50),
        kernel(7, 300, 100),
        # Waits for a peer all along, and still is not the stream that computes.
        kernel(20, 50, 500, "ncclDevKernel_SendRecv"),
        kernel(21, 90, 20),
    ]
    found = trace.overlap(events)
    assert (found.side_us, found.hidden_us) == (500, 100 + 100)
    assert found.fraction == 0.4
    assert "500 us on side streams (the scan), 200 us" in trace.describe(events)
    assert trace.describe(events).endswith("40% hidden")
    assert trace.describe(events[:3]) == "nothing ran beside the main stream"
    assert trace.overlap(events[:2]) is None
    # Held until 90: of the side streams (90, 110) is left, of the main one (100, 150) and more.
    found = trace.overlap([*events, kernel(7, 0, 90, "spin_kernel(long)")])
    assert (found.side_us, found.hidden_us) == (20, 10)


class Event:
    """Of a GPU that reaches the fifth event and those behind it too early, for a host this slow."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1
        self.number = Event.made

    def record(self):
        pass

    def query(self):
        return self.number in (1, 2, 5, 6)

    def elapsed_time(self, other):
        return 1e3 * self.number


def test_only_calls_launched_in_time_count(monkeypatch):
    held = []
    fakes = {"Event": Event, "_sleep": held.append, "synchronize": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "meet", lambda ahead: [ahead, True])
    mesh = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    # Pairs of events: (1, 2) late, (3, 4) in time, (5, 6) late, (7, 8) in time.
    assert timing._queued_seconds(lambda: None, mesh, 2) == [3, 7]
    first = timing.FIRST_HOLD * timing.CYCLES_PER_SECOND
    assert held == [first, 2 * first, 2 * first, 4 * first]
    monkeypatch.setattr(Event, "query", lambda _self: True)
    with pytest.raises(RuntimeError, match="the call waits for the GPU"):
        timing._queued_seconds(lambda: None, mesh, 1)


def test_sizes_and_names():
    assert sizes("64K,2m, 1G,7,64K") == (65536, 2**21, 2**30, 7)
    assert [human_bytes(n) for n in (7, 512, 65536, 3 * 2**20, 131584)] == [
        *("7", "512", "64K", "3M", "128.5K"),
    ]
    assert all(size(human_bytes(n)) == n for n in (1, 1023, 2**10, 3 * 2**20, 2**30))
    assert names(("a", "b"))("b, a,b") == ("b", "a")
    for read, text in ((size, "-1"), (size, "1.5K"), (sizes, "1,,2"), (names(("a",)), "")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)


def test_state_shapes():
    assert shape_of(2**21) == (32, 128, 128), "the paper's 32 heads of 128 x 128"
    assert shape_of(2**10) == (1, 2, 128)
    for num_bytes in (100, 2**16 + 2**10):
        with pytest.raises(ValueError, match=r"is no state .* multiple of 64K"):
            shape_of(num_bytes)


def test_table():
    rows = [
        {"name": "a", "us": 1234.5, "share": 0.25},
        {"name": "bcd", "reason": "no such thing"},
        {"name": "e", "us": float("nan"), "share": 1e-9},
        {"name": "f", "reason": "no such thing"},
    ]
    assert report.format_table({"name": "name", "us": "us", "share": "%"}, rows).splitlines() == [
        "name          us        %",
        "----  ----------  -------",
        "a          1,234    0.250",
        "bcd            -        -  [1]",
        "e     not finite  1.0e-09",
        "f              -        -  [1]",
        "[1] cannot run: no such thing",
    ]
