"""A curriculum of lengths: one run that trains short sequences first and long ones last.

A step costs more the longer its sequences are, and most of what a model has to learn about length
it learns from few of them. So a run may have stages, as 32K, then 128K, then 1M tokens. A stage
says how long sequences are, how many make up a step, how fast the model learns and how softmax
layers tell positions apart: a linear layer's state has no length, but a rotation by RoPE at a
position that was never trained means nothing, hence its frequencies are stretched at the boundary.
The mesh, the model, the optimizer's state and the learning rate's schedule go on across it.

A recipe without `stages` is a run of one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridsp.loss import TokenMean
from hybridsp.recipe import Recipe, StageKeys
from hybridsp.untrusted import shown

# Frequencies that depend on the length of a whole sequence, which no rank sees.
OF_THE_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, complete.

    Attributes:
        number: from 1.
        first_step, last_step: optimizer steps of the whole run, from 1, both included.
        seq_length: tokens per packed sequence.
        micro_batch_size: sequences per data-parallel rank in one forward pass.
        gradient_accumulation_steps: micro-batches per optimizer step.
        learning_rate_factor: peak learning rate over that of the schedule.
        rope_parameters: what the model's config is to say of RoPE; None to leave it as it is.
    """

    number: int
    first_step: int
    last_step: int
    seq_length: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    learning_rate_factor: float
    rope_parameters: dict[str, Any] | None


def plan_stages(recipe: Recipe, config: Any) -> list[Stage]:
    """The stages of a run, in order.

    Args:
        recipe: the run's settings.
        config: the model's configuration, which is not changed.

    Raises:
        ValueError: a stage's `rope_parameters` do not suit the model or sequence parallelism.
    """
    keys = recipe.stages or [StageKeys(seq_length=recipe.seq_length, max_steps=recipe.max_steps)]
    stages: list[Stage] = []
    rope, taken = None, 0
    for number, one in enumerate(keys, start=1):
        if one.rope_parameters is not None:
            try:
                rope = _rope_parameters(config, rope, one.rope_parameters)
            except ValueError as error:
                raise ValueError(f"stages.{number - 1}.rope_parameters: {error}") from error
        peak = recipe.learning_rate if one.learning_rate is None else one.learning_rate
        stage = Stage(
            number=number,
            first_step=taken + 1,
            last_step=taken + one.max_steps,
            seq_length=one.seq_length,
            micro_batch_size=one.micro_batch_size or recipe.micro_batch_size,
            gradient_accumulation_steps=(
                one.gradient_accumulation_steps or recipe.gradient_accumulation_steps
            ),
            learning_rate_factor=peak / recipe.learning_rate,
            rope_parameters=rope,
        )
        stages.append(stage)
        taken = stage.last_step
    return stages


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step `step`, from 1, belongs to; the last one for later steps."""
    return next((stage for stage in stages if step <= stage.last_step), stages[-1])


def enter_stage(engine: Any, stage: Stage) -> None:
    """Make an engine train as a stage says, from its next step on.

    Args:
        engine: made by `hybridsp.initialize`, between two optimizer steps.
        stage: its batch sizes and RoPE take effect here; the learning rate in `scale_rate`.
    """
    model, accumulation = engine.module, stage.gradient_accumulation_steps
    token_mean: TokenMean = model.token_mean
    # What DeepSpeed's setters write; they multiply by a number of ranks it has not with our mpu.
    engine._config.train_micro_batch_size_per_gpu = stage.micro_batch_size
    engine._config.gradient_accumulation_steps = accumulation
    engine._config.train_batch_size = stage.micro_batch_size * accumulation * token_mean.mesh.dp
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        # DeepSpeed's optimizers keep a copy, which those that offload gradients look at.
        engine.optimizer.gradient_accumulation_steps = accumulation
    # DeepSpeed takes the optimizer's step at its multiples.
    engine.micro_steps = 0
    token_mean.gradient_factor *= accumulation / token_mean.micro_batches
    token_mean.micro_batches = accumulation
    set_rope(model, stage.rope_parameters, stage.seq_length)


def scale_rate(engine: Any, stage: Stage) -> float:
    """Turn the schedule's learning rate of the step to come into the stage's; returns it.

    To be called once before each step: DeepSpeed's schedulers set the next rate after each.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] *= stage.learning_rate_factor
    return engine.get_lr()[0]


def set_rope(model: PreTrainedModel, parameters: dict[str, Any] | None, seq_length: int) -> None:
    """Change how a model rotates queries and keys, in place and in its config.

    Args:
        model: on any device, with RoPE or without.
        parameters: complete `rope_parameters`, as `plan_stages` makes them; None for those it has.
        seq_length: tokens per sequence from now on; `max_position_embeddings` grows to it.
    """
    rotary = _rotary_embeddings(model)
    configs = {id(part.config): part.config for part in (model, *rotary)}
    if parameters is None and model.config.max_position_embeddings >= seq_length:
        return
    for config in configs.values():
        if parameters is not None:
            config.rope_parameters = dict(parameters)
        config.max_position_embeddings = max(config.max_position_embeddings, seq_length)
    # Also where only the length grew: some kinds of RoPE make their factor of it.
    for module in rotary:
        # A new one knows everything that follows from the config. The old one stays where it is,
        # because DeepSpeed has hooked it.
        fresh = type(module)(module.config)
        for name, buffer in fresh.named_buffers():
            getattr(module, name).copy_(buffer)
        plain = {k: v for k, v in vars(fresh).items() if k[0] != "_" and k != "training"}
        vars(module).update(plain)


def _rotary_embeddings(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "config")]


def _rope_parameters(
    config: Any, before: dict[str, Any] | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """`changes` laid over what was in force, completed and checked by transformers."""
    before = before or getattr(config, "rope_parameters", None)
    softmax_rope = getattr(config, "softmax_rope", True)
    if not before or not (softmax_rope or getattr(config, "linear_rope", False)):
        raise ValueError(f"{config.model_type} has no layer with RoPE here: drop them")
    if empty := [name for name, value in changes.items() if value is None]:
        raise ValueError(f"{empty[0]} = None: give a value, or leave it out")
    kept = {"rope_theta": before["rope_theta"]} if "rope_type" in changes else before
    trial = deepcopy(config)
    trial.rope_parameters = {**kept, **changes}
    kind = trial.rope_parameters.get("rope_type", "default")
    if isinstance(kind, str) and any(word in kind for word in OF_THE_LENGTH):
        raise ValueError(
            f"rope_type = {kind!r}: its frequencies depend on the length of the whole sequence, "
            "which no rank sees; use linear, yarn or llama3"
        )
    if not isinstance(kind, str) or (kind != "default" and kind not in ROPE_INIT_FUNCTIONS):
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS} - {*OF_THE_LENGTH}))
        raise ValueError(f"rope_type = {shown(kind)} is unknown; known: {known}")
    _check_rope(trial, set(changes), kind)
    return trial.rope_parameters


def _check_rope(trial: Any, changed: set[str], kind: str) -> None:
    """Complete a config's `rope_parameters`, and see whether frequencies can be made of them."""

    def check_keys(_: str, received: set, required: set, *optional: set, **more: set) -> None:
        known = required.union(*optional, *filter(None, more.values()))
        if missing := required - received:
            needs = ", ".join(sorted(missing))
            raise ValueError(f"transformers refuses them: rope_type = {kind!r} needs {needs}")
        if unknown := changed & received - known - {"type"}:
            raise ValueError(
                f"{min(unknown)} is no parameter of rope_type = {kind!r}: drop it; known: "
                f"{', '.join(sorted(known))}"
            )

    # transformers warns of keys that it will not read; here they are errors.
    trial._check_received_keys = check_keys
    try:
        trial.standardize_rope_params()
        trial.validate_rope()
        theta = trial.rope_parameters["rope_theta"]
        frequencies, scale = torch.tensor(1.0 / theta), 1.0
        if kind != "default":
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](trial, torch.device("cpu"))
    except ValueError:
        raise
    except Exception as error:  # of every kind: it computes with what it is given
        raise ValueError(
            f"transformers refuses them ({type(error).__name__}: {error}); mend {sorted(changed)}"
        ) from error
    if not (frequencies.isfinite().all() and (frequencies > 0).all() and 0 < scale < float("inf")):
        raise ValueError(
            f"{shown(trial.rope_parameters)} give frequencies of 0 or without bound: "
            f"mend {', '.join(sorted(changed))}"
        )


__all__ = ["Stage", "enter_stage", "plan_stages", "scale_rate", "set_rope", "stage_of"]
