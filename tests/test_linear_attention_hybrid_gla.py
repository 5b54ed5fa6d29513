"""The linear layer of HybridGLA against its definition, written out with the naive oracles."""

import pytest
import torch
from tiny_hybrid_gla import VARIANTS, random_tokens, randomise, tiny_config, tiny_model
from transformers.models.llama.modeling_llama import rotate_half

from hybridsp.models.hybrid_gla import HybridGLAForCausalLM
from hybridsp.models.hybrid_gla.linear_attention_hybrid_gla import HybridGLALinearAttention
from hybridsp.ops.reference import naive_causal_conv, naive_gla

FEATURE_MAPS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
}


@pytest.mark.parametrize(
    "variant", ["vector", "vector_conv", "scalar_conv", "fixed", "key", "elu", "relu"]
)
@torch.no_grad()
def test_linear_layer_is_gla(variant):
    config = tiny_config(**VARIANTS[variant])
    layer = randomise(HybridGLALinearAttention(config, layer_idx=0))
    x = torch.randn(2, 9, 32)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    if config.linear_conv_kernel_dim:
        convs = (layer.q_conv, layer.k_conv, layer.v_conv)
        q, k, v = (
            naive_causal_conv(y, conv.weight, activation="silu")
            for y, conv in zip((q, k, v), convs, strict=True)
        )
    # 4 heads; 2 key-value heads, each serving two neighbouring query heads; K = 4, V = 8
    q, k, v = q.view(2, 9, 4, 4), k.view(2, 9, 2, 4), v.view(2, 9, 2, 8)
    key = k[:, :, [0, 0, 1, 1]]
    if config.linear_qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = (FEATURE_MAPS[config.linear_feature_map](y) for y in (q, k))
    rotation = None
    if config.linear_rope:  # two turning pairs in K = 4
        angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.01]).repeat(2)
        rotation = angles.cos()[None], angles.sin()[None]
        q, k = (
            y * rotation[0][:, :, None] + rotate_half(y) * rotation[1][:, :, None] for y in (q, k)
        )
    k, v = k[:, :, [0, 0, 1, 1]], v[:, :, [0, 0, 1, 1]]
    if config.linear_decay == "fixed":
        decay = torch.tensor([1 - 2 ** -(5 + 7 * h / 3) for h in range(4)]).expand(2, 9, 4)
        g = decay.log()[..., None]
    elif config.linear_decay == "key":
        g = torch.sigmoid(key).log() / 16
    else:
        logits = x @ layer.decay_down.weight.T @ layer.decay_up.weight.T + layer.decay_up.bias
        gates = torch.sigmoid(logits) ** (1 / 16)
        g = gates.log().view(2, 9, 4, -1)
    if config.linear_gate_clamp_min is not None:
        assert (g < config.linear_gate_clamp_min).any()
        g = g.clamp_min(config.linear_gate_clamp_min)
    o, _ = naive_gla(q, k, v, g, scale=4**-0.5)
    o = layer.output_norm(o).reshape(2, 9, 32)
    if config.linear_output_gate:
        gate = x @ layer.output_gate.weight.T
        o = o * torch.sigmoid(gate) * (gate if config.linear_output_gate_act == "silu" else 1)
    torch.testing.assert_close(
        layer(x, position_embeddings=rotation), o @ layer.o_proj.weight.T, atol=1e-5, rtol=1e-4
    )


def test_fixed_decay_is_retnets():
    config = tiny_config(linear_decay="fixed", linear_num_heads=8, linear_key_head_dim=2)
    layer = HybridGLALinearAttention(config, layer_idx=0)
    log_decay = layer.log_decay(torch.zeros(1, 1, 32))
    gamma = 1 - 2.0 ** -torch.arange(5, 13)
    torch.testing.assert_close(log_decay[0, 0, :, 0].exp(), gamma, rtol=0, atol=1e-7)
    assert not any("decay" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("normalizer", [1, 16, 0.5, 5000])
def test_gates_start_near_one(decay, normalizer):
    config = tiny_config(linear_decay=decay, linear_gate_logit_normalizer=normalizer)
    layer = HybridGLAForCausalLM(config).model.layers[0].linear_attn
    memory = -1 / layer.log_decay(torch.zeros(1, 1, 32))
    torch.testing.assert_close(memory.min(), torch.tensor(2.0**5), rtol=1e-4, atol=0)
    torch.testing.assert_close(memory.max(), torch.tensor(2.0**12), rtol=1e-2, atol=0)


@pytest.mark.parametrize("decay", ["vector", "scalar", "fixed"])
def test_bf16_model_keeps_decays_and_state_in_fp32(decay):
    model = tiny_model(linear_decay=decay, linear_conv_kernel_dim=4).bfloat16()
    layer = model.model.layers[0].linear_attn
    assert layer.log_decay(torch.zeros(1, 2, 32, dtype=torch.bfloat16)).dtype == torch.float32
    outputs = model(random_tokens(1, 5))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.past_key_values.get_recurrent_state(0).dtype == torch.float32


def test_head_dims_follow_from_expansion():
    config = tiny_config(linear_num_heads=2, expand_k=1.0, expand_v=2.0)
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (16, 32)
    state = HybridGLAForCausalLM(config)(random_tokens(3, 2)).past_key_values
    assert state.get_recurrent_state(0).shape == (3, 2, 16, 32)


def test_memory_range_is_where_decays_start():
    wanted = {"linear_memory_range": [10.0, 90.0], "linear_num_heads": 3, "linear_key_head_dim": 2}
    wanted |= {"linear_num_key_value_heads": 1, "linear_value_head_dim": 2}
    expected = torch.tensor([10.0, 30.0, 90.0])
    fixed = HybridGLALinearAttention(tiny_config(linear_decay="fixed", **wanted), layer_idx=0)
    gamma = fixed.log_decay(torch.zeros(1, 1, 32)).exp().flatten()
    torch.testing.assert_close(1 / (1 - gamma), expected, rtol=1e-4, atol=0)
    scalar = HybridGLAForCausalLM(tiny_config(linear_decay="scalar", **wanted)).model.layers[0]
    memory = -1 / scalar.linear_attn.log_decay(torch.zeros(1, 1, 32)).flatten()
    torch.testing.assert_close(memory, expected, rtol=1e-4, atol=0)
