"""One recipe for three phases: what each of them gets, and what is refused."""

from importlib import resources

import pytest
import yaml

from hybridsp.distill import load_distill_recipe

RECIPE = {
    "teacher": "teacher",
    "model": "model",
    "data": "train.jsonl",
    "eval_data": "valid.jsonl",
    "output_dir": "run",
    "seq_length": "1K",
    "learning_rate": 1e-3,
    "align": {"max_steps": 5},
    "distill": {"max_steps": 7, "seq_length": 2048, "temperature": 2},
    "finetune": {"stages": [{"seq_length": 4096, "max_steps": 3}], "learning_rate": 1e-5},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with the files that the recipe names, which the test stands in."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def load(settings, *overrides):
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(settings, file)
    return load_distill_recipe("recipe.yaml", overrides)


def test_phases_follow_each_other(project):
    recipe = load({**RECIPE, "activation_checkpointing": True, "eval_sequences": 9})
    assert [phase.name for phase in recipe.phases] == ["align", "distill", "finetune"]
    align, distill, finetune = (phase.recipe for phase in recipe.phases)
    assert [r.model for r in (align, distill, finetune)] == [
        "model",
        "run/aligned",
        "run/distilled",
    ]
    assert [r.output_dir for r in (align, distill, finetune)] == [
        "run/align",
        "run/distill",
        "run/finetune",
    ]
    assert [r.seq_length for r in (align, distill, finetune)] == [1024, 2048, 4096]
    assert [r.learning_rate for r in (align, distill, finetune)] == [1e-3, 1e-3, 1e-5]
    assert recipe.phases[1].keys.temperature == 2
    assert recipe.phases[2].keys is None
    assert str(recipe.phases[2].result) == "run/finetuned"
    assert (recipe.eval_seq_length, recipe.eval_sequences) == (1024, 9)
    assert distill.eval_sequences is None, "the batches are all of them"
    assert not align.activation_checkpointing, "its gradients are taken in the forward"
    assert distill.activation_checkpointing


def test_phases_may_be_left_out_and_overridden(project):
    recipe = load(
        {**RECIPE, "align": None},
        "distill.max_steps=9",
        "finetune=null",
        "eval_seq_length=2K",
        "distill.ce_weight=0.5",
    )
    (distill,) = recipe.phases
    assert (distill.recipe.max_steps, distill.recipe.model) == (9, "model")
    assert distill.keys.ce_weight == 0.5
    assert recipe.eval_seq_length == 2048


@pytest.mark.parametrize("name", ["distill", "distill_demo", "distill_smollm2"])
def test_shipped_recipes_are_valid(project, name):
    text = (resources.files("hybridsp.train") / f"recipes/{name}.yaml").read_text()
    settings = yaml.safe_load(text)
    places = {key: RECIPE[key] for key in ("teacher", "model", "data", "eval_data", "output_dir")}
    assert len(load({**settings, **places}).phases) == 3


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"teacher": None}, (), "teacher"),
        ({"teacher": "nowhere"}, (), "teacher = 'nowhere' holds no config.json"),
        ({"model": 5}, (), "model = 5: name a directory"),
        ({"model": "nowhere"}, (), "model = 'nowhere' holds no config.json"),
        ({"data": "nothing.jsonl"}, (), "data = 'nothing.jsonl' matches no file"),
        ({"align": None, "distill": None, "finetune": None}, (), "no phase: add at least one"),
        ({"align": [1]}, (), r"align = \[1\] must be a mapping"),
        ({"temprature": 2}, (), "unknown key 'temprature'"),
        ({"lora": {"r": 2}}, (), "unknown key 'lora'"),
        ({"distill": {"temprature": 2}}, (), "distill: unknown key 'temprature'; did you mean"),
        ({"align": {"temperature": 2}}, (), "align: unknown key 'temperature'"),
        ({"distill": {"max_steps": 1, "temperature": 0}}, (), "distill: temperature = 0"),
        ({"distill": {"max_steps": 1, "ce_weight": -1}}, (), "distill: ce_weight = -1"),
        ({"distill": {"max_steps": 1, "learns": "some"}}, (), "distill: learns = 'some'"),
        ({"align": {}}, (), "align: max_steps is missing"),
        ({"finetune": {"model": "x"}}, (), "finetune.model: all phases share it"),
        ({"finetune": {"ring": 2}}, (), "finetune.ring: all phases share it"),
        ({"resume": "run/checkpoints"}, (), "write auto or never"),
        ({"eval_seq_length": 0}, (), "eval_seq_length = 0"),
        ({}, ("max_steps",), "must have the form key=value"),
        ({}, ("distil.max_steps=3",), "'distil' is no section; use one of align, distill"),
        ({}, ("distill.a.b=3",), "'a' is no section"),
        ({"align": 3}, ("align.max_steps=3",), "align = 3 must be a mapping"),
        (
            {
                "distill": {
                    "max_steps": 1,
                    "learns": "converted",
                    "converted_learning_rate": 1e-3,
                }
            },
            (),
            "nothing else learns, so set learning_rate",
        ),
    ],
)
def test_mistakes_are_named(project, change, overrides, message):
    with pytest.raises(ValueError, match=message):
        load({**RECIPE, **change}, *overrides)


def test_a_result_of_another_run_is_not_taken_for_this_ones(project):
    (project / "run" / "aligned").mkdir(parents=True)
    assert load(RECIPE).phases
    with pytest.raises(ValueError, match="resume = 'never', but run/aligned is there"):
        load({**RECIPE, "resume": "never"})
