"""What All-Scan refuses: on one rank, between ranks, and what it does not ask twice."""

import contextlib
import re
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import run_ranks

from hybridsp.collectives import agreement, all_scan, scan_plan, start_all_scan
from hybridsp.collectives.agreement import agree
from hybridsp.collectives.scan_plan import Options, refusal_of_arguments, refusal_of_values

STATE, DECAY = torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5)
MISFITS = {
    r"state \(2, 5, 4\) and decay \(1, 2, 5\) do not fit": (STATE[0], DECAY, {}),
    r"state .* and decay \(1, 2, 5, 1\) do not fit": (STATE, DECAY[..., None], {}),
    r"state .* and decay \(1, 2, 4\) do not fit": (STATE, DECAY[..., :4], {}),
    r"state .* and decay \(1, 1, 5\) do not fit": (STATE, DECAY[:, :1], {}),
    r"state .* and decay \(2, 2, 5\) do not fit": (STATE, DECAY.repeat(2, 1, 1), {}),
    r"state \(0, 2, 5, 4\) .* do not fit": (STATE[:0], DECAY[:0], {}),
    r"state is torch.bfloat16 and decay torch.float32": (STATE.bfloat16(), DECAY, {}),
    r"state is torch.float32 and decay torch.float64": (STATE, DECAY.double(), {}),
    r"state is on cpu and decay on meta": (STATE, DECAY.to("meta"), {}),
    r"algorithm = 'ring' is unknown; use one of": (STATE, DECAY, {"algorithm": "ring"}),
    r"num_blocks = 0 must lie in 1 .. K = 5": (
        STATE,
        DECAY,
        {"algorithm": "chain", "num_blocks": 0},
    ),
    r"num_blocks = 6 must lie in 1 .. K = 5": (
        STATE,
        DECAY,
        {"algorithm": "chain", "num_blocks": 6},
    ),
    r"num_blocks = 2 means nothing to algorithm = 'auto'": (STATE, DECAY, {"num_blocks": 2}),
    r"num_blocks = 2 means nothing to algorithm = 'doubling'": (
        STATE,
        DECAY,
        {"algorithm": "doubling", "num_blocks": 2},
    ),
    r"ranks_per_host = 2 means nothing to algorithm = 'chain'": (
        STATE,
        DECAY,
        {"algorithm": "chain", "ranks_per_host": 2},
    ),
    r"ranks_per_host = 0 must be at least 1": (
        STATE,
        DECAY,
        {"algorithm": "hierarchical", "ranks_per_host": 0},
    ),
}


@pytest.mark.parametrize("match", MISFITS)
def test_misfits(match):
    state, decay, options = MISFITS[match]
    assert re.search(match, refusal_of_arguments(state, decay, Options(**options)))


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf")])
def test_decays_outside_their_range(value):
    assert refusal_of_values(DECAY) is None
    assert refusal_of_values(0 * DECAY) is None
    decay = DECAY.clone()
    decay[0, 1, 3] = value
    assert f"{value:g}" in refusal_of_values(decay)


# What rank 1 does otherwise than the others, and what every rank is told.
DIFFERENCES = {
    "shapes": ((STATE[:, :1], DECAY[:, :1], {}), r"rank 1: all_scan\(state \(1, 1, 5, 4\)"),
    "decays": ((STATE, DECAY[..., :1], {}), r"rank 0: .* decay \(1, 2, 5\).* decay \(1, 2, 1\)"),
    "algorithms": ((STATE, DECAY, {"algorithm": "chain"}), r"rank 1: .*'chain'.*rank 2: .*'auto'"),
    "dtypes": ((STATE.bfloat16(), DECAY, {}), r"state is torch.bfloat16"),
    "too much": ((STATE, 1.5 * DECAY, {}), r"values from 1.5 to 1.5"),
    "too little": ((STATE, -0.1 * DECAY, {}), r"values from -0.1 to -0.1"),
    "NaN": ((STATE, float("nan") * DECAY, {}), r"values from nan to nan"),
    "unknown": ((STATE, DECAY, {"algorithm": "ring"}), r"algorithm = 'ring' is unknown"),
}
# What all ranks do alike, and are refused alike.
REFUSED = {
    "no symmetric memory": ({"algorithm": "symmetric"}, r"'symmetric' cannot run here: .*; use"),
    "lost gradient": ({}, "start_all_scan is not differentiable"),
}


def message(scan, *args, **options):
    try:
        scan(*args, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def refusals(odd_rank):
    group, messages = dist.group.WORLD, {}
    for name, ((state, decay, options), _) in DIFFERENCES.items():
        with case(name):
            mine = (state, decay, options) if dist.get_rank() == odd_rank else (STATE, DECAY, {})
            messages[name] = message(all_scan, *mine[:2], group, **mine[2])
    for name, (options, _) in REFUSED.items():
        with case(name):
            decay = DECAY.clone().requires_grad_(name == "lost gradient")
            messages[name] = message(start_all_scan, STATE, decay, group, **options)
    out = all_scan(STATE + 1, DECAY, group)
    torch.testing.assert_close(out, STATE + dist.get_rank())
    # The same kind of call again: its values are still looked at.
    messages["later"] = message(all_scan, STATE, DECAY + 1, group)
    return messages


def test_every_rank_raises(subtests):
    results = run_ranks(refusals, 3, 1, timeout=30)
    for name, (_, match) in (DIFFERENCES | REFUSED).items():
        with subtests.test(name):
            for result in results:
                assert re.search(match, result[name]), result[name]
    # Refused before it can differ: rank 1 says why, the others that rank 1 does.
    assert "rank 1: refuses: decay has values" in results[0]["NaN"]
    assert results[0]["NaN"] == results[2]["NaN"]
    assert results[0]["shapes"] == results[1]["shapes"] == results[2]["shapes"]


def test_rank_0_refuses():
    first, other = run_ranks(refusals, 2, 0, timeout=30)
    assert other["NaN"] == f"rank 0 refuses: {first['NaN']}"


def misses():
    """One rank meets a new kind of call, the others do something else."""
    rank, found = dist.get_rank(), {}
    for alone in range(3):
        group = dist.new_group()
        agree(group, "the old kind")
        group.get_group_store().set_timeout(timedelta(milliseconds=500))
        if rank == alone:
            with pytest.raises(ValueError, match="before the group's store timed out") as error:
                agree(group, "the new kind")
            found[alone] = str(error.value)
        dist.barrier()
    return found


def test_a_rank_that_is_alone_with_a_call_misses_the_others_by_name():
    results = run_ranks(misses, 3, timeout=30)
    for alone, absent in enumerate(([1, 2], [0, 2], [0, 1])):
        assert f"ranks {absent} did not come to the call the new kind" in results[alone][alone]


def one_is_absent():
    """The others come, rank 0 later than the rest and later than their first patience is over."""
    rank, found = dist.get_rank(), {}
    for absent in range(3):
        group = dist.new_group()
        group.get_group_store().set_timeout(timedelta(seconds=1))
        dist.barrier()
        if rank != absent:
            time.sleep(0.8 if rank == 0 else 0)
            found[absent] = message(agree, group, "the new kind")
        dist.barrier()
    return found


def test_every_rank_that_came_names_the_one_that_did_not():
    results = run_ranks(one_is_absent, 3, timeout=60)
    for rank, found in enumerate(results):
        assert sorted(found) == [absent for absent in range(3) if absent != rank]
        for absent, text in found.items():
            assert text.startswith(f"ranks [{absent}] did not come to the call the new kind")


def later_refusals(bad_rank, seconds):
    """What this rank's second call of a kind gives, by algorithm; the bad rank's decay is 1.5."""
    rank, outcomes = dist.get_rank(), {}
    state, decay = torch.full_like(STATE, 1.0 + rank), DECAY / 2
    expected = torch.full_like(state, [0, 1, 2.5][rank])
    for algorithm in ("chain", "doubling", "allgather"):
        group = dist.new_group(timeout=timedelta(seconds=seconds))
        with case(algorithm):
            # The first call also connects the ranks.
            torch.testing.assert_close(all_scan(state, decay, group, algorithm=algorithm), expected)
            dist.barrier()
            start = time.monotonic()
            try:
                out = all_scan(state, decay + (rank == bad_rank), group, algorithm=algorithm)
                torch.testing.assert_close(out, expected)
                outcomes[algorithm] = "right"
            except (ValueError, RuntimeError) as error:
                outcomes[algorithm] = f"{type(error).__name__}: {error}"
            assert time.monotonic() - start < 10 * seconds
            dist.barrier()
    return outcomes


def test_a_refusal_in_a_later_call_is_its_ranks_alone(subtests):
    """The others wait for it and fail at the timeout; nobody gets a wrong state.

    Rank 0 of a chain needs nothing of rank 1, but gloo sends to who receives.
    """
    of_rank = run_ranks(later_refusals, 3, 1, 2, timeout=60)
    for algorithm in of_rank[0]:
        with subtests.test(algorithm):
            first, bad, last = (outcomes[algorithm] for outcomes in of_rank)
            assert re.match("ValueError: decay has values from 1.5 to 1.5", bad)
            for other in (first, last):
                assert re.match(r"RuntimeError: .*Timed out waiting 2000ms", other)


def asks():
    """How often the ranks compare their calls."""
    questions = []
    agreement.agree = lambda group, call: questions.append(call)
    state, decay = torch.randn(1, 2, 5, 4), torch.rand(1, 2, 5).requires_grad_()
    for reverse in (False, True):
        for _ in range(2):
            all_scan(state, decay, dist.group.WORLD, reverse=reverse).sum().backward()
    all_scan(state, decay[..., :1], dist.group.WORLD)
    return questions


def test_the_ranks_compare_each_kind_of_call_once():
    for questions in run_ranks(asks, 2):
        assert len(questions) == len(set(questions)) == 2


def automatic(reason):
    """What "auto" takes where symmetric memory cannot be had for a reason, or can (None)."""
    with mock.patch.object(scan_plan, "why_not", return_value=reason):
        return scan_plan.plan_scan(STATE, DECAY, dist.group.WORLD, Options()).algorithm


def test_auto_takes_symmetric_memory_where_it_can_be_had():
    assert run_ranks(automatic, 2, None) == ["symmetric"] * 2
    for algorithm in run_ranks(automatic, 2, "the ranks are on two hosts"):
        assert algorithm in ("chain", "doubling", "allgather")


def one_rank_needs_nobody():
    group = dist.group.WORLD
    agree(group, "anything")
    with pytest.raises(ValueError, match="too large"):
        agree(group, "anything", "too large")


def test_one_rank_needs_nobody():
    run_ranks(one_rank_needs_nobody, 1)


def memory_runs_out_on_one_rank():
    group, failure = dist.group.WORLD, torch.OutOfMemoryError("too little")
    fails = mock.patch.object(scan_plan, "refusal_of_values", side_effect=failure)
    with fails if dist.get_rank() == 1 else contextlib.nullcontext():
        return message(all_scan, STATE, DECAY, group)


def test_any_failure_before_a_first_call_ends_all_ranks():
    for told in run_ranks(memory_runs_out_on_one_rank, 2, timeout=60):
        assert "OutOfMemoryError: too little" in told
