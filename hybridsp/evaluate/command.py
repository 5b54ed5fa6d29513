"""`hybridsp eval`: several checkpoints, the same questions, one set of tables.

Models are loaded one after another, and a teacher once. Each answers every task; where one cannot,
for lack of memory at a length say, that is an entry of the table and the rest goes on. Results of
a model are written when it has answered, so that a job that is cut off leaves what it found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hybridsp.bench.job import attempt, job, one_voice
from hybridsp.bench.record import Record, environment, make_folder
from hybridsp.evaluate.agreement import score_text
from hybridsp.evaluate.needle import NeedleSettings, find_needles
from hybridsp.evaluate.options import Options, add_arguments
from hybridsp.evaluate.positions import CurveOfLoss, loss_by_context, loss_by_position
from hybridsp.evaluate.report import draw, render
from hybridsp.evaluate.subject import Subject, load_subject
from hybridsp.evaluate.text import HeldOut, load_held_out
from hybridsp.mesh import SPMesh
from hybridsp.prepare import check_same_tokenizer, load_tokenizer
from hybridsp.pretrained import check_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(args: argparse.Namespace) -> None:
    """Run `hybridsp eval`. Collective over the job.

    Raises:
        ValueError: an option, a checkpoint or the text cannot be used; rank 0 tells it.
    """
    with one_voice():
        options = Options.of(args)
        with job() as world:
            Evaluation(options, world).run()


class Evaluation:
    """All models of a command and what they have answered so far.

    Args:
        options: what is asked.
        world: any mesh over the job.

    Raises:
        ValueError: text or tokenizers cannot be used, or the text has too few tokens.
    """

    def __init__(self, options: Options, world: SPMesh) -> None:
        self.options, self.world = options, world
        dtype = options.dtype or ("bf16" if world.device.type == "cuda" else "fp32")
        self.dtype = DTYPES[dtype]
        self.tokenizer = world.on_every_rank(_tokenizer_of_all, options)
        # One rank reads the text; the others may have no such file, and need not tokenise it.
        self.text: HeldOut = world.on_rank_zero(load_held_out, options.text, self.tokenizer)
        world.on_every_rank(self._require_enough_text)
        self.trained = world.on_every_rank(_trained_length, options)
        self.results: dict[str, dict[str, Any]] = {}
        self.header = {
            "environment": environment(world),
            "options": {**asdict(options), "text": str(options.text), "out": str(options.out)},
            "dtype": dtype,
            "documents": len(self.text.documents),
            "tokens": self.text.num_tokens,
            "models": self.results,
        }

    def run(self) -> None:
        """Ask every model; print the tables and write the record. Collective."""
        folder = self.world.on_rank_zero(make_folder, "eval", self.options.out)
        record = Record(self.world, folder / "eval.json", self.header)
        teacher = None
        if self.options.teacher is not None and "text" in self.options.tasks:
            teacher = load_subject("teacher", self.options.teacher, self.world, self.dtype)
        for name, path in self.options.models.items():
            is_teacher = teacher is not None and path == self.options.teacher
            subject = teacher if is_teacher else None
            subject = subject or load_subject(name, path, self.world, self.dtype)
            self.results[name] = self._ask(name, subject, teacher)
            record.save()
        if self.world.rank == 0:
            print(render(self.results))
        record.finish()
        if self.world.rank == 0:
            draw(folder / "eval.png", self.results)
            print(f"\nwritten: {folder}/eval.json, {folder}/eval.png")

    def _ask(self, name: str, subject: Subject, teacher: Subject | None) -> dict[str, Any]:
        options = self.options
        answers: dict[str, Callable[[], Any]] = {
            "text": lambda: score_text(subject, self._packed(), teacher).summary(),
            "positions": lambda: {"points": loss_by_position(subject, self._windows()).points()},
            "context": lambda: _context(loss_by_context(subject, self._windows()), self.trained),
        }
        found: dict[str, Any] = {}
        bar = tqdm(options.tasks, desc=name, unit="task", disable=self.world.rank > 0)
        for task in bar:
            bar.set_postfix_str(task)
            if task == "needle":
                found[task] = self._needles(subject)
            else:
                result, reason = attempt(answers[task], self.world)
                found[task] = {"reason": reason} if result is None else result
        return found

    def _needles(self, subject: Subject) -> list[dict[str, Any]]:
        options, cases = self.options, []
        for keys in options.keys:
            settings = NeedleSettings(
                keys=keys, depths=options.depths, samples=options.samples, seed=options.seed
            )
            for length in options.needle_lengths:

                def ask(length: int = length, settings: NeedleSettings = settings) -> Any:
                    return find_needles(subject, self.text, self.tokenizer, length, settings)

                scores, reason = attempt(ask, self.world)
                found = {"reason": reason} if scores is None else scores.summary()
                cases.append({"length": length, "keys": keys, **found})
        return cases

    def _packed(self) -> Any:
        return self.text.packed(self.options.length, self.options.tokens)

    def _windows(self) -> Any:
        return self.text.windows(self.options.length, self.options.tokens)

    def _require_enough_text(self) -> None:
        if "text" in self.options.tasks:
            self._packed()
        if not {"positions", "context"}.isdisjoint(self.options.tasks):
            self._windows()
        if "needle" in self.options.tasks:
            for keys in self.options.keys:
                NeedleSettings(keys=keys, depths=self.options.depths, samples=self.options.samples)


def _context(curve: CurveOfLoss, trained: int | None) -> dict[str, Any]:
    """The curve, and what all context changes and that past the trained length."""
    edges = curve.edges
    changes = [curve.change(edges[0], edges[-1])] if len(edges) > 1 else []
    if trained in edges[1:-1]:
        changes.append(curve.change(trained, edges[-1]))
    return {"points": curve.points(), "changes": changes, "trained_length": trained}


def _tokenizer_of_all(options: Options) -> PreTrainedTokenizerBase:
    """The tokenizer of the first model, which must be that of the others."""
    (name, folder), *others = options.models.items()
    tokenizer = load_tokenizer(folder)
    if options.teacher is not None:
        others.append(("teacher", options.teacher))
    for other, path in others:
        check_same_tokenizer(
            name,
            tokenizer,
            other,
            load_tokenizer(path),
            "losses per token cannot be compared: evaluate them apart",
        )
    return tokenizer


def _trained_length(options: Options) -> int | None:
    """The least length that one of the checkpoints was trained for; None if none says it.

    One for all, and not each one's own: fine-tuning at length raises what a model says of itself,
    and what is asked is how it does past the length of the model it was made from.
    """
    folders = [*options.models.values(), *([options.teacher] if options.teacher else [])]
    lengths = [check_config(folder).get("max_position_embeddings") for folder in folders]
    return min((length for length in lengths if isinstance(length, int)), default=None)


__all__ = ["Evaluation", "add_arguments", "run"]
