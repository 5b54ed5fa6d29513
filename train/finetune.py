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
import contextlib
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridsp
from hybridsp.checkpoint import export_pretrained, load_checkpoint, save_checkpoint
from hybridsp.data import PackedLoader, load_documents, pack_documents
from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.launch import rank_from_environment
from hybridsp.mesh import SPMesh
from hybridsp.metrics import RunLogger
from hybridsp.pretrained import check_safetensors, load_causal_lm
from hybridsp.recipe import Recipe, load_recipe, one_line


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

        tokenizer, model = mesh.on_every_rank(load_pretrained, recipe)
        num_parameters = model.num_parameters()
        mesh.on_every_rank(hybridsp.parallelize, model, mesh)
        train_loader, eval_batches = mesh.on_every_rank(load_data, recipe, tokenizer, mesh)
        engine = hybridsp.initialize(model, mesh, config)
        engine.lr_scheduler.step(first_iteration(recipe))
        first_step = resume(recipe, mesh, engine, train_loader)
        if mesh.rank == 0:
            print(describe(recipe, mesh, engine, num_parameters, first_step), flush=True)

        log = mesh.on_every_rank(open_log, recipe, mesh, first_step)
        train(recipe, mesh, engine, train_loader, eval_batches, log, first_step)
        log.close()

        exported = export_pretrained(engine, mesh, Path(recipe.output_dir) / "model", tokenizer)
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
    loader: PackedLoader,
    eval_batches: list[dict[str, Any]],
    log: RunLogger,
    first_step: int,
) -> None:
    """Take the steps behind `first_step`; log, evaluate and save as often as the recipe says."""
    if eval_batches and first_step == 0:
        log.log_evaluation(0, hybridsp.eval_step(engine, eval_batches))

    def due(step: int, every: int | None) -> bool:
        return step == recipe.max_steps or (every is not None and step % every == 0)

    for step in range(first_step + 1, recipe.max_steps + 1):
        start = time.perf_counter()
        learning_rate = engine.get_lr()[0]
        micro_batches = [
            hybridsp.shard_batch(batch, mesh)
            for batch in itertools.islice(loader, recipe.gradient_accumulation_steps)
        ]
        result = hybridsp.train_step(engine, micro_batches)
        if due(step, recipe.log_every):
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
        if eval_batches and due(step, recipe.eval_every):
            log.log_evaluation(step, hybridsp.eval_step(engine, eval_batches))
        if recipe.save_every is not None and due(step, recipe.save_every):
            state = {"step": step, "data": loader.state_dict()}
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


def load_pretrained(recipe: Recipe) -> tuple[Any, Any]:
    """The tokenizer and the model of the recipe's checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    except Exception as error:  # tokenizers raises plain Exceptions, which name no file
        raise ValueError(f"the tokenizer of {recipe.model} cannot be read: {error}") from error
    check_safetensors(recipe.model)
    model = load_causal_lm(recipe.model, dtype=recipe.torch_dtype)
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable()
    return tokenizer, model


def load_data(
    recipe: Recipe, tokenizer: Any, mesh: SPMesh
) -> tuple[PackedLoader, list[dict[str, Any]]]:
    """The endless training batches, and this rank's part of one pass over the evaluation data.

    Evaluation leaves out sequences at the end that are too few for all data-parallel ranks.
    """

    def loader(source: str, shuffle: bool) -> PackedLoader:
        # The first rank packs, behind a lock, and the others read what it wrote.
        return PackedLoader(
            pack_documents(load_documents(source), tokenizer, recipe.seq_length),
            dp_rank=mesh.dp_rank,
            dp=mesh.dp,
            micro_batch_size=recipe.micro_batch_size,
            seed=recipe.seed,
            shuffle=shuffle,
        )

    train_loader = loader(recipe.data, shuffle=True)
    if recipe.eval_data is None:
        return train_loader, []
    held_out = loader(recipe.eval_data, shuffle=False)
    per_step = recipe.micro_batch_size * mesh.dp
    steps = held_out.steps_per_epoch
    if recipe.eval_sequences is not None:
        steps = min(steps, -(-recipe.eval_sequences // per_step))
    one_pass = itertools.islice(held_out, steps)
    return train_loader, [hybridsp.shard_batch(batch, mesh) for batch in one_pass]


def resume(recipe: Recipe, mesh: SPMesh, engine: Any, loader: PackedLoader) -> int:
    """Restore a checkpoint as the recipe says; returns the optimizer steps already taken."""
    state = load_checkpoint(engine, mesh, recipe.output_dir, recipe.resume)
    if state is None:
        return 0
    mesh.on_every_rank(loader.load_state_dict, state["data"])
    return state["step"]


def open_log(recipe: Recipe, mesh: SPMesh, first_step: int) -> RunLogger:
    """The run's record, which only rank 0 writes."""
    return RunLogger(recipe.output_dir, recipe.max_steps, mesh.rank == 0, first_step)


def describe(
    recipe: Recipe, mesh: SPMesh, engine: Any, num_parameters: int, first_step: int
) -> str:
    """What is about to be trained, and on what."""
    config = engine.module.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = kinds.count("linear_attention")
    sequences = recipe.micro_batch_size * recipe.gradient_accumulation_steps * mesh.dp
    rows = {
        "model": f"{recipe.model} ({type(engine.module).__name__}, {recipe.dtype})",
        "parameters": f"{num_parameters:,}",
        "layers": f"{len(kinds)} ({linear} linear, {len(kinds) - linear} softmax)",
        "mesh": f"dp {mesh.dp} x ring {mesh.ring} x ulysses {mesh.ulysses} on {mesh.device.type}",
        "ZeRO stage": str(engine.zero_optimization_stage()),
        "tokens per step": f"{sequences * recipe.seq_length:,} ({sequences} sequences)",
        "steps": f"{first_step} taken, {recipe.max_steps} in all",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def generate(directory: Path, recipe: Recipe) -> str:
    """The recipe's prompt and how the exported model continues it, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer(recipe.generate_prompt, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=recipe.max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def keep_quiet(is_main: bool) -> None:
    """Let only rank 0 speak, and keep libraries from warning about each other."""
    # DeepSpeed 0.19.8 calls functions that torch 2.13 is about to rename, twice per step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed's schedulers warn about what their own constructors do.
    hide = "Attempting to get learning rate from scheduler before it has started"
    deepspeed_logger = logging.getLogger("DeepSpeed")
    deepspeed_logger.addFilter(lambda record: hide not in record.getMessage())
    if is_main:
        return
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # A filter, because DeepSpeed sets its logger's level when it is imported, later on.
    deepspeed_logger.addFilter(lambda record: record.levelno >= logging.ERROR)


@contextlib.contextmanager
def errors_of_users(*, show_traceback: bool) -> Iterator[None]:
    """Turn a ValueError into one line of rank 0 and exit code 2."""
    try:
        yield
    except ValueError as error:
        if show_traceback:
            raise
        rank = rank_from_environment().rank
        if rank > 0:
            # An error of all ranks is told by rank 0, and the launcher ends the others meanwhile.
            # One that only this rank met would otherwise not be told by anyone.
            time.sleep(3)
        whose = "error" if rank == 0 else f"error on rank {rank}"
        print(f"{whose}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
