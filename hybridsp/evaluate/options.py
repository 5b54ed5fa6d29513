"""The options of `hybridsp eval`, and what they may not be."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridsp.bench.options import add_out, names, size, sizes

TASKS = ("text", "positions", "context", "needle")
SHORTEST = 64
SHORTEST_NEEDLE = 2**12


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is evaluated, on what, and how.

    Attributes:
        models: folders by the names that tables give them, in the order given.
        teacher: folder of the model to compare with; None for no comparison.
        tasks: some of `TASKS`.
        text: held-out documents, as `hybridsp.data.load_documents` takes them.
        length: tokens of a sequence of held-out text.
        tokens: the most tokens of each task on text; None for all.
        needle_lengths: tokens of a haystack with its question.
        keys: how many sentences are hidden; each is a case.
        depths, samples, seed: see `NeedleSettings`.
        dtype: of the weights; None for bf16 on GPUs and fp32 on CPUs.
        out: folder for the results.
    """

    models: dict[str, str]
    teacher: str | None
    tasks: tuple[str, ...]
    text: Path
    length: int
    tokens: int | None
    needle_lengths: tuple[int, ...]
    keys: tuple[int, ...]
    depths: int
    samples: int
    seed: int
    dtype: str | None
    out: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """The options that argparse has read.

        Raises:
            ValueError: a folder is named twice, or a length is too short for its task.
        """
        if args.length < SHORTEST:
            raise ValueError(f"--length = {args.length} must be at least {SHORTEST} tokens")
        lengths = args.needle_lengths or _doubling(args.length)
        return cls(
            models=_named(args.model),
            teacher=args.teacher,
            tasks=args.tasks,
            text=args.text,
            length=args.length,
            tokens=args.tokens,
            needle_lengths=lengths,
            keys=args.keys,
            depths=args.depths,
            samples=args.samples,
            seed=args.seed,
            dtype=args.dtype,
            out=args.out,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridsp eval`."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR,...", help="checkpoints, a row of the tables each")
    add("--teacher", metavar="DIR", help="checkpoint to measure the agreement with")
    add(
        "--text",
        type=Path,
        required=True,
        metavar="PATH",
        help="held-out documents: JSONL with a field text, Parquet, a folder or a text file",
    )
    add(
        "--tasks",
        type=names(TASKS),
        default=TASKS,
        metavar="NAME,...",
        help=f"some of {', '.join(TASKS)}; default all",
    )
    add(
        "--length",
        type=size,
        default="8K",
        metavar="T",
        help="tokens of a sequence of held-out text; default %(default)s",
    )
    add("--tokens", type=size, metavar="N", help="of held-out text in each task; default all")
    add(
        "--needle-lengths",
        type=sizes,
        metavar="T,...",
        help="tokens of a haystack; default 4K, 8K and so on up to --length",
    )
    add(
        "--keys",
        type=sizes,
        default="1,4",
        metavar="N,...",
        help="sentences hidden in a haystack, of which one is asked for; default %(default)s",
    )
    add("--depths", type=size, default=5, metavar="N", help="of a needle; default %(default)s")
    add(
        "--samples",
        type=size,
        default=4,
        metavar="N",
        help="questions at each length, depth and number of keys; default %(default)s",
    )
    add("--seed", type=int, default=0, help="of the needles; default %(default)s")
    add(
        "--dtype",
        choices=("bf16", "fp32"),
        help="of the weights; default bf16 on GPUs, fp32 on CPUs",
    )
    add_out(parser, "eval")


def _named(models: str) -> dict[str, str]:
    """Folders by the shortest ends of their paths that tell them apart."""
    folders = [part.strip() for part in models.split(",") if part.strip()]
    if not folders:
        raise ValueError(f"--model = {models!r} names no checkpoint")
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise ValueError(f"--model names {twice[0]!r} twice; name each checkpoint once")
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return dict(zip(ends, folders, strict=True))
    raise ValueError(f"--model = {models!r} names one folder twice; name each checkpoint once")


def _doubling(length: int) -> tuple[int, ...]:
    lengths = [min(SHORTEST_NEEDLE, length)]
    while 2 * lengths[-1] <= length:
        lengths.append(2 * lengths[-1])
    return tuple(lengths)


__all__ = ["TASKS", "Options", "add_arguments"]
