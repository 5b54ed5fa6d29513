"""`hybridsp bench step`: one training step of a whole model, beside what the planner says of it.

A row is a model, a length and what is done about memory: ZeRO stage, optimizer offload, activation
checkpointing and what it keeps where, tiles of the MLP (`case`). Options with commas are
multiplied, so that one run is a table of what each technique brings, holds the planner's memory and
time models against this machine, or compares models. Weights are random, or those of checkpoints
(--checkpoint), tokens random or a text's (--text); the loss is the one before any update, and so
the same for all that differ in memory alone.

A row that runs out of memory says so, and the next one runs. The record is written after every row.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hybridsp.bench.job import attempt, attempt_each, job, one_voice
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.bench.step.case import Case, free, known_gpu, predict, take_steps
from hybridsp.bench.step.data import ONE, OWN
from hybridsp.bench.step.longest import find_longest
from hybridsp.bench.step.options import (
    DEFAULT_MODEL,
    DEFAULT_SHARE,
    DEFAULT_TOKENS,
    DENSE,
    add_arguments,
    check,
)
from hybridsp.bench.step.report import describe, draw, row_of
from hybridsp.host_memory import host_memory
from hybridsp.mesh import SPMesh, choose_degrees, gather_objects
from hybridsp.planner import Cluster, Setting, load_shape
from hybridsp.planner.model import LINEAR
from hybridsp.planner.search import DTYPE_BYTES
from hybridsp.train.console import keep_quiet

RECORDED = (
    *("model", "checkpoint", "text", "documents", "warmup_tokens", "profile", "longest"),
    *("softmax_layers", "sp", "tokens_per_rank", "stage", "offload_optimizer", "checkpointing"),
    *("keep_attention", "offload_activations", "tiled_mlp", "dtype", "steps", "seed"),
)


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp bench step`."""
    with one_voice():
        check(args)
    with job() as whole:
        keep_quiet(is_main=whole.rank == 0)
        args.tokens_per_rank = args.tokens_per_rank or DEFAULT_TOKENS[whole.device.type]
        with one_voice():
            todo = cases(args, whole)
            folder = whole.on_rank_zero(make_folder, "step", args.out)
        record = measure_all(args, todo, whole, folder)
        if whole.rank == 0:
            print(describe(record.content, folder))
        record.finish()
        if whole.rank == 0:
            draw(record.content, folder / "step.png")


def measure_all(args: argparse.Namespace, todo: list[Case], whole: SPMesh, folder: Path) -> Record:
    """The record of a run, to be finished. Collective."""
    table = Table(args, whole, folder)
    for case, figures, reason in attempt_each(todo, table.measure, whole, name="step"):
        table.add(case, figures, reason)
    if args.longest:
        # What a step of another length needs once, it has paid for by now.
        tokens = args.warmup_tokens or min(args.tokens_per_rank)
        once = partial(table.measure, steps=1, warmup_tokens=tokens, profiled=False)

        def attempt_once(case: Case) -> dict[str, Any]:
            return table.add(case, *attempt(partial(once, case), whole))

        found = find_longest(todo, table.rows, attempt_once, args.longest, table.cluster())
        table.record.content["longest"] = [each._asdict() for each in found]
    return table.record


class Table:
    """The record of a run, row by row.

    Args:
        args: the options.
        whole: the job.
        folder: where the record is written.
    """

    def __init__(self, args: argparse.Namespace, whole: SPMesh, folder: Path) -> None:
        where = environment(whole)
        self.gpu = args.gpu or known_gpu(whole)
        self.local_ranks = -(-where["world"] // where["hosts"])
        self.rows: list[dict[str, Any]] = []
        content = {
            "bench": "step",
            "environment": where,
            "gpu": self.gpu,
            "options": {name: getattr(args, name) for name in RECORDED},
            "cases": self.rows,
            "longest": [],
        }
        self.record = Record(whole, folder / "step.json", content)
        self._whole = whole
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
        left = max(gather_objects(free(self._whole) - self._at_first))
        predicted = predict(case, self.gpu, self.local_ranks)
        row = row_of(case, figures or {}, predicted, self.gpu, reason)
        self.rows.append({**row, "left_bytes": left})
        self.record.save()
        return self.rows[-1]

    def cluster(self) -> Cluster | None:
        """The job's machines as the planner sees them; None for a chip it does not know."""
        found = gather_objects(host_memory())
        known = [memory.total for memory in found if memory is not None]
        if self.gpu is None or not known:  # Linux says how much there is
            return None
        return Cluster(
            gpu=self.gpu,
            gpus=self._whole.world_size,
            gpus_per_node=self.local_ranks,
            host_memory=min(known),
        )


def cases(args: argparse.Namespace, mesh: SPMesh) -> list[Case]:
    """All rows, each model's together.

    Raises:
        ValueError: a model that cannot be read or planned, a text that is too short.
    """
    found = []
    local = torch.cuda.device_count() or mesh.world_size
    models = args.checkpoint or args.model or (DEFAULT_MODEL,)
    for model, word, sp in product(models, args.softmax_layers or (None,), _sp_degrees(args, mesh)):
        layers = None if args.checkpoint else _softmax_layers(model, word)
        config = load_shape(model, layers).config
        heads = config.num_attention_heads, config.num_key_value_heads
        degrees = choose_degrees(sp, *heads, local)
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


def _sp_degrees(args: argparse.Namespace, mesh: SPMesh) -> tuple[int, ...]:
    degrees = args.sp or (mesh.world_size,)
    for sp in degrees:
        if mesh.world_size % sp:
            raise ValueError(
                f"--sp {sp} does not divide the {mesh.world_size} ranks of this job: every "
                "sequence needs as many"
            )
    return degrees


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
    plain = Setting(
        gpus=gpus,
        ring=ring,
        ulysses=ulysses,
        stage=1,
        batch=gpus // (ring * ulysses),
        dtype_bytes=dtype_bytes,
    )
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


__all__ = ["add_arguments", "cases", "measure_all", "run", "settings"]
