"""Models and settings that the planner's tests share."""

import json

from tiny import tiny_config
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hybridsp.planner import Setting, load_shape
from hybridsp.planner.setting import features_of

K = 1024
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LARGE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# Llama-70B's.
HUGE = LARGE | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SOURCES = {
    "tiny": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "small": LlamaConfig(**SMALL),
    "large": LlamaConfig(**LARGE),
}
HYBRIDS = {
    "all options": tiny_config(
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        qk_norm=True,
        linear_qk_norm=True,
        tie_word_embeddings=False,
    ),
    "vector": tiny_config(hidden_size=72, head_dim=8, linear_value_head_dim=16),
    "scalar": tiny_config(linear_decay="scalar", linear_conv_kernel_dim=0),
    "fixed": tiny_config(linear_decay="fixed", linear_output_gate=False, linear_output_norm=False),
}


def shape_of(tmp_path, config, softmax_layers=None):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_diff_dict() | {"model_type": config.model_type}))
    return load_shape(path, softmax_layers)


def setting_of(**changes):
    options = {
        "gpus": 8,
        "ring": 1,
        "ulysses": 8,
        "stage": 3,
        "offload_optimizer": False,
        "checkpointing": True,
        "batch": 1,
        "dtype_bytes": 2,
        "features": features_of(),
    }
    return Setting(**{**options, **changes})
