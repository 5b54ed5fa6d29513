"""Which layers the self-check goes through: one of each kind, and the last."""

import copy
import functools
from unittest import mock

import pytest
import torch
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_self_check import BF16, make_engine
from tiny import tiny_model

import hybridsp
from hybridsp.self_check import SelfCheckError, self_check
from hybridsp.self_check.layers import find_mixers, of_layers_gone_through

PRELOAD += DEEPSPEED


def deep_models():
    """Which layers are gone through, and the check's line, per ZeRO stage."""
    mesh = hybridsp.SPMesh(ring=2)
    kinds = ["full_attention", "linear_attention", "linear_attention"] * 3
    found = []
    for stage, extra in [(1, {}), (2, BF16), (3, {}), (3, BF16)]:
        with case((stage, extra)):
            model = tiny_model(num_hidden_layers=9, layer_types=kinds)
            model.gradient_checkpointing_enable()
            layers = list(model.model.layers)
            line = self_check(make_engine(mesh, stage, extra, model=model, self_check=False), mesh)
            assert list(model.model.layers) == layers
            names = [mixer.name for mixer in of_layers_gone_through(find_mixers(model))]
            found.append((names, line))
    return found


def test_layers_like_others_are_passed_by():
    for names, line in run_ranks(deep_models, 2)[0]:
        assert [name.split(".")[2] for name in names] == ["0", "1", "8"]
        assert "through 3 of 9 layers (the others are like them)" in line


def numbers(change, model=None, layers=(4,)):
    """The layers gone through of nine that are alike, after `change` of some of them."""
    model = model or tiny_model(num_hidden_layers=9, layer_types=["linear_attention"] * 9)
    for index in layers:
        change(model.model.layers[index])
    mixers = of_layers_gone_through(find_mixers(model))
    return [int(mixer.name.split(".")[2]) for mixer in mixers]


def own_forward(layer):
    layer.mlp.forward = lambda hidden: hidden


def other_class(layer):
    layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)


def own_config(layer):
    mixer = layer.linear_attn
    mixer.config = copy.copy(mixer.config)
    mixer.config._attn_implementation = "sdpa"


def other_name(layer):
    layer.linear_attn.implementation = "x"


def wrapped(layer):
    layer.linear_attn.forward = around(layer.linear_attn.forward)


def frozen(layer):
    layer.mlp.requires_grad_(False)


def hooked(layer):
    layer.linear_attn.register_forward_hook(lambda module, args, output: output)


def hooked_before(layer):
    layer.linear_attn.register_forward_pre_hook(lambda module, args: args)


def private(layer):
    layer.linear_attn._window = 5


def around(function, extra=None):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs) if extra is None else extra

    return run


@pytest.mark.parametrize(
    "change",
    [
        own_forward,
        other_class,
        own_config,
        other_name,
        wrapped,
        frozen,
        hooked,
        hooked_before,
        private,
    ],
)
def test_a_layer_that_differs_is_a_kind_of_its_own(change):
    assert numbers(lambda layer: None) == [0, 8]
    assert numbers(change) == [0, 4, 8]


def with_setting(setting):
    """Nine layers with a setting each: what `setting` makes of the layer and whether it is odd."""
    model = tiny_model(num_hidden_layers=9, layer_types=["linear_attention"] * 9)
    for index, layer in enumerate(model.model.layers):
        layer.linear_attn.setting = setting(layer.linear_attn, index == 4)
    return numbers(lambda layer: None, model)


@pytest.mark.parametrize(
    "setting",
    [
        lambda mixer, odd: {"parallel": odd},
        lambda mixer, odd: [1, {"deep": (odd,)}],
        lambda mixer, odd: {1, 2, 3 if odd else 4},
        lambda mixer, odd: (True if odd else 1, 0.0),
        lambda mixer, odd: around(mixer.forward, odd),
        lambda mixer, odd: around(around(mixer.forward, odd)),
        lambda mixer, odd: functools.partial(type(mixer).forward, mixer, local=odd),
        lambda mixer, odd: mixer.q_proj if odd else mixer.k_proj,
        lambda mixer, odd: lambda flag=odd: flag,
    ],
)
def test_settings_are_compared_by_what_they_contain(setting):
    assert with_setting(setting) == [0, 4, 8]
    assert with_setting(lambda mixer, odd: setting(mixer, False)) == [0, 8]


def test_layers_with_lora_are_alike_but_for_its_settings():
    peft = pytest.importorskip("peft")
    model = tiny_model(num_hidden_layers=9, layer_types=["linear_attention"] * 9)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    peft.get_peft_model(model, options)
    assert numbers(lambda layer: None, model) == [0, 8]
    change = model.model.layers[4].linear_attn.q_proj.scaling
    change["default"] = 3.0
    assert numbers(lambda layer: None, model) == [0, 4, 8]


def test_what_cannot_be_compared_has_to_be_one_object():
    shared = object()
    assert with_setting(lambda mixer, odd: [shared]) == [0, 8]
    assert with_setting(lambda mixer, odd: [object() if odd else shared]) == [0, 4, 8]


def test_what_contains_itself_is_compared_too():
    def setting(mixer, odd):
        loop = [mixer, odd]
        loop.append(loop)
        return loop

    assert with_setting(setting) == [0, 4, 8]
    assert with_setting(lambda mixer, odd: setting(mixer, False)) == [0, 8]


def own_layers(stage):
    """Which layers of an engine are gone through, without and with one that differs, twice."""
    mesh = hybridsp.SPMesh(ring=2)
    found = []
    for options in [{}, {"tiled_mlp": 4}, {"offload_activations": True}]:
        with case(options):
            model = tiny_model(num_hidden_layers=6, layer_types=["full_attention"] * 6)
            model.gradient_checkpointing_enable()
            with mock.patch.object(
                hybridsp, "parallelize", functools.partial(hybridsp.parallelize, **options)
            ):
                engine = make_engine(mesh, stage, {}, model=model, self_check=False)
            lines = [self_check(engine, mesh) for _ in range(2)]
            assert all("through 2 of 6 layers" in line for line in lines), lines
            found.append([numbers(lambda layer: None, model)])
            attention = model.model.layers[3].self_attn
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = "sdpa"
            found[-1].append(numbers(lambda layer: None, model))
            with pytest.raises(SelfCheckError, match=r"layers\.3"):
                self_check(engine, mesh)
            engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_in_an_engine_a_layer_without_communication_is_not_passed_by(stage):
    for alike, one_differs in run_ranks(own_layers, 2, stage, timeout=200)[0]:
        assert (alike, one_differs) == ([0, 5], [0, 3, 5])
