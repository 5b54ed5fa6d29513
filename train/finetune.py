"""Fine-tune a Hugging Face model on long sequences, cut over the ranks of a job.

    deepspeed train/finetune.py train/recipes/demo.yaml max_steps=100
    torchrun --nproc_per_node 4 train/finetune.py train/recipes/demo.yaml

`main` is the whole story, from top to bottom: the recipe says what is to be done, the mesh who does
it; the model is loaded, parallelized and handed to DeepSpeed; documents become packed batches; and
after the last step the result is an ordinary Hugging Face checkpoint, which rank 0 loads as anyone
would. A run that was stopped goes on from its latest checkpoint when it is started again.

An error that the user can mend ends the job with one line and exit code 2. SIGTERM and SIGUSR1 let
it finish its step, save, and end with exit code 75. A rank that died, hangs or failed ends it with
a report of where it stood and exit code 70.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridsp
from hybridsp.adapters import decoder_layers
from hybridsp.checkpoint import CheckpointSaver, export_pretrained, load_checkpoint
from hybridsp.curriculum import Stage, enter_stage, plan_stages, scale_rate, stage_of
from hybridsp.data import PackedLoader, load_documents, pack_documents
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.faults import (
    EXIT_STOPPED,
    BadSteps,
    Position,
    StopSignals,
    batch_facts,
    check_in_step,
    check_room,
    engine_facts,
    follow,
    settings_facts,
)
from hybridsp.lora import add_lora, export_merged
from hybridsp.mesh import SPMesh
from hybridsp.metrics import RunLogger
from hybridsp.prepare import load_prepared, load_tokenizer, num_embeddings
from hybridsp.pretrained import num_parameters
from hybridsp.recipe import Recipe, load_recipe
from hybridsp.train.console import errors_of_users, watched_job

# The batches of one stage: endless ones to train on, and one pass over the evaluation data.
StageData = tuple[PackedLoader, PackedLoader | None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the recipe named on the command line says.

    Args:
        arguments: the command line without the program; None for this process's.
    """
    options = parse(arguments)
    with errors_of_users(show_traceback=options.traceback):
        recipe = load_recipe(options.recipe, options.overrides)
        with watched_job(recipe, recipe.output_dir) as (mesh, position):
            exported = fine_tune(recipe, mesh, position)
        if exported is None:
            sys.exit(EXIT_STOPPED)
        if mesh.rank == 0 and recipe.generate_prompt is not None:
            print("It continues the prompt:\n" + generate(exported, recipe), flush=True)


def fine_tune(recipe: Recipe, mesh: SPMesh, position: Position) -> Path | None:
    """The run from the model to the exported model, whose directory is returned.

    None if a signal stopped it; it is saved then.
    """
    check_in_step(mesh, settings_facts(recipe), {})
    transformers.set_seed(recipe.seed)
    config = mesh.on_every_rank(deepspeed_config, recipe, mesh)
    tokenizer = mesh.on_every_rank(load_tokenizer, recipe.model)
    model = load_prepared(recipe, mesh, config)
    if recipe.lora is not None:
        mesh.on_every_rank(add_lora, model, recipe.lora)
    mesh.on_rank_zero(check_disk, recipe, model)
    stages = mesh.on_every_rank(plan_stages, recipe, model.config)
    data = mesh.on_every_rank(load_data, recipe, stages, tokenizer, mesh)
    engine = hybridsp.initialize(model, mesh, config, self_check=recipe.self_check)
    engine.lr_scheduler.step(first_iteration(recipe))
    torch.manual_seed(recipe.seed + mesh.rank)  # dropout: each rank has other tokens
    first_step = resume(recipe, mesh, engine, stages, data)
    if mesh.rank == 0:
        print(describe(recipe, mesh, engine, stages, first_step), flush=True)

    log = mesh.on_every_rank(open_log, recipe, mesh, first_step)
    stopped = train(recipe, mesh, engine, stages, data, log, first_step, position)
    log.close()
    exported = None
    if stopped is None:
        with position.during("exporting the model", watched=False):
            exported = export(recipe, mesh, engine, tokenizer)
    engine.destroy()
    if mesh.rank == 0 and exported is None:
        print(f"Stopped by {stopped}; all is saved: start again to go on", flush=True)
    elif mesh.rank == 0:
        print(f"{log.summary()}\nThe trained model is in {exported}", flush=True)
    return exported


def train(
    recipe: Recipe,
    mesh: SPMesh,
    engine: Any,
    stages: list[Stage],
    data: list[StageData],
    log: RunLogger,
    first_step: int,
    position: Position | None = None,
) -> str | None:
    """Take the steps behind `first_step`; log, evaluate and save as often as the recipe says.

    The last step of a stage is always logged, evaluated and saved, where that is done at all.

    Returns:
        The name of the signal that stopped it, after a checkpoint behind the step in progress; None
        if all steps were taken.
    """
    position = position or Position()
    bad_steps = BadSteps(mesh, recipe.output_dir, recipe.max_bad_steps)
    keep, background = recipe.keep_checkpoints, recipe.async_save
    saver = CheckpointSaver(engine, mesh, recipe.output_dir, keep=keep, background=background)
    with (
        StopSignals() as signals,
        follow(decoder_layers(engine.module), position),
        position.during("training", watched=True),
    ):
        stopped = None
        for stage, (loader, held_out) in zip(stages, data, strict=True):
            if stage.last_step < first_step and stage is not stages[-1]:
                continue
            enter_stage(engine, stage)
            log.enter_stage(stage.number, stage.seq_length)
            eval_batches = mesh.on_every_rank(batches_of_one_pass, recipe, mesh, stage, held_out)
            if eval_batches and lacks_evaluation(recipe, mesh, stage, log, first_step):
                log.log_evaluation(first_step, hybridsp.eval_step(engine, eval_batches))
            begin = max(first_step + 1, stage.first_step)
            for step in range(begin, stage.last_step + 1):
                position.enter("drawing a batch", step=step)
                row = take_step(recipe, mesh, engine, stage, loader, step, bad_steps, step == begin)
                saver.poll()
                stopped = signals.agreed(mesh)
                if due(recipe.log_every, step, stage):
                    log.log_step(step, **row)
                log.advance()
                if eval_batches and due(recipe.eval_every, step, stage) and not stopped:
                    log.log_evaluation(step, hybridsp.eval_step(engine, eval_batches))
                if stopped or (recipe.save_every and due(recipe.save_every, step, stage)):
                    with position.during("saving a checkpoint", watched=False):
                        save(saver, recipe, stage, loader, step)
                        log.draw()
                if stopped:
                    break
            if stopped:
                break
        with position.during("saving a checkpoint", watched=False):
            saver.wait()
    return stopped


def lacks_evaluation(
    recipe: Recipe, mesh: SPMesh, stage: Stage, log: RunLogger, first_step: int
) -> bool:
    """Whether an evaluation is to be made before the first step of this start. Collective.

    Of what it begins with, or what a run that was stopped behind that step has left out.
    """
    if first_step == 0:
        return stage.first_step == 1
    is_of_stage = stage.first_step <= first_step and due(recipe.eval_every, first_step, stage)
    return is_of_stage and not mesh.on_rank_zero(log.has_evaluation, first_step)


def due(every: int | None, step: int, stage: Stage) -> bool:
    """Whether what is done every so many steps, and behind a stage's last, is due behind `step`."""
    return step == stage.last_step or (every is not None and step % every == 0)


def take_step(
    recipe: Recipe,
    mesh: SPMesh,
    engine: Any,
    stage: Stage,
    loader: PackedLoader,
    step: int,
    bad_steps: BadSteps,
    is_first: bool,
) -> dict[str, Any]:
    """One optimizer step, and what the record says of it.

    Before the first step of a stage, or after a resume, the ranks compare what they are about to
    do.
    """
    start = time.perf_counter()
    learning_rate = scale_rate(engine, stage)
    batches = list(itertools.islice(loader, stage.gradient_accumulation_steps))
    if is_first:
        of_all, of_sequence = batch_facts(batches)
        of_all |= engine_facts(engine, recipe, step=step)
        check_in_step(mesh, of_all, of_sequence)
    micro_batches = [hybridsp.shard_batch(batch, mesh) for batch in batches]
    result = hybridsp.train_step(engine, micro_batches)
    bad_steps.note(step, result, micro_batches, learning_rate=learning_rate)
    return {
        "loss": result.loss,
        "tokens": result.num_tokens,
        "labels": result.num_labels,
        "seconds": time.perf_counter() - start,
        "learning_rate": learning_rate,
        "grad_norm": result.grad_norm,
    }


def save(
    saver: CheckpointSaver, recipe: Recipe, stage: Stage, loader: PackedLoader, step: int
) -> None:
    """A checkpoint behind `step`, with all that `resume` asks for."""
    state = {
        "step": step,
        "stage": stage.number,
        "data": loader.state_dict(),
        "lora_alpha": recipe.lora and recipe.lora.alpha,
    }
    saver.save(step, state)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line: a recipe, what to change in it, and what the launcher adds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file, as train/recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    # DeepSpeed's launcher adds it; the environment, which every launcher sets, says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def load_data(recipe: Recipe, stages: list[Stage], tokenizer: Any, mesh: SPMesh) -> list[StageData]:
    """The data of every stage, all packed before the first step is taken."""
    vocab_size = num_embeddings(recipe.model)

    def loader(key: str, stage: Stage, shuffle: bool) -> PackedLoader:
        try:
            # The first rank packs, behind a lock, and the others read what it wrote.
            documents = load_documents(getattr(recipe, key))
            return PackedLoader(
                pack_documents(documents, tokenizer, stage.seq_length, vocab_size=vocab_size),
                dp_rank=mesh.dp_rank,
                dp=mesh.dp,
                micro_batch_size=stage.micro_batch_size,
                seed=recipe.seed + stage.number - 1,
                shuffle=shuffle,
            )
        except ValueError as error:
            where = f"{key}, stage {stage.number}" if recipe.stages else key
            raise ValueError(f"{where}: {error}") from error

    return [
        (
            loader("data", stage, shuffle=True),
            None if recipe.eval_data is None else loader("eval_data", stage, shuffle=False),
        )
        for stage in stages
    ]


def batches_of_one_pass(
    recipe: Recipe, mesh: SPMesh, stage: Stage, held_out: PackedLoader | None
) -> list[dict[str, Any]]:
    """This rank's part of the evaluation data at a stage's length.

    Sequences at the end that are too few for all data-parallel ranks are left out.
    """
    if held_out is None:
        return []
    steps = held_out.steps_per_epoch
    if recipe.eval_sequences is not None:
        steps = min(steps, -(-recipe.eval_sequences // (stage.micro_batch_size * mesh.dp)))
    return [hybridsp.shard_batch(batch, mesh) for batch in itertools.islice(held_out, steps)]


def resume(
    recipe: Recipe, mesh: SPMesh, engine: Any, stages: list[Stage], data: list[StageData]
) -> int:
    """Restore a checkpoint as the recipe says; returns the optimizer steps already taken."""
    state = load_checkpoint(engine, mesh, recipe.output_dir, recipe.resume)
    if state is None:
        return 0
    if lacking := {"step", "stage", "data", "lora_alpha"} - state.keys():
        raise ValueError(
            f"the checkpoint's client_state lacks {', '.join(sorted(lacking))}, so it is none of "
            "this script's: name one that is in resume"
        )
    if state["step"] > stages[-1].last_step:
        raise ValueError(
            f"max_steps = {stages[-1].last_step}, but the checkpoint has taken {state['step']}: "
            "raise it, or name an earlier checkpoint in resume"
        )
    # Not in the weights' shapes, by which a checkpoint of another rank or other targets is known.
    if recipe.lora is not None and recipe.lora.alpha != state["lora_alpha"]:
        raise ValueError(
            f"lora.alpha = {recipe.lora.alpha}, but the checkpoint was trained with "
            f"{state['lora_alpha']}: keep it, it scales what has been learnt"
        )
    stage = stage_of(stages, state["step"])
    if (saved := state["stage"]) != stage.number:
        raise ValueError(
            f"the checkpoint's step {state['step']} was one of stage {saved}, but by this recipe "
            f"it is one of stage {stage.number}: keep the max_steps of stages that are over"
        )
    # The checkpoint's are those of the recipe as it was, the next step's rate among them.
    for group in engine.optimizer.param_groups:
        group["betas"], group["weight_decay"] = recipe.betas, recipe.weight_decay
    engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)
    loader, _ = data[stage.number - 1]
    mesh.on_every_rank(loader.load_state_dict, state["data"])
    return state["step"]


def export(recipe: Recipe, mesh: SPMesh, engine: Any, tokenizer: Any) -> Path:
    """Write the trained model as a Hugging Face checkpoint; with LoRA, its adapter as well."""
    output_dir = Path(recipe.output_dir)
    if recipe.lora is None:
        return export_pretrained(engine, mesh, output_dir / "model", tokenizer)
    adapter = export_pretrained(engine, mesh, output_dir / "adapter", tokenizer)
    merge = functools.partial(
        export_merged, config=engine.module.config, tokenizer=tokenizer, dtype=recipe.torch_dtype
    )
    return mesh.on_rank_zero(merge, recipe.model, adapter, output_dir / "model")


def check_disk(recipe: Recipe, model: Any) -> None:
    """Raise ValueError if `output_dir` has no room for what the run is going to write."""
    check_room(
        recipe.output_dir,
        trained=num_parameters(model, only_trainable=True),
        parameters=num_parameters(model),
        bytes_per_weight=recipe.torch_dtype.itemsize,
        checkpoints=recipe.keep_checkpoints + 1 if recipe.save_every else 0,
    )


def open_log(recipe: Recipe, mesh: SPMesh, first_step: int) -> RunLogger:
    """The run's record, which only rank 0 writes."""
    return RunLogger(recipe.output_dir, recipe.max_steps, mesh.rank == 0, first_step)


def describe(
    recipe: Recipe, mesh: SPMesh, engine: Any, stages: list[Stage], first_step: int
) -> str:
    """What is about to be trained, and on what."""
    config, trained = engine.module.config, num_parameters(engine.module, only_trainable=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = kinds.count("linear_attention")
    rows = {
        "model": f"{recipe.model} ({type(engine.module).__name__}, {recipe.dtype})",
        "parameters": f"{num_parameters(engine.module):,} ({trained:,} trained)",
        "layers": f"{len(kinds)} ({linear} linear, {len(kinds) - linear} softmax)",
        "mesh": f"dp {mesh.dp} x ring {mesh.ring} x ulysses {mesh.ulysses} on {mesh.device.type}",
        "ZeRO stage": str(engine.zero_optimization_stage()),
        "steps": f"{first_step} taken, {stages[-1].last_step} in all",
    }
    for stage in stages:
        sequences = stage.micro_batch_size * stage.gradient_accumulation_steps * mesh.dp
        tokens = f"{sequences * stage.seq_length:,} tokens per step"
        rows[f"steps {stage.first_step}-{stage.last_step}"] = (
            f"{tokens} ({sequences} sequences of {stage.seq_length:,})"
        )
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def generate(directory: Path, recipe: Recipe) -> str:
    """The recipe's prompt and how the exported model continues it, greedily."""
    ours = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(directory, **ours)
    model = AutoModelForCausalLM.from_pretrained(directory, **ours)
    prompt = tokenizer(recipe.generate_prompt, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=recipe.max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
