"""The longest sequence that fits, found by taking steps.

Lengths grow by a third or a half each time, from the longest that has run, until memory runs out.
Every try is a whole training step of an engine of its own. What the one before left on the GPU is
counted first: where that is more than the caches of libraries, the next would not see an empty
GPU, and the search ends there. Host memory that the planner expects not to be there is not asked
for either, because a system that runs out of it ends the process, and with it the record.

How long a step takes decides how far this goes; documents of some thousand tokens each
(`--documents 32K`) make it linear in the length, and what is held on the GPU depends on the length
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hybridsp.bench.step.case import Case
from hybridsp.planner import Cluster, Job
from hybridsp.planner.hardware import GIB
from hybridsp.planner.memory import memory
from hybridsp.planner.report import describe_setting
from hybridsp.planner.search import longest

# Workspaces of cuBLAS, boundaries of the last documents on the GPU, and the like.
LEFT_BYTES = 0.5 * GIB


class Found(NamedTuple):
    """What the search of one model and way found.

    Attributes:
        model, softmax_layers: which.
        setting: the way, as the planner names it.
        fits: tokens of the longest sequence that ran; None where none did.
        fails: tokens of the next one; None where the tries were used up.
        reason: why that one failed.
        planned: tokens of the longest that fits by the plan; None for a chip nobody knows.
    """

    model: str
    softmax_layers: str | None
    setting: str
    fits: int | None
    fails: int | None
    reason: str | None
    planned: int | None


def find_longest(
    cases: Sequence[Case],
    rows: Sequence[dict[str, Any]],
    attempt: Callable[[Case], dict[str, Any]],
    tries: int,
    planned_as: Cluster | None,
) -> list[Found]:
    """For every model and way, the longest sequence that ran and the first that did not.

    Collective.

    Args:
        cases: what has run.
        rows: what came of them, by position.
        attempt: takes a step and returns its row.
        tries: steps for each model and way, at the most.
        planned_as: the planner's view of the job's machines; None for chips that it does not know.
    """
    ways: dict[Any, list[tuple[Case, dict[str, Any]]]] = {}
    for case, row in zip(cases, list(rows), strict=True):
        way = case.model, case.softmax_layers, case.setting
        ways.setdefault(way, []).append((case, row))
    return [_of_a_way(tried, attempt, tries, planned_as) for tried in ways.values()]


def _of_a_way(
    tried: list[tuple[Case, dict[str, Any]]],
    attempt: Callable[[Case], dict[str, Any]],
    tries: int,
    cluster: Cluster | None,
) -> Found:
    ran = [case for case, row in tried if row["reason"] is None]
    failed = [(case.length, row["reason"]) for case, row in tried if row["reason"] is not None]
    fails, reason = min(failed, default=(None, None))
    case = max(ran, key=lambda each: each.length, default=tried[0][0])
    fits = case.length if ran else None
    left = max(row["left_bytes"] for _, row in tried)
    lengths = _growing(case.tokens_per_rank) if ran and fails is None else iter(())
    for _, tokens in zip(range(tries), lengths, strict=False):
        longer = replace(case, tokens_per_rank=tokens)
        reason = _why_not(longer, left, cluster)
        if reason is None:
            row = attempt(longer)
            reason, left = row["reason"], row["left_bytes"]
        if reason is not None:
            fails = longer.length
            break
        fits = longer.length
    return Found(
        model=case.model,
        softmax_layers=case.softmax_layers,
        setting=describe_setting(case.setting),
        fits=fits,
        fails=fails,
        reason=reason,
        planned=None if cluster is None else _planned(case, cluster),
    )


def _growing(tokens: int) -> Iterator[int]:
    """1.5, 2, 3, 4, 6, ... times as many."""
    while True:
        yield tokens * 3 // 2
        tokens *= 2
        yield tokens


def _why_not(case: Case, left: int, cluster: Cluster | None) -> str | None:
    """What speaks against a try."""
    if left > LEFT_BYTES:
        return f"the try before left {left / GIB:.1f} GiB on the GPU: this one would prove nothing"
    try:
        _ = case.sequence
    except ValueError as error:
        return f"not tried: {error}"
    if cluster is None:
        return None
    short = memory(case.shape, case.setting, cluster, case.length).short_host
    if short <= 0:
        return None
    return (
        f"not tried: by the plan the host lacks {short / GIB:.1f} GiB of "
        f"{cluster.host_memory / GIB:.1f}"
    )


def _planned(case: Case, cluster: Cluster) -> int:
    return longest(Job(model=case.shape, cluster=cluster, length=case.length), case.setting)


__all__ = ["Found", "find_longest"]
