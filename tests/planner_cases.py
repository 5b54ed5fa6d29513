"""Models and settings that the planner's tests share."""

import json

from tiny import tiny_config
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hybridsp.planner import Setting, load_shape
from hybridsp.planner.presets import PRESETS

K = 1024
SMALL, LARGE = PRESETS["smollm2-135m"], PRESETS["llama-8b"]
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
    "key": tiny_config(linear_decay="key", linear_feature_map="softmax"),
    "fixed": tiny_config(linear_decay="fixed", linear_output_gate=False, linear_output_norm=False),
}


def shape_of(tmp_path, config, softmax_layers=None):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_diff_dict() | {"model_type": config.model_type}))
    return load_shape(path, softmax_layers)


def setting_of(**changes):
    return Setting(**{"gpus": 8, "ring": 1, "ulysses": 8, "stage": 3} | changes)
