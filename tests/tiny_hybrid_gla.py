"""Tiny HybridGLA models for tests: hidden size 32, four layers, every parameter random.

Biases and norms are random too, so that no path hides behind zeros and ones.
"""

import torch
from torch import nn

from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM

VOCAB = 64
HYBRID = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Each variant turns on what the ones before it leave off.
VARIANTS = {
    "vector": {},
    "vector_conv": {"linear_conv_kernel_dim": 4, "attention_bias": True},
    "scalar": {"linear_decay": "scalar", "linear_rope": True, "softmax_rope": False},
    "scalar_conv": {"linear_decay": "scalar", "linear_conv_kernel_dim": 3, "linear_qk_norm": True},
    "fixed": {"linear_decay": "fixed", "linear_output_gate": False, "qk_norm": True},
    "fixed_conv": {"linear_decay": "fixed", "linear_conv_kernel_dim": 1},
    "key": {"linear_decay": "key", "linear_feature_map": "softmax", "linear_rope": True},
    "elu": {"linear_feature_map": "elu", "linear_output_gate_act": "sigmoid"},
    "relu": {"linear_feature_map": "relu", "linear_gate_clamp_min": -0.04, "linear_qk_norm": True},
    "only_linear": {"layer_types": ["linear_attention"] * 4, "linear_output_norm": False},
    "only_softmax": {"layer_types": ["full_attention"] * 4, "attention_output_bias": True},
}


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def tiny_config(**kwargs) -> HybridGLAConfig:
    return HybridGLAConfig(
        **(SHAPE | {"layer_types": HYBRID, "linear_num_key_value_heads": 2} | kwargs)
    )


def tiny_model(**kwargs) -> HybridGLAForCausalLM:
    return randomise(HybridGLAForCausalLM(tiny_config(**kwargs)).eval())


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length))
