"""A Trainer whose disk cannot hold its checkpoints is refused before it makes an engine."""

import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from test_trainer import make_trainer, pytestmark, spare_a_compiler
from test_trainer_misuse import message_of
from trainer_cases import zero

import hybridsp
from hybridsp.trainer import trainer as trainer_module
from hybridsp.trainer.guards import check_disk, checkpoints_at_once

__all__ = ["pytestmark"]


def settings(**changes):
    """Arguments and state of a run of 10 steps in 4 epochs, and what it is to write."""
    given = {"save_strategy": "steps", "save_total_limit": None, "save_steps": 3, **changes}
    epochs = given.pop("epochs", 4)
    args = SimpleNamespace(**{"save_only_model": False, **given})
    state = SimpleNamespace(max_steps=10, num_train_epochs=epochs, save_steps=args.save_steps)
    return args, state


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 4),  # the last one behind the last step
        ({"save_steps": 0}, 1),
        ({"save_steps": 500}, 1),
        ({"save_total_limit": 2}, 3),
        ({"save_total_limit": 9}, 4),
        ({"save_total_limit": 0}, 4),  # as transformers reads it
        ({"save_strategy": "epoch"}, 4),
        ({"save_strategy": "epoch", "save_total_limit": 1}, 2),
        ({"save_strategy": "epoch", "epochs": sys.maxsize}, 1),
        ({"save_strategy": "best"}, 1),
        ({"save_strategy": "no"}, 0),
    ],
)
def test_checkpoints_at_once_are_what_the_arguments_say(changes, count):
    assert checkpoints_at_once(*settings(**changes)) == count


def usage(free):
    return mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=free))


@pytest.mark.parametrize(
    ("changes", "config", "needed"),
    [
        ({}, {"type": "AdamW"}, 300 + 2 * (110 * 12 + 300)),
        ({"save_steps": 500}, {"type": "AdamW"}, 300 + 110 * 12 + 300),
        ({"save_only_model": True}, {"type": "AdamW"}, 220 + 2 * 220),
        ({}, {"type": "SGD"}, 300 + 2 * 300),
        ({"save_strategy": "no"}, {"type": "AdamW"}, 0),
    ],
)
def test_room_is_asked_for_what_is_saved(changes, config, needed, tmp_path):
    """A model in bf16 of 150 weights, of which 110 are trained."""
    args, state = settings(**{"save_total_limit": 1, **changes})
    args.output_dir = str(tmp_path)
    model = torch.nn.Linear(10, 11).requires_grad_(False)
    model.bias = None
    model.weight.requires_grad = True
    model.frozen = torch.nn.Parameter(torch.zeros(40), requires_grad=False)
    work = args, state, model, None, {"optimizer": config, "bf16": {"enabled": True}}
    with usage(needed):
        check_disk(*work)
    if needed:
        with usage(needed - 1), pytest.raises(ValueError, match=r"\(save_total_limit\)"):
            check_disk(*work)


def refused(directory):
    spare_a_compiler()
    mesh = hybridsp.SPMesh(ring=2)
    trainer = make_trainer(
        mesh, directory, zero(3), kind="dense", save_strategy="steps", save_steps=1
    )
    engine = mock.patch.object(trainer_module, "initialize", side_effect=AssertionError)
    with usage(2**10), engine:
        return message_of(trainer.train)


def test_a_run_without_room_is_refused_on_every_rank(tmp_path):
    for message in run_ranks(refused, 2, str(tmp_path), timeout=200):
        assert "has room for 0.0 GiB, but" in message
