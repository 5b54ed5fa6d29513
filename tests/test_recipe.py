"""Recipes: what is read, what is refused, and what DeepSpeed makes of the result."""

import dataclasses
import json
from importlib import resources
from types import SimpleNamespace

import pytest
import torch
import yaml
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig

from hybridsp.deepspeed_config import deepspeed_config, first_iteration
from hybridsp.recipe import Recipe, load_recipe

CPU = SimpleNamespace(dp=2, device=torch.device("cpu"))
GPU = SimpleNamespace(dp=2, device=torch.device("cuda", 0))
REQUIRED = {
    "model": "model",
    "data": "data/*.jsonl",
    "output_dir": "run",
    "seq_length": 64,
    "max_steps": 10,
    "learning_rate": 1e-3,
}
STAGE = {"seq_length": 64, "max_steps": 5}


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Write a recipe with the given changes beside the files it names; None removes a key."""
    monkeypatch.chdir(tmp_path)
    for name in ("model/config.json", "data/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    def write(**changes):
        settings = {k: v for k, v in {**REQUIRED, **changes}.items() if v is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        return "recipe.yaml"

    return write


def make(**changes):
    return Recipe(**{**REQUIRED, **changes})


def test_values_come_from_file_then_command_line_then_defaults(recipe_file):
    path = recipe_file(ring=2, schedule="linear", eval_data="data/train.jsonl")
    recipe = load_recipe(path, ["schedule=constant", "betas=[0.8, 0.9]", "eval_data=null"])
    assert (recipe.ring, recipe.schedule, recipe.ulysses) == (2, "constant", 1)
    assert recipe.betas == (0.8, 0.9)
    assert recipe.eval_data is None


def test_stages_decide_length_and_steps(recipe_file):
    stages = [{"seq_length": 8, "max_steps": 3}, {"seq_length": 32, "max_steps": 4}]
    recipe = load_recipe(recipe_file(stages=stages, seq_length=None, max_steps=None))
    assert (recipe.seq_length, recipe.max_steps) == (32, 7)
    assert dataclasses.replace(recipe, ring=2).max_steps == 7
    assert recipe.lora is None
    laid_over = load_recipe(recipe_file(stages=stages), ["seq_length=null", "max_steps=null"])
    assert laid_over == recipe
    given = load_recipe(recipe_file(lora={"alpha": 8}, stages=stages, seq_length=32, max_steps=7))
    assert (given.lora.r, given.lora.alpha, given.max_steps) == (16, 8.0, 7)


def test_sizes_are_written_as_on_the_command_line(recipe_file):
    recipe = load_recipe(recipe_file(seq_length="128K"), ["tiled_mlp=8k"])
    assert (recipe.seq_length, recipe.tiled_mlp) == (131072, 8192)
    stages = [{"seq_length": "1K", "max_steps": 3}, {"seq_length": "2K", "max_steps": 4}]
    follows = load_recipe(recipe_file(stages=stages, seq_length=None, max_steps=None))
    assert (follows.seq_length, follows.max_steps) == (2048, 7)
    assert load_recipe(recipe_file(stages=stages, seq_length="2K", max_steps=7)) == follows


def test_an_access_key_is_no_setting(recipe_file):
    made = make(deepspeed={"comet": {"enabled": True, "api_key": "hunter2"}})
    with pytest.raises(ValueError, match=r"comet\.api_key would be printed .*COMET_API_KEY") as e:
        deepspeed_config(made, CPU)
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003"])
def test_every_way_to_write_a_number_is_a_number(recipe_file, text):
    # YAML 1.1 reads 3e-4 as text.
    assert load_recipe(recipe_file(), [f"learning_rate={text}"]).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1.0}, r"recipe.yaml: unknown key 'lerning_rate'; .*'learning_rate'\?"),
        ({"lr": 1.0}, r"unknown key 'lr'; did you mean 'learning_rate'\?"),
        ({"batch_size": 1}, r"unknown key 'batch_size'; did you mean 'micro_batch_size'\?"),
        ({"sequence_parallel_size": 4}, r"'sequence_parallel_size'; did you mean 'ring' and 'uly"),
        ({"train_batch_size": 8}, r"did you mean 'micro_batch_size' and 'gradient_accumulation"),
        ({"seq_length": "128X"}, "seq_length = '128X': '128X' is no size: write a positive whole"),
        ({"seq_length": "2G"}, "seq_length = '2G': .*less than or equal to 2147483647"),
        ({"max_steps": "1K"}, "max_steps = '1K': .*valid integer"),
        ({"hang_timeout": 1e300}, r"hang_timeout = 1e\+300: .*less than or equal to 100000000"),
        ({"seed": 2**32}, "seed = 4294967296: .*less than 4294967296"),
        ({"output_dir": "data/train.jsonl"}, "output_dir = .*train.jsonl is a file: choose"),
        (
            {"output_dir": ".", "model": "./model"},
            "output_dir = '.' would write model over the mod",
        ),
        ({"output_dir": "a" * 300}, "output_dir = 'a+.* is no path: File name too long"),
        ({"data": "x\0y"}, r"data = 'x\\x00y' is no path: write one"),
        (
            {"model": "https://me:hunter2@host/x"},
            r"model = 'https://\*\*\*@host/x' holds no config",
        ),
        ({"xyzzy": 1}, r"unknown key 'xyzzy'; known: .*ulysses"),
        ({"seq_length": None, "data": None}, "data is missing; seq_length is missing"),
        ({"seq_length": 0}, "seq_length = 0: .* greater than or equal to 1"),
        ({"seq_length": 64.0}, "seq_length = 64.0: .* integer"),
        ({"ring": True}, "ring = True: .* integer"),
        ({"learning_rate": True}, "learning_rate = True: .* number"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast': .* number"),
        ({"betas": [0.9]}, "betas.1 is missing"),
        ({"betas": [0.9, 1.0]}, r"betas.1 = 1.0: .* less than 1"),
        ({"schedule": "cosin"}, "schedule = 'cosin': .*'cosine', 'linear' or 'constant'"),
        ({"dtype": "float16"}, "dtype = 'float16': .*'float32' or 'bfloat16'"),
        ({"activation_checkpointing": "yes"}, "activation_checkpointing = 'yes': .*boolean"),
        ({"warmup_steps": 10}, "warmup_steps = 10 must be less than max_steps = 10"),
        ({"eval_every": 2}, "eval_every = 2 needs eval_data"),
        ({"offload_activations": True}, "offload_activations needs activation_checkpointing: set"),
        ({"tiled_mlp": 0}, "tiled_mlp = 0: .* greater than or equal to 1"),
        ({"lora": {"rank": 8}}, "lora.rank is unknown; known: r, alpha, target_modules"),
        ({"lora": {"target_modules": []}}, r"lora.target_modules = \[\]: .*at least 1 item"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout = 1.0: .*less than 1"),
        ({"stages": []}, r"stages = \[\]: .*at least 1 item"),
        ({"stages": 3}, "stages = 3: .*list"),
        ({"stages": [{"seq_length": 64}]}, "stages.0.max_steps is missing"),
        ({"stages": [STAGE, {**STAGE, "ring": 2}]}, "stages.1.ring is unknown; known: seq_"),
        ({"stages": [{**STAGE, "max_steps": 9}]}, "make it 9: .* write max_steps=null"),
        ({"model": "elsewhere"}, "model = 'elsewhere' holds no config.json"),
        ({"data": "data/*.txt"}, r"data = 'data/\*.txt' matches no file"),
        ({"eval_data": "held.jsonl"}, "eval_data = 'held.jsonl' matches no file"),
        ({"resume": "latest"}, "resume = 'latest' is no directory: write auto, never"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(recipe_file, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(**change))


@pytest.mark.parametrize("name", ["curriculum", "demo", "full", "lora"])
def test_shipped_recipes_are_valid(name):
    text = (resources.files("hybridsp.train") / f"recipes/{name}.yaml").read_text()
    recipe = Recipe(**yaml.safe_load(text))
    assert DeepSpeedConfig(deepspeed_config(recipe, CPU)).zero_optimization_stage == 3
    if name == "full":
        assert set(yaml.safe_load(text)) == {field.name for field in dataclasses.fields(Recipe)}


def test_never_does_not_write_over_another_run(recipe_file, tmp_path):
    path = recipe_file(resume="never")
    load_recipe(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"resume = 'never', but run.metrics.jsonl is there"):
        load_recipe(path)
    load_recipe(path, ["resume=auto"])


def test_files_and_overrides_that_cannot_be_read_are_named(recipe_file, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the recipe nowhere.yaml: No such file"):
        load_recipe("nowhere.yaml")
    with pytest.raises(ValueError, match="'ring' must have the form key=value"):
        load_recipe(recipe_file(), ["ring"])
    with pytest.raises(ValueError, match=r"command line: unknown key 'rings'.*'ring'"):
        load_recipe(recipe_file(), ["rings=2"])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list.yaml must be a mapping"):
        load_recipe("list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"broken.yaml is no valid YAML"):
        load_recipe("broken.yaml")


@pytest.mark.parametrize("mesh", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_deepspeed_takes_every_shipped_configuration(name, mesh):
    recipe = make(deepspeed=name, dtype="bfloat16", gradient_accumulation_steps=3)
    config = deepspeed_config(recipe, mesh)
    parsed = DeepSpeedConfig(json.loads(json.dumps(config)))
    assert parsed.zero_optimization_stage == int(name[4])
    assert parsed.gradient_clipping == 1.0
    assert parsed.bfloat16_config.enabled
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (1, 3)
    assert parsed.optimizer_params["lr"] == recipe.learning_rate
    assert "auto" not in json.dumps(config)


def test_adam_needs_a_compiler_only_where_it_is_offloaded_from_a_gpu():
    def adam(name, mesh):
        config = deepspeed_config(make(deepspeed=name), mesh)
        params = config["optimizer"]["params"]
        return {key: params[key] for key in ("torch_adam", "fused") if key in params}, config

    assert adam("zero3", CPU)[0] == {"torch_adam": True}
    assert adam("zero3", GPU)[0] == {"torch_adam": True, "fused": True}
    assert adam("zero3_offload", GPU)[0] == {}
    offloaded_cpu, config = adam("zero3_offload", CPU)
    assert offloaded_cpu == {"torch_adam": True}
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_a_choice_of_adam_in_the_configuration_is_kept():
    theirs = {"optimizer": {"type": "adamw", "params": {"torch_adam": False}}}
    params = deepspeed_config(make(deepspeed=theirs), GPU)["optimizer"]["params"]
    assert params["torch_adam"] is False
    assert "fused" not in params


def test_auto_means_left_out(tmp_path):
    theirs = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": {"params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(theirs))
    config = deepspeed_config(make(deepspeed=str(tmp_path / "ds.json")), CPU)
    assert config["zero_optimization"] == {"stage": 2}
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["bf16"] == {"enabled": False}
    assert "train_batch_size" not in config


def test_an_equal_value_is_no_contradiction():
    theirs = {"train_batch_size": 6, "optimizer": {"params": {"lr": 0.001, "betas": [0.9, 0.95]}}}
    config = deepspeed_config(make(deepspeed=theirs, micro_batch_size=3), CPU)
    assert config["train_batch_size"] == 6


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 5}, "train_batch_size = 5 contradicts .*batch sizes.* 2:"),
        ({"gradient_accumulation_steps": 2}, "steps = 2 contradicts .* 1: delete it there"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type = 'Lion' contradicts .*'AdamW'"),
        ({"optimizer": {"params": {"lr": 1}}}, "params.lr = 1 contradicts .*learning_rate.*0.001"),
        ({"scheduler": {"type": "OneCycle"}}, "type = 'OneCycle' contradicts .*'WarmupCosineLR'"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True contradicts .*dtype.*False"),
        ({"bfloat16": {"enabled": True}}, "bfloat16.enabled = True contradicts .*dtype"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True contradicts .*dtype"),
        ({"optimizer": "AdamW"}, "optimizer = 'AdamW' must be a mapping"),
        (
            {"gradient_cliping": 1.0},
            "unknown DeepSpeed key 'gradient_cliping'.*'gradient_clipping'",
        ),
        ({"sequence_parallel_size": 2}, "unknown DeepSpeed key 'sequence_parallel_size'"),
        ({"amp": {"enabled": True}}, "DeepSpeed refuses it: .*AMP"),
        ({"zero_optimization": 3}, "DeepSpeed refuses it: .*must be a mapping"),
        ({"zero_optimization": {"stagee": 3}}, "DeepSpeed refuses it: .*stagee"),
        ({"zero_optimization": {"stage": 4}}, "DeepSpeed refuses it: .*stage"),
        ("zero4", r"neither a JSON file nor a shipped configuration \(zero1, zero2, zero3, "),
    ],
)
def test_what_contradicts_the_recipe_or_deepspeed_does_not_know_is_refused(theirs, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_config(make(deepspeed=theirs), CPU)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ValueError, match=r"ds.json' is no valid JSON: .*line 1"):
        deepspeed_config(make(deepspeed=str(tmp_path / "ds.json")), CPU)


def learning_rates(**changes):
    """The rate of each optimizer step, as a fraction of the peak, by DeepSpeed's own scheduler."""
    recipe = make(learning_rate=1.0, **changes)
    config = deepspeed_config(recipe, CPU)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    scheduler_type = getattr(lr_schedules, config["scheduler"]["type"])
    scheduler = scheduler_type(optimizer, **config["scheduler"]["params"])
    scheduler.step(first_iteration(recipe))
    rates = []
    for _ in range(recipe.max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 3, 9])
def test_learning_rate_warms_up_peaks_and_decays(schedule, warmup_steps):
    rates = learning_rates(schedule=schedule, warmup_steps=warmup_steps)
    before_peak = max(1, warmup_steps) - 1
    expected = [step / warmup_steps for step in range(1, warmup_steps)]
    assert rates[:before_peak] == pytest.approx(expected)
    after = rates[before_peak:]
    assert min(after) > 0
    if schedule == "constant":
        assert after == [1.0] * len(after)
    else:
        assert after == sorted(set(after), reverse=True)
    if schedule == "linear":
        assert after[0] == 1.0
