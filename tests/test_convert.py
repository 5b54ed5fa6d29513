"""The conversion in memory: which layers stay softmax, and what is kept is kept exactly."""

import re

import pytest
import torch
from tiny_softmax import SOFTMAX_MODELS, logits, tiny_softmax_model
from transformers import AutoConfig, AutoModelForCausalLM

from hybridsp.convert import choose_softmax_layers, convert_model

# --- which layers


@pytest.mark.parametrize(
    ("spec", "num_layers", "expected"),
    [
        (0.25, 8, [3, 7]),
        ("0.25", 8, [3, 7]),
        (0.25, 30, [2, 6, 10, 14, 17, 21, 25, 29]),  # 7.5 rounds up
        (0.5, 3, [0, 2]),  # 1.5 rounds up
        (0.3, 4, [3]),
        (0.1, 4, []),
        (0.0, 4, []),
        (1.0, 3, [0, 1, 2]),
        ("1.0", 3, [0, 1, 2]),
        ("2", 3, [2]),  # no dot: an index
        ("1,", 3, [1]),
        ("7, 3", 8, [3, 7]),
        ([2, 0], 3, [0, 2]),
        ([], 3, []),
        ("every:4", 8, [3, 7]),
        ("every:4", 10, [3, 7]),
        ("every:1", 2, [0, 1]),
    ],
)
def test_choose_softmax_layers(spec, num_layers, expected):
    assert choose_softmax_layers(spec, num_layers) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1.5, "no fraction in [0, 1]"),
        ("-0.1", "no fraction in [0, 1]"),
        (float("nan"), "no fraction in [0, 1]"),
        (1, "write 1.0 or [1]"),
        (True, "write 1.0 or [1]"),
        ("1", "write 1.0 for all layers, or 1, with a comma for layer 1"),
        ("0", "write 0.0 for none"),
        ("8", "numbered 0 to 7"),
        ([-1], "numbered 0 to 7"),
        ("3,3", "twice"),
        ([0.5], "no layer index"),
        ("", "cannot be read"),
        ("half", "cannot be read"),
        ("3;7", "cannot be read"),
        ("every:0", "from 1 to the model's 8 layers"),
        ("every:9", "from 1 to the model's 8 layers"),
        ("every:x", "from 1 to the model's 8 layers"),
    ],
)
def test_choose_softmax_layers_refuses(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_softmax_layers(spec, 8)


# --- the mapping


@pytest.mark.parametrize("name", SOFTMAX_MODELS)
def test_all_softmax_is_the_source_bit_for_bit(name):
    model = tiny_softmax_model(name)
    hybrid = convert_model(model, 1.0)
    assert torch.equal(logits(hybrid), logits(model))


@pytest.mark.parametrize("name", SOFTMAX_MODELS)
def test_every_weight_is_reused(name):
    model = tiny_softmax_model(name)
    hybrid = convert_model(model, [1])
    kept = dict(hybrid.named_parameters())
    for source_name, weight in model.named_parameters():
        mixer = "self_attn" if ".1.self_attn" in source_name else "linear_attn"
        copied = kept.pop(source_name.replace("self_attn", mixer))
        assert torch.equal(copied, weight)
        assert copied.data_ptr() != weight.data_ptr()
    kinds = ("decay_down.weight", "decay_up.weight", "decay_up.bias", "output_norm.weight")
    assert set(kept) == {
        f"model.layers.{i}.linear_attn.{kind}" for i in (0, 2, 3) for kind in kinds
    }
    assert torch.isfinite(logits(hybrid)).all()


def test_key_value_heads_are_cloned_head_by_head():
    """Sharing KV heads equals giving every query head its own copy of its group's."""
    grouped = tiny_softmax_model()
    full = tiny_softmax_model(num_key_value_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(
        logits(convert_model(grouped, 0.0)), logits(convert_model(full, 0.0))
    )


@pytest.mark.parametrize("decay", ["vector", "scalar", "fixed"])
def test_gates_start_near_one(decay):
    hybrid = convert_model(tiny_softmax_model(), 0.25, linear_decay=decay)
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    for layer in hybrid.model.layers[:3]:
        gates = layer.linear_attn.log_decay(layer.input_layernorm(hidden)).exp()
        assert gates.min() > 0.95
        assert gates.max() < 1.0


def test_linear_layers_speak_as_loud_as_softmax_did():
    """Output norms start at a quarter of the root mean square of the layer's values."""
    model = tiny_softmax_model("qwen2")
    hybrid = convert_model(model, 0.0)
    mixers = [layer.linear_attn for layer in hybrid.model.layers]
    directions = torch.randn(1 << 14, 32, generator=torch.Generator().manual_seed(0))
    inputs = directions * model.model.layers[2].input_layernorm.weight
    values = model.model.layers[2].self_attn.v_proj(inputs)
    expected = 0.25 * values.square().mean().sqrt()
    # 16,384 random inputs estimate a root mean square to about 1 part in 200.
    weight = mixers[2].output_norm.weight
    torch.testing.assert_close(weight, expected.expand_as(weight), rtol=0.02, atol=0)


@pytest.mark.parametrize(("decay", "num_gates"), [("vector", 4 * 8), ("scalar", 4), ("fixed", 0)])
def test_linear_decay(decay, num_gates):
    mixer = convert_model(tiny_softmax_model(), 0.0, linear_decay=decay).model.layers[0].linear_attn
    assert (mixer.decay_up.out_features if hasattr(mixer, "decay_up") else 0) == num_gates


def test_same_seed_same_weights():
    model, state = tiny_softmax_model(), torch.get_rng_state()
    first, again, other = (convert_model(model, 0.25, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing
    assert all(name.endswith(("decay_down.weight", "decay_up.weight")) for name in differing)


def test_source_is_left_alone():
    model = tiny_softmax_model()
    before = logits(model)
    hybrid = convert_model(model, 0.5)
    with torch.no_grad():
        for weight in hybrid.parameters():
            weight.zero_()
    assert torch.equal(logits(model), before)


def test_untied_in_fact_stays_untied():
    """What counts is the model, where it contradicts its config."""
    model = tiny_softmax_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    hybrid = convert_model(model, 1.0)
    assert not hybrid.config.tie_word_embeddings
    assert torch.equal(logits(hybrid), logits(model))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ],
)
def test_sliding_window_is_refused(name, changes):
    with pytest.raises(ValueError, match=r"sliding_window = .* is active"):
        convert_model(tiny_softmax_model(name, **changes), 0.25)


def test_sliding_window_that_no_layer_uses_is_accepted():
    unused = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}
    model = tiny_softmax_model("qwen2", **unused)
    assert torch.equal(logits(convert_model(model, 1.0)), logits(model))


def test_unsupported_architecture_is_refused():
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    with pytest.raises(ValueError, match="'gpt2' cannot be converted; supported are llama, mist"):
        convert_model(AutoModelForCausalLM.from_config(config))


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="linear_decay = 'matrix'"):
        convert_model(tiny_softmax_model(), linear_decay="matrix")
