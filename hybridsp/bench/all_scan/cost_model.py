"""What the measured scans say about other numbers of ranks, and the picture of both.

Each algorithm's formula (`collectives.cost`) is linear in two unknowns, the latency of a message
and the seconds per byte of its link. Least squares on the relative errors of an algorithm's own
measurements gives its *effective* link: NCCL's all-gather, its send/recv and a kernel of ours reach
different figures on the same wires, and where hosts differ the fit is their mixture. With it the
formula is drawn for 2 to 1,024 ranks. A measurement is a marker, the model a dashed line, and the
table of the paper stands beside them with a label of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from hybridsp.bench.options import human_bytes
from hybridsp.bench.report import finish_panel, new_figure
from hybridsp.collectives.cost import (
    Link,
    Topology,
    all_gather_seconds,
    chain_plan,
    chain_seconds,
    doubling_seconds,
    hierarchical_plan,
    hierarchical_seconds,
)

RANKS_DRAWN = [2**n for n in range(1, 11)]
# ZeCO (arXiv:2507.01004), table 2: d = 4096, H = 32, so K = V = 128; milliseconds on H100 80 GB.
PAPER_RANKS = (8, 16, 32, 64, 128, 256)
PAPER_MS = {
    "AllGather": (0.375, 0.658, 1.616, 2.543, 4.350, 8.514),
    "All-Scan": (0.226, 0.297, 0.448, 0.739, 1.272, 2.165),
}
PAPER_STATE_BYTES = 32 * 128 * 128 * 4  # as fp32; the paper does not say
RANKS_TOLD = (8, 64, 256)
PREDICTION_COLUMNS = {
    "name": "algorithm",
    "measured_us": "measured",
    "model_us": "model",
    **{f"model_us_{ranks}": f"{ranks} ranks" for ranks in RANKS_TOLD},
}
COLORS = {
    "chain": "C0",
    "doubling": "C1",
    "allgather": "C2",
    "hierarchical": "C3",
    "symmetric": "C4",
    "send/recv": "black",
    "all_gather": "gray",
}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan whose time is known or asked for.

    Attributes:
        algorithm: never "auto".
        ranks: P.
        state_bytes, decay_bytes: of one rank.
        rows: K, the most blocks.
        num_blocks: of the chain and the hierarchical scan; None elsewhere.
        ranks_per_host: of the hierarchical scan; None elsewhere.
    """

    algorithm: str
    ranks: int
    state_bytes: int
    decay_bytes: int
    rows: int
    num_blocks: int | None = None
    ranks_per_host: int | None = None

    def seconds(self, link: Link) -> float:
        """What the formula says if every message takes `link`."""
        topology = Topology(
            ranks_per_host=self.ranks_per_host, within=link, between=link, all_gather=link
        )
        ranks, state, decay = self.ranks, self.state_bytes, self.decay_bytes
        if self.algorithm == "doubling":
            return doubling_seconds(topology, ranks, state, decay)
        if self.algorithm == "allgather":
            return all_gather_seconds(topology, ranks, state, decay)
        if self.algorithm == "symmetric":
            # Slices follow one another without a launch: each hop's latency, one state's bytes.
            return (ranks - 1) * link.latency + state / link.bandwidth
        assert self.num_blocks is not None
        if self.algorithm == "chain":
            return chain_seconds(topology, ranks, state, self.num_blocks)
        assert self.algorithm == "hierarchical"
        assert self.ranks_per_host is not None
        return hierarchical_seconds(
            topology, ranks, state, decay, self.num_blocks, self.ranks_per_host
        )

    def messages(self) -> int:
        """Messages that follow one another on the way to the last rank."""
        if self.algorithm == "doubling":
            return ceil(log2(self.ranks))
        if self.algorithm in ("allgather", "symmetric"):
            return self.ranks - 1  # a ring's steps, inside the collective; hops
        assert self.num_blocks is not None
        if self.algorithm == "chain":
            return self.ranks - 2 + self.num_blocks
        assert self.ranks_per_host is not None
        inside, hosts = ceil(log2(self.ranks_per_host)), ceil(self.ranks / self.ranks_per_host)
        return inside if hosts == 1 else inside + hosts - 2 + self.num_blocks + 1

    def bytes_sent(self) -> int:
        """By the rank that sends most; of an all-gather, as a ring does it."""
        state, pair = self.state_bytes, self.state_bytes + self.decay_bytes
        if self.algorithm == "doubling":
            return max(self._doubling_bytes(position) for position in range(self.ranks))
        if self.algorithm == "allgather":
            return (self.ranks - 1) * pair
        if self.algorithm in ("chain", "symmetric"):
            return state
        assert self.ranks_per_host is not None
        inside = ceil(log2(min(self.ranks_per_host, self.ranks))) * pair
        hosts = ceil(self.ranks / self.ranks_per_host)
        if hosts == 1:
            return inside
        # A leader passes the state on to the next host and to the others of its own; the first
        # host's has nobody to tell, and the last one, which may be short of ranks, no next host.
        last = self.ranks - (hosts - 1) * self.ranks_per_host
        leader = max(self.ranks_per_host if hosts > 2 else 1, last - 1) * state
        return max(inside, leader)

    def _doubling_bytes(self, position: int) -> int:
        """Sent by the rank at `position`; a pair that reaches the start goes without its decay."""
        total, distance = 0, 1
        while position + distance < self.ranks:
            with_decay = position - distance + 1 > 0
            total += self.state_bytes + with_decay * self.decay_bytes
            distance *= 2
        return total

    def at(self, ranks: int, link: Link) -> Scan:
        """The same scan on so many ranks, with the blocks that suit `link`."""
        topology = Topology(
            ranks_per_host=self.ranks_per_host, within=link, between=link, all_gather=link
        )
        blocks = None
        if self.algorithm == "chain":
            blocks = chain_plan(topology, ranks, self.state_bytes, self.rows)[1].num_blocks
        elif self.algorithm == "hierarchical":
            assert self.ranks_per_host is not None
            sizes = self.state_bytes, self.decay_bytes, self.rows, self.ranks_per_host
            blocks = hierarchical_plan(topology, ranks, *sizes)[1].num_blocks
        return Scan(
            algorithm=self.algorithm,
            ranks=ranks,
            state_bytes=self.state_bytes,
            decay_bytes=self.decay_bytes,
            rows=self.rows,
            num_blocks=blocks,
            ranks_per_host=self.ranks_per_host,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A scan and the seconds it took."""

    scan: Scan
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """An algorithm's effective link, and the root mean square of its relative errors."""

    link: Link
    error: float

    def as_json(self) -> dict[str, float | None]:
        """By name; a bandwidth that no measurement shows is null."""
        return {
            "latency_seconds": self.link.latency,
            "bytes_per_second": self.link.bandwidth,
            "relative_error": self.error,
        }


def fit(points: Sequence[Measured]) -> Fit | None:
    """Latency and bandwidth behind one algorithm's measurements; None where two do not suffice.

    Neither is negative: where the best fit would have one so, it is zero (no latency, or a
    bandwidth that is never felt).
    """
    per_latency = np.array([p.scan.seconds(Link(latency=1.0, bandwidth=inf)) for p in points])
    per_byte = np.array([p.scan.seconds(Link(latency=0.0, bandwidth=1.0)) for p in points])
    measured = np.array([p.seconds for p in points])
    matrix = np.stack([per_latency, per_byte], axis=1) / measured[:, None]
    # In comparable units: seconds of a message and of the largest message's bytes.
    scales = matrix.max(axis=0, initial=0.0)
    if len(points) < 2 or not scales.all() or np.linalg.matrix_rank(matrix / scales, 1e-3) < 2:
        return None
    solution = _non_negative(matrix / scales) / scales
    latency, seconds_per_byte = (float(x) for x in solution)
    bandwidth = 1 / seconds_per_byte if seconds_per_byte > 0 else inf
    residual = matrix @ solution - 1
    return Fit(
        link=Link(latency=latency, bandwidth=bandwidth), error=sqrt(float(np.mean(residual**2)))
    )


def fit_all(points: Sequence[Measured]) -> dict[str, Fit]:
    """The fit of each algorithm that has one."""
    found = {}
    for algorithm in dict.fromkeys(point.scan.algorithm for point in points):
        fitted = fit([point for point in points if point.scan.algorithm == algorithm])
        if fitted is not None:
            found[algorithm] = fitted
    return found


def predictions(points: Sequence[Measured], fits: dict[str, Fit]) -> list[dict[str, Any]]:
    """Each algorithm at the state nearest to the paper's, and what the paper measured.

    Returns:
        Rows of `PREDICTION_COLUMNS`, microseconds: measured on the most ranks there are, by the
        model there, by the model on `RANKS_TOLD` if every link were like the one it was fitted to.
        The paper's own figures stand in the columns of its ranks.
    """
    if not points:
        return []
    size, most = _nearest_to_paper(points), max(point.scan.ranks for point in points)
    here = [p for p in points if p.scan.state_bytes == size and p.scan.ranks == most]
    rows: list[dict[str, Any]] = []
    for algorithm, mine in _by_algorithm(here).items():
        if algorithm in fits:
            link, scan = fits[algorithm].link, mine[0].scan
            told = {ranks: 1e6 * scan.at(ranks, link).seconds(link) for ranks in RANKS_TOLD}
            rows.append(
                {
                    "name": algorithm,
                    "measured_us": 1e6 * sum(point.seconds for point in mine) / len(mine),
                    "model_us": 1e6 * scan.seconds(link),
                    **_by_ranks(told),
                }
            )
    for name, milliseconds in PAPER_MS.items():
        told = {n: 1e3 * ms for n, ms in zip(PAPER_RANKS, milliseconds, strict=True)}
        rows.append({"name": f"{name}, ZeCO paper", **_by_ranks(told)})
    return rows


def _by_ranks(microseconds: dict[int, float]) -> dict[str, float]:
    return {f"model_us_{ranks}": microseconds[ranks] for ranks in RANKS_TOLD}


def _nearest_to_paper(points: Sequence[Measured]) -> int:
    """The measured state whose bytes are nearest to the paper's."""
    sizes = {point.scan.state_bytes for point in points}
    return min(sizes, key=lambda size: abs(log2(size / PAPER_STATE_BYTES)))


def draw(
    points: Sequence[Measured],
    references: Sequence[dict[str, Any]],
    fits: dict[str, Fit],
    path: Path,
    title: str,
) -> None:
    """Two panels: time over bytes at the most ranks measured, and time over ranks.

    Args:
        points: scans measured, of this run and of those included.
        references: the wire's rows at the ranks of this run: "name", "state_bytes", "seconds".
        fits: of the algorithms in `points`.
        path: the file to write.
        title: what was measured, and on what.
    """
    figure, (by_bytes, by_ranks) = new_figure(2)
    figure.suptitle(title, fontsize=11)
    if points:
        _draw_by_bytes(by_bytes, points, fits)
        _draw_by_ranks(by_ranks, points, fits)
    for name in dict.fromkeys(row["name"] for row in references):
        curve = [(r["state_bytes"], 1e6 * r["seconds"]) for r in references if r["name"] == name]
        by_bytes.plot(
            *zip(*sorted(curve), strict=True),
            linestyle="none",
            marker="x",
            color=COLORS[name],
            label=f"{name}, the raw wire, measured",
        )
    for name, marker in (("AllGather", "s"), ("All-Scan", "^")):
        microseconds = [1e3 * ms for ms in PAPER_MS[name]]
        by_ranks.plot(
            PAPER_RANKS,
            microseconds,
            linestyle="none",
            marker=marker,
            fillstyle="none",
            color="black",
            label=f"{name}: ZeCO paper, H100",
        )
    for axes, what in ((by_bytes, "bytes of one rank's state"), (by_ranks, "ranks")):
        finish_panel(axes, what, "us")
    figure.savefig(path, dpi=150)


def _draw_by_bytes(axes: Any, points: Sequence[Measured], fits: dict[str, Fit]) -> None:
    ranks = max(point.scan.ranks for point in points)
    axes.set_title(f"{ranks} ranks")
    here = [point for point in points if point.scan.ranks == ranks]
    for algorithm, mine in _by_algorithm(here).items():
        curve = [(point.scan.state_bytes, 1e6 * point.seconds) for point in mine]
        _plot_measured(axes, algorithm, curve)
        if algorithm in fits:
            link = fits[algorithm].link
            scans = {point.scan.state_bytes: point.scan.at(ranks, link) for point in mine}
            line = [(size, 1e6 * scans[size].seconds(link)) for size in sorted(scans)]
            _plot_model(axes, algorithm, line)


def _draw_by_ranks(axes: Any, points: Sequence[Measured], fits: dict[str, Fit]) -> None:
    shown = _nearest_to_paper(points)
    axes.set_title(f"state of {human_bytes(shown)} (paper: {human_bytes(PAPER_STATE_BYTES)})")
    of_size = [point for point in points if point.scan.state_bytes == shown]
    for algorithm, mine in _by_algorithm(of_size).items():
        _plot_measured(axes, algorithm, [(p.scan.ranks, 1e6 * p.seconds) for p in mine])
        if algorithm in fits:
            link, scan = fits[algorithm].link, mine[0].scan
            line = [(p, 1e6 * scan.at(p, link).seconds(link)) for p in RANKS_DRAWN]
            _plot_model(axes, algorithm, line)


def _by_algorithm(points: Sequence[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {}
    for point in points:
        found.setdefault(point.scan.algorithm, []).append(point)
    return found


def _plot_measured(axes: Any, name: str, curve: list[tuple[int, float]]) -> None:
    xs, ys = zip(*sorted(curve), strict=True)
    label = f"{name}, measured"
    axes.plot(xs, ys, linestyle="none", marker="o", markersize=5, color=COLORS[name], label=label)


def _plot_model(axes: Any, name: str, line: list[tuple[int, float]]) -> None:
    shown = [(x, y) for x, y in line if isfinite(y) and y > 0]
    if shown:
        xs, ys = zip(*shown, strict=True)
        axes.plot(xs, ys, linestyle="--", linewidth=1, color=COLORS[name], label=f"{name}, model")


def _non_negative(matrix: np.ndarray) -> np.ndarray:
    """The x >= 0 of two elements for which matrix @ x is nearest to one."""
    ones = np.ones(len(matrix))
    both = np.linalg.lstsq(matrix, ones, rcond=None)[0]
    if (both >= 0).all():
        return both
    single = []
    for column in range(2):
        x = np.zeros(2)
        x[column] = matrix[:, column].sum() / (matrix[:, column] ** 2).sum()
        single.append(x)
    return min(single, key=lambda x: float(((matrix @ x - 1) ** 2).sum()))
