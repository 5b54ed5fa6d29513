"""Give a converted checkpoint back what conversion lost: align, distil and fine-tune it, in a row.

    deepspeed train/distill.py train/recipes/distill.yaml align.max_steps=200
    torchrun --nproc_per_node 4 train/distill.py train/recipes/distill_demo.yaml

The recipe has a section for each phase (`hybridsp.distill`). A phase trains as train/finetune.py
does, with the same loop, data, sharding and checkpoints; what is its own is the objective that
answers for the model's loss, and who learns. Each leaves a Hugging Face checkpoint, from which the
next one starts, so that any of them can be judged. A run that was stopped goes on where it stopped,
in the middle of a phase too, when it is started again.

An error that the user can mend, a signal and a rank that is lost end the job as they end
train/finetune.py, with the same exit codes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

import hybridsp
from hybridsp.checkpoint import export_pretrained
from hybridsp.curriculum import Stage, plan_stages
from hybridsp.data import PackedLoader, load_documents, pack_documents
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.distill import (
    Alignment,
    DistillRecipe,
    Matching,
    Phase,
    PhaseLogger,
    Teacher,
    check_pair,
    learning_only,
    load_distill_recipe,
    summarize,
    two_rates,
)
from hybridsp.distill.recipe import DistillKeys
from hybridsp.distill.report import format_summary
from hybridsp.faults import EXIT_STOPPED, Position
from hybridsp.mesh import SPMesh
from hybridsp.prepare import check_same_tokenizer, load_prepared, load_tokenizer
from hybridsp.pretrained import NO_CODE, check_config
from hybridsp.recipe import Recipe
from hybridsp.release import release
from hybridsp.train import finetune
from hybridsp.train.console import errors_of_users, watched_job


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the phases of the recipe named on the command line.

    Args:
        arguments: the command line without the program; None for this process's.
    """
    options = parse(arguments)
    with errors_of_users(show_traceback=options.traceback):
        recipe = load_distill_recipe(options.recipe, options.overrides)
        shared = recipe.phases[0].recipe
        with watched_job(shared, recipe.output_dir) as (mesh, position):
            stopped = run(recipe, mesh, position)
        if stopped is not None:
            sys.exit(EXIT_STOPPED)


def run(recipe: DistillRecipe, mesh: SPMesh, position: Position) -> str | None:
    """The phases whose result is not there yet, and the summary of all.

    Returns:
        The name of the signal that stopped it, after a checkpoint; None if all phases are over.
    """
    tokenizer = mesh.on_every_rank(check_teacher, recipe)
    for phase in recipe.phases:
        if mesh.on_rank_zero(phase.result.exists):
            tell(mesh, f"{phase.name}: {phase.result} is there already")
            continue
        stopped = run_phase(recipe, phase, mesh, tokenizer, position)
        # The next phase needs the memory that this one's engine, which is full of cycles, holds.
        gc.collect()
        torch.cuda.empty_cache()
        if stopped is not None:
            tell(mesh, f"{phase.name}: stopped by {stopped}; all is saved: start again to go on")
            return stopped
        tell(mesh, f"{phase.name}: the model is in {phase.result}")
    records = [(phase.name, Path(phase.recipe.output_dir)) for phase in recipe.phases]
    summary = mesh.on_rank_zero(summarize, recipe.output_dir, records)
    if summary is not None:
        tell(mesh, format_summary(summary))
    return None


def run_phase(
    recipe: DistillRecipe, phase: Phase, mesh: SPMesh, tokenizer: Any, position: Position
) -> str | None:
    """One phase from the checkpoint before it to its own; a signal's name if one stopped it."""
    settings = phase.recipe
    transformers.set_seed(settings.seed)
    config = mesh.on_every_rank(deepspeed_config, settings, mesh)
    student = load_prepared(settings, mesh, config)
    rate, optimizer = None, None
    if isinstance(phase.keys, DistillKeys):
        rate = phase.keys.converted_learning_rate
    if learns_converted_only(phase):
        learning_only(student)
    elif rate is not None:
        optimizer, config = two_rates(student, config, rate)
    mesh.on_rank_zero(finetune.check_disk, settings, student)
    stages = mesh.on_every_rank(plan_stages, settings, student.config)
    data = mesh.on_every_rank(load_data, recipe, phase, stages, tokenizer, mesh)
    engine = hybridsp.initialize(
        student, mesh, config, optimizer=optimizer, self_check=settings.self_check
    )
    engine.lr_scheduler.step(first_iteration(settings))
    torch.manual_seed(settings.seed + mesh.rank)  # dropout: each rank has other tokens
    teacher = None if phase.keys is None else load_teacher(recipe, phase, mesh, config)
    objective = install(phase, student, teacher)
    first_step = finetune.resume(settings, mesh, engine, stages, data)
    tell(mesh, f"{phase.name}\n" + finetune.describe(settings, mesh, engine, stages, first_step))

    log = mesh.on_every_rank(open_log, phase, mesh, objective, first_step)
    if teacher is not None and first_step == 0 and data[0][1] is not None:
        batches = finetune.batches_of_one_pass(settings, mesh, stages[0], data[0][1])
        log.log_values(0, {"teacher_eval_loss": teacher.evaluate(batches)})
    stopped = finetune.train(settings, mesh, engine, stages, data, log, first_step, position)
    log.close()
    if stopped is None:
        with position.during("exporting the model", watched=False):
            export_pretrained(engine, mesh, phase.result, tokenizer)

    if teacher is not None:
        teacher.close()
    release(engine)
    return stopped


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line: a recipe, what to change in it, and what the launcher adds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, as train/recipes/distill.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="[section.]key=value", help="in place of the file's"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    # DeepSpeed's launcher adds it; the environment, which every launcher sets, says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def check_teacher(recipe: DistillRecipe) -> Any:
    """The tokenizer, once it is clear that the teacher can teach this model."""
    tokenizer = load_tokenizer(recipe.model)
    learns = [phase.name for phase in recipe.phases if phase.keys is not None]
    if learns:
        check_same_tokenizer(
            "teacher",
            load_tokenizer(recipe.teacher),
            "model",
            tokenizer,
            "name the checkpoint that the model was converted from",
        )
        pair = [load_config(folder) for folder in (recipe.teacher, recipe.model)]
        check_pair(*pair, aligns="align" in learns)
    return tokenizer


def load_config(folder: str) -> Any:
    """The configuration of a checkpoint, once its fields are known to be harmless."""
    check_config(folder)
    return AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)


def learns_converted_only(phase: Phase) -> bool:
    """Whether all but the mixers of the converted layers stays as it is in this phase."""
    return phase.name == "align" or getattr(phase.keys, "learns", "all") == "converted"


def load_teacher(recipe: DistillRecipe, phase: Phase, mesh: SPMesh, config: Any) -> Teacher:
    """The teacher on this phase's mesh, in its precision."""
    settings = dataclasses.replace(
        phase.recipe,
        model=recipe.teacher,
        activation_checkpointing=False,
        offload_activations=False,
    )
    return Teacher(load_prepared(settings, mesh, config), mesh, config)


def install(phase: Phase, student: Any, teacher: Teacher | None) -> Alignment | Matching | None:
    """What the phase trains towards; None for the plain loss."""
    if teacher is None:
        return None
    if isinstance(phase.keys, DistillKeys):
        temperature, ce_weight = phase.keys.temperature, phase.keys.ce_weight
        return Matching(student, teacher, temperature=temperature, ce_weight=ce_weight)
    return Alignment(student, teacher)


def load_data(
    recipe: DistillRecipe, phase: Phase, stages: list[Stage], tokenizer: Any, mesh: SPMesh
) -> list[finetune.StageData]:
    """The data of every stage, with the same held-out sequences whatever the stage's length is."""
    settings = phase.recipe
    only_train = dataclasses.replace(settings, eval_data=None, eval_every=None)
    loaders = [loader for loader, _ in finetune.load_data(only_train, stages, tokenizer, mesh)]
    held_out = held_out_data(recipe, settings, tokenizer, mesh)
    return [(loader, held_out) for loader in loaders]


def held_out_data(
    recipe: DistillRecipe, settings: Recipe, tokenizer: Any, mesh: SPMesh
) -> PackedLoader | None:
    """One pass over the held-out sequences, one at a time.

    Of larger micro-batches, which phases choose, some would leave out the last sequences. Fewer
    than all are spread evenly over all: the first ones may lie in one long document.
    """
    if settings.eval_data is None:
        return None
    try:
        documents = load_documents(settings.eval_data)
        samples = pack_documents(documents, tokenizer, recipe.eval_seq_length)
        count = min(len(samples), recipe.eval_sequences or len(samples))
        return PackedLoader(
            samples.select([at * len(samples) // count for at in range(count)]),
            dp_rank=mesh.dp_rank,
            dp=mesh.dp,
            micro_batch_size=1,
            seed=settings.seed,
            shuffle=False,
        )
    except ValueError as error:
        raise ValueError(f"eval_data at eval_seq_length: {error}") from error


def open_log(
    phase: Phase, mesh: SPMesh, objective: Alignment | Matching | None, first_step: int
) -> PhaseLogger:
    """The phase's record, which only rank 0 writes."""
    metrics = None if objective is None else objective.metrics
    settings, is_main = phase.recipe, mesh.rank == 0
    return PhaseLogger(metrics, settings.output_dir, settings.max_steps, is_main, first_step)


def tell(mesh: SPMesh, text: str) -> None:
    """Say something once."""
    if mesh.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
