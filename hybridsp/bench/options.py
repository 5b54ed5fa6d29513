"""Options that benchmarks share, read by argparse before anything slow happens.

Sizes are written as people say them (`64K`, `4M`, binary units) and lists with commas. What a list
may hold is checked here, so a mistake is told before a single rank has joined.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybridsp.sizes import UNITS, parse_size


def size(text: str) -> int:
    """A positive number with an optional binary unit: `48`, `64K`, `4M`, `1G`."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between them, each once, in the order given."""
    return tuple(dict.fromkeys(size(part) for part in text.split(",")))


def names(allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names from `allowed` with commas between them, each once."""

    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is unknown: choose from {', '.join(allowed)}"
                )
        return chosen

    return read


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark: how often, and where the results go."""
    parser.add_argument(
        "--repeats",
        type=size,
        default=20,
        metavar="N",
        help="timed calls of each case, whose median counts; default %(default)s",
    )
    parser.add_argument(
        "--queued",
        action="store_true",
        help="hold the GPU until the host has launched the whole call, so that launching costs "
        "nothing: as inside a step, whose host is ahead",
    )
    add_out(parser, "NAME")
    parser.add_argument(
        "--trace",
        action="store_true",
        help="save torch.profiler traces (chrome://tracing, ui.perfetto.dev)",
    )


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the results of benchmark `name` go."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for the results; default bench_results/{name}-DATE-TIME",
    )


def add_layer(
    parser: argparse.ArgumentParser,
    *,
    cpu_tokens: str,
    dims: Mapping[str, int],
    dtypes: Sequence[str],
) -> None:
    """Options of a benchmark of a layer: its tokens, sizes and dtype.

    Args:
        parser: gets the options.
        cpu_tokens: the default lengths on CPUs, as help shows them.
        dims: option of each size, and its default.
        dtypes: of q, k, v; the default is bf16.
    """
    parser.add_argument(
        "--tokens-per-rank",
        type=sizes,
        metavar="L,...",
        help=f"default 8K,32K,128K on GPUs, {cpu_tokens} on CPUs",
    )
    for name, default in dims.items():
        parser.add_argument(
            name, type=size, default=default, metavar="N", help="default %(default)s"
        )
    parser.add_argument(
        "--dtype", choices=dtypes, default="bf16", help="of q, k, v; default %(default)s"
    )


def human_bytes(count: float) -> str:
    """A number with a binary unit, to four digits: `64K`, `128.5K`; `size` reads it if whole."""
    for unit in ("G", "M", "K"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.4g}{unit}"
    return f"{count:.4g}"
