"""Which layers the self-check goes through: one of each kind, and the last."""

import torch
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_self_check import BF16, make_engine
from tiny import tiny_model

import hybridsp
from hybridsp.self_check import self_check
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
        assert "through 3 of 9 layers, which the others are like" in line


def test_a_layer_that_differs_is_a_kind_of_its_own():
    def numbers(change):
        model = tiny_model(num_hidden_layers=9, layer_types=["linear_attention"] * 9)
        change(model.model.layers[4])
        mixers = of_layers_gone_through(find_mixers(model))
        return [int(mixer.name.split(".")[2]) for mixer in mixers]

    def own_forward(layer):
        layer.mlp.forward = lambda hidden: hidden

    def other_class(layer):
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)

    assert numbers(lambda layer: None) == [0, 8]
    assert numbers(lambda layer: setattr(layer.linear_attn, "implementation", "x")) == [0, 4, 8]
    assert numbers(own_forward) == [0, 4, 8]
    assert numbers(other_class) == [0, 4, 8]
