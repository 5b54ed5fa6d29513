"""The Trainer against transformers' own on one process; stopping, going on, and what is refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from distributed import DEEPSPEED, PRELOAD, run_ranks
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import reference_loss_sum
from trainer_cases import COLLATORS, Documents, arguments, history, model_of, pad_right, zero

import hybridsp
from hybridsp.trainer.checkpoints import STATE, complete_checkpoint

PRELOAD += [*DEEPSPEED, "transformers.trainer", "hybridsp.trainer", "peft"]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate would leave gloo for NCCL"),
    pytest.mark.timeout(600),  # a Trainer and four ranks on few cores
]


def spare_a_compiler():
    import deepspeed.ops

    # TrainingArguments would compile it, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_trainer(mesh, directory, config, *, kind="hybrid", collator="flattened", **options):
    """A Trainer and the arguments of its run; `options` that it does not know are arguments'."""
    names = ("callbacks", "eval_dataset", "self_check", "max_bad_steps", "hang_timeout")
    own = {name: options.pop(name) for name in names if name in options}
    args = arguments(directory, deepspeed=config, **options)
    documents, collate = Documents(), COLLATORS[collator]
    return hybridsp.Trainer(
        model_of(kind), args, train_dataset=documents, data_collator=collate, mesh=mesh, **own
    )


def plain_run(kind, collator, directory, **changes):
    """Logs and final weights of transformers' Trainer on one process, two sequences at a time."""
    args = arguments(directory, use_cpu=True, per_device_train_batch_size=2, **changes)
    trainer = transformers.Trainer(
        model_of(kind), args, train_dataset=Documents(), data_collator=COLLATORS[collator]
    )
    trainer.train()
    return history(trainer, "loss", "grad_norm", "learning_rate"), trainer.model.state_dict()


def runs_on_mesh(ring, ulysses, directory, cases):
    """The same of hybridsp.Trainer, for each (kind, collator, stage, changes); weights in files."""
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
    logs = []
    for index, (kind, collator, stage, changes) in enumerate(cases):
        trainer = make_trainer(
            mesh,
            f"{directory}/{index}",
            zero(stage),
            kind=kind,
            collator=collator,
            per_device_train_batch_size=2 // mesh.dp,
            **changes,
        )
        trainer.train()
        trainer.save_model()
        logs.append(history(trainer, "loss", "grad_norm", "learning_rate"))
    return logs


TWO = {"gradient_accumulation_steps": 2}
CASES = {
    (2, 1, 2): [
        ("hybrid", "flattened", 0, {}),
        ("hybrid", "flattened", 3, TWO),
        ("dense", "padded", 2, TWO),
    ],
    (2, 2, 1): [
        ("hybrid", "padded", 2, TWO),
        ("dense", "flattened positions", 3, {"activation_checkpointing": True}),
    ],
}


@pytest.mark.parametrize(("ring", "ulysses", "dp"), CASES, ids=["dp2 sp2", "sp4"])
def test_runs_equal_one_process(ring, ulysses, dp, tmp_path):
    check_runs(ring, ulysses, dp, CASES[ring, ulysses, dp], tmp_path)


def check_runs(ring, ulysses, dp, cases, directory, backend="gloo"):
    world = ring * ulysses * dp
    ranks = run_ranks(
        runs_on_mesh, world, ring, ulysses, str(directory), cases, timeout=500, backend=backend
    )
    for index, (kind, collator, _, changes) in enumerate(cases):
        logs, weights = plain_run(kind, collator, directory / "plain", **changes)
        assert len(logs) == 3
        for rank in ranks:
            got = torch.tensor(rank[index])
            torch.testing.assert_close(got, torch.tensor(logs), rtol=1e-5, atol=0.0)
        saved = load_file(directory / str(index) / "model.safetensors")
        assert saved.keys() <= weights.keys()
        for name, got in saved.items():
            assert (got - weights[name]).norm() <= 1e-5 * weights[name].norm(), name


def with_adapters():
    model = model_of("hybrid")
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    return model


def adapted_run(directory):
    """Logs of a run that trains adapters alone, layers whole under ZeRO-3; then it saves them."""
    spare_a_compiler()
    args = arguments(directory, deepspeed=zero(3))
    collate = COLLATORS["flattened"]
    trainer = hybridsp.Trainer(
        with_adapters(), args, train_dataset=Documents(), data_collator=collate
    )
    trainer.train()
    trainer.save_model()
    return history(trainer, "loss", "grad_norm")


def test_adapters_of_peft_train_as_on_one_process(tmp_path):
    logs = run_ranks(adapted_run, 2, str(tmp_path / "run"), timeout=300)
    args = arguments(tmp_path / "plain", use_cpu=True)
    plain = transformers.Trainer(
        with_adapters(), args, train_dataset=Documents(), data_collator=COLLATORS["flattened"]
    )
    plain.train()
    want = torch.tensor(history(plain, "loss", "grad_norm"))
    for got in logs:
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=0.0)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files


def test_a_folder_without_a_step_is_no_checkpoint_to_resume_from(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).touch()
    assert complete_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-10")


def random_numbers(directory):
    """What a layer and a collator draw on this rank in two steps of two micro-batches."""
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)
    layer, collator = [], []

    def collate(samples):
        collator.append(torch.rand(()).item())
        return pad_right(samples)

    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(mesh, directory, zero(2), kind="dense", self_check=False, **options)
    trainer.data_collator = collate
    mlp = trainer.model.model.layers[0].mlp
    mlp.register_forward_hook(lambda *_: layer.append(torch.rand(()).item()))
    trainer.train()
    return layer, collator


def test_dropout_differs_between_the_ranks_of_a_sequence_and_collators_do_not(tmp_path):
    results = run_ranks(random_numbers, 4, str(tmp_path))
    layers, collators = zip(*results, strict=True)
    assert len(set(layers[0] + layers[1])) == 8
    assert layers[:2] == layers[2:], "as transformers has it on the ranks of data parallelism"
    assert all(drawn == collators[0] for drawn in collators)


class Recorder(transformers.TrainerCallback):
    """Which events took place, in order."""

    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append(("log", state.global_step, sorted(logs)[:2]))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))


def stop_and_go_on(directory, config):
    """A run of four steps; and one that goes on after its second, beside a save cut short."""
    spare_a_compiler()
    mesh, recorder = hybridsp.SPMesh(ulysses=2), Recorder()
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,  # an epoch ends within the third step
        "include_num_input_tokens_seen": "non_padding",
        "eval_dataset": Documents(5, seed=1),
    }
    whole = make_trainer(mesh, directory, config, callbacks=[recorder], **options)
    whole.train()
    keys = ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen")
    wanted, evaluated = history(whole, *keys), history(whole, "eval_loss")
    mesh.on_rank_zero(shutil.rmtree, f"{directory}/checkpoint-4")
    mesh.on_rank_zero(Path(f"{directory}/checkpoint-3").mkdir)

    resumed = make_trainer(mesh, directory, config, **options)
    resumed.train(resume_from_checkpoint=True)
    again = history(resumed, *keys), history(resumed, "eval_loss")
    return (wanted, evaluated), again, recorder.events


OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(2, {}), (3, {"optimizer": OPTIMIZER, "scheduler": SCHEDULER})],
    ids=["optimizer of transformers", "optimizer of DeepSpeed"],
)
def test_resumed_run_equals_the_undisturbed_one(stage, changes, tmp_path):
    results = run_ranks(stop_and_go_on, 2, str(tmp_path), zero(stage, **changes), timeout=500)
    for undisturbed, resumed, events in results:
        assert resumed == undisturbed
        steps = [event[1] for event in events if event[0] == "step"]
        assert steps == [1, 2, 3, 4]
        assert events.index(("evaluate", 2)) < events.index(("save", 2)) < events.index(("step", 3))
        assert ("log", 1, ["epoch", "grad_norm"]) in events
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"config.json", "model.safetensors", "trainer_state.json", "checkpoints"} <= files


def evaluate(directory, model_kind):
    spare_a_compiler()
    held_out = Documents(5, seed=1)
    trainer = make_trainer(
        None, directory, zero(0), kind=model_kind, collator="padded", eval_dataset=held_out
    )
    one_sequence = trainer.mesh.sp
    apart = make_trainer(hybridsp.SPMesh(), directory, zero(0), kind=model_kind, collator="padded")
    return one_sequence, [t.evaluate(held_out)["eval_loss"] for t in (trainer, apart)]


def test_evaluation_is_the_mean_over_all_labels(tmp_path):
    """Without a mesh all ranks share a sequence; apart, one rank runs out of batches."""
    model, samples = model_of("dense"), Documents(5, seed=1)
    sums = [reference_loss_sum(model, COLLATORS["padded"]([sample])) for sample in samples]
    want = sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)
    for sp, losses in run_ranks(evaluate, 2, str(tmp_path), "dense", timeout=300):
        assert sp == 2
        assert losses == pytest.approx([want, want], rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    """The same documents, in order and without a length."""

    def __iter__(self):
        return iter(Documents())


def other_ways(directory):
    """Losses of the same run with a list, with `datasets`, with a stream and with `model_init`."""
    spare_a_compiler()
    mesh = hybridsp.SPMesh()
    table = datasets.Dataset.from_list([{**item, "text": "unused"} for item in Documents()])
    losses = []
    for data in (Documents(), table, Stream(), Documents()):
        args = arguments(directory, deepspeed=zero(1), train_sampling_strategy="sequential")
        model = {"model": model_of("dense")}
        if len(losses) == 3:
            model = {"model_init": functools.partial(model_of, "dense")}
        trainer = hybridsp.Trainer(
            **model,
            mesh=mesh,
            args=args,
            train_dataset=data,
            eval_dataset=table,
            data_collator=COLLATORS["flattened"],
        )
        trainer.train()
        losses.append(history(trainer, "loss"))
    return losses, trainer.evaluate()["eval_loss"]


def test_data_and_models_may_come_in_other_ways(tmp_path):
    (losses, evaluation), other_rank = run_ranks(other_ways, 2, str(tmp_path), timeout=400)
    assert losses[1:] == losses[:1] * 3
    assert len(losses[0]) == 3
    assert other_rank[1] == evaluation


SCRIPT = """
import sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
from transformers import AutoModelForCausalLM
from hybridsp import Trainer
from trainer_cases import COLLATORS, Documents, arguments

zero = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
}
args = arguments(sys.argv[2], deepspeed=zero, per_device_train_batch_size=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert all(hasattr(p, "ds_id") for p in model.parameters()), "loaded in parts"
trainer = Trainer(
    model=model, args=args, train_dataset=Documents(), data_collator=COLLATORS["padded"]
)
trainer.train()
trainer.save_model()
trainer.save_state()
"""


def test_a_script_changes_one_import(tmp_path):
    """Under a launcher, with a model that ZeRO-3 loads in parts."""
    (tmp_path / "train.py").write_text(SCRIPT)
    model_of("hybrid").save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launcher, *(str(tmp_path / name) for name in ("train.py", "model", "out"))],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("'grad_norm'") == 3, "rank 0 alone reports"
    logs, _ = plain_run("hybrid", "padded", tmp_path / "plain")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    got = [[row["loss"], row["grad_norm"]] for row in state["log_history"][:3]]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(logs)[:, :2], rtol=1e-5, atol=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "hybrid_gla"
