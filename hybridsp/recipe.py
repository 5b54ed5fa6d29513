"""A recipe: everything that decides a training run, in one YAML file.

A run is a pure function of its recipe, its data and the number of ranks. `load_recipe` reads the
file, lays `key=value` overrides from the command line over it and checks every key, type and range
before a process group exists, so that a typing error costs a second and not a place in the queue.
Paths are relative to the directory the command is started in.

`hybridsp.deepspeed_config` turns it into DeepSpeed's configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from hybridsp.recipe_checks import check_files, one_line, refuse_unknown
from hybridsp.sizes import parse_size
from hybridsp.untrusted import MAX_YAML_BYTES, parse_yaml, read_text, shown

# Boundaries of documents are int32, as the kernels take them.
MOST = 2**31 - 1


def _read_size(value: Any) -> Any:
    """The number that text such as `128K` stands for; other values as they are."""
    return parse_size(value) if isinstance(value, str) else value


def _size_or_other(value: Any) -> Any:
    """As `_read_size`; what it cannot read is left to the field's own check."""
    with suppress(ValueError):
        return _read_size(value)
    return value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Count = Annotated[StrictInt, Field(ge=1, le=MOST)]
Tokens = Annotated[StrictInt, BeforeValidator(_read_size), Field(ge=1, le=MOST)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
# Three years; what keeps time counts nanoseconds in 64 bits.
Seconds = Annotated[Number, Field(gt=0, le=1e8)]
SECTION = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class StageKeys:
    """One entry of `Recipe.stages`. What it leaves out is the recipe's, or the stage's before."""

    seq_length: Tokens
    """Tokens per packed sequence in this stage."""

    max_steps: Count
    """Optimizer steps of this stage."""

    micro_batch_size: Count | None = None
    """Sequences per data-parallel rank in one forward pass. None: the recipe's."""

    gradient_accumulation_steps: Count | None = None
    """Forward and backward passes per optimizer step. None: the recipe's."""

    learning_rate: Positive | None = None
    """Peak learning rate in this stage: the schedule, which spans the whole run, times this over
    the recipe's `learning_rate`. None: the recipe's."""

    rope_parameters: dict[str, Any] | None = None
    """From this stage on, laid over the model's `rope_parameters` (`rope_theta`, `factor`, ...);
    with a `rope_type` in it, in their place, `rope_theta` excepted. None: as before."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class LoraKeys:
    """The section `Recipe.lora` (LoRA, arXiv:2106.09685)."""

    r: Count = 16
    """Rank of the update of each weight."""

    alpha: Positive = 32.0
    """The update is multiplied by alpha / r."""

    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    """Names of the linear modules to adapt, in every decoder layer that has them."""

    dropout: Fraction = 0.0
    """Of the adapters' input, in training. Its mask depends on how the sequence is cut, so with
    more than 0 two sequence-parallel degrees train alike, not the same."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run. Keys of the YAML file are the names of these fields.

    Raises:
        ValueError: a value is of the wrong type or out of its range, or two contradict each other.
    """

    model: str
    """Directory of a Hugging Face checkpoint with its tokenizer."""

    data: str
    """Training documents: a file or a glob pattern."""

    eval_data: str | None = None
    """Held-out documents, a file or a glob pattern: evaluated before the first and after the last
    step. None: no evaluation."""

    eval_sequences: Count | None = None
    """Sequences of `eval_data` to evaluate, the first ones. None: all of them."""

    output_dir: str
    """Directory for metrics, checkpoints and the trained model (`output_dir/model`)."""

    stages: Annotated[list[StageKeys], Field(min_length=1)] | None = None
    """A curriculum of lengths: stages that follow each other in one run. None: one stage."""

    seq_length: Tokens
    """Tokens per packed sequence, before it is cut over the sequence-parallel ranks: 131072, or
    128K. With `stages` it is their longest, and may be left out."""

    micro_batch_size: Count = 1
    """Sequences per data-parallel rank in one forward pass."""

    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per optimizer step."""

    max_steps: Count
    """Optimizer steps in the whole run, those before a resume included. With `stages` it is their
    sum, and may be left out."""

    learning_rate: Positive
    """Peak learning rate of AdamW."""

    warmup_steps: Annotated[StrictInt, Field(ge=0, le=MOST)] = 0
    """Optimizer steps over which the learning rate rises linearly to its peak."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: `cosine` or `linear` decay towards zero, or `constant`."""

    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, per unit of learning rate."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment, per optimizer step."""

    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the data and of every random generator."""

    ring: Count = 1
    """Ranks among which keys and values travel in softmax layers. With `ulysses` it gives the
    sequence-parallel degree `ring * ulysses`; data parallelism is what remains of the job."""

    ulysses: Count = 1
    """Ranks among which tokens are traded for heads in softmax layers."""

    deepspeed: str | dict[str, Any] = "zero3"
    """DeepSpeed configuration: the name of a shipped one, the path of a JSON file, or a mapping."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations, `float32` or `bfloat16`; the optimizer works in
    float32."""

    lora: LoraKeys | None = None
    """Train low-rank updates of some weights and nothing else. None: train every weight."""

    activation_checkpointing: StrictBool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""

    keep_attention: StrictBool = True
    """Where activations are recomputed, keep softmax attention's output instead of computing it
    again."""

    offload_activations: StrictBool = False
    """Keep in the host's memory what activation checkpointing keeps of each layer."""

    tiled_mlp: Tokens | None = None
    """Tokens that go through a layer's MLP at once. None: all of a rank's."""

    self_check: StrictBool = True
    """Prove before the first step, on this model and mesh, that sequence parallelism is exact."""

    eval_every: Count | None = None
    """Optimizer steps between evaluations. None: only before the first and after the last step."""

    save_every: Count | None = None
    """Optimizer steps between checkpoints; the last step is saved too. None: no checkpoints."""

    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""

    async_save: StrictBool = False
    """Copy checkpoints to the host's memory and write them while training goes on."""

    log_every: Count = 1
    """Optimizer steps between rows in the metrics files."""

    max_bad_steps: Count = 10
    """Optimizer steps in a row whose loss or gradient is not finite, which are left out, after
    which the run ends; the batch of each is kept in `output_dir/bad_steps`."""

    hang_timeout: Seconds = 900.0
    """Seconds without a layer begun, in training, after which the job ends with a report of where
    each rank stands."""

    resume: str = "auto"
    """`auto`: from the latest checkpoint in `output_dir` if there is one. `never`: from `model`;
    `output_dir` must hold no checkpoints then. Else: the directory of the checkpoint to resume."""

    generate_prompt: str | None = None
    """Text that the trained model continues at the end. None: nothing is generated."""

    max_new_tokens: Count = 64
    """Tokens to generate after `generate_prompt`."""

    @model_validator(mode="before")
    @classmethod
    def _follow_from_stages(cls, arguments: Any) -> Any:
        """Fill in what `stages` decide; a stage that is none is left to the fields' own checks."""
        settings = arguments.kwargs
        stages = settings.get("stages")
        if not (isinstance(stages, list) and all(isinstance(one, Mapping) for one in stages)):
            return arguments
        for name, combine in (("seq_length", max), ("max_steps", sum)):
            values = [_size_or_other(one.get(name)) for one in stages]
            if values and all(type(value) is int for value in values):
                follows = combine(values)
                if settings.get(name) is None:
                    settings[name] = follows
                elif _size_or_other(settings[name]) != follows:
                    raise ValueError(
                        f"{name} = {settings[name]!r}, but stages make it {follows}: leave it out, "
                        f"or on the command line write {name}=null"
                    )
        return arguments

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.max_steps:
            remedy = f"must be less than max_steps = {self.max_steps}"
            raise ValueError(f"warmup_steps = {self.warmup_steps} {remedy}")
        if self.stages and self.seed + len(self.stages) > 2**32:
            remedy = f"must leave room for the seeds of {len(self.stages)} stages below 2**32"
            raise ValueError(f"seed = {self.seed} {remedy}")
        if self.offload_activations and not self.activation_checkpointing:
            remedy = "set it to true, or drop this"
            raise ValueError(f"offload_activations needs activation_checkpointing: {remedy}")
        if self.async_save and self.save_every is None:
            raise ValueError("async_save needs save_every: set it, or drop this")
        for name in ("eval_every", "eval_sequences"):
            if getattr(self, name) and not self.eval_data:
                raise ValueError(
                    f"{name} = {getattr(self, name)} needs eval_data: name it, or drop this"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def check_files(self) -> None:
        """Check that the files the recipe names are there.

        Raises:
            ValueError: a file is missing, or `output_dir` cannot be written or is where the model
                is; the message names the key, the path and the remedy.
        """
        check_files(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it and the files it names.

    Args:
        path: a YAML file whose keys are fields of `Recipe`.
        overrides: `key=value` strings, values in YAML syntax; they replace the file's.

    Returns:
        The checked recipe.

    Raises:
        ValueError: the file is missing or no YAML mapping, a key is unknown or missing, a value is
            of the wrong type or out of range, or a file that the recipe names is missing.
    """
    settings = parse_yaml(read_text(path, MAX_YAML_BYTES, "the recipe "), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of recipe keys to values, as `model: PATH`")
    known = [field.name for field in dataclasses.fields(Recipe)]
    refuse_unknown(settings, known, f"{path}: unknown key")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {shown(override)} must have the form key=value")
        refuse_unknown([key], known, "command line: unknown key")
        settings[key] = parse_yaml(value, f"override {shown(override)}")
    try:
        recipe = Recipe(**settings)
        recipe.check_files()
    except ValidationError as error:
        raise ValueError(f"{path}: {describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe


def describe(error: ValidationError) -> str:
    """All that pydantic found wrong with a recipe, on one line."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{name} is missing")
        elif item["type"] == "unexpected_keyword_argument":  # a key of a section
            section = {"lora": LoraKeys, "stages": StageKeys}[str(item["loc"][0])]
            known = ", ".join(field.name for field in dataclasses.fields(section))
            lines.append(f"{name} is unknown; known: {known}")
        else:  # an error of __post_init__ has no location, and names its field itself
            lines.append(f"{name} = {shown(item['input'])}: {message}" if name else message)
    return "; ".join(lines)


__all__ = [
    "LoraKeys",
    "Recipe",
    "StageKeys",
    "describe",
    "load_recipe",
    "one_line",
    "refuse_unknown",
]
