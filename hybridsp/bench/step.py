"""`hybridsp bench step`: one training step of a whole model, beside what the planner says of it.

A row is a model, a length and what is done about memory: ZeRO stage, optimizer offload, activation
checkpointing and what it keeps where, tiles of the MLP (`step_case`). Options with commas are
multiplied, so that one run is a table of what each technique brings, holds the planner's memory and
time models against this machine, or compares models. Weights are random, or those of checkpoints
(--checkpoint), tokens random or a text's (--text); the loss is the one before any update, and so
the same for all that differ in memory alone.

A row that runs out of memory says so, and the next one runs. The record is written after every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hybridsp.bench.job import attempt, attempt_each, job, one_voice
from hybridsp.bench.options import names, size, sizes
from hybridsp.bench.report import environment, make_folder, write_json
from hybridsp.bench.step_case import Case, free, known_gpu, of_ranks, predict, take_steps
from hybridsp.bench.step_data import ONE, OWN
from hybridsp.bench.step_longest import find_longest, host_memory
from hybridsp.bench.step_report import describe, draw
from hybridsp.mesh import SPMesh, choose_degrees
from hybridsp.planner import GPUS, Cluster, Setting, load_shape
from hybridsp.planner.model import LINEAR
from hybridsp.planner.presets import PRESETS
from hybridsp.planner.search import DTYPE_BYTES
from hybridsp.train.console import keep_quiet

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_TOKENS = {"cuda": (2**15, 2**17), "cpu": (2**8,)}
WHOLE = "whole"
DENSE, DEFAULT_SHARE = "dense", "0.25"
SWITCHES = ("off", "on")
RECORDED = (
    *("model", "checkpoint", "text", "documents", "warmup_tokens", "profile", "longest"),
    *("softmax_layers", "tokens_per_rank", "stage", "offload_optimizer", "checkpointing"),
    *("keep_attention", "offload_activations", "tiled_mlp", "dtype", "steps", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hybridsp bench step`."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--model",
        type=_words,
        metavar="NAME,...",
        help="random weights in the shape of these: "
        f"{', '.join(PRESETS)}, or folders with config.json; default {DEFAULT_MODEL}",
    )
    models.add_argument(
        "--checkpoint",
        type=_words,
        metavar="FOLDER,...",
        help="real weights: hybrid or dense checkpoints, as they are",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="what to train on, documents as train/prepare_corpus.py writes them: their first "
        "tokens by the tokenizer of each --checkpoint; default random tokens",
    )
    parser.add_argument(
        "--documents",
        type=_documents,
        metavar=f"{OWN}|{ONE}|TOKENS",
        help=f"which tokens see each other: those of one document of the text ({OWN}), all ({ONE}) "
        f"or TOKENS in a row; default {OWN} with --text, else {ONE}",
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
    parser.add_argument(
        "--warmup-tokens",
        type=size,
        metavar="L",
        help="per rank in the step that warms up, where one as long as those timed costs too much; "
        "host memory is pinned all the same",
    )
    parser.add_argument(
        "--longest",
        type=size,
        metavar="TRIES",
        help="then make sequences longer, by a third or a half each time, until memory runs out",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="a step more of each row, and what its time goes into (some 100K tokens at the most: "
        "a trace has an event for every kernel)",
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
    with one_voice():
        _check(args)
    with job() as whole:
        keep_quiet(is_main=whole.rank == 0)
        args.tokens_per_rank = args.tokens_per_rank or DEFAULT_TOKENS[whole.device.type]
        with one_voice():
            todo = cases(args, whole)
            folder = whole.on_rank_zero(make_folder, "step", args.out)

        def save(record: dict[str, Any]) -> None:
            if whole.rank == 0:
                write_json(folder / "step.json", record)

        record = measure_all(args, todo, whole, save)
        if whole.rank == 0:
            draw(record, folder / "step.png")
            print(describe(record, folder))


def measure_all(
    args: argparse.Namespace,
    todo: list[Case],
    whole: SPMesh,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The record of a run, saved after every row. Collective."""
    table = Table(args, whole, save)
    for case, figures, reason in attempt_each(todo, table.measure, whole, name="step"):
        table.add(case, figures, reason)
    if args.longest:
        # What a step of another length needs once, it has paid for by now.
        tokens = args.warmup_tokens or min(args.tokens_per_rank)
        once = partial(table.measure, steps=1, warmup_tokens=tokens, profiled=False)

        def attempt_once(case: Case) -> dict[str, Any]:
            return table.add(case, *attempt(partial(once, case), whole))

        found = find_longest(todo, table.rows, attempt_once, args.longest, table.cluster())
        table.record["longest"] = [each._asdict() for each in found]
        save(table.record)
    return table.record


class Table:
    """The record of a run, row by row.

    Args:
        args: the options.
        whole: the job.
        save: called with the record after every row.
    """

    def __init__(
        self, args: argparse.Namespace, whole: SPMesh, save: Callable[[dict[str, Any]], None]
    ) -> None:
        where = environment(whole)
        self.gpu = args.gpu or known_gpu(whole)
        self.local_ranks = -(-where["world"] // where["hosts"])
        self.rows: list[dict[str, Any]] = []
        self.record = {
            "bench": "step",
            "environment": where,
            "gpu": self.gpu,
            "options": {name: getattr(args, name) for name in RECORDED},
            "cases": self.rows,
            "longest": [],
        }
        self._whole, self._save = whole, save
        self._options = {"steps": args.steps, "warmup_tokens": args.warmup_tokens}
        self._options["profiled"] = args.profile
        self._meshes: dict[tuple[int, int], SPMesh] = {}
        self._at_first = free(whole)

    def measure(self, case: Case, **changes: Any) -> dict[str, Any]:
        """`take_steps` as the options, or `changes` of them, say. Collective."""
        degrees = case.setting.ring, case.setting.ulysses
        if degrees not in self._meshes:
            self._meshes[degrees] = SPMesh(ring=degrees[0], ulysses=degrees[1])
        return take_steps(case, self._meshes[degrees], **{**self._options, **changes})

    def add(self, case: Case, figures: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """A row, with what the case left on the GPU that has most of it. Collective."""
        left = max(of_ranks(free(self._whole) - self._at_first, self._whole))
        predicted = predict(case, self.gpu, self.local_ranks)
        row = row_of(case, figures or {}, predicted, self.gpu, reason)
        self.rows.append({**row, "left_bytes": left})
        self._save(self.record)
        return self.rows[-1]

    def cluster(self) -> Cluster | None:
        """The job's machines as the planner sees them; None for a chip it does not know."""
        memory = min(of_ranks(host_memory(), self._whole))
        if self.gpu is None:
            return None
        return Cluster(
            gpu=self.gpu,
            gpus=self._whole.world_size,
            gpus_per_node=self.local_ranks,
            host_memory=memory,
        )


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
        ValueError: a model that cannot be read or planned, a text that is too short.
    """
    found = []
    local = torch.cuda.device_count() or mesh.world_size
    models = args.checkpoint or args.model or (DEFAULT_MODEL,)
    for model, word in product(models, args.softmax_layers or (None,)):
        layers = None if args.checkpoint else _softmax_layers(model, word)
        config = load_shape(model, layers).config
        heads = config.num_attention_heads, config.num_key_value_heads
        degrees = choose_degrees(mesh.world_size, *heads, local)
        ways = settings(args, mesh.world_size, *degrees)
        found += [
            Case(
                model=model,
                softmax_layers=layers,
                setting=setting,
                tokens_per_rank=tokens,
                has_weights=bool(args.checkpoint),
                text=args.text,
                documents=args.documents or (OWN if args.text else ONE),
                seed=args.seed,
            )
            for tokens, setting in product(args.tokens_per_rank, ways)
        ]
    if args.text:
        for case in found:
            _ = case.sequence  # a text that is too short is told before anything runs
    return found


def _check(args: argparse.Namespace) -> None:
    if args.checkpoint and args.softmax_layers:
        raise ValueError(
            "--softmax-layers makes a hybrid of a shape, but a --checkpoint is taken as it is: "
            "leave it out, or convert the checkpoint first (hybridsp convert)"
        )
    if args.text and not args.checkpoint:
        raise ValueError("--text needs the tokenizer of a --checkpoint: name one, or leave it out")
    if args.documents == OWN and not args.text:
        raise ValueError(
            f"--documents {OWN} are those of a text: name it with --text, or say {ONE} or TOKENS"
        )


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
    dtype_bytes = DTYPE_BYTES[args.dtype]
    plain = Setting(gpus=gpus, ring=ring, ulysses=ulysses, stage=1, dtype_bytes=dtype_bytes)
    found: dict[Setting, None] = {}
    for stage, tile, optimizer, checkpointing, keep, activations in product(
        args.stage, args.tiled_mlp, *switches
    ):
        layers = {  # two that differ in what has no effect are one
            "checkpointing": checkpointing,
            "keep_attention": keep or not checkpointing,
            "offload_activations": activations and checkpointing,
            "tiled_mlp": tile,
        }
        found[replace(plain, stage=stage, offload_optimizer=optimizer, **layers)] = None
    return list(found)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _documents(text: str) -> str | int:
    return text if text in (ONE, OWN) else size(text)


def _stages(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in names(("1", "2", "3"))(text))


def _tiles(text: str) -> tuple[int | None, ...]:
    return tuple(None if word == WHOLE else size(word) for word in _words(text))
