"""Shapes of well-known models, by name: to plan or to measure without a checkpoint at hand.

Vocabulary, widths, heads and layers are those of the models' own configs on the Hub; all are dense
Llamas.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

# HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B, meta-llama/Llama-3.1-8B.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def preset_config(name: str) -> LlamaConfig:
    """The config of a preset."""
    return LlamaConfig(**PRESETS[name])


__all__ = ["PRESETS", "preset_config"]
