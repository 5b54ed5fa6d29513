"""Layers whose first call one rank makes otherwise than the others: what each rank is told."""

import contextlib
import re
from unittest import mock

import pytest
import torch
from cases import case
from distributed import run_ranks


def refusal(attention, tensors, options, mesh):
    """Why a call is refused."""
    try:
        attention(*tensors, mesh=mesh, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def told_of_a_failure(attention, tensors, mesh, module, function):
    """What this rank is told where `module.function`, on rank 1, fails with what is no ValueError.

    Of a first call; of a later one, rank 1 meets the error itself, and nobody is asked.
    """
    first, later = (
        mock.patch.object(module, function, side_effect=torch.OutOfMemoryError("too little"))
        if mesh.rank == 1
        else contextlib.nullcontext()
        for _ in range(2)
    )
    with first:
        told = refusal(attention, tensors, {}, mesh)
    attention(*tensors, mesh=mesh)
    if mesh.rank == 1:
        with later, pytest.raises(torch.OutOfMemoryError, match="too little"):
            attention(*tensors, mesh=mesh)
    return told


def told_of(attention, alike, calls, mesh, odd_rank):
    """What this rank is told of each of `calls`: (name, odd tensors, odd options, all's options).

    All other ranks call `attention(*alike, mesh=mesh)` with all's options.
    """
    told = {}
    for name, tensors, options, common in calls:
        mine = (tensors, common | options) if mesh.rank == odd_rank else (alike, common)
        with case(name):
            told[name] = refusal(attention, *mine, mesh)
    return told


def check_told(disagreements, odd_rank, refused, different, subtests):
    """Hold what the ranks of `disagreements(odd_rank)` return, `told_of`, against patterns.

    Args:
        disagreements: runs on three ranks.
        odd_rank: the one that differs.
        refused: by name, what this rank cannot do by itself, and says; the others name it and what
            it said.
        different: by name, what each rank could do by itself: all are told the same.
        subtests: pytest's.
    """
    told = run_ranks(disagreements, 3, odd_rank)
    assert set(told[0]) == {*refused, *different}
    for name, match in refused.items():
        with subtests.test(name):
            assert re.search(match, told[odd_rank][name])
            for rank in {0, 1, 2} - {odd_rank}:
                assert re.search(f"rank {odd_rank}:? refuses: .*{match}", told[rank][name])
    for name, match in different.items():
        with subtests.test(name):
            assert re.search(match.replace("{}", str(odd_rank)), told[0][name])
            assert told[0][name] == told[1][name] == told[2][name]
