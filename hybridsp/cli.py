"""The `hybridsp` command.

    hybridsp convert SRC DST --softmax-layers 0.25
    hybridsp plan MODEL --gpus 8 --gpu h100-80 --seq 1M
    hybridsp bench linear --tokens-per-rank 32K
    hybridsp eval --model dense,hybrid --text heldout.jsonl
    hybridsp doctor

A subcommand is one function that adds its parser and one that runs it; list the first in
`SUBCOMMANDS` and it is there. Whatever is slow to import is imported by the second, so that help
and mistyped options are answered at once. A benchmark is one line of `BENCHES`; its module is
imported when it is asked for. A mistake of the user (`ValueError`, or a file that cannot be used)
is one line and exit code 2; `--traceback` shows where it was noticed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# name -> (module of hybridsp.bench with add_arguments(parser) and run(args), what it measures)
BENCHES = {
    "all-scan": ("all_scan.command", "every All-Scan algorithm against the raw wire"),
    "linear": ("linear.command", "linear attention: memory floor, FLA, SP methods"),
    "softmax": ("softmax.command", "softmax attention: kernels, ring x Ulysses, balance"),
    "step": ("step.command", "one training step: time and memory, beside the plan's"),
    "alst": ("alst.command", "the rival: DeepSpeed's own ALST on the dense model"),
    "tune": ("tune", "find the fastest launches of the kernels on this chip"),
}


def add_convert(subcommands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """`hybridsp convert`: a softmax checkpoint into a hybrid one."""
    subcommands.add_parser(
        "convert",
        parents=[common],
        allow_abbrev=False,
        help="turn a Llama, Mistral, Qwen2 or Qwen3 checkpoint into a hybrid one",
        description="Turn a Llama, Mistral, Qwen2 or Qwen3 checkpoint into a HybridGLA one: most "
        "layers become gated linear attention and reuse the weights of softmax attention. "
        "The result has to be trained. A GLA checkpoint of flash-linear-attention is read as it "
        "is, and --to fla writes one.",
        module="hybridsp.cli_convert",
    )


def add_bench(subcommands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """`hybridsp bench NAME`: measure on this machine, or under a launcher on many."""
    parser = subcommands.add_parser(
        "bench",
        allow_abbrev=False,
        help="measure collectives and layers on your own machines",
        description="Measure on this machine, or on many: start it with torchrun or deepspeed, "
        "as in `torchrun --nproc-per-node 8 -m hybridsp.cli bench all-scan` or "
        "`deepspeed --module hybridsp.cli bench all-scan`.",
    )
    benches = parser.add_subparsers(
        dest="bench", required=True, metavar="NAME", parser_class=ModuleParser
    )
    for name, (module, what) in BENCHES.items():
        benches.add_parser(
            name,
            parents=[common],
            allow_abbrev=False,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            module=f"hybridsp.bench.{module}",
        )


class ModuleParser(argparse.ArgumentParser):
    """Takes its options from its module, if it has one, when it is first asked to parse.

    Such a command is run by many ranks, and one of them says what is wrong with its options.
    """

    def __init__(self, *args: Any, module: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module
        self._has_ranks = module is not None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of every parser, once the module's options are there."""
        if self._module is not None:
            module = importlib.import_module(self._module)
            module.add_arguments(self)
            self.set_defaults(run=module.run)
            self._module = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say on rank 0, in one line, what is wrong with the options; exit code 2 on all."""
        if not self._has_ranks:
            super().error(message)
        from hybridsp.launch import rank_from_environment

        told = f"{self.prog}: error: {message} (--help lists the options)\n"
        self.exit(2, told if rank_from_environment().rank == 0 else None)


def add_plan(subcommands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """`hybridsp plan`: what a run needs and how fast it is, from the config alone."""
    parser = subcommands.add_parser(
        "plan",
        parents=[common],
        allow_abbrev=False,
        help="degrees, ZeRO stage, memory and time of a run, from the model's config alone",
        description="Say how to train a model at a length on some GPUs: degrees, ZeRO stage, "
        "what is offloaded or computed in tiles; the memory and time this is expected to take; the "
        "longest length that fits. Reads the config only and needs no GPU.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with config.json, a config.json, a GGUF file, or one of the presets "
        "smollm2-135m, llama-1b and llama-8b",
    )
    parser.add_argument("--gpus", type=_size, required=True, metavar="N", help="in all, 1 to 1024")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="as h100-80, h200-141")
    parser.add_argument(
        "--seq", type=_size, required=True, metavar="T", help="tokens of a sequence, as 1M"
    )
    parser.add_argument(
        "--gpus-per-node", type=_size, default=8, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--batch",
        type=_size,
        default=1,
        metavar="N",
        help="sequences per optimizer step; default %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="default %(default)s"
    )
    parser.add_argument(
        "--softmax-layers",
        metavar="WHICH",
        help="plan a dense model as the hybrid that `convert` would make, and compare both",
    )
    parser.add_argument(
        "--host-memory", type=_size, default="1T", metavar="BYTES", help="of a host; default 1T"
    )
    parser.add_argument(
        "--network",
        type=float,
        default=400,
        metavar="GBIT",
        help="Gb/s of each GPU's network card; default %(default)s",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write the DeepSpeed configuration and the recipe there"
    )
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    """Run `hybridsp plan`."""
    from hybridsp.planner import Cluster, Job, Plan, load_shape, make_plan, render, write_files

    cluster = Cluster(
        gpu=args.gpu,
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        network=args.network * 1e9 / 8,
        host_memory=args.host_memory,
    )

    def plan(softmax_layers: str | None) -> Plan:
        job = Job(
            model=load_shape(args.model, softmax_layers),
            cluster=cluster,
            length=args.seq,
            batch=args.batch,
            dtype=args.dtype,
        )
        return make_plan(job)

    chosen = plan(args.softmax_layers)
    rival: Plan | str | None = None
    if args.softmax_layers is not None:
        try:
            rival = plan(None)
        except ValueError as error:  # the dense model fits nowhere, which is worth saying
            rival = str(error)
    print(render(chosen, rival))
    if args.out is not None:
        for file in write_files(chosen, args.out):
            print(f"written: {file}")


def _size(text: str) -> int:
    """`bench.options.size`, and T besides."""
    from hybridsp.bench.options import size

    text = text.strip().upper()
    return 1024 * size(f"{text[:-1]}G") if text.endswith("T") else size(text)


def add_doctor(subcommands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """`hybridsp doctor`: what will be used on this machine, and what has to be mended."""
    parser = subcommands.add_parser(
        "doctor",
        parents=[common],
        allow_abbrev=False,
        help="check this machine and its collectives: what will be used, what is missing",
        description="Check GPUs, links, NCCL, shared and host memory, disk, versions and kernels; "
        "under a launcher, as in `torchrun --nproc-per-node 8 -m hybridsp.cli doctor`, run each "
        "collective once as well. Exit code 1 if anything fails.",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="RECIPE",
        help="a recipe, or the folder written by `hybridsp plan --out`, whose needs to compare",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results will go; default the plan's, or ."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    parser.add_argument(
        "--time-limit",
        type=_size,
        default=120,
        metavar="SECONDS",
        help="of each collective; default %(default)s",
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> None:
    """Run `hybridsp doctor`."""
    from hybridsp.doctor.command import run

    run(args)


def add_eval(subcommands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """`hybridsp eval`: what checkpoints make of held-out text and of long contexts."""
    subcommands.add_parser(
        "eval",
        parents=[common],
        allow_abbrev=False,
        help="held-out loss, loss by context, needles and agreement with a teacher",
        description="Evaluate checkpoints on held-out text: mean loss and agreement with a "
        "teacher, loss by position and by context, numbers hidden in long text. One sequence is "
        "cut over all ranks: start it with torchrun or deepspeed for lengths that one GPU cannot "
        "hold, as in `torchrun --nproc-per-node 8 -m hybridsp.cli eval ...`.",
        module="hybridsp.evaluate.command",
    )


SUBCOMMANDS = (add_convert, add_plan, add_eval, add_doctor, add_bench)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="hybridsp",
        description="Fine-tune models that mix linear and softmax attention, at long context.",
    )
    # `deepspeed` gives it to every script; what it says is in the environment as well.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subcommands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=ModuleParser
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")
    for add in SUBCOMMANDS:
        add(subcommands, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"hybridsp {args.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        from hybridsp.launch import rank_from_environment

        if rank_from_environment().rank == 0:
            print(f"hybridsp {args.command}: interrupted", file=sys.stderr)
        return 130  # as shells have it: 128 + SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
