"""LoRA: exact gradients of the adapters and of nothing else, and what a training leaves."""

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from tiny import batch_of, reference_loss_sum, tiny_model
from tiny_softmax import logits
from transformers import AutoModelForCausalLM

import hybridsp
from hybridsp.checkpoint import export_pretrained
from hybridsp.lora import add_lora, export_merged
from hybridsp.pretrained import empty_causal_lm, fill_sharded, num_parameters
from hybridsp.recipe import LoraKeys

PRELOAD += [*DEEPSPEED, "peft"]

LENGTH = 32
PACKED = [
    batch_of(1, LENGTH, seed=1, cu_seqlens=[0, 1, 5, 24, 32], ignored=[slice(0, 9)]),
    batch_of(1, LENGTH, seed=2, cu_seqlens=[0, 8, 30, 32], ignored=[slice(14, 32)]),
]
# What both layer kinds have, what only linear layers have, and the MLP.
ALL = LoraKeys(r=3, alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "decay_up", "up_proj"])
TOLERANCE = 1e-5


def zero(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10000,
            "stage3_param_persistence_threshold": 0,
        },
    }


def adapted(keys=ALL, model=None):
    """A tiny model whose adapters do something already: while B is 0, A has no gradient."""
    model = model or tiny_model()
    torch.manual_seed(5)
    add_lora(model, keys)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def gradients_on_mesh(ring, ulysses, batches, stages):
    from deepspeed.utils import safe_get_full_grad

    mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
    results = []
    for stage, checkpointing in stages:
        model = adapted()
        if checkpointing:
            model.activation_checkpointing_enable()
        hybridsp.parallelize(model, mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        engine = hybridsp.initialize(model, mesh, zero(stage), optimizer=optimizer)
        engine.train()
        loss = engine(**hybridsp.shard_batch(batches[mesh.dp_rank], mesh)).loss
        engine.backward(loss)
        grads = {
            name: safe_get_full_grad(p)
            for name, p in engine.module.named_parameters()
            if p.requires_grad
        }
        results.append((loss.item(), grads))
    return results


@pytest.mark.parametrize(("ring", "ulysses", "dp"), [(2, 2, 1), (2, 1, 2)])
def test_gradients_equal_one_process(ring, ulysses, dp):
    check(ring, ulysses, dp)


@pytest.mark.gpu
@pytest.mark.parametrize(("ring", "ulysses", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_gradients_equal_one_process_on_gpus(ring, ulysses, dp):
    check(ring, ulysses, dp, backend="nccl")


def check(ring, ulysses, dp, backend="gloo"):
    model = adapted()
    sums, counts = zip(*(reference_loss_sum(model, b) for b in PACKED[:dp]), strict=True)
    loss = sum(sums) / sum(counts)
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
    stages = [(0, False), (2, False), (3, False), (3, True)]
    results = run_ranks(
        gradients_on_mesh,
        dp * ring * ulysses,
        ring,
        ulysses,
        PACKED[:dp],
        stages,
        timeout=240,
        backend=backend,
    )
    for rank_results in results:
        for (stage, _), (got, grads) in zip(stages, rank_results, strict=True):
            assert got == pytest.approx(loss.item(), rel=1e-5)
            assert grads.keys() == expected.keys()
            errors = {n: ((grads[n] - g).norm() / g.norm()).item() for n, g in expected.items()}
            wrong = {n: e for n, e in errors.items() if not e <= TOLERANCE}
            assert not wrong, f"relative error of gradients at stage {stage}"


def train_and_export(base, output, stage, dtype):
    """Some steps from the checkpoint `base`; the logits of the trained model."""
    mesh = hybridsp.SPMesh(ulysses=2)
    config = {**zero(stage), "bf16": {"enabled": dtype == torch.bfloat16}}
    if stage == 3:
        model = empty_causal_lm(base, dtype=dtype)
        hybridsp.parallelize(model, mesh)
        fill_sharded(model, base, mesh, config)
        add_lora(model, ALL)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        add_lora(model, ALL)
        hybridsp.parallelize(model, mesh)
    trained = num_parameters(model, only_trainable=True)
    assert 0 < trained < num_parameters(model) / 5
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = hybridsp.initialize(model, mesh, config)
    engine.train()
    batch = hybridsp.shard_batch(PACKED[0], mesh)
    for _ in range(4):
        hybridsp.train_step(engine, [batch])
    adapter = export_pretrained(engine, mesh, output / "adapter")
    if mesh.rank == 0:
        export_merged(base, adapter, output / "model", config=engine.module.config, dtype=dtype)
    torch.distributed.barrier()


@pytest.mark.parametrize(
    ("stage", "backend"),
    [(2, "gloo"), (3, "gloo"), pytest.param(3, "nccl", marks=pytest.mark.gpu)],
)
def test_adapter_on_base_and_merged_model_are_the_same(tmp_path, stage, backend):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    before = load_file(base / "model.safetensors")
    run_ranks(
        train_and_export, 2, base, tmp_path, stage, torch.float32, timeout=120, backend=backend
    )

    tokens = PACKED[1]["input_ids"]
    load = AutoModelForCausalLM.from_pretrained
    merged = logits(load(tmp_path / "model"), tokens)
    on_base = logits(PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")), tokens)
    torch.testing.assert_close(merged, on_base, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, logits(load(base), tokens), atol=0.1), "nothing was learnt"

    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(ALL.target_modules)


def test_adapters_in_bf16(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    run_ranks(train_and_export, 2, tmp_path / "base", tmp_path, 3, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16


def test_modules_that_are_not_there_are_refused():
    for name in ("lm_head", "embed_tokens", "q_conv", "qproj"):
        with pytest.raises(ValueError, match=rf"'{name}'; choose among decay_down, .*q_proj"):
            add_lora(tiny_model(), LoraKeys(target_modules=["q_proj", name]))
