"""The shape of a model: its layers, their parameters and their products, from a config alone.

A dense Llama, Mistral, Qwen2 or Qwen3 is a hybrid whose layers are all softmax (that is what the
converter rests on, `hybridsp.convert.mapping`), so one set of formulas serves every model.

Symbols: D hidden size, I width of the MLP, H heads, K and V dims of a linear head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from hybridsp.convert.layer_choice import SoftmaxLayers
from hybridsp.convert.mapping import SUPPORTED_MODEL_TYPES, hybrid_config
from hybridsp.convert.source import find_source
from hybridsp.models.hybrid_gla import HybridGLAConfig
from hybridsp.planner.presets import PRESETS, preset_config
from hybridsp.pretrained import check_config
from hybridsp.untrusted import reading

SOFTMAX, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What is known of a model without its weights.

    Attributes:
        path: where its config is, or the name of a preset.
        model_type: the family of that config.
        config: the same architecture in the family of hybrids.
        softmax_layers: the choice by which a dense model was turned into a hybrid, if it was.
    """

    path: Path
    model_type: str
    config: Any
    softmax_layers: SoftmaxLayers | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return _is_gguf(self.path)

    @property
    def is_preset(self) -> bool:
        """Whether there is nothing but a shape."""
        return _is_preset(self.path)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind that there is."""
        layers = self.config.layer_types
        return {kind: layers.count(kind) for kind in (LINEAR, SOFTMAX) if kind in layers}

    def count(self, kind: str) -> int:
        """Layers of a kind."""
        return self.kinds.get(kind, 0)

    @property
    def num_layers(self) -> int:
        """Layers of any kind."""
        return len(self.config.layer_types)

    @property
    def gates(self) -> int:
        """Decays of a linear layer per token, over all heads."""
        per_channel = self.config.linear_decay in ("vector", "key")
        per_head = self.config.linear_key_head_dim if per_channel else 1
        return self.config.linear_num_heads * per_head

    @property
    def projects_gates(self) -> bool:
        """Whether a linear layer's gates have weights of their own."""
        return self.config.linear_decay in ("vector", "scalar")

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.config.vocab_size * self.config.hidden_size

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied ones once."""
        c = self.config
        layers = sum(count * self.layer_parameters(kind) for kind, count in self.kinds.items())
        return layers + self.embedding * (1 if c.tie_word_embeddings else 2) + c.hidden_size

    @cached_property
    def tensors(self) -> int:
        """Parameters, each a tensor; tied ones once."""
        c = self.config
        layers = sum(count * self._layer_tensors(kind) for kind, count in self.kinds.items())
        return layers + (2 if c.tie_word_embeddings else 3)

    def layer_parameters(self, kind: str) -> int:
        """Parameters of one decoder layer."""
        c = self.config
        mixer = sum(rows * columns for rows, columns in self.mixer_products(kind))
        return self.mlp_parameters + mixer + self._mixer_vectors(kind) + 2 * c.hidden_size

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP."""
        c = self.config
        biases = (2 * c.intermediate_size + c.hidden_size) * bool(c.mlp_bias)
        return 3 * c.hidden_size * c.intermediate_size + biases

    def layer_products(self, kind: str) -> list[tuple[int, int]]:
        """(inputs, outputs) of every matrix that a layer multiplies each token with."""
        return self.mixer_products(kind) + self.mlp_products

    @property
    def mlp_products(self) -> list[tuple[int, int]]:
        """Those of its MLP."""
        c = self.config
        return [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]

    def mixer_products(self, kind: str) -> list[tuple[int, int]]:
        """Those of its token mixer."""
        c, hidden = self.config, self.config.hidden_size
        if kind == SOFTMAX:
            width = c.num_attention_heads * c.head_dim
            kv_width = c.num_key_value_heads * c.head_dim
            return [(hidden, width), (hidden, kv_width), (hidden, kv_width), (width, hidden)]
        query, key, value = self.linear_widths
        out = c.linear_num_heads * c.linear_value_head_dim
        products = [(hidden, query), (hidden, key), (hidden, value), (out, hidden)]
        if self.projects_gates:
            rank = c.linear_gate_low_rank_dim
            products += [(hidden, rank), (rank, self.gates)]
        return products + [(hidden, out)] * bool(c.linear_output_gate)

    @property
    def linear_widths(self) -> tuple[int, int, int]:
        """Widths of q, k and v of a linear layer as they are projected."""
        c = self.config
        return (
            c.linear_num_heads * c.linear_key_head_dim,
            c.linear_num_key_value_heads * c.linear_key_head_dim,
            c.linear_num_key_value_heads * c.linear_value_head_dim,
        )

    def _mixer_vectors(self, kind: str) -> int:
        """Biases, norms and convolutions of a token mixer."""
        c = self.config
        out_bias = c.hidden_size * bool(c.attention_output_bias)
        if kind == SOFTMAX:
            qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
            return qkv * bool(c.attention_bias) + out_bias + 2 * c.head_dim * bool(c.qk_norm)
        qkv = sum(self.linear_widths)
        return (
            qkv * (bool(c.attention_bias) + c.linear_conv_kernel_dim)
            + out_bias
            + self.gates * self.projects_gates
            + 2 * c.linear_key_head_dim * bool(c.linear_qk_norm)
            + c.linear_value_head_dim * bool(c.linear_output_norm)
        )

    def _layer_tensors(self, kind: str) -> int:
        """Parameters of one decoder layer, each a tensor."""
        c = self.config
        both = 2 + 3 * (1 + bool(c.mlp_bias)) + len(self.mixer_products(kind))
        both += 3 * bool(c.attention_bias) + bool(c.attention_output_bias)
        if kind == SOFTMAX:
            return both + 2 * bool(c.qk_norm)
        return (
            both
            + 3 * bool(c.linear_conv_kernel_dim)
            + self.projects_gates
            + 2 * bool(c.linear_qk_norm)
            + bool(c.linear_output_norm)
        )

    @cached_property
    def largest_weight(self) -> int:
        """Numbers in the largest weight of a decoder layer."""
        return max(
            rows * columns for kind in self.kinds for rows, columns in self.layer_products(kind)
        )


def load_shape(path: str | Path, softmax_layers: SoftmaxLayers | None = None) -> ModelShape:
    """Read a model's config.

    Args:
        path: a folder with config.json, a config.json, a GGUF file, or the name of a preset;
            weights are not read.
        softmax_layers: which layers would stay softmax if a dense model were converted, as in
            `hybridsp convert`; None to take the model as it is.

    Raises:
        ValueError: a file that cannot be read, a family that is not supported, or a choice of
            layers for a model that has already got one.
        FileNotFoundError: nothing there.
    """
    config = load_config(path)
    if isinstance(config, HybridGLAConfig):
        if softmax_layers is not None:
            raise ValueError(
                f"softmax_layers = {softmax_layers!r}, but {path} is a hybrid already: leave it "
                "out, or give the softmax model it came from"
            )
        return ModelShape(path=Path(path), model_type=config.model_type, config=config)
    return ModelShape(
        path=Path(path),
        model_type=config.model_type,
        config=hybrid_config(config, 1.0 if softmax_layers is None else softmax_layers),
        softmax_layers=softmax_layers,
    )


def _is_gguf(path: Path) -> bool:
    """Whether `find_source` is to say what this is."""
    return path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists())


def _is_preset(path: Path) -> bool:
    return str(path) in PRESETS and not path.exists()


def load_config(path: str | Path) -> PretrainedConfig:
    """The config at a path, as `load_shape` takes it, in its own family; raises as that does."""
    path = Path(path)
    if _is_preset(path):
        return preset_config(str(path))
    if _is_gguf(path):
        return find_source(path).load_config()
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"MODEL = {path} does not exist; give a folder with config.json, a config.json, a GGUF "
            f"file or one of {', '.join(PRESETS)} (`hf download NAME config.json --local-dir DIR` "
            "fetches the config alone)"
        )
    fields = check_config(file)
    model_type = fields["model_type"]
    if model_type == HybridGLAConfig.model_type:
        with reading(file, "config"):
            return HybridGLAConfig.from_dict(fields)
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join((HybridGLAConfig.model_type, *SUPPORTED_MODEL_TYPES))
        raise ValueError(
            f"{file} is of model_type {model_type!r}, which cannot be planned; supported: {known}"
        )
    with reading(file, "config"):
        return CONFIG_MAPPING[model_type].from_dict(fields)


__all__ = ["LINEAR", "SOFTMAX", "ModelShape", "load_config", "load_shape"]
