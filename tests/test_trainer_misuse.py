"""What a Trainer refuses while it runs, on every rank; and a save that was cut short."""

import re
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from test_trainer import make_trainer, pytestmark, spare_a_compiler
from trainer_cases import Documents, pad_right, zero

import hybridsp
from hybridsp.trainer.checkpoints import complete_checkpoint

__all__ = ["pytestmark"]


def message_of(work):
    with pytest.raises(ValueError, match=r"\w") as error:
        work()
    return str(error.value)


def cut_short(directory):
    """Two runs into one folder, of which the second ends while it writes its checkpoint."""
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)
    options = {"kind": "dense", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(mesh, directory, zero(0), **options).train()
    before = complete_checkpoint(directory, True)
    second = make_trainer(mesh, directory, zero(0), **options)
    second.save_model = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        second.train()
    return before, message_of(lambda: complete_checkpoint(directory, True))


def test_a_save_that_was_cut_short_is_not_complete_for_what_was_there(tmp_path):
    for before, message in run_ranks(cut_short, 2, str(tmp_path)):
        assert before == str(tmp_path / "checkpoint-1")
        assert "holds no complete checkpoint" in message


def random_tokens(samples):
    return {key: torch.randint(60, (1, 8)) for key in ("input_ids", "labels")}


def misuses(directory):
    """Message of each error, by what was done wrong."""
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)

    def trainer(config=None, **options):
        return make_trainer(mesh, directory, config or zero(0), kind="dense", **options)

    messages = {
        "batch size": message_of(lambda: trainer(zero(0, train_batch_size=2))),
        "contradiction": message_of(trainer(zero(0, gradient_clipping=3.0)).train),
        "auto": message_of(trainer(zero(0, steps_per_print="auto")).train),
        "tensor parallel": message_of(lambda: trainer(zero(0, tensor_parallel={"autotp_size": 2}))),
        "predict": message_of(lambda: trainer().predict(Documents())),
        "nothing to resume": message_of(lambda: trainer().train(resume_from_checkpoint=True)),
        "no checkpoint": message_of(lambda: trainer().train(resume_from_checkpoint=directory)),
    }
    used = trainer(max_steps=1)
    messages["other mesh"] = message_of(
        lambda: hybridsp.Trainer(used.model, used.args, mesh=hybridsp.SPMesh())
    )
    messages["no model of transformers"] = message_of(
        lambda: hybridsp.Trainer(torch.nn.Linear(2, 2), used.args, mesh=mesh)
    )
    used.train()
    messages["twice"] = message_of(used.train)

    def failing(samples):
        if mesh.rank == 1:
            raise KeyError("text")
        return pad_right(samples)

    for name in ("train", "evaluate"):
        failed = trainer(eval_dataset=Documents())
        failed.data_collator = failing
        messages[f"collator, {name}"] = message_of(getattr(failed, name))
    torch.manual_seed(mesh.rank)
    random = trainer()
    random.data_collator = random_tokens
    random.accelerator.dataloader_config.data_seed = 0
    torch.manual_seed(mesh.rank)
    messages["random"] = message_of(random.train)
    return messages


def test_misuse_is_refused_on_every_rank(tmp_path):
    for messages in run_ranks(misuses, 2, str(tmp_path), timeout=400):
        for case, part in {
            "batch size": 'train_batch_size = 2, but 1 data-parallel groups .* "auto"',
            "contradiction": "gradient_clipping=3.0 vs hf max_grad_norm=0.5",
            "auto": 'steps_per_print to "auto"',
            "tensor parallel": "autotp_size = 2: remove it",
            "predict": "call save_model",
            "nothing to resume": "holds no complete checkpoint: leave it out",
            "no checkpoint": "is no complete checkpoint: it has no trainer_state.json",
            "other mesh": "parallelized for another mesh",
            "no model of transformers": "model is a Linear: give a PreTrainedModel",
            "twice": "make a new Trainer",
            "collator, train": "rank 1: KeyError: 'text'",
            "collator, evaluate": "rank 1: KeyError: 'text'",
            "random": "ranks that share a sequence got different batches",
        }.items():
            assert re.search(part, messages[case]), messages[case]
