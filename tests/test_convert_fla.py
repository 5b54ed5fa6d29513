"""fla's GLA checkpoints: read as HybridGLA with the same logits, written back with the same bytes.

fla's layers run as Triton kernels on a GPU only, so here they are written out from fla 0.6's
`layers/gla.py`, `layers/attn.py` and `modules/mlp.py` with the naive oracles, under fla's names.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from hybridsp.convert import convert, export_fla
from hybridsp.convert.fla_config import hybrid_config_of_gla
from hybridsp.models.hybrid_gla import HybridGLAForCausalLM
from hybridsp.ops.reference import naive_causal_conv, naive_gla

GLA = {
    "model_type": "gla",
    "architectures": ["GLAForCausalLM"],
    "hidden_size": 32,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "norm_eps": 1e-5,
    "vocab_size": 96,
    "fuse_norm": True,
    "attn_mode": "chunk",
}
ATTENTION = {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "rope_theta": 5e3}
VARIANTS = {
    "plain": {},
    "hybrid": {"attn": ATTENTION},
    "several entries": {"attn": [ATTENTION, ATTENTION | {"layers": [2]}]},
    "bias": {"attn": ATTENTION | {"qkv_bias": True}},
    "all softmax": {"attn": ATTENTION | {"layers": [0, 1, 2]}},
    "shared heads": {"num_kv_heads": 2, "use_short_conv": True, "conv_size": 3},
    "no gate": {"use_output_gate": False, "feature_map": "relu", "expand_v": 2.0},
    "clamped": {"clamp_min": -0.02, "fuse_norm": False, "tie_word_embeddings": True},
}


def tiny_gla(fields):
    """Random weights of a `GLAForCausalLM` under fla's names."""
    f = {"num_kv_heads": None, "use_output_gate": True, "use_short_conv": False, "attn": None}
    f |= {"fuse_norm": True, "tie_word_embeddings": False} | fields
    hidden, ffn, vocab = f["hidden_size"], f["intermediate_size"], f["vocab_size"]
    key, value = int(hidden * f["expand_k"]), int(hidden * f["expand_v"])
    share = f["num_heads"] // (f["num_kv_heads"] or f["num_heads"])
    norm = "g_norm_swish_gate" if f["fuse_norm"] and f["use_output_gate"] else "g_norm"
    shapes = {"model.embeddings.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not f["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(f["num_hidden_layers"]):
        attention = attention_of(f, i)
        if attention is None:
            layer = {
                "attn.q_proj.weight": (key, hidden),
                "attn.k_proj.weight": (key // share, hidden),
                "attn.v_proj.weight": (value // share, hidden),
                "attn.gk_proj.0.weight": (16, hidden),
                "attn.gk_proj.1.weight": (key // share, 16),
                "attn.gk_proj.1.bias": (key // share,),
                "attn.o_proj.weight": (hidden, value),
                f"attn.{norm}.weight": (value // f["num_heads"],),
            }
            if f["use_output_gate"]:
                layer["attn.g_proj.weight"] = (value, hidden)
            if f["use_short_conv"]:
                for part, width in (("q", key), ("k", key // share), ("v", value // share)):
                    layer[f"attn.{part}_conv1d.weight"] = (width, 1, f["conv_size"])
        else:
            kv = hidden // attention["num_heads"] * attention["num_kv_heads"]
            layer = {f"attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
            layer |= {f"attn.{part}_proj.weight": (kv, hidden) for part in "kv"}
            if attention.get("qkv_bias"):
                layer |= {f"attn.{p}_proj.bias": (n,) for p, n in (("q", hidden), ("k", kv))}
                layer["attn.v_proj.bias"] = (kv,)
        layer |= {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
        layer |= {f"mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def attention_of(fields, layer):
    entries = fields.get("attn") or []
    for entry in [entries] if isinstance(entries, dict) else entries:
        if layer in entry["layers"]:
            return entry
    return None


def gla_logits(fields, weights, tokens):
    """The logits that fla's model computes, [B, L, vocab]."""
    eps = fields["norm_eps"]

    def rms_norm(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)

    x = weights["model.embeddings.weight"][tokens]
    for i in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): weights[name] for name in weights if prefix in name}
        attention = attention_of(fields, i)
        h = rms_norm(x, w["attn_norm.weight"])
        if attention is None:
            x = x + gla_mixer(fields, w, h, rms_norm)
        else:
            x = x + softmax_mixer(attention, w, h)
        h = rms_norm(x, w["mlp_norm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embeddings.weight"])
    return rms_norm(x, weights["model.norm.weight"]) @ head.T


def gla_mixer(fields, w, x, rms_norm):
    heads = fields["num_heads"]
    groups = heads // (fields.get("num_kv_heads") or heads)
    q, k, v = (x @ w[f"attn.{part}_proj.weight"].T for part in "qkv")
    if fields.get("use_short_conv"):
        q, k, v = (
            naive_causal_conv(y, w[f"attn.{part}_conv1d.weight"][:, 0], activation="silu")
            for part, y in (("q", q), ("k", k), ("v", v))
        )
    logits = x @ w["attn.gk_proj.0.weight"].T @ w["attn.gk_proj.1.weight"].T
    g = F.logsigmoid(logits + w["attn.gk_proj.1.bias"]) / 16
    g = g.clamp_min(fields.get("clamp_min") or -torch.inf)
    q = q.unflatten(-1, (heads, -1))
    k, v, g = (
        y.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, dim=2) for y in (k, v, g)
    )
    if fields.get("feature_map") == "relu":
        q, k = q.relu(), k.relu()
    o, _ = naive_gla(q, k, v, g, scale=q.shape[-1] ** -0.5)
    norm = "attn.g_norm.weight" if "attn.g_norm.weight" in w else "attn.g_norm_swish_gate.weight"
    o = rms_norm(o, w[norm]).flatten(2)
    if "attn.g_proj.weight" in w:
        o = o * F.silu(x @ w["attn.g_proj.weight"].T)
    return o @ w["attn.o_proj.weight"].T


def softmax_mixer(attention, w, x):
    def project(part):
        return F.linear(x, w[f"attn.{part}_proj.weight"], w.get(f"attn.{part}_proj.bias"))

    heads, head_dim = attention["num_heads"], x.shape[-1] // attention["num_heads"]
    q, k, v = (project(part).unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in "qkv")
    rates = attention["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(x.shape[1])[:, None] * torch.cat([rates, rates])
    q, k = (y * angles.cos() + rotate_half(y) * angles.sin() for y in (q, k))
    k, v = (y.repeat_interleave(heads // attention["num_kv_heads"], dim=1) for y in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2).flatten(2) @ w["attn.o_proj.weight"].T


def write_checkpoint(folder, fields, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path, capsys):
    fields = GLA | VARIANTS[name]
    weights = tiny_gla(fields)
    source = write_checkpoint(tmp_path / "gla", fields, weights)
    hybrid = convert(source, tmp_path / "hybrid")
    assert "new             0 parameters\n" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    assert isinstance(model, HybridGLAForCausalLM)
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Two float32 computations of the same sums in another order.
        torch.testing.assert_close(
            model(tokens).logits, gla_logits(fields, weights, tokens), atol=1e-4, rtol=1e-4
        )

    back = export_fla(hybrid, tmp_path / "back")
    written = load_file(back / "model.safetensors")
    fused = {key.replace("g_norm.", "g_norm_swish_gate."): key for key in weights}
    if not fields["fuse_norm"]:  # written as fla's default, which fuses
        written = {fused[key]: weight for key, weight in written.items()}
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[key], weights[key]) for key in weights)
    assert (back / "tokenizer.model").read_bytes() == b"a tokenizer"
    again = hybrid_config_of_gla(json.loads((back / "config.json").read_text()))
    assert again.to_diff_dict() == hybrid_config_of_gla(fields).to_diff_dict()


def test_a_norm_without_weight_is_one_of_ones(tmp_path):
    fields = GLA | {"elementwise_affine": False}
    weights = {key: w for key, w in tiny_gla(fields).items() if "g_norm" not in key}
    source = write_checkpoint(tmp_path / "gla", fields, weights)
    model = AutoModelForCausalLM.from_pretrained(convert(source, tmp_path / "hybrid"))
    assert (model.model.layers[0].linear_attn.output_norm.weight == 1).all()


def test_intermediate_size_of_hidden_ratio():
    """As `GatedMLP` of fla has it: two thirds of 4 * 1024, up to a multiple of 256."""
    fields = GLA | {"hidden_size": 1024, "intermediate_size": None, "hidden_ratio": 4}
    assert hybrid_config_of_gla(fields).intermediate_size == 2816


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_map": "gelu"}, "feature_map = 'gelu'"),
        ({"hidden_act": "powlu"}, "hidden_act = 'powlu'"),
        ({"attnres_block_size": 4}, "attnres_block_size = 4"),
        ({"attn": ATTENTION | {"window_size": 8}}, "window_size = 8 is a sliding window"),
        ({"attn": ATTENTION | {"layers": [3]}}, "names layer 3, .* numbered 0 to 2"),
        ({"attn": [ATTENTION, ATTENTION | {"num_heads": 4, "layers": [2]}]}, "several shapes"),
        ({"expand_k": 0.3}, "expand_k = 0.3 makes"),
        ({"attn": 5}, "attn = 5 .* does not say which layers are softmax"),
        ({"attn": {"num_heads": 4}}, "attn = {'num_heads': 4} .* does not say which layers"),
        ({"attn": [ATTENTION, 5]}, "attn = .* does not say which layers are softmax"),
        ({"attn": {"layers": 3}}, "attn: layers = 3 .* is not a list of layer numbers"),
        ({"attn": ATTENTION | {"layers": ["1"]}}, r"attn: layers = \['1'\] .* is not a list"),
        ({"attn": ATTENTION | {"num_heads": 0}}, "attn: num_heads = 0 .* is not a whole number"),
        ({"attn": ATTENTION | {"num_heads": 3}}, "attn: num_heads = 3 .* does not divide"),
        ({"attn": ATTENTION | {"rope_theta": None}}, "attn: rope_theta = None .* is not a number"),
        ({"num_heads": 0}, "num_heads = 0 .* is not a whole number above 0"),
        ({"num_heads": "4"}, "num_heads = '4' .* is not a whole number above 0"),
        ({"hidden_size": None}, "hidden_size = None .* is not a whole number above 0"),
        ({"expand_k": None}, "expand_k = None .* is not a number above 0"),
        ({"norm_eps": "small"}, "'rms_norm_eps' expected float, got str"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_unsupported_gla_is_refused(tmp_path, changes, message):
    source = write_checkpoint(tmp_path / "gla", GLA | changes, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda w: w.update(stray=torch.ones(1)), "has no place for stray"),
        (lambda w: w.update({"model.norm.weight": torch.ones(5)}), r"has shape \(5,\)"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, edit, message):
    weights = tiny_gla(GLA)
    edit(weights)
    source = write_checkpoint(tmp_path / "gla", GLA, weights)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "hybrid")


@pytest.mark.parametrize("choice", [{"softmax_layers": 0.5}, {"linear_rope": True}])
def test_a_gla_checkpoint_leaves_no_choice(tmp_path, choice):
    source = write_checkpoint(tmp_path / "gla", GLA, tiny_gla(GLA))
    with pytest.raises(ValueError, match=f"{next(iter(choice))}: .* is a GLA checkpoint"):
        convert(source, tmp_path / "hybrid", **choice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_rope": True}, "linear_rope = True cannot be written as fla's GLA"),
        ({"linear_decay": "fixed"}, "linear_decay = 'fixed'"),
        ({"linear_gate_low_rank_dim": 4}, "linear_gate_low_rank_dim = 4"),
        ({"softmax_rope": False}, "softmax_rope = False"),
        ({"linear_num_key_value_heads": 2}, "differs between query heads"),
        ({"attention_bias": True}, "is not zero"),
    ],
)
def test_what_fla_has_not_is_not_written(tmp_path, changes, message):
    config = hybrid_config_of_gla(GLA | {"attn": ATTENTION})
    for name, value in changes.items():
        setattr(config, name, value)
    model = HybridGLAForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match=message):
        export_fla(tmp_path / "hybrid", tmp_path / "gla")
    assert not (tmp_path / "gla").exists()


def test_only_hybrids_are_written_as_gla(tmp_path):
    source = write_checkpoint(tmp_path / "gla", GLA | {"model_type": "llama"}, {})
    with pytest.raises(ValueError, match=re.escape("is no HybridGLA checkpoint")):
        export_fla(source, tmp_path / "back")
