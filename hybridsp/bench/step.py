"""`hybridsp bench step`: one training step of a whole model, beside what the planner says of it.

A row is a model, a length and what is done about memory: ZeRO stage, optimizer offload, activation
checkpointing and what it keeps where, tiles of the MLP (`step_case`). Options with commas are
multiplied, so that one run is a table of what each technique brings, or holds the planner's memory
and time models against this machine. Weights and tokens are random; the loss is the first step's,
before any update, and so the same for all that differ in memory alone.

A row that runs out of memory says so, and the next one runs.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hybridsp.bench.job import attempt, job, one_voice
from hybridsp.bench.options import names, size, sizes
from hybridsp.bench.report import environment, make_folder, write_json
from hybridsp.bench.step_case import Case, free, known_gpu, predict, take_steps
from hybridsp.bench.step_report import describe, draw
from hybridsp.mesh import SPMesh, choose_degrees
from hybridsp.planner import GPUS, Setting, load_shape
from hybridsp.planner.model import LINEAR
from hybridsp.planner.presets import PRESETS
from hybridsp.planner.search import DTYPE_BYTES
from hybridsp.train.console import keep_quiet

DEFAULT_TOKENS = {"cuda": (2**15, 2**17), "cpu": (2**8,)}
WHOLE = "whole"
DENSE, DEFAULT_SHARE = "dense", "0.25"
SWITCHES = ("off", "on")
RECORDED = (
    *("model", "softmax_layers", "tokens_per_rank", "stage", "offload_optimizer", "checkpointing"),
    *("keep_attention", "offload_activations", "tiled_mlp", "dtype", "steps", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench step`."""
    parser.add_argument(
        "--model",
        type=_words,
        default=("smollm2-135m",),
        metavar="NAME,...",
        help=f"of {', '.join(PRESETS)}, or folders with config.json; default smollm2-135m",
    )
    parser.add_argument(
        "--softmax-layers",
        type=_words,
        metavar="SHARE,...",
        help="what becomes of a dense model: a hybrid with this share of softmax layers (0.25), or "
        f"`{DENSE}` for the model itself; default 0.25. A hybrid is taken as it is",
    )
    parser.add_argument(
        "--tokens-per-rank",
        type=sizes,
        metavar="L,...",
        help="default 32K,128K on GPUs, 256 on CPUs",
    )
    parser.add_argument(
        "--stage", type=_stages, default=(1,), metavar="N,...", help="of ZeRO, 1 to 3; default 1"
    )
    _add_switch(parser, "--checkpointing", "on", "compute layers again in the backward")
    _add_switch(parser, "--keep-attention", "on", "of softmax attention keep the output")
    _add_switch(parser, "--offload-activations", "off", "keep what is kept in host memory")
    _add_switch(parser, "--offload-optimizer", "off", "AdamW on the host")
    parser.add_argument(
        "--tiled-mlp",
        type=_tiles,
        default=(None,),
        metavar="TOKENS,...",
        help=f"that an MLP computes at a time, or `{WHOLE}`; default {WHOLE}",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), default="bf16", help="default bf16")
    parser.add_argument(
        "--steps",
        type=size,
        default=2,
        metavar="N",
        help="timed, behind one that warms up; default %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens; default 0")
    parser.add_argument(
        "--gpu",
        choices=tuple(GPUS),
        help="the planner's name of this GPU; default: by the name the driver tells",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results; default bench_results/step-DATE-TIME",
    )


def _add_switch(parser: argparse.ArgumentParser, name: str, default: str, what: str) -> None:
    parser.add_argument(
        name,
        type=names(SWITCHES),
        default=(default,),
        metavar="on|off",
        help=f"{what}; `off,on` for both; default {default}",
    )


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench step`."""
    with job() as whole:
        keep_quiet(is_main=whole.rank == 0)
        args.tokens_per_rank = args.tokens_per_rank or DEFAULT_TOKENS[whole.device.type]
        with one_voice():
            todo = cases(args, whole)
            folder = whole.on_rank_zero(make_folder, "step", args.out)
        record = measure_all(args, todo, whole)
        if whole.rank == 0:
            write_json(folder / "step.json", record)
            draw(record, folder / "step.png")
            print(describe(record, folder))


def measure_all(args: argparse.Namespace, todo: list[Case], whole: SPMesh) -> dict[str, Any]:
    """The record of a run. Collective."""
    gpu, where = args.gpu or known_gpu(whole), environment(whole)
    ranks_per_host = -(-where["world"] // where["hosts"])
    meshes: dict[tuple[int, int], SPMesh] = {}
    rows = []
    for case in tqdm(todo, desc="step", unit="case", disable=whole.rank > 0):
        degrees = case.setting.ring, case.setting.ulysses
        if degrees not in meshes:
            meshes[degrees] = SPMesh(ring=degrees[0], ulysses=degrees[1])
        work = partial(take_steps, case, meshes[degrees], steps=args.steps, seed=args.seed)
        figures, reason = attempt(work, whole)
        free(whole)
        rows.append(row_of(case, figures or {}, predict(case, gpu, ranks_per_host), gpu, reason))
    return {
        "bench": "step",
        "environment": where,
        "gpu": gpu,
        "options": {name: getattr(args, name) for name in RECORDED},
        "cases": rows,
    }


def row_of(
    case: Case,
    figures: dict[str, Any],
    predicted: dict[str, float],
    gpu: str | None,
    reason: str | None,
) -> dict[str, Any]:
    """A case's entry in the record.

    Args:
        case: what ran.
        figures: what was measured; empty where it could not run.
        predicted: what the planner says.
        gpu: its name for the chip; of the peak of an unknown one nobody knows the share (MFU).
        reason: why it could not run.
    """
    row = {**case.columns, **figures, **predicted, "reason": reason}
    if figures and gpu is not None:
        possible = case.setting.gpus * GPUS[gpu].peak * figures["seconds"]
        row["mfu"] = figures["flops"] / possible
    for name in ("seconds", "peak_bytes"):
        if row.get(name) is not None and f"predicted_{name}" in row:
            row[f"{name}_error"] = row[f"predicted_{name}"] / row[name] - 1
    return row


def cases(args: argparse.Namespace, mesh: SPMesh) -> list[Case]:
    """All rows, each model's together.

    Raises:
        ValueError: a model that cannot be read or planned.
    """
    found = []
    local = torch.cuda.device_count() or mesh.world_size
    for model, word in product(args.model, args.softmax_layers or (None,)):
        layers = _softmax_layers(model, word)
        config = load_shape(model, layers).config
        heads = config.num_attention_heads, config.num_key_value_heads
        degrees = choose_degrees(mesh.world_size, *heads, local)
        ways = settings(args, mesh.world_size, *degrees)
        found += [
            Case(model=model, softmax_layers=layers, setting=setting, tokens_per_rank=tokens)
            for tokens, setting in product(args.tokens_per_rank, ways)
        ]
    return found


def _softmax_layers(model: str, word: str | None) -> str | None:
    """How a model is made a hybrid, from what was said of it, if anything; None for not at all."""
    if word is not None:
        return None if word == DENSE else word
    return None if load_shape(model).count(LINEAR) else DEFAULT_SHARE


def settings(args: argparse.Namespace, gpus: int, ring: int, ulysses: int) -> list[Setting]:
    """All combinations, without those in which one option leaves another nothing to do."""
    switches = [
        [word == "on" for word in getattr(args, name)]
        for name in ("offload_optimizer", "checkpointing", "keep_attention", "offload_activations")
    ]
    found: dict[Setting, None] = {}
    for stage, tile, optimizer, checkpointing, keep, activations in product(
        args.stage, args.tiled_mlp, *switches
    ):
        setting = Setting(  # two that differ in what has no effect are one
            gpus=gpus,
            ring=ring,
            ulysses=ulysses,
            stage=stage,
            offload_optimizer=optimizer,
            checkpointing=checkpointing,
            keep_attention=keep or not checkpointing,
            offload_activations=activations and checkpointing,
            tiled_mlp=tile,
            batch=1,
            dtype_bytes=DTYPE_BYTES[args.dtype],
        )
        found[setting] = None
    return list(found)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _stages(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in names(("1", "2", "3"))(text))


def _tiles(text: str) -> tuple[int | None, ...]:
    return tuple(None if word == WHOLE else size(word) for word in _words(text))
