"""The plan as files: a DeepSpeed configuration and a recipe for `train/finetune.py`.

The DeepSpeed configuration is a shipped one (`hybridsp.ds_configs`), so that what the plan was
computed for is what is tested. What a plan cannot know (data, learning rate, steps) stands in the
recipe with values to start from, marked as such.
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hybridsp.planner.model import ModelShape
from hybridsp.planner.search import Plan
from hybridsp.planner.setting import Setting
from hybridsp.recipe import Recipe

DEEPSPEED_FILE, RECIPE_FILE = "deepspeed.json", "recipe.yaml"
DTYPES: dict[int, Any] = {2: "bfloat16", 4: "float32"}

# What the user decides, not the plan.
TO_CHOOSE: dict[str, Any] = {
    "data": "data/*.jsonl",
    "max_steps": 100,
    "learning_rate": 2e-5,
    "warmup_steps": 10,
}


def write_files(plan: Plan, out: str | Path) -> list[Path]:
    """Write the DeepSpeed configuration and the recipe of a plan.

    Args:
        plan: the plan.
        out: a folder, made if it is not there.

    Returns:
        The files.

    Raises:
        ValueError: one of them is there already, or the model is a preset.
    """
    if plan.job.model.is_preset:
        raise ValueError(
            f"MODEL = {plan.job.model.path} is a shape without weights, so there is no recipe to "
            "train it: leave --out out, or give a checkpoint"
        )
    out = Path(out)
    config_file, recipe_file = out / DEEPSPEED_FILE, out / RECIPE_FILE
    for file in (config_file, recipe_file):
        if file.exists():
            raise ValueError(f"{file} exists: choose another --out, or remove it")
    recipe = recipe_of(plan, out)
    text = recipe_text(plan, recipe, out)
    out.mkdir(parents=True, exist_ok=True)
    config_file.write_text(shipped_config(plan.best.setting), encoding="utf-8")
    recipe_file.write_text(text, encoding="utf-8")
    return [config_file, recipe_file]


def config_name(setting: Setting) -> str:
    """The shipped DeepSpeed configuration of a setting."""
    return f"zero{setting.stage}" + ("_offload" if setting.offload_optimizer else "")


def shipped_config(setting: Setting) -> str:
    """Its text."""
    folder = resources.files("hybridsp.ds_configs")
    return (folder / f"{config_name(setting)}.json").read_text(encoding="utf-8")


def recipe_of(plan: Plan, out: Path) -> Recipe:
    """The recipe of a plan whose files are in `out`."""
    setting = plan.best.setting
    return Recipe(
        model=str(_checkpoint(plan.job.model, out)),
        output_dir=str(out / "run"),
        seq_length=plan.job.length,
        gradient_accumulation_steps=setting.accumulation,
        ring=setting.ring,
        ulysses=setting.ulysses,
        deepspeed=str(out / DEEPSPEED_FILE),
        dtype=DTYPES[setting.dtype_bytes],
        activation_checkpointing=setting.checkpointing,
        keep_attention=setting.keep_attention,
        offload_activations=setting.offload_activations,
        tiled_mlp=setting.tiled_mlp,
        **TO_CHOOSE,
    )


def convert_command(model: ModelShape, out: Path) -> str | None:
    """The command that makes the checkpoint to train, where it is not there yet."""
    if not _needs_conversion(model):
        return None
    # A GGUF file is trained as the hybrid that keeps all its layers softmax.
    layers = "1.0" if model.softmax_layers is None else model.softmax_layers
    target = _checkpoint(model, out)
    return f"hybridsp convert {_folder(model.path)} {target} --softmax-layers {layers}"


def recipe_text(plan: Plan, recipe: Recipe, out: Path) -> str:
    """The recipe as YAML, its lines in groups with a comment each."""
    known = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    cluster, setting = plan.job.cluster, plan.best.setting
    lines = [
        f"# Made by `hybridsp plan` for {cluster.gpus} x {cluster.gpu} "
        f"(dp {setting.dp} x ring {setting.ring} x ulysses {setting.ulysses}).",
        f"# Start on {cluster.gpus} ranks: deepspeed train/finetune.py {out / RECIPE_FILE}",
    ]
    command = convert_command(plan.job.model, out)
    if command is not None:
        lines.append(f"# The checkpoint has to be made first: {command}")
    groups = {
        "Yours to choose; these are values to start from": [*TO_CHOOSE, "output_dir"],
        "What the plan is about": ["model", "seq_length", "gradient_accumulation_steps"],
        "What the plan decided": [
            "ring",
            "ulysses",
            "deepspeed",
            "dtype",
            "activation_checkpointing",
            "keep_attention",
            "offload_activations",
            "tiled_mlp",
        ],
    }
    for comment, names in groups.items():
        lines += ["", f"# {comment}"]
        lines += [yaml.safe_dump({name: known[name]}).strip() for name in names]
    return "\n".join(lines) + "\n"


def _needs_conversion(model: ModelShape) -> bool:
    return model.softmax_layers is not None or model.is_gguf


def _folder(path: Path) -> Path:
    """Where the weights are that belong to a config."""
    return path.parent if path.suffix == ".json" else path


def _checkpoint(model: ModelShape, out: Path) -> Path:
    """The folder to train from: the model's own, or one that `hybridsp convert` is to write."""
    return out / "checkpoint" if _needs_conversion(model) else _folder(model.path)


__all__ = ["DEEPSPEED_FILE", "RECIPE_FILE", "convert_command", "write_files"]
