"""Loading a checkpoint cut over the ranks: the same weights and refusals as loaded whole."""

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, expect_raises, run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_softmax import tiny_softmax_model

from hybridsp.mesh import SPMesh
from hybridsp.pretrained import empty_causal_lm, fill_sharded, load_causal_lm, num_parameters

PRELOAD += DEEPSPEED

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3},
}


def load_both(folders, dtype):
    """For each checkpoint, how the sharded model differs from the whole one."""
    import deepspeed

    mesh = SPMesh(ring=2)
    for name, folder in folders.items():
        whole = load_causal_lm(folder, dtype=dtype)
        config = {**CONFIG, "bf16": {"enabled": dtype == torch.bfloat16}}
        model = empty_causal_lm(folder, dtype=dtype)
        fill_sharded(model, folder, mesh, config)
        assert num_parameters(model) == whole.num_parameters(), name
        held = sum(p.ds_tensor.numel() for p in model.parameters())
        assert held <= 0.6 * num_parameters(model), f"{name}: a share, and padding of small ones"
        assert all(p.numel() == 0 for p in model.parameters()), name
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            state = {k: v.clone() for k, v in model.state_dict().items()}
        torch.testing.assert_close(state, whole.state_dict(), rtol=0, atol=0, msg=name)
        buffers = dict(model.named_buffers())
        torch.testing.assert_close(buffers, dict(whole.named_buffers()), rtol=0, atol=0, msg=name)
        assert model.config.to_dict() == whole.config.to_dict(), name
        assert model.generation_config.to_dict() == whole.generation_config.to_dict(), name
        tied = [
            m.get_parameter("lm_head.weight") is m.model.embed_tokens.weight for m in (model, whole)
        ]
        assert tied[0] == tied[1], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_model_is_the_whole_one(tmp_path, dtype):
    models = {
        "tied hybrid": tiny_model(),
        "untied hybrid": tiny_model(tie_word_embeddings=False, linear_rope=True),
        "tied llama": tiny_softmax_model("llama"),
        "qwen3": tiny_softmax_model("qwen3"),
    }
    models["qwen3"].generation_config.max_new_tokens = 77
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    run_ranks(load_both, 2, {name: str(tmp_path / name) for name in models}, dtype)


def fill_from_two_hosts(folders):
    mesh = SPMesh(ring=2)
    folder = folders[mesh.rank]
    fill_sharded(empty_causal_lm(folder, dtype=torch.float32), folder, mesh, CONFIG)


def test_hosts_with_different_models_are_told(tmp_path):
    for name, tied in (("host0", True), ("host1", False)):
        tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("host0", "host1")]
    message = "rank 1: .*host1 holds another model than on rank 0: copy the same"
    expect_raises(fill_from_two_hosts, 2, ValueError, message, folders)


def rename(state, old, new):
    return {new if name == old else name: weight for name, weight in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: rename(s, "model.norm.weight", "norm.weight"), "1 missing .*model.norm.weight"),
        (lambda s: {**s, "extra": torch.zeros(1)}, "1 unexpected .*extra"),
        (lambda s: {**s, "model.norm.weight": torch.zeros(2)}, "1 mismatched .*model.norm.weight"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        empty_causal_lm(tmp_path, dtype=torch.float32)


def test_what_follows_from_the_config_may_be_stored(tmp_path):
    tiny_softmax_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file
    )
    assert empty_causal_lm(tmp_path, dtype=torch.float32).model.embed_tokens.weight.is_meta
