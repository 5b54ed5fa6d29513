"""Parallelizing models from outside: what is refused, what is left alone, and dense models."""

import copy
import itertools

import pytest
import torch
from cases import case
from distributed import run_ranks
from tiny import VOCABULARY, batch_of, reference_loss_sum, tiny_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hybridsp

DENSE = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def dense_config(family, **changes):
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "mistral":
        options["sliding_window"] = None
    return DENSE[family][0](**{**options, **changes})


def dense_model(family, **changes):
    torch.manual_seed(0)
    return DENSE[family][1](dense_config(family, **changes))


class ForeignMixer(nn.Module):
    """Works on this rank's tokens alone, and nobody would notice."""

    def forward(self, hidden_states, **_):
        return hidden_states.cumsum(dim=1), None


def with_foreign_mixer():
    model = tiny_model()
    model.model.layers[2].linear_attn = ForeignMixer()
    return model


def with_biased_head():
    model = dense_model("llama")
    model.lm_head = nn.Linear(16, VOCABULARY)
    return model


def gpt2():
    options = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, **options))


def mamba():
    return MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=11))


REFUSED = {
    "an unknown softmax family": (gpt2, {}, ["'gpt2'", "GPT2Attention", "supported are"]),
    "an unknown linear family": (mamba, {}, ["'mamba'", "MambaMixer", "supported are"]),
    "a foreign mixer": (
        with_foreign_mixer,
        {},
        ["layer 2: linear_attn is ForeignMixer", "HybridGLALinearAttention"],
    ),
    "RoPE that depends on the length": (
        lambda: dense_model(
            "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        {},
        ["'dynamic'", "use linear, yarn or llama3"],
    ),
    "dropout": (
        lambda: dense_model("llama", attention_dropout=0.1),
        {},
        ["config.attention_dropout = 0.1", "set it to 0"],
    ),
    "a window": (
        lambda: dense_model("mistral", sliding_window=8),
        {"ring": 2},
        ["config.sliding_window = 8 in layers all", "with ring = 2; raise ulysses to 2"],
    ),
    "a window in some layers": (
        lambda: dense_model(
            "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        {"ring": 2},
        ["config.sliding_window = 8 in layers [1]"],
    ),
    "everything at once": (
        lambda: dense_model("mistral", sliding_window=8, attention_dropout=0.1),
        {"ring": 2},
        ["config.sliding_window = 8", "config.attention_dropout = 0.1"],
    ),
    "too few heads": (
        lambda: dense_model("llama", num_attention_heads=1, num_key_value_heads=1),
        {"ulysses": 2},
        ["ulysses = 2 is more than the 1 query heads"],
    ),
    "a head with a bias": (with_biased_head, {}, ["lm_head of LlamaForCausalLM", "without bias"]),
}


def fingerprint(model):
    """What installing would change: forwards, implementations, attributes."""
    modules = {
        name: (type(module), sorted(vars(module)), getattr(module, "implementation", None))
        for name, module in model.named_modules()
    }
    return modules, copy.deepcopy(model.config.to_dict()), model.config._attn_implementation


def refusals():
    """Messages of this rank; a refused model is as it was."""
    messages = {}
    for name, (make, degrees, _) in REFUSED.items():
        with case(name):
            mesh, model = hybridsp.SPMesh(**degrees), make()
            before = fingerprint(model)
            with pytest.raises(ValueError, match=r"not|more|needed") as caught:
                hybridsp.parallelize(model, mesh)
            assert fingerprint(model) == before
            messages[name] = str(caught.value)
    return messages


def test_what_cannot_be_parallelized_is_refused_and_left_unchanged(subtests):
    for messages in run_ranks(refusals, 2):
        for name, (_, _, parts) in REFUSED.items():
            with subtests.test(name):
                for part in parts:
                    assert part in messages[name]


def misplaced_arguments():
    """A parallelized model refuses what only a whole sequence can have."""
    mesh = hybridsp.SPMesh()
    messages = {}
    for make in (tiny_model, lambda: dense_model("llama")):
        model = make()
        hybridsp.parallelize(model, mesh)
        good = hybridsp.shard_batch(batch_of(1, 8, seed=1), mesh)
        assert model(**good).loss.isfinite()
        tokens = {"input_ids": good["input_ids"]}
        for name, arguments in {
            "labels": {**good, "labels": good["input_ids"]},
            "past_key_values": {**good, "past_key_values": object()},
            "no position_ids": tokens,
            "use_cache": {**good, "use_cache": True},
            "attention_mask": {**good, "attention_mask": torch.ones(1, 8, dtype=torch.int64)},
        }.items():
            try:
                model(**arguments)
            except ValueError as error:
                messages[type(model).__name__, name] = str(error)
            else:
                messages[type(model).__name__, name] = "nothing was raised"
    return messages


def test_arguments_of_a_whole_sequence_are_refused(subtests):
    (messages,) = run_ranks(misplaced_arguments, 1)
    for (model, name), message in messages.items():
        with subtests.test(f"{model}: {name}"):
            assert name in message
            assert "shard_batch" in message


def others_are_unaffected():
    """Neither a model of the same family nor one made from the same config object."""
    mesh = hybridsp.SPMesh(ring=2)
    batch = batch_of(1, 8, seed=1)
    tokens = {"input_ids": batch["input_ids"]}
    for family in ("hybrid_gla", *DENSE):
        with case(family):
            config = tiny_model().config if family == "hybrid_gla" else dense_config(family)
            kind = type(tiny_model()) if family == "hybrid_gla" else DENSE[family][1]
            torch.manual_seed(0)
            mine, other = kind(copy.deepcopy(config)), kind(copy.deepcopy(config))
            sharing = kind(mine.config)
            before = [model(**tokens).logits for model in (other, sharing)]
            hybridsp.parallelize(mine, mesh)
            assert mine(**hybridsp.shard_batch(batch, mesh)).loss.isfinite()
            after = [model(**tokens).logits for model in (other, sharing)]
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            assert not any(hasattr(module, "sp_mesh") for module in other.modules())
            saved = mine.config.to_dict()
            assert "hybridsp" not in str(saved), "an exported config must not ask for SP"


def test_other_models_are_unaffected():
    run_ranks(others_are_unaffected, 2)


BATCHES = {
    "rows": batch_of(2, 12, seed=1, ignored=[slice(0, 7)]),
    "documents": batch_of(1, 12, seed=2, cu_seqlens=[0, 1, 5, 6, 12]),
    "padded": batch_of(1, 11, seed=3, cu_seqlens=[0, 4, 11]),
    "nothing to learn": batch_of(1, 12, seed=4, ignored=[slice(0, 12)]),
}


MODELS = {
    **{family: (family, {}) for family in DENSE},
    "a window": ("mistral", {"sliding_window": 5}),
    "a window in one layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
}


def models_for(ring):
    return {name: one for name, one in MODELS.items() if ring == 1 or "window" not in name}


def losses_and_gradients(degrees):
    """Loss and this rank's share of the gradients, for each model, mesh and batch."""
    results = {}
    for ring, ulysses in degrees:
        mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
        for family, (kind, changes) in models_for(ring).items():
            model = dense_model(kind, **changes)
            hybridsp.parallelize(model, mesh)
            for name, batch in BATCHES.items():
                with case((family, ring, ulysses, name)):
                    loss = model(**hybridsp.shard_batch(batch, mesh)).loss
                    grads = torch.autograd.grad(loss, list(model.parameters()))
                    results[family, ring, ulysses, name] = loss.detach(), grads
    return results


@pytest.mark.parametrize(("world", "degrees"), [(2, [(2, 1), (1, 2)]), (4, [(2, 2)])])
def test_dense_models_equal_one_process(world, degrees, subtests):
    results = run_ranks(losses_and_gradients, world, degrees)
    for family, (batch_name, batch) in itertools.product(MODELS, BATCHES.items()):
        kind, changes = MODELS[family]
        model = dense_model(kind, **changes)
        loss_sum, count = reference_loss_sum(model, batch)
        right_loss = loss_sum / max(count, 1)
        right = torch.autograd.grad(right_loss, list(model.parameters()))
        scale = max(1e-5, *(grad.abs().max().item() for grad in right))
        for ring, ulysses in degrees:
            if family not in models_for(ring):
                continue
            with subtests.test(f"{family}, ring {ring}, ulysses {ulysses}, {batch_name}"):
                got = [result[family, ring, ulysses, batch_name] for result in results]
                for loss, _ in got:
                    torch.testing.assert_close(loss, right_loss.detach(), rtol=1e-5, atol=0)
                sums = [sum(grads) for grads in zip(*(grads for _, grads in got), strict=True)]
                close = {"rtol": 1e-5, "atol": 1e-5 * scale}
                torch.testing.assert_close(tuple(sums), right, **close)
