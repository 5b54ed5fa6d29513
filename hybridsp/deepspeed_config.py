"""From a recipe to DeepSpeed's configuration: one source for every number.

The recipe says how to train, a DeepSpeed JSON how to shard. Batch sizes, precision, optimizer and
schedule stand in the recipe alone: a JSON that contradicts it is an error, not a silent override,
and so is a key that DeepSpeed never reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridsp.recipe import Recipe, one_line, refuse_unknown
from hybridsp.untrusted import MAX_JSON_BYTES, parse_json, read_text, redact, shown

if TYPE_CHECKING:
    from hybridsp.mesh import SPMesh


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
    config, source = read_deepspeed(recipe.deepspeed)

    def fill(path: str, value: Any, field: str) -> None:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"{source}: {name} = {shown(section)} must be a mapping")
        if key in section and not _equal(section[key], value):
            raise ValueError(
                f"{source}: {path} = {shown(section[key])} contradicts the recipe's {field}, which "
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
    offload = parse_deepspeed(config, source).zero_config.offload_optimizer
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


def prefer_torch_adam(config: dict[str, Any]) -> bool:
    """Let an Adam be PyTorch's, which needs no compiler, where the configuration says nothing.

    Returns:
        Whether the optimizer is PyTorch's Adam.
    """
    optimizer = config.get("optimizer", {})
    if str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return False
    return bool(optimizer.setdefault("params", {}).setdefault("torch_adam", True))


def skip_inference_op() -> None:
    """Keep DeepSpeed on a CPU from compiling an op when it first communicates.

    Only its inference uses it, and compiling takes minutes and a compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _choose_adam(config: dict[str, Any], offloads: bool, on_gpu: bool) -> None:
    if offloads and on_gpu:
        return
    torch_adam = prefer_torch_adam(config)
    if torch_adam and on_gpu:
        config["optimizer"]["params"].setdefault("fused", True)
    if offloads and torch_adam:
        # Without a GPU nothing is offloaded in truth; CPUAdam would only cost its compilation.
        config.setdefault("zero_force_ds_cpu_optimizer", False)


def read_deepspeed(value: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The user's DeepSpeed configuration without its "auto" values, and where it came from.

    Args:
        value: the configuration, its JSON file, or the name of a shipped one.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    if isinstance(value, Mapping):
        return _without_auto(value), "deepspeed"
    shipped = resources.files("hybridsp.ds_configs")
    names = sorted(f.name[:-5] for f in shipped.iterdir() if f.name.endswith(".json"))
    if value in names:
        text = (shipped / f"{value}.json").read_text(encoding="utf-8")
    elif _is_file(value):
        text = read_text(value, MAX_JSON_BYTES)
    else:
        remedy = f"is neither a JSON file nor a shipped configuration ({', '.join(names)})"
        raise ValueError(f"deepspeed = {shown(value)} {remedy}")
    config = parse_json(text, f"deepspeed = {value!r}")
    return _without_auto(config), f"deepspeed = {value!r}"


def _is_file(path: str) -> bool:
    try:
        return path.isprintable() and Path(path).is_file()
    except OSError:  # no name for a file, as one of a thousand letters
        return False


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


def parse_deepspeed(config: Mapping[str, Any], source: str) -> Any:
    """DeepSpeed's own view of a configuration; a key that it never asks for is a typing error.

    DeepSpeed itself ignores unknown top-level keys, and keeps no list of the known ones.

    Args:
        config: without "auto" values. A train_batch_size is not looked at, as DeepSpeed would
            have to know the mesh.
        source: what to call the configuration in an error.

    Raises:
        ValueError: a key or a value that DeepSpeed does not take.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    zero = config.get("zero_optimization")
    what = f"{source}: DeepSpeed refuses it: unknown key in zero_optimization"
    refuse_unknown(zero if isinstance(zero, Mapping) else (), known, what)
    _refuse_secrets(config, source)
    lookups = _Lookups({k: v for k, v in config.items() if k != "train_batch_size"})
    try:
        parsed = DeepSpeedConfig(lookups)
    except Exception as error:  # of every kind, where a value is of a type it does not expect
        reason = redact(one_line(error))[:1000] or type(error).__name__
        raise ValueError(f"{source}: DeepSpeed refuses it: {reason}") from error
    refuse_unknown(config, lookups.seen, f"{source}: unknown DeepSpeed key")
    return parsed


def _refuse_secrets(config: Mapping[str, Any], source: str) -> None:
    """DeepSpeed prints its whole configuration, so it is no place for an access key."""
    comet = config.get("comet")
    if isinstance(comet, Mapping) and comet.get("api_key") is not None:
        raise ValueError(
            f"{source}: comet.api_key would be printed in every log: remove it, and set the "
            "environment variable COMET_API_KEY"
        )


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return bool(theirs == ours)


__all__ = [
    "deepspeed_config",
    "first_iteration",
    "parse_deepspeed",
    "prefer_torch_adam",
    "skip_inference_op",
]
