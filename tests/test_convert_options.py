"""The choices of a conversion: each reaches the model, and layers can be chosen by measuring."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_convert_source import tiny_tokenizer
from tiny_softmax import logits, tiny_softmax_model
from transformers import AutoModelForCausalLM

from hybridsp.cli import main
from hybridsp.convert import convert, convert_model, measure_layers
from hybridsp.convert.align import FitOptions, fit_layer, record_attention, relative_error
from hybridsp.convert.measure import LayerCost, _loss, keep_costliest, measured_share

# No weight is drawn at random.
FIXED = {"linear_decay": "fixed"}


@pytest.mark.parametrize(
    ("options", "new_per_layer"),
    [
        ({}, {"decay_down.weight", "decay_up.weight", "decay_up.bias", "output_norm.weight"}),
        ({"linear_decay": "key", "linear_feature_map": "softmax"}, {"output_norm.weight"}),
        ({"linear_decay": "fixed", "linear_output_norm": False}, set()),
        (
            {"linear_decay": "fixed", "linear_output_gate": True, "linear_qk_norm": True},
            {"output_gate.weight", "output_norm.weight", "q_norm.weight", "k_norm.weight"},
        ),
    ],
)
def test_new_weights_are_those_of_the_options(options, new_per_layer):
    model = tiny_softmax_model()
    hybrid = convert_model(model, [1], **options)
    mixer = "model.layers.0.linear_attn."
    names = {n.removeprefix(mixer) for n, _ in hybrid.named_parameters() if n.startswith(mixer)}
    assert names - {f"{part}_proj.weight" for part in "qkvo"} == new_per_layer
    assert all(getattr(hybrid.config, name) == value for name, value in options.items())
    assert torch.isfinite(logits(hybrid)).all()


def test_cloned_heads_compute_what_shared_ones_do():
    """4 query heads on 2 KV heads; a clone per query head, as `repeat_kv` clones."""
    for name in ("llama", "qwen2"):  # without and with biases
        model = tiny_softmax_model(name)
        shared = convert_model(model, [1], linear_decay="fixed")
        cloned = convert_model(model, [1], linear_decay="fixed", linear_num_key_value_heads=4)
        assert cloned.model.layers[0].linear_attn.k_proj.out_features == 4 * 8
        torch.testing.assert_close(logits(cloned), logits(shared))


def test_a_sigmoid_gate_starts_as_no_gate():
    model = tiny_softmax_model()
    gated = FIXED | {"linear_output_gate": True, "linear_output_gate_act": "sigmoid"}
    with_gate, without = (convert_model(model, 0.0, **options) for options in (gated, FIXED))
    torch.testing.assert_close(logits(with_gate), logits(without))


def test_norms_that_linear_layers_do_not_keep_are_left_out():
    hybrid = convert_model(tiny_softmax_model("qwen3"), [1], linear_qk_norm=False)
    assert not hasattr(hybrid.model.layers[0].linear_attn, "q_norm")
    assert hasattr(hybrid.model.layers[1].self_attn, "q_norm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_num_key_value_heads": 1}, "neither the source's 2 nor its 4 query heads"),
        ({"hidden_size": 8}, "hidden_size is no option of a conversion"),
        ({"linear_feature_map": "exp"}, "linear_feature_map = 'exp' is unknown"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_model(tiny_softmax_model(), **options)


def test_command_line(tmp_path, capsys):
    tiny_softmax_model().save_pretrained(tmp_path / "source")
    flags = "--linear-decay fixed --linear-memory-range 2 64 --linear-feature-map relu "
    flags += "--linear-output-gate sigmoid --linear-num-key-value-heads 4 --no-linear-rope "
    flags += "--no-softmax-rope --linear-qk-norm --no-linear-output-norm"
    src, dst = str(tmp_path / "source"), str(tmp_path / "hybrid")
    assert main(["convert", src, dst, *flags.split()]) == 0
    config = AutoModelForCausalLM.from_pretrained(dst).config
    assert (config.linear_decay, config.linear_memory_range) == ("fixed", [2.0, 64.0])
    assert (config.linear_feature_map, config.linear_output_gate_act) == ("relu", "sigmoid")
    assert (config.linear_output_gate, config.linear_num_key_value_heads) == (True, 4)
    assert (config.linear_rope, config.softmax_rope) == (False, False)
    assert (config.linear_qk_norm, config.linear_output_norm) == (True, False)
    for bad, message in (
        (["--text", "x.txt"], "is used to measure layers only"),
        (["--softmax-layers", "measured:0.25"], "needs a text to measure on"),
        (["--softmax-layers", "measured:2", "--text", "x"], "goes the share of softmax layers"),
        (["--to", "fla", "--linear-rope"], "leave other choices out"),
        (["--to", "fla"], "is no HybridGLA checkpoint"),
    ):
        capsys.readouterr()
        assert main(["convert", src, str(tmp_path / "bad"), *bad]) == 2
        assert message in capsys.readouterr().err


def test_fitting_lowers_the_error_of_one_layer_alone():
    model = tiny_softmax_model()
    tokens = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(0))
    record = record_attention(model, tokens, [2])[2]
    hidden = model.model(tokens, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(record.inputs, model.model.layers[2].input_layernorm(hidden))
    hybrid = convert_model(model, 0.0)
    before = {name: weight.clone() for name, weight in hybrid.named_parameters()}
    error = relative_error(hybrid.model, 2, record).item()
    fit_layer(hybrid.model, 2, record, FitOptions(steps=30, lr=1e-2))
    assert relative_error(hybrid.model, 2, record).item() < 0.8 * error
    changed = {n for n, w in hybrid.named_parameters() if not torch.equal(w, before[n])}
    assert changed
    assert all(name.startswith("model.layers.2.linear_attn.") for name in changed)


def test_layers_are_measured_alone_and_the_source_is_left_alone():
    model = tiny_softmax_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    tokens = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(0))
    costs = measure_layers(model, tokens, fit=FitOptions(steps=2), linear_decay="fixed")
    assert [cost.layer for cost in costs] == [0, 1, 2, 3]
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with torch.no_grad():  # a layer that says nothing costs nothing
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    costs = measure_layers(model, tokens, fit=FitOptions(steps=2, lr=1e-9), linear_decay="fixed")
    silent = costs[1]
    assert max(abs(silent.recall), abs(silent.text)) < 1e-5
    assert all(abs(cost.text) > 1e-4 for cost in costs if cost.layer != 1)


class Copier(torch.nn.Module):
    """Knows what it has read: the token behind the last one's first occurrence, where it recurs."""

    def forward(self, tokens, use_cache):
        row = tokens[0].tolist()
        logits = torch.zeros(1, len(row), 96)
        for i, token in enumerate(row):
            if token in row[:i]:
                logits[0, i, row[row.index(token) + 1]] = 50.0
        return SimpleNamespace(logits=logits)


def test_recall_counts_only_what_repetition_foretells():
    """The first token of the second half is none of it: nothing says that a repetition begins."""
    passage = torch.arange(8).repeat(1, 2)
    assert _loss(Copier(), passage, repeated=True) == pytest.approx(0.0, abs=1e-6)
    # Alone, 8 tokens of 15 are guesses among 96.
    assert _loss(Copier(), passage) == pytest.approx(8 / 15 * math.log(96))


def test_a_choice_of_a_wrong_type_is_named():
    with pytest.raises(ValueError, match="'linear_rope' expected bool, got str"):
        convert_model(tiny_softmax_model(), linear_rope="yes")


def test_the_costliest_layers_are_kept():
    costs = [LayerCost(i, recall, 0.0, 0.0) for i, recall in enumerate([0.1, 0.9, -0.2, 0.5])]
    assert keep_costliest(costs, 0.5) == [1, 3]
    assert keep_costliest(costs, 0.0) == []


@pytest.mark.parametrize("spec", ["measured:1", "measured:2.0", "measured:", "measured:x.y"])
def test_measured_wants_a_share(spec):
    with pytest.raises(ValueError, match="goes the share of softmax layers"):
        measured_share(spec)


def test_measured_choice_writes_its_ranking(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridsp.convert.align.FitOptions", partial(FitOptions, steps=2))
    tiny_softmax_model().save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    words = torch.randint(90, (17000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (tmp_path / "short.txt").write_text("w1 " * 2000)
    with pytest.raises(ValueError, match="windows of 512 tokens, and 32 are needed"):
        convert(
            tmp_path / "source",
            tmp_path / "hybrid",
            softmax_layers="measured:0.25",
            text=tmp_path / "short.txt",
        )
    dst = convert(
        tmp_path / "source",
        tmp_path / "hybrid",
        softmax_layers="measured:0.25",
        text=tmp_path / "text.txt",
        linear_decay="fixed",
    )
    written = json.loads((dst / "layer_ranking.json").read_text())
    kept = json.loads((dst / "config.json").read_text())["layer_types"].index("full_attention")
    assert written["softmax_layers"] == [kept]
    assert written["ranking"][0]["layer"] == kept
    assert len(written["ranking"]) == 4


def test_tokenizer_of_another_model_is_refused(tmp_path):
    tiny_softmax_model(vocab_size=40).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"tokens up to 95, and the model's vocab_size is 40"):
        convert(tmp_path / "source", tmp_path / "hybrid")
