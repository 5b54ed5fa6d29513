"""Runs that are saved at one mesh and ZeRO stage and go on at another: shared by test and script.

Every run takes the same four sequences per step from the same packed rows, an epoch of which ends
within the run, so all meshes and stages have the same losses, and so have runs that change them.
"""

import itertools
from functools import cache

import datasets
import deepspeed.ops
import numpy as np
import torch
from distributed import DEEPSPEED, PRELOAD
from tiny import VOCABULARY, tiny_model

import hybridsp
from hybridsp.checkpoint import load_checkpoint, save_checkpoint
from hybridsp.data import PackedLoader
from hybridsp.mesh import SPMesh

PRELOAD += DEEPSPEED

# name: ranks, ring, ulysses
MESHES = {"dp4": (4, 1, 1), "sp4": (4, 2, 2), "dp2 x sp2": (4, 2, 1), "world 2": (2, 2, 1)}
# For machines of two devices.
SMALL_MESHES = {"one": (1, 1, 1), "dp2": (2, 1, 1), "ulysses 2": (2, 1, 2)}
STAGES = (1, 2, 3)
CASES = [(mesh, stage) for mesh in MESHES for stage in STAGES]
SEQUENCES, LENGTH, ROWS = 4, 24, 12
SAVED_AT, LAST = 2, 4


def world_of(case):
    return (MESHES | SMALL_MESHES)[case[0]][0]


def folder(directory, case):
    return directory / f"{case[0].replace(' ', '')}-zero{case[1]}"


@cache
def mesh_of(name):
    _, ring, ulysses = (MESHES | SMALL_MESHES)[name]
    return SPMesh(ring=ring, ulysses=ulysses)


@cache
def rows():
    draw = np.random.RandomState(3)
    return datasets.Dataset.from_dict(
        {
            "input_ids": draw.randint(VOCABULARY, size=(ROWS, LENGTH)).tolist(),
            "document_lengths": [[9 + row, LENGTH - 9 - row] for row in range(ROWS)],
        }
    )


def start(case, dtype=torch.float32, seed=0):
    """A fresh engine, its mesh and its data."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    mesh = mesh_of(case[0])
    torch.manual_seed(seed)
    layers = ["linear_attention", "full_attention"]
    model = tiny_model(num_hidden_layers=2, layer_types=layers).to(dtype)
    hybridsp.parallelize(model, mesh)
    zero = {"stage": case[1], "reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
    if case[1] == 3:
        zero |= {"stage3_param_persistence_threshold": 40, "sub_group_size": 4000}
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": SEQUENCES // mesh.dp,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine = hybridsp.initialize(model, mesh, config, self_check=False)
    loader = PackedLoader(rows(), dp_rank=mesh.dp_rank, dp=mesh.dp, micro_batch_size=1, seed=1)
    return engine, mesh, loader


def losses_of(engine, mesh, loader, steps):
    taken = []
    for _ in range(steps):
        parts = itertools.islice(loader, engine.gradient_accumulation_steps())
        batches = [hybridsp.shard_batch(batch, mesh) for batch in parts]
        taken.append(hybridsp.train_step(engine, batches).loss)
    return taken


def save_all(directory, cases, dtype=torch.float32):
    """Losses after the save of each run that was not stopped."""
    found = {}
    for case in cases:
        engine, mesh, loader = start(case, dtype)
        losses_of(engine, mesh, loader, SAVED_AT)
        state = {"data": loader.state_dict()}
        save_checkpoint(engine, mesh, folder(directory, case), SAVED_AT, state)
        found[case] = losses_of(engine, mesh, loader, LAST - SAVED_AT)
        engine.destroy()
    return found


def resume_all(directory, pairs, dtype=torch.float32):
    """Losses of each run that was saved at one case and goes on at another."""
    found = {}
    for source, target in pairs:
        engine, mesh, loader = start(target, dtype, seed=7)
        state = load_checkpoint(engine, mesh, folder(directory, source))
        loader.load_state_dict(state["data"])
        assert engine.global_steps == SAVED_AT
        found[source, target] = losses_of(engine, mesh, loader, LAST - SAVED_AT)
        engine.destroy()
    return found
