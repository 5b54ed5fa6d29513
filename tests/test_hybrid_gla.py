"""HybridGLA checkpoints: saved, loaded through the Auto classes, and carried with their code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_hybrid_gla import random_tokens, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hybridsp.models.hybrid_gla import (
    HybridGLAConfig,
    HybridGLAForCausalLM,
    HybridGLAModel,
    register,
)


@pytest.mark.parametrize("tie", [False, True])
def test_save_and_load(tmp_path, tie):
    register()
    register()  # idempotent
    model = tiny_model(tie_word_embeddings=tie, linear_conv_kernel_dim=4, linear_decay="scalar")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()

    tokens = random_tokens(2, 6)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is HybridGLAForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is HybridGLAConfig

    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is HybridGLAModel
    hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(decoder(tokens).last_hidden_state, hidden)


def test_missing_decay_is_initialised_near_one(tmp_path):
    """As when a softmax checkpoint's weights are loaded into a hybrid."""
    model = tiny_model()
    weights = {k: v for k, v in model.state_dict().items() if "decay" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = HybridGLAForCausalLM.from_pretrained(tmp_path)
    layer = loaded.model.layers[0].linear_attn
    assert torch.equal(layer.q_proj.weight, model.model.layers[0].linear_attn.q_proj.weight)
    torch.testing.assert_close(layer.decay_up.bias.detach(), layer.decay_up.initial_bias())


def test_installed_classes_win_over_the_saved_copy(tmp_path):
    register()
    tiny_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is HybridGLAForCausalLM


LOAD_WITHOUT_HYBRIDSP = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "hybridsp" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model.config).__module__.startswith("transformers_modules."), type(model.config)
tokens = torch.arange(1, 9)[None]
generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
torch.save((model(tokens).logits, generated), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


def test_checkpoint_carries_its_code(tmp_path):
    register()
    model = tiny_model(linear_conv_kernel_dim=4, tie_word_embeddings=True)
    saved, again = tmp_path / "saved", tmp_path / "again"
    model.save_pretrained(saved)
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_hybrid_gla.HybridGLAForCausalLM"

    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_HYBRIDSP, saved, tmp_path / "out.pt", again]
    run = subprocess.run(
        command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    logits, generated = torch.load(tmp_path / "out.pt")
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(logits, model(tokens).logits)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=4, do_sample=False))
    for name in ("config.json", *(path.name for path in saved.glob("*.py"))):
        assert (again / name).read_text() == (saved / name).read_text(), name
