"""Tiny Llama, Mistral, Qwen2 and Qwen3 models: what the converter's tests convert."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SOFTMAX_MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 16, "hidden_act": "gelu"}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-yarn-rope": ("mistral", {"sliding_window": None, "rope_parameters": YARN_ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-3}),
}
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def tiny_softmax_model(name: str = "llama", **changes):
    """A model with no weight at 0 or 1, so that a wrong mapping changes its logits."""
    model_type, fields = SOFTMAX_MODELS[name]
    config = AutoConfig.for_model(model_type, **SIZES | fields | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            offset = 1.0 if weight.ndim == 1 else 0.0
            weight.copy_(offset + torch.randn(weight.shape, generator=generator) / 8)
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits
