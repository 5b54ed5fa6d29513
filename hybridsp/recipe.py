"""A recipe: everything that decides a training run, in one YAML file.

A run is a pure function of its recipe, its data and the number of ranks. `load_recipe` reads the
file, lays `key=value` overrides from the command line over it and checks every key, type and range
before a process group exists, so that a typing error costs a second and not a place in the queue.
Paths are relative to the directory the command is started in.

`deepspeed_config` then completes a DeepSpeed configuration with what the recipe says (batch size,
precision, optimizer, schedule). Each number lives in one place: a DeepSpeed file that contradicts
the recipe is an error, not a silent override, and so is a key that DeepSpeed never reads.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, ValidationError
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from hybridsp.mesh import SPMesh


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Count = Annotated[StrictInt, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


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

    output_dir: str
    """Directory for metrics, checkpoints and the trained model (`output_dir/model`)."""

    seq_length: Count
    """Tokens per packed sequence, before it is cut over the sequence-parallel ranks."""

    micro_batch_size: Count = 1
    """Sequences per data-parallel rank in one forward pass."""

    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per optimizer step."""

    max_steps: Count
    """Optimizer steps in the whole run, those before a resume included."""

    learning_rate: Annotated[Number, Field(gt=0)]
    """Peak learning rate of AdamW."""

    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly to its peak."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: `cosine` or `linear` decay towards zero, or `constant`."""

    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, per unit of learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment, per optimizer step."""

    seed: Annotated[StrictInt, Field(ge=0)] = 0
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

    activation_checkpointing: StrictBool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""

    eval_every: Count | None = None
    """Optimizer steps between evaluations. None: only before the first and after the last step."""

    save_every: Count | None = None
    """Optimizer steps between checkpoints; the last step is saved too. None: no checkpoints."""

    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""

    log_every: Count = 1
    """Optimizer steps between rows in the metrics files."""

    resume: str = "auto"
    """`auto`: from the latest checkpoint in `output_dir` if there is one. `never`: from `model`;
    `output_dir` must hold no checkpoints then. Else: the directory of the checkpoint to resume."""

    generate_prompt: str | None = None
    """Text that the trained model continues at the end. None: nothing is generated."""

    max_new_tokens: Count = 64
    """Tokens to generate after `generate_prompt`."""

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.max_steps:
            remedy = f"must be less than max_steps = {self.max_steps}"
            raise ValueError(f"warmup_steps = {self.warmup_steps} {remedy}")
        if self.eval_every and not self.eval_data:
            raise ValueError(
                f"eval_every = {self.eval_every} needs eval_data: name it, or drop this"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def check_files(self) -> None:
        """Check that the files the recipe names are there.

        Raises:
            ValueError: a file is missing; the message names the key, the path and the remedy.
        """
        if not (Path(self.model) / "config.json").is_file():
            remedy = "download the checkpoint first (hf download NAME --local-dir DIRECTORY)"
            raise ValueError(f"model = {self.model!r} holds no config.json: {remedy}")
        for name in ("data", "eval_data"):
            pattern = getattr(self, name)
            if pattern is not None and not glob(pattern, recursive=True):
                raise ValueError(f"{name} = {pattern!r} matches no file from {Path.cwd()}")
        if self.resume not in ("auto", "never") and not Path(self.resume).is_dir():
            remedy = "write auto, never, or the directory of a checkpoint"
            raise ValueError(f"resume = {self.resume!r} is no directory: {remedy}")


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
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of recipe keys to values, as `model: PATH`")
    known = [field.name for field in dataclasses.fields(Recipe)]
    _refuse_unknown(settings, known, f"{path}: unknown key")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form key=value")
        _refuse_unknown([key], known, "command line: unknown key")
        settings[key] = yaml.safe_load(value)
    try:
        recipe = Recipe(**settings)
        recipe.check_files()
    except ValidationError as error:
        raise ValueError(f"{path}: {_describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe


def deepspeed_config(recipe: Recipe, mesh: SPMesh) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Starts from `recipe.deepspeed`, where "auto" means the same as leaving the key out, and fills in
    what the recipe decides. AdamW is PyTorch's (fused on a GPU), which needs no compiler, and
    DeepSpeed's CPUAdam where the optimizer is offloaded from a GPU.

    Args:
        recipe: the run's settings.
        mesh: its degrees and device.

    Returns:
        What `hybridsp.initialize` takes as `config`.

    Raises:
        ValueError: the configuration cannot be read, contradicts the recipe, or holds a key or
            value that DeepSpeed does not take.
    """
    config, source = _read_deepspeed(recipe.deepspeed)

    def fill(path: str, value: Any, field: str) -> None:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"{source}: {name} = {section!r} must be a mapping")
        if key in section and not _equal(section[key], value):
            raise ValueError(
                f"{source}: {path} = {section[key]!r} contradicts the recipe's {field}, which "
                f"makes it {value!r}: delete it there, the recipe decides"
            )
        section[key] = value

    micro_batch, accumulation = recipe.micro_batch_size, recipe.gradient_accumulation_steps
    fill("train_micro_batch_size_per_gpu", micro_batch, "micro_batch_size")
    fill("gradient_accumulation_steps", accumulation, "gradient_accumulation_steps")
    if "train_batch_size" in config:
        fill("train_batch_size", micro_batch * accumulation * mesh.dp, "batch sizes")
    bf16 = "bfloat16" if "bfloat16" in config else "bf16"
    fill(f"{bf16}.enabled", recipe.dtype == "bfloat16", "dtype")
    if "fp16" in config:
        fill("fp16.enabled", False, "dtype")
    fill("optimizer.type", "AdamW", "optimizer (always AdamW)")
    fill("optimizer.params.lr", recipe.learning_rate, "learning_rate")
    fill("optimizer.params.betas", list(recipe.betas), "betas")
    fill("optimizer.params.weight_decay", recipe.weight_decay, "weight_decay")
    for key, value in _scheduler(recipe).items():
        fill(f"scheduler.{key}", value, "schedule")
    offload = _parse_deepspeed(config, source).zero_config.offload_optimizer
    offloads = offload is not None and offload.device != "none"
    _choose_adam(config, offloads, on_gpu=mesh.device.type == "cuda")
    return config


def first_iteration(recipe: Recipe) -> int:
    """Where DeepSpeed's schedule is to stand for the first optimizer step.

    Left alone, DeepSpeed's schedulers give the first two steps a learning rate of 0. Call
    `engine.lr_scheduler.step(first_iteration(recipe))` on a fresh engine, and step s (from 1) of w
    warm-up steps gets s/w of the peak. Their shortest warm-up is 2 steps; a shorter one starts
    behind it.
    """
    return 1 if recipe.warmup_steps >= 2 else 2


def _scheduler(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's schedule for this recipe, so that the last step's rate is small but not zero."""
    warmup = {
        "params.warmup_num_steps": max(2, recipe.warmup_steps),
        "params.warmup_type": "linear",
    }
    linear = {"params.warmup_max_lr": recipe.learning_rate, **warmup}
    end = first_iteration(recipe) + recipe.max_steps
    if recipe.schedule == "constant":
        return {"type": "WarmupLR", **linear}
    if recipe.schedule == "linear":
        return {"type": "WarmupDecayLR", "params.total_num_steps": end, **linear}
    cosine = {"params.total_num_steps": end + 1, "params.cos_min_ratio": 0.0}
    return {"type": "WarmupCosineLR", **cosine, **warmup}


def _choose_adam(config: dict[str, Any], offloads: bool, on_gpu: bool) -> None:
    if offloads and on_gpu:
        return
    params = config["optimizer"]["params"]
    if params.setdefault("torch_adam", True) and on_gpu:
        params.setdefault("fused", True)
    if offloads and params["torch_adam"]:
        # Without a GPU nothing is offloaded in truth; CPUAdam would only cost its compilation.
        config.setdefault("zero_force_ds_cpu_optimizer", False)


def _read_deepspeed(value: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The user's DeepSpeed configuration without its "auto" values, and where it came from."""
    if isinstance(value, Mapping):
        return _without_auto(value), "deepspeed"
    shipped = resources.files("hybridsp.ds_configs")
    names = sorted(f.name[:-5] for f in shipped.iterdir() if f.name.endswith(".json"))
    if value in names:
        text = (shipped / f"{value}.json").read_text(encoding="utf-8")
    elif Path(value).is_file():
        text = Path(value).read_text(encoding="utf-8")
    else:
        remedy = f"is neither a JSON file nor a shipped configuration ({', '.join(names)})"
        raise ValueError(f"deepspeed = {value!r} {remedy}")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed = {value!r} is no valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed = {value!r} must hold a JSON object")
    return _without_auto(config), f"deepspeed = {value!r}"


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in config.items()
        if value != "auto"
    }


class _Lookups(dict):
    """A dictionary that notes which keys its reader asks for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.seen: set[str] = set()

    def __copy__(self) -> _Lookups:
        return self

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def _parse_deepspeed(config: Mapping[str, Any], source: str) -> Any:
    """DeepSpeed's own view of the configuration; a key that it never asks for is a typing error.

    DeepSpeed itself ignores unknown top-level keys, and keeps no list of the known ones.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    lookups = _Lookups({k: v for k, v in config.items() if k != "train_batch_size"})
    try:
        parsed = DeepSpeedConfig(lookups)
    except (DeepSpeedConfigError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{source}: DeepSpeed refuses it: {_one_line(error)}") from error
    _refuse_unknown(config, lookups.seen, f"{source}: unknown DeepSpeed key")
    return parsed


def _describe(error: ValidationError) -> str:
    """All that pydantic found wrong with a recipe, on one line."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"{name} is missing")
        else:  # an error of __post_init__ has no location, and names its field itself
            lines.append(f"{name} = {item['input']!r}: {message}" if name else message)
    return "; ".join(lines)


def _refuse_unknown(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} {key!r}; {hint}")


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return bool(theirs == ours)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = ["Recipe", "deepspeed_config", "first_iteration", "load_recipe"]
