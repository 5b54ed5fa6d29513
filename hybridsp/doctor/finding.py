"""One line of the report: a check, what it found, and the one sentence that mends it.

Every rank examines its own host and GPU, and most find the same. What they say alike is one line;
what differs is told with the ranks that say it, because the odd one out is what one is looking for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

WIDTH = 110
# So many different findings of ranks that are all well are shown; a job has hundreds of GPUs.
SHOWN = 3


class Status(StrEnum):
    """How bad it is: fine, will run but slower or only so far, or will not run."""

    OK = "ok"
    WARNING = "warning"
    FAILING = "failing"


SEVERITY = (Status.FAILING, Status.WARNING, Status.OK)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: how bad it is.
        found: what there is.
        fix: what to do, as one sentence; empty only where all is well.
    """

    name: str
    status: Status
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) or self.status == Status.OK, f"{self.name}: a finding without a fix"

    def as_json(self) -> dict[str, str]:
        """The fields as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, str]) -> Finding:
        """The finding whose `as_json` this is."""
        return cls(**dict(fields) | {"status": Status(fields["status"])})  # type: ignore[arg-type]


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name=name, status=Status.OK, found=found)


def warning(name: str, found: str, fix: str) -> Finding:
    """It will run, but slower, or only so far."""
    return Finding(name=name, status=Status.WARNING, found=found, fix=fix)


def failing(name: str, found: str, fix: str) -> Finding:
    """It will not run."""
    return Finding(name=name, status=Status.FAILING, found=found, fix=fix)


def merge(by_rank: Mapping[int, Sequence[Finding]]) -> list[Finding]:
    """One table out of what the ranks found, in the order in which the first of them looked.

    Args:
        by_rank: each rank's findings.

    Returns:
        What is alike once. Where the ranks differ, one line for each thing found and at most
        `SHOWN` for those that are well; each names its ranks.
    """
    told: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in sorted(by_rank.items()):
        for finding in findings:
            told.setdefault(finding.name, {}).setdefault(finding, []).append(rank)
    merged = []
    for lines in told.values():
        differ = len(lines) > 1
        well = [finding for finding in lines if finding.status == Status.OK]
        for finding in sorted(lines, key=lambda one: SEVERITY.index(one.status)):
            if finding in well[SHOWN:]:
                continue
            whose = f" ({name_ranks(lines[finding])})" if differ else ""
            merged.append(Finding(**asdict(finding) | {"found": finding.found + whose}))
        if well[SHOWN:]:
            merged.append(ok(well[0].name, f"{len(well[SHOWN:])} other answers, all of them well"))
    return merged


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0, 4-7`."""
    ranks = sorted(ranks)
    parts = []
    for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"


def exit_status(findings: Iterable[Finding]) -> int:
    """1 if anything fails, else 0."""
    return int(any(finding.status == Status.FAILING for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """The table, its sums below."""
    name_width = max((len(finding.name) for finding in findings), default=0)
    status_width = max(len(status) for status in Status)
    indent = " " * (status_width + name_width + 4)
    lines = []
    for finding in findings:
        head = f"{finding.status:<{status_width}}  {finding.name:<{name_width}}  "
        lines += _wrapped(finding.found, head, indent)
        if finding.fix:
            lines += _wrapped(finding.fix, f"{indent}fix: ", f"{indent}     ")
    counts = {status: sum(one.status == status for one in findings) for status in Status}
    sums = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, "", sums])


def _wrapped(text: str, head: str, indent: str) -> list[str]:
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent, **options) or [
        head.rstrip()
    ]


def amount(num_bytes: float) -> str:
    """Bytes as people compare them."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:,.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


__all__ = [
    "Finding",
    "Status",
    "amount",
    "exit_status",
    "failing",
    "merge",
    "name_ranks",
    "ok",
    "render",
    "warning",
]
