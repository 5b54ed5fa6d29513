"""`hybridsp bench alst`: the rival, DeepSpeed's own ALST on the dense model, on the same GPUs.

One training step of a dense model with random weights under Ulysses, tiled MLP and loss, activation
checkpoints on the host and ZeRO-3, all of them DeepSpeed's (`model`). The columns are those of
`hybridsp bench step`, and FLOPs are counted by the same formula, so that rows of both can stand in
one table: start both on the same ranks, with the same tokens. What ALST refuses (heads that do not
divide by the ranks) or what runs out of memory is a row that says so.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from hybridsp.bench.alst.model import KERNELS, make_alst
from hybridsp.bench.job import attempt_each, job, one_voice
from hybridsp.bench.options import size
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.bench.report import format_table
from hybridsp.bench.step.case import WARMUP_STEPS, Case, free, known_gpu
from hybridsp.bench.step.options import DEFAULT_TOKENS, add_step, add_switch
from hybridsp.bench.step.report import COLUMNS, draw, row_of, table_row
from hybridsp.bench.timing import measure
from hybridsp.mesh import SPMesh
from hybridsp.planner import Setting, load_shape
from hybridsp.planner.kernels import model_flops
from hybridsp.planner.model import LINEAR
from hybridsp.planner.presets import PRESETS
from hybridsp.planner.search import DTYPE_BYTES
from hybridsp.release import release
from hybridsp.train.console import keep_quiet

RECORDED = (
    *("model", "tokens_per_rank", "stage", "offload_optimizer", "offload_activations"),
    *("tiled_mlp", "kernel", "dtype", "steps", "warmup_tokens", "seed"),
)
SHOWN = (
    *("model", "tokens_shown", "zero", "checkpoints", "seconds", "tokens_per_second"),
    *("mfu_percent", "peak_gib", "loss"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench alst`."""
    parser.add_argument(
        "--model",
        type=lambda text: tuple(dict.fromkeys(text.split(","))),
        default=("llama-1b",),
        metavar="NAME,...",
        help=f"dense: of {', '.join(PRESETS)}, or folders with config.json; default llama-1b",
    )
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO; default 3"
    )
    add_switch(parser, "--offload-activations", "on", "keep layer inputs in host memory")
    add_switch(parser, "--offload-optimizer", "off", "AdamW on the host")
    parser.add_argument(
        "--tiled-mlp",
        type=size,
        metavar="TOKENS",
        help="that an MLP computes at a time, at most; default ALST's: the model's width",
    )
    parser.add_argument(
        "--kernel",
        choices=tuple(KERNELS),
        help="of softmax attention; default cudnn on GPUs, PyTorch's choice on CPUs",
    )
    add_step(parser, name="alst")


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench alst`."""
    with job() as whole:
        keep_quiet(is_main=whole.rank == 0)
        on_gpu = whole.device.type == "cuda"
        args.tokens_per_rank = args.tokens_per_rank or DEFAULT_TOKENS[whole.device.type]
        with one_voice():
            if args.kernel is not None and not on_gpu:
                raise ValueError(f"--kernel {args.kernel} needs CUDA, and this job has none")
            args.kernel = args.kernel or ("cudnn" if on_gpu else None)
            todo = cases(args, whole)
            folder = whole.on_rank_zero(make_folder, "alst", args.out)
        record = measure_all(args, todo, SPMesh(ulysses=whole.world_size), folder)
        if whole.rank == 0:
            print(describe(record.content, folder))
        record.finish()
        if whole.rank == 0:
            draw(record.content, folder / "alst.png")


def cases(args: argparse.Namespace, mesh: SPMesh) -> list[Case]:
    """All rows.

    Raises:
        ValueError: a model that cannot be read, or is not dense.
    """
    for model in args.model:
        if load_shape(model).count(LINEAR):
            raise ValueError(
                f"--model {model} has linear attention, which ALST cannot cut: give a dense model, "
                "such as llama-1b"
            )
    switches = product(args.offload_optimizer, args.offload_activations)
    settings = [
        Setting(
            gpus=mesh.world_size,
            ring=1,
            ulysses=mesh.world_size,
            stage=args.stage,
            offload_optimizer=optimizer == "on",
            checkpointing=True,
            keep_attention=False,
            offload_activations=activations == "on",
            tiled_mlp=args.tiled_mlp,
            batch=1,
            dtype_bytes=DTYPE_BYTES[args.dtype],
        )
        for optimizer, activations in switches
    ]
    return [
        Case(
            model=model,
            softmax_layers=None,
            setting=setting,
            tokens_per_rank=tokens,
            seed=args.seed,
        )
        for model, tokens, setting in product(args.model, args.tokens_per_rank, settings)
    ]


def measure_all(args: argparse.Namespace, todo: list[Case], mesh: SPMesh, folder: Path) -> Record:
    """The record of a run, to be finished. Collective."""
    gpu = args.gpu or known_gpu(mesh)
    rows: list[dict[str, Any]] = []
    content = {
        "bench": "alst",
        "environment": environment(mesh),
        "gpu": gpu,
        "options": {name: getattr(args, name) for name in RECORDED},
        "cases": rows,
    }
    record = Record(mesh, folder / "alst.json", content)

    def work(case: Case) -> dict[str, Any]:
        return take_steps(
            case, mesh, kernel=args.kernel, steps=args.steps, warmup_tokens=args.warmup_tokens
        )

    for case, figures, reason in attempt_each(todo, work, mesh, name="alst"):
        free(mesh)
        rows.append(row_of(case, figures or {}, {}, gpu, reason))
        record.save()
    return record


def take_steps(
    case: Case, mesh: SPMesh, *, kernel: str | None, steps: int, warmup_tokens: int | None
) -> dict[str, Any]:
    """The figures of a case. Collective over the world; see `step.case.take_steps`."""
    alst = make_alst(case, mesh, kernel=kernel)
    losses: list[float] = []
    try:
        alst.warm_up(WARMUP_STEPS, warmup_tokens)
        times = measure(lambda: losses.append(alst.step()), mesh, repeats=steps, warmup=0)
    finally:
        release(alst.engine)  # also where memory ran out: the next case needs it
    return {
        **times.as_json(),
        "warmup_calls": WARMUP_STEPS,
        "tokens_per_second": case.length / times.median,
        "loss": losses[0],
        "parameters": case.shape.parameters,
        "flops": model_flops(case.shape, case.length),
    }


def describe(record: dict[str, Any], folder: Path) -> str:
    """What is printed: the table, and where the files are."""
    where, options = record["environment"], record["options"]
    title = (
        f"one training step of the dense model under DeepSpeed's ALST, {where['world']} x "
        f"{where['chip']}, {options['dtype']}, attention by {options['kernel'] or 'PyTorch'}, "
        "random weights and tokens"
    )
    columns = {name: COLUMNS[name] for name in SHOWN}
    table = format_table(columns, [table_row(row) for row in record["cases"]])
    return "\n\n".join([title, table, f"written to {folder}"])
