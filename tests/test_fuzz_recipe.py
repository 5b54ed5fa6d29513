"""Recipes and DeepSpeed configurations at random: understood as written, or refused by name."""

import dataclasses
import json
from importlib import resources
from types import SimpleNamespace

import pytest
import torch
import yaml
from fuzzing import cases, damaged, outcome, refusal, scalars, wild
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from hybridsp.curriculum import plan_stages
from hybridsp.deepspeed_config import deepspeed_config, parse_deepspeed, read_deepspeed
from hybridsp.recipe import Recipe, load_recipe
from hybridsp.sizes import UNITS, parse_size
from hybridsp.untrusted import parse_yaml

CPU = SimpleNamespace(dp=2, device=torch.device("cpu"))
REQUIRED = {
    "model": "model",
    "data": "data/*.jsonl",
    "output_dir": "run",
    "seq_length": 64,
    "max_steps": 10,
    "learning_rate": 1e-3,
}
FIELDS = [field.name for field in dataclasses.fields(Recipe)]
SHIPPED = [
    (resources.files("hybridsp.train") / f"recipes/{name}.yaml").read_text()
    for name in ("curriculum", "demo", "lora")
]
JSONS = [
    file.read_text()
    for file in resources.files("hybridsp.ds_configs").iterdir()
    if file.name.endswith(".json")
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The files that a recipe names."""
    monkeypatch.chdir(tmp_path)
    for name in ("model/config.json", "data/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")


def load(text, *overrides):
    with open("recipe.yaml", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
    return load_recipe("recipe.yaml", overrides)


settings_of_a_recipe = st.builds(
    lambda known, unknown: {**REQUIRED, **known, **unknown},
    st.dictionaries(st.sampled_from(FIELDS), wild, max_size=3),
    st.dictionaries(st.text(max_size=12), wild, max_size=1),
)


@cases(200)
@given(settings_of_a_recipe)
def test_a_recipe_says_what_is_written_or_is_refused(settings):
    recipe, error = outcome(load, yaml.safe_dump(settings))
    if error is None:
        for name, value in settings.items():
            if isinstance(value, int | bool | None):
                assert getattr(recipe, name) == value or value is None
        outcome(plan_stages, recipe, tiny_config())
        outcome(deepspeed_config, recipe, CPU)


@cases(100)
@given(st.sampled_from(SHIPPED).flatmap(damaged) | st.text(max_size=60))
def test_text_that_is_no_recipe(text):
    recipe, error = outcome(load, text)
    assert (recipe is None) != (error is None)


@cases(100)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20), st.builds("{}={}".format, st.sampled_from(FIELDS), scalars)
        ),
        max_size=3,
    )
)
def test_overrides(overrides):
    outcome(load, yaml.safe_dump(REQUIRED), *overrides)


@cases(100)
@given(st.integers(1, 2**40), st.sampled_from("KMG"), st.text(max_size=3))
def test_sizes(number, unit, junk):
    for text in (f"{number}{unit}", f" {number}{unit.lower()} "):
        assert parse_size(text) == number * UNITS[unit]
    assert parse_size(str(number)) == number
    refusal(parse_size, f"{number}{unit}x{junk}")
    refusal(parse_size, f"-{number}")
    recipe, error = outcome(
        load, yaml.safe_dump(REQUIRED), f"seq_length={number}{unit}", "tiled_mlp=1K"
    )
    assert (error is None) == (number * UNITS[unit] < 2**31)
    assert error is not None or (recipe.seq_length, recipe.tiled_mlp) == (
        number * UNITS[unit],
        1024,
    )


ROPE_KEYS = [
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
    "truncate",
    "mscale",
    "x",
]
rope = st.dictionaries(
    st.sampled_from(ROPE_KEYS),
    st.sampled_from(
        [
            "default",
            "linear",
            "yarn",
            "llama3",
            "dynamic",
            "longrope",
            "proportional",
            2.0,
            8,
            1e6,
            0.1,
            4096,
        ]
    )
    | wild,
    max_size=5,
)
stage = st.fixed_dictionaries(
    {"seq_length": st.integers(1, 99), "max_steps": st.integers(1, 9)},
    optional={
        "micro_batch_size": st.integers(1, 3),
        "learning_rate": st.floats(1e-6, 1),
        "rope_parameters": rope,
    },
)


@cases(200)
@given(st.lists(stage, min_size=1, max_size=4), st.booleans())
def test_stages_follow_each_other(stages, linear_rope):
    given = {k: v for k, v in REQUIRED.items() if k not in ("seq_length", "max_steps")}
    recipe, error = outcome(load, yaml.safe_dump({**given, "stages": stages}))
    if error is not None:
        return
    config = tiny_config(linear_rope=linear_rope)
    before = config.to_dict()
    planned, error = outcome(plan_stages, recipe, config)
    assert config.to_dict() == before
    if error is not None:
        assert "rope_parameters" in str(error)
        return
    steps = [step for one in planned for step in range(one.first_step, one.last_step + 1)]
    assert steps == list(range(1, recipe.max_steps + 1))
    assert [one.seq_length for one in planned] == [one["seq_length"] for one in stages]
    assert recipe.seq_length == max(one["seq_length"] for one in stages)


@cases(40)
@given(st.integers(2, 12), st.integers(2, 12), st.booleans())
def test_references_that_unfold_to_more_than_memory(levels, width, merge):
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    value, error = outcome(parse_yaml, "\n".join(lines), "it")
    assert error is None or width**levels > 1000
    assert error is not None or len(value) == levels


KEYS = [
    "zero_optimization",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "train_batch_size",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "checkpoint",
    "comms_logger",
    "activation_checkpointing",
    "monitor_config",
    "tensorboard",
    "wandb",
    "comet",
    "flops_profiler",
    "aio",
    "sparse_attention",
    "data_types",
    "compression_training",
    "data_efficiency",
    "elasticity",
    "autotuning",
    "eigenvalue",
    "progressive_layer_drop",
    "curriculum_learning",
    "amp",
    "steps_per_print",
    "communication_data_type",
    "tensor_parallel",
    "hybrid_engine",
    "pipeline",
    "quantize_training",
    "zero_allow_untested_optimizer",
    "nebula",
    "torch_autocast",
    "compile",
    "sequence_parallel_size",
    "dump_state",
    "timers",
    "weight_quantization",
]
SECTION_KEYS = [
    "stage",
    "enabled",
    "type",
    "params",
    "lr",
    "betas",
    "device",
    "offload_optimizer",
    "offload_param",
    "x",
    "reduce_scatter",
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "sub_group_size",
    "api_key",
    "path",
    "max_live_parameters",
    "writer",
    "tag_validation",
    "warmup_num_steps",
    "nvme_path",
    "pin_memory",
]
sections = st.recursive(
    wild,
    lambda inner: st.dictionaries(st.sampled_from(SECTION_KEYS), inner, max_size=3),
    max_leaves=5,
)
json_of_deepspeed = st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=10), sections, max_size=4
)


@cases(150)
@given(json_of_deepspeed)
def test_a_deepspeed_configuration_is_taken_or_refused(config):
    recipe = Recipe(**REQUIRED, deepspeed=config)
    made, error = outcome(deepspeed_config, recipe, CPU)
    if error is None:
        assert made["train_micro_batch_size_per_gpu"] == 1
        assert made["optimizer"]["params"]["lr"] == recipe.learning_rate
    outcome(parse_deepspeed, {"train_micro_batch_size_per_gpu": 1, **config}, "config")


@cases(100)
@given(st.sampled_from(JSONS).flatmap(damaged) | st.text(max_size=40) | wild.map(json.dumps))
def test_a_deepspeed_file_is_read_or_refused(text):
    with open("ds.json", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)
    recipe = Recipe(**REQUIRED, deepspeed="ds.json")
    outcome(deepspeed_config, recipe, CPU)
    outcome(read_deepspeed, text)


def test_deeply_nested_files_are_refused(tmp_path):
    for name in ("ds.json", "recipe.yaml"):
        (tmp_path / name).write_text("[" * 50_000)
    refusal(read_deepspeed, "ds.json")
    refusal(load_recipe, "recipe.yaml")
