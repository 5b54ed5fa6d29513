"""One recipe for three phases: what they share, and a section for each.

    teacher: checkpoints/dense            # everything at the top is a key of a fine-tuning recipe,
    model: checkpoints/hybrid             # and holds for all phases ...
    data: corpus/train.jsonl
    output_dir: runs/hybrid
    align:    {seq_length: 4096, max_steps: 300, learning_rate: 1e-3}
    distill:  {seq_length: 4096, max_steps: 1000, learning_rate: 1e-4, temperature: 1.0}
    finetune: {stages: [...], learning_rate: 2e-5}     # ... unless a section says otherwise

A phase is a training run of its own: it starts from the checkpoint that the phase before it left,
has its own optimizer and schedule, and leaves a Hugging Face checkpoint itself. A phase that is not
named is passed over, and one whose result is there is over, which is all that resuming takes
between phases; inside one it is `hybridsp.checkpoint`'s.

    output_dir/
      align/ distill/ finetune/          each phase's metrics, checkpoints and pictures
      aligned/ distilled/ finetuned/     what each leaves
      summary.json recovery.png          all of them in one (`report.py`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from hybridsp.recipe import SECTION, Number, Positive, Recipe, Tokens, describe, refuse_unknown
from hybridsp.untrusted import MAX_YAML_BYTES, parse_yaml, read_text, shown

RESULTS = {"align": "aligned", "distill": "distilled", "finetune": "finetuned"}
# Phases follow each other by these, are one job, and are compared by the same held-out documents.
SHARED_ONLY = (
    "model",
    "output_dir",
    "resume",
    "ring",
    "ulysses",
    "hang_timeout",
    "eval_data",
    "eval_sequences",
)
# A phase learns every weight of what it is named for, and its result is a model, not an adapter.
# What is generated in the end is the last checkpoint's business.
NOT_HERE = ("lora", "generate_prompt", "max_new_tokens")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RunKeys:
    """What a recipe of phases has at the top beside the keys of a fine-tuning recipe."""

    teacher: str
    """Directory of the softmax checkpoint that `model` was converted from."""

    eval_seq_length: Tokens | None = None
    """Tokens per held-out sequence, in all phases alike, so that their losses can be compared.
    None: the first phase's `seq_length`."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class AlignKeys:
    """What `align` has beside the keys of a fine-tuning recipe: nothing."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DistillKeys:
    """What `distill` has beside the keys of a fine-tuning recipe."""

    temperature: Positive = 1.0
    """Both distributions are softened by it."""

    ce_weight: Annotated[Number, Field(ge=0)] = 0.0
    """The labels' cross-entropy is added to the divergence with this weight."""

    learns: Literal["all", "converted"] = "all"
    """`converted`: only the mixers of the layers that the conversion changed."""

    converted_learning_rate: Positive | None = None
    """Peak learning rate of those mixers. None: `learning_rate`, as all else."""

    def __post_init__(self) -> None:
        if self.learns == "converted" and self.converted_learning_rate is not None:
            raise ValueError(
                f"converted_learning_rate = {self.converted_learning_rate} beside learns = "
                "'converted': nothing else learns, so set learning_rate and drop this"
            )


OWN_KEYS: dict[str, Any] = {"align": AlignKeys, "distill": DistillKeys, "finetune": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase, complete.

    Attributes:
        name: `align`, `distill` or `finetune`.
        recipe: how it trains; `model` is what the phase before it leaves.
        keys: what only this phase has; None for `finetune`.
        result: the folder that its model appears in.
    """

    name: str
    recipe: Recipe
    keys: AlignKeys | DistillKeys | None
    result: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """A run of up to three phases.

    Attributes:
        teacher: directory of the softmax checkpoint.
        model: directory of what was converted from it.
        output_dir: of all phases.
        eval_seq_length: tokens per held-out sequence, in every phase.
        eval_sequences: number of them, spread evenly over all; None for all.
        phases: in order.
    """

    teacher: str
    model: str
    output_dir: Path
    eval_seq_length: int
    eval_sequences: int | None
    phases: list[Phase]


def load_distill_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DistillRecipe:
    """Read a recipe of phases and check it and the files it names.

    Args:
        path: a YAML file as the module describes: keys of `Recipe` and `RunKeys`, and sections.
        overrides: `key=value` or `section.key=value` strings, values in YAML syntax.

    Raises:
        ValueError: as `hybridsp.recipe.load_recipe`, or there is no phase, or a section has a key
            that all phases share.
    """
    settings = parse_yaml(read_text(path, MAX_YAML_BYTES, "the recipe "), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a mapping of recipe keys to values, as `model: PATH`")
    for override in overrides:
        _lay_over(settings, override)
    try:
        return _build(settings)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _lay_over(settings: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {shown(override)} must have the form key=value")
    *sections, key = name.split(".")
    place = settings
    for section in sections:
        if section not in RESULTS or place is not settings:
            raise ValueError(
                f"override {shown(override)}: {section!r} is no section; use one of "
                f"{', '.join(RESULTS)}"
            )
        if not isinstance(place.setdefault(section, {}), dict):
            raise ValueError(f"{section} = {shown(place[section])} must be a mapping of keys")
        place = place[section]
    place[key] = parse_yaml(value, f"override {shown(override)}")


def _build(settings: Mapping[str, Any]) -> DistillRecipe:
    common = {f.name for f in dataclasses.fields(Recipe)} - {*NOT_HERE}
    own = {field.name for field in dataclasses.fields(RunKeys)}
    refuse_unknown(settings, {*common, *own, *RESULTS}, "unknown key")
    run = RunKeys(**{key: settings[key] for key in own & settings.keys()})
    for name in ("model", "output_dir"):
        if not isinstance(settings.get(name), str):
            raise ValueError(f"{name} = {shown(settings.get(name))}: name a directory")
    if settings.get("resume", "auto") not in ("auto", "never"):
        raise ValueError(f"resume = {shown(settings['resume'])}: write auto or never")
    shared = {k: v for k, v in settings.items() if k in common}
    names = [name for name in RESULTS if settings.get(name) is not None]
    if not names:
        raise ValueError(f"no phase: add at least one of the sections {', '.join(RESULTS)}")
    root, model, phases = Path(settings["output_dir"]), settings["model"], []
    for name in names:
        phase = _phase(name, settings[name], shared, common, root, model)
        phases.append(phase)
        model = str(phase.result)
    recipe = DistillRecipe(
        teacher=run.teacher,
        model=settings["model"],
        output_dir=root,
        eval_seq_length=run.eval_seq_length or phases[0].recipe.seq_length,
        eval_sequences=settings.get("eval_sequences"),
        phases=phases,
    )
    _check_files(recipe, settings.get("resume", "auto"))
    return recipe


def _phase(
    name: str, section: Any, shared: Mapping[str, Any], common: set[str], root: Path, model: str
) -> Phase:
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} = {shown(section)} must be a mapping, as {{max_steps: 9}}")
    own_class = OWN_KEYS[name]
    own_names = {f.name for f in dataclasses.fields(own_class)} if own_class else set()
    if misplaced := [key for key in SHARED_ONLY if key in section]:
        raise ValueError(f"{name}.{misplaced[0]}: all phases share it; move it out of the section")
    refuse_unknown(section, (common - {*SHARED_ONLY}) | own_names, f"{name}: unknown key")
    inherited = dict(shared)
    if section.get("stages") is not None:  # they decide both
        inherited = {k: v for k, v in shared.items() if k not in ("seq_length", "max_steps")}
    keys = {k: v for k, v in section.items() if k not in own_names}
    places: dict[str, Any] = {"model": model, "output_dir": str(root / name)}
    if name == "align":
        # Its gradients are taken layer by layer in the forward, so there is nothing to recompute.
        places |= {"activation_checkpointing": False, "offload_activations": False}
    try:
        recipe = Recipe(**{**inherited, **keys, **places})
        own = (
            own_class(**{k: section[k] for k in own_names & section.keys()}) if own_class else None
        )
    except ValidationError as error:
        raise ValueError(f"{name}: {describe(error)}") from None
    # How many held-out sequences there are is settled once, before they are cut into batches.
    recipe = dataclasses.replace(recipe, eval_sequences=None)
    return Phase(name=name, recipe=recipe, keys=own, result=root / RESULTS[name])


def _check_files(recipe: DistillRecipe, resume: str) -> None:
    for phase in recipe.phases:
        # What a later phase starts from is not there yet.
        dataclasses.replace(phase.recipe, model=recipe.model).check_files()
        if resume == "never" and phase.result.exists():
            raise ValueError(
                f"resume = 'never', but {phase.result} is there from another run: choose another "
                "output_dir, or write auto"
            )
    if not (Path(recipe.teacher) / "config.json").is_file():
        raise ValueError(
            f"teacher = {recipe.teacher!r} holds no config.json: name the checkpoint that the "
            "model was converted from"
        )


__all__ = ["AlignKeys", "DistillKeys", "DistillRecipe", "Phase", "RunKeys", "load_distill_recipe"]
