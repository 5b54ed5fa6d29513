"""Fine-tune a Hugging Face model on long sequences, cut over the ranks of a job.

    deepspeed train/finetune.py train/recipes/demo.yaml max_steps=100
    torchrun --nproc_per_node 4 train/finetune.py train/recipes/demo.yaml

`main` is the whole story, from top to bottom: the recipe says what is to be done, the mesh who does
it; the model is loaded, parallelized and handed to DeepSpeed; documents become packed batches; and
after the last step the result is an ordinary Hugging Face checkpoint, which rank 0 loads as anyone
would. A run that was stopped goes on from its latest checkpoint when it is started again.

An error that the user can mend ends the job with one line and exit code 2.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridsp
from hybridsp.checkpoint import export_pretrained, load_checkpoint, save_checkpoint
from hybridsp.curriculum import Stage, enter_stage, plan_stages, scale_rate, stage_of
from hybridsp.data import PackedLoader, load_documents, pack_documents
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.lora import add_lora, export_merged
from hybridsp.mesh import SPMesh
from hybridsp.metrics import RunLogger
from hybridsp.prepare import load_prepared, load_tokenizer
from hybridsp.pretrained import num_parameters
from hybridsp.recipe import Recipe, load_recipe
from hybridsp.train.console import errors_of_users, keep_quiet

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
        mesh = SPMesh(ring=recipe.ring, ulysses=recipe.ulysses)
        keep_quiet(is_main=mesh.rank == 0)
        transformers.set_seed(recipe.seed)
        config = mesh.on_every_rank(deepspeed_config, recipe, mesh)
        tokenizer = mesh.on_every_rank(load_tokenizer, recipe.model)
        model = load_prepared(recipe, mesh, config)
        if recipe.lora is not None:
            mesh.on_every_rank(add_lora, model, recipe.lora)
        stages = mesh.on_every_rank(plan_stages, recipe, model.config)
        data = mesh.on_every_rank(load_data, recipe, stages, tokenizer, mesh)
        engine = hybridsp.initialize(model, mesh, config, self_check=recipe.self_check)
        engine.lr_scheduler.step(first_iteration(recipe))
        torch.manual_seed(recipe.seed + mesh.rank)  # dropout: each rank has other tokens
        first_step = resume(recipe, mesh, engine, stages, data)
        if mesh.rank == 0:
            print(describe(recipe, mesh, engine, stages, first_step), flush=True)

        log = mesh.on_every_rank(open_log, recipe, mesh, first_step)
        train(recipe, mesh, engine, stages, data, log, first_step)
        log.close()

        exported = export(recipe, mesh, engine, tokenizer)
        engine.destroy()
        del engine, model
        dist.destroy_process_group()
        if mesh.rank == 0:
            print(f"{log.summary()}\nThe trained model is in {exported}", flush=True)
            if recipe.generate_prompt is not None:
                print("It continues the prompt:\n" + generate(exported, recipe), flush=True)


def train(
    recipe: Recipe,
    mesh: SPMesh,
    engine: Any,
    stages: list[Stage],
    data: list[StageData],
    log: RunLogger,
    first_step: int,
) -> None:
    """Take the steps behind `first_step`; log, evaluate and save as often as the recipe says.

    The last step of a stage is always logged, evaluated and saved, where that is done at all.
    """
    for stage, (loader, held_out) in zip(stages, data, strict=True):
        if stage.last_step <= first_step and stage is not stages[-1]:
            continue
        enter_stage(engine, stage)
        log.enter_stage(stage.number, stage.seq_length)
        eval_batches = mesh.on_every_rank(batches_of_one_pass, recipe, mesh, stage, held_out)
        if eval_batches and first_step == 0 and stage is stages[0]:
            log.log_evaluation(0, hybridsp.eval_step(engine, eval_batches))

        for step in range(max(first_step + 1, stage.first_step), stage.last_step + 1):

            def due(every: int | None, step: int = step, last: int = stage.last_step) -> bool:
                return step == last or (every is not None and step % every == 0)

            start = time.perf_counter()
            learning_rate = scale_rate(engine, stage)
            micro_batches = [
                hybridsp.shard_batch(batch, mesh)
                for batch in itertools.islice(loader, stage.gradient_accumulation_steps)
            ]
            result = hybridsp.train_step(engine, micro_batches)
            if due(recipe.log_every):
                log.log_step(
                    step,
                    loss=result.loss,
                    tokens=result.num_tokens,
                    labels=result.num_labels,
                    seconds=time.perf_counter() - start,
                    learning_rate=learning_rate,
                    grad_norm=result.grad_norm,
                )
            log.advance()
            if eval_batches and due(recipe.eval_every):
                log.log_evaluation(step, hybridsp.eval_step(engine, eval_batches))
            if recipe.save_every is not None and due(recipe.save_every):
                state = {
                    "step": step,
                    "stage": stage.number,
                    "data": loader.state_dict(),
                    "lora_alpha": recipe.lora and recipe.lora.alpha,
                }
                keep = recipe.keep_checkpoints
                save_checkpoint(engine, mesh, recipe.output_dir, step, state, keep=keep)
                log.draw()


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

    def loader(key: str, stage: Stage, shuffle: bool) -> PackedLoader:
        try:
            # The first rank packs, behind a lock, and the others read what it wrote.
            documents = load_documents(getattr(recipe, key))
            return PackedLoader(
                pack_documents(documents, tokenizer, stage.seq_length),
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
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer(recipe.generate_prompt, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=recipe.max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
