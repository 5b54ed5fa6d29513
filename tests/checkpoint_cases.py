"""A small DeepSpeed engine to save and load, and what tests of checkpoints look at."""

import contextlib
import random

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from distributed import DEEPSPEED, PRELOAD
from transformers import LlamaConfig, LlamaForCausalLM

PRELOAD += DEEPSPEED

BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
    "gradient_clipping": 1.0,
}


def make_engine(mesh, stage=3, seed=0, tied=False, frozen="", **changes):
    """A tiny Llama; the checkpoint's business is the DeepSpeed engine, not the architecture."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    # DeepSpeed's default buckets reserve gigabytes.
    zero = {"stage": stage, "reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
    settings = {**BASE, "zero_optimization": zero, **changes}
    model = LlamaForCausalLM(config).to(torch.bfloat16 if "bf16" in changes else torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    engine, *_ = deepspeed.initialize(model=model, config=settings, mpu=mesh.mpu)
    return engine


def train(engine, mesh, steps):
    """Losses of some steps on data drawn from the rank's own generator, and the rates they took."""
    record = []
    for _ in range(steps):
        tokens = torch.randint(48, (1, 12))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        record.append((float(loss), engine.get_lr()[0]))
    return record


def draws():
    return [float(torch.rand(())), float(np.random.rand()), random.random(), random.gauss(0, 1)]


def weights(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {k: v.detach().clone() for k, v in engine.module.state_dict().items()}


@contextlib.contextmanager
def rank_zero_only(mesh):
    """A time in which rank 0 alone touches files."""
    dist.barrier()
    yield mesh.rank == 0
    dist.barrier()
