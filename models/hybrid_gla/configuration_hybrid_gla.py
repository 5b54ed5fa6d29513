"""Configuration of HybridGLA: a Llama-like decoder whose layers are linear or softmax attention.

Softmax layers and everything around them use Llama's names and meanings, so that a Llama, Qwen2 or
Qwen3 checkpoint maps onto them one to one. Linear layers are gated linear attention (GLA,
arXiv:2312.06635) with a choice of decay. A field this family does not have is refused, not stored.
"""

import difflib
from dataclasses import fields
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# Fields that may be given as None are filled at construction; the type checker sees them filled.
if TYPE_CHECKING:
    from typing import Any as OptionalDict
    from typing import Any as OptionalInt
    from typing import Any as OptionalList
else:
    OptionalDict, OptionalInt, OptionalList = dict | None, int | None, list[str] | None

LAYER_TYPES = ("linear_attention", "full_attention")
DECAYS = ("vector", "scalar", "key", "fixed")
FEATURE_MAPS = ("none", "relu", "elu", "softmax")
OUTPUT_GATES = ("silu", "sigmoid")
FULL_ATTENTION_INTERVAL = 4

# What Hugging Face libraries keep in config.json without a field of `PreTrainedConfig` for it.
LIBRARY_KEYS = ("auto_map", "quantization_config", "tokenizer_class", "transformers_weights")


@strict
class HybridGLAConfig(PreTrainedConfig):
    """Architecture of a HybridGLA model.

    Every layer:
        layer_types: "linear_attention" or "full_attention" per layer; None puts softmax attention
            in every fourth layer.
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, hidden_act, mlp_bias,
        max_position_embeddings, initializer_range, rms_norm_eps, use_cache, tie_word_embeddings,
        pad_token_id, bos_token_id, eos_token_id, rope_parameters: as in `LlamaConfig`.
        attention_bias: bias on q, k and v of both layer kinds.
        attention_output_bias: bias on o of both layer kinds. Llama's `attention_bias=True` means
            both; Qwen2 has the first only.

    Softmax layers:
        num_attention_heads, num_key_value_heads, head_dim, attention_dropout: as in `LlamaConfig`.
        qk_norm: RMSNorm over each head of q and k (Qwen3).
        softmax_rope: False for no position embedding in softmax layers (NoPE).

    Linear layers:
        linear_num_heads: None for num_attention_heads.
        linear_num_key_value_heads: heads of k and v, each cloned for linear_num_heads /
            linear_num_key_value_heads query heads; None for linear_num_heads.
        linear_key_head_dim, linear_value_head_dim: rows and columns of a head's state; None for
            hidden_size * expand_k (or expand_v) / linear_num_heads.
        expand_k, expand_v: key and value width over hidden_size; None for 0.5 and 1.0.
        linear_decay: "vector" (a gate per key channel, GLA), "scalar" (a gate per head), "key" (a
            gate per key channel, the key itself being its logit, so without weights of its own;
            Liger, arXiv:2503.01496) or "fixed" (a constant per head, RetNet, arXiv:2307.08621).
        linear_gate_low_rank_dim: rank of the projection to the gates (vector and scalar).
        linear_gate_logit_normalizer: divides the log of the gates, so a larger one forgets more
            slowly (all but fixed).
        linear_gate_clamp_min: least value of the log of the gates, or None (all but fixed).
        linear_memory_range: shortest and longest memory in tokens, spread evenly in log over the
            heads, or over the channels of a head with a gate per channel. Fixed decays have it;
            vector and scalar gates start with it.
        linear_feature_map: what q and k pass behind q/k norm and in front of RoPE: "none", "relu",
            "elu" (elu + 1, arXiv:2006.16236) or "softmax" (over the head, Liger).
        linear_output_gate: multiply the output by an activation of a projection of the layer's
            input.
        linear_output_gate_act: that activation, "silu" or "sigmoid".
        linear_output_norm: RMSNorm over each head of the output.
        linear_conv_kernel_dim: taps of a causal convolution on q, k and v; 0 for none.
        linear_rope, linear_qk_norm: as softmax_rope and qk_norm.

    Raises:
        ValueError: a field unknown to the family, or values that do not fit each other.
        StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "hybrid_gla"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - Trainer adds a list to it

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    layer_types: OptionalList = None
    hidden_act: str = "silu"
    mlp_bias: bool = False
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    rope_parameters: OptionalDict = None
    attention_bias: bool = False
    attention_output_bias: bool = False

    num_attention_heads: int = 16
    num_key_value_heads: OptionalInt = None
    head_dim: OptionalInt = None
    attention_dropout: float | int = 0.0
    qk_norm: bool = False
    softmax_rope: bool = True

    linear_num_heads: OptionalInt = None
    linear_num_key_value_heads: OptionalInt = None
    linear_key_head_dim: OptionalInt = None
    linear_value_head_dim: OptionalInt = None
    expand_k: float | int | None = None
    expand_v: float | int | None = None
    linear_decay: str = "vector"
    linear_gate_low_rank_dim: int = 16
    linear_gate_logit_normalizer: float | int = 16
    linear_gate_clamp_min: float | int | None = None
    linear_memory_range: list | tuple = (32, 4096)
    linear_feature_map: str = "none"
    linear_output_gate: bool = True
    linear_output_gate_act: str = "silu"
    linear_output_norm: bool = True
    linear_conv_kernel_dim: int = 0
    linear_rope: bool = False
    linear_qk_norm: bool = False

    def __post_init__(self, **kwargs):
        """Fill what follows from other fields, then check; `kwargs` are keys without a field."""
        self._require_positive("hidden_size", "num_hidden_layers", "num_attention_heads")
        if self.layer_types is None:
            self.layer_types = [
                "linear_attention" if (i + 1) % FULL_ATTENTION_INTERVAL else "full_attention"
                for i in range(self.num_hidden_layers)
            ]
        self._resolve_heads()
        if kwargs.get("per_layer_config") is not None:
            raise ValueError(
                "per_layer_config is not supported by HybridGLA: its layers differ by kind only; "
                "use layer_types"
            )
        super().__post_init__(**kwargs)
        self._refuse_unknown(kwargs)
        # @strict calls this again, but would wrap its ValueError into an error of its own.
        self.validate_architecture()

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        self._require_positive(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "rms_norm_eps",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "linear_num_heads",
            "linear_num_key_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_gate_low_rank_dim",
            "linear_gate_logit_normalizer",
        )
        self._require_multiple("num_attention_heads", "num_key_value_heads")
        self._require_multiple("linear_num_heads", "linear_num_key_value_heads")
        self._require_one_of("linear_decay", DECAYS)
        self._require_one_of("linear_feature_map", FEATURE_MAPS)
        self._require_one_of("linear_output_gate_act", OUTPUT_GATES)
        self._check_memory()
        self._require_one_of("hidden_act", ACT2FN)
        self._check_layer_types()
        self._check_rope()
        if self.linear_conv_kernel_dim < 0:
            raise ValueError(
                f"linear_conv_kernel_dim = {self.linear_conv_kernel_dim} must not be negative; "
                "0 means no convolution"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout} must be at least 0 and below 1"
            )

    def _resolve_heads(self):
        if self.head_dim is None:
            self._require_multiple("hidden_size", "num_attention_heads", remedy="or set head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.linear_num_heads is None:
            self.linear_num_heads = self.num_attention_heads
        if self.linear_num_key_value_heads is None:
            self.linear_num_key_value_heads = self.linear_num_heads
        self._require_positive("linear_num_heads")
        self._resolve_linear_head_dim("linear_key_head_dim", "expand_k", default=0.5)
        self._resolve_linear_head_dim("linear_value_head_dim", "expand_v", default=1.0)

    def _resolve_linear_head_dim(self, name: str, expand_name: str, default: float):
        expand, given = getattr(self, expand_name), getattr(self, name)
        if given is not None and expand is None:
            return
        width = int(self.hidden_size * (default if expand is None else expand))
        head_dim, rest = divmod(width, self.linear_num_heads)
        if given is not None and given * self.linear_num_heads != width:
            raise ValueError(
                f"{name} = {given} contradicts {expand_name} = {expand}, which makes {width} / "
                f"{self.linear_num_heads} heads; give only one of the two"
            )
        if rest:
            raise ValueError(
                f"linear_num_heads = {self.linear_num_heads} does not divide {width}, the width "
                f"that {expand_name} makes of hidden_size = {self.hidden_size}; set {name}"
            )
        setattr(self, name, head_dim)

    def _refuse_unknown(self, kwargs: dict):
        """Refuse the keys that `PreTrainedConfig` did not understand.

        It consumes or translates those it knows (rope_theta, torch_dtype, generation parameters,
        ...) and stores any other under its own name, which is how they are told apart. Names with
        a leading underscore are the library's own bookkeeping.
        """
        known = sorted(field.name for field in fields(self))
        for key in kwargs:
            stored = key in self.__dict__ and not hasattr(type(self), key)
            if stored and not key.startswith("_") and key not in LIBRARY_KEYS:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{key} = {kwargs[key]!r} is not a field of HybridGLAConfig; "
                    f"did you mean {near!r}?"
                )

    def _check_memory(self):
        memory = self.linear_memory_range
        is_range = len(memory) == 2 and all(type(end) in (int, float) for end in memory)
        if not is_range or not 1 < memory[0] <= memory[1] < float("inf"):
            raise ValueError(
                f"linear_memory_range = {memory} must be the shortest and the longest memory in "
                "tokens, both above 1, such as [32, 4096]"
            )
        lowest = self.linear_gate_clamp_min
        if lowest is not None and not lowest < 0:
            raise ValueError(
                f"linear_gate_clamp_min = {lowest} bounds the log of gates in (0, 1), so it must "
                "be negative, or None for no bound"
            )

    def _check_layer_types(self):
        for i, layer_type in enumerate(self.layer_types):
            if layer_type not in LAYER_TYPES:
                raise ValueError(
                    f"layer_types[{i}] = {layer_type!r} is unknown; use one of {LAYER_TYPES}"
                )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers = "
                f"{self.num_hidden_layers}; give one per layer, or None for the default"
            )

    def _check_rope(self):
        rope = self.rope_parameters
        if "rope_type" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"rope_parameters = {rope} must be one set for all layers that rotates whole "
                "heads; drop entries per layer type and partial_rotary_factor"
            )
        rotated = {"head_dim": self.softmax_rope, "linear_key_head_dim": self.linear_rope}
        for name, used in rotated.items():
            if used and getattr(self, name) % 2:
                raise ValueError(f"{name} = {getattr(self, name)} must be even to be rotated")

    def _require_positive(self, *names: str):
        for name in names:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")

    def _require_multiple(self, name: str, divisor: str, remedy: str = "change one of them"):
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise ValueError(f"{name} = {value} must be a multiple of {divisor} = {by}; {remedy}")

    def _require_one_of(self, name: str, allowed):
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"{name} = {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}"
            )


__all__ = ["HybridGLAConfig"]
