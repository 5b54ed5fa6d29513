"""fla's GLA configs as HybridGLA configs, and back.

flash-linear-attention (github.com/fla-org/flash-linear-attention, 0.6) keeps its pretrained models
as `GLAForCausalLM`, model_type "gla": GLA layers, or softmax attention where its `attn` option says
so. HybridGLA can compute every one of them that is refused here by name:

    feature_map but None and relu      attnres_block_size      hidden_act but swish
    softmax layers with a window, or of several shapes         a bias in softmax layers only (*)

(*) is read, by giving linear layers biases of zero, and written back if they are zero still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hybridsp.convert.mapping import make_config
from hybridsp.models.hybrid_gla import HybridGLAConfig
from hybridsp.untrusted import shown

# GLAConfig's own defaults, which a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "num_heads": 4,
    "num_kv_heads": None,
    "feature_map": None,
    "use_short_conv": False,
    "conv_size": 4,
    "use_output_gate": True,
    "clamp_min": None,
    "hidden_act": "swish",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "attn": None,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "vocab_size": 32000,
    "attnres_block_size": None,
}
SAME_NAME = (
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "initializer_range",
    "vocab_size",
)
# The gates' low rank and normaliser are no fields of GLAConfig but constants of its layer.
GATE_RANK, GATE_NORMALIZER = 16, 16
ATTENTION_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "window_size": None}


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf


def _is_list_of_indices(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(index) is int for index in value)


# What a field is reckoned with as, in words and as a test. HybridGLAConfig checks all others.
Kind = tuple[str, Callable[[object], bool]]
COUNT: Kind = ("a whole number above 0", _is_count)
FACTOR: Kind = ("a number above 0", _is_factor)
COUNT_OR_NULL: Kind = (f"{COUNT[0]} or null", lambda value: value is None or _is_count(value))
FACTOR_OR_NULL: Kind = (f"{FACTOR[0]} or null", lambda value: value is None or _is_factor(value))
GLA_KINDS = {
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_heads": COUNT,
    "num_kv_heads": COUNT_OR_NULL,
    "expand_k": FACTOR,
    "expand_v": FACTOR,
    "hidden_ratio": FACTOR_OR_NULL,
    "intermediate_size": COUNT_OR_NULL,
}
ATTENTION_KINDS = {
    "layers": ("a list of layer numbers", _is_list_of_indices),
    "num_heads": COUNT,
    "num_kv_heads": COUNT_OR_NULL,
    "rope_theta": FACTOR,
}


def hybrid_config_of_gla(fields: Mapping[str, Any]) -> HybridGLAConfig:
    """The HybridGLA config that computes what a GLA config does.

    Args:
        fields: config.json of a `GLAForCausalLM`.

    Raises:
        ValueError: a field that HybridGLA cannot follow; its name, value and what to do.
    """
    gla = DEFAULTS | dict(fields)
    _check_kinds(gla, GLA_KINDS)
    _refuse_unsupported(gla)
    attention = _attention(gla)
    layers = attention["layers"]
    hidden, heads = gla["hidden_size"], gla["num_heads"]
    softmax_heads = attention.get("num_heads", heads)
    value_dim = _head_dim(gla, "expand_v")
    return make_config(
        **{name: gla[name] for name in SAME_NAME},
        intermediate_size=_intermediate_size(gla),
        hidden_act="silu",
        rms_norm_eps=gla["norm_eps"],
        layer_types=[
            "full_attention" if i in layers else "linear_attention"
            for i in range(gla["num_hidden_layers"])
        ],
        num_attention_heads=softmax_heads,
        num_key_value_heads=attention.get("num_kv_heads") or softmax_heads,
        head_dim=hidden // softmax_heads if layers else value_dim,
        attention_bias=attention.get("qkv_bias", False),
        softmax_rope=bool(layers),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(attention.get("rope_theta", 10000.0)),
        },
        linear_num_heads=heads,
        linear_num_key_value_heads=gla["num_kv_heads"] or heads,
        linear_key_head_dim=_head_dim(gla, "expand_k"),
        linear_value_head_dim=value_dim,
        linear_decay="vector",
        linear_gate_low_rank_dim=GATE_RANK,
        linear_gate_logit_normalizer=GATE_NORMALIZER,
        linear_gate_clamp_min=gla["clamp_min"],
        linear_feature_map=gla["feature_map"] or "none",
        linear_output_gate=gla["use_output_gate"],
        linear_output_gate_act="silu",
        linear_output_norm=True,
        linear_conv_kernel_dim=gla["conv_size"] if gla["use_short_conv"] else 0,
    )


def gla_config_of_hybrid(config: HybridGLAConfig) -> dict[str, Any]:
    """config.json of the `GLAForCausalLM` that computes what a HybridGLA config does.

    Raises:
        ValueError: a field that fla's GLA does not have, with the value that it needs.
    """
    layers = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    _require(config, _needed_of_linear())
    gla: dict[str, Any] = {
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        **{name: getattr(config, name) for name in SAME_NAME},
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": config.rms_norm_eps,
        "num_heads": config.linear_num_heads,
        "num_kv_heads": config.linear_num_key_value_heads,
        "expand_k": _expand(config, config.linear_key_head_dim),
        "expand_v": _expand(config, config.linear_value_head_dim),
        "feature_map": None if config.linear_feature_map == "none" else config.linear_feature_map,
        "use_output_gate": config.linear_output_gate,
        "use_short_conv": config.linear_conv_kernel_dim > 0,
        "conv_size": config.linear_conv_kernel_dim or 4,
        "clamp_min": config.linear_gate_clamp_min,
        "elementwise_affine": True,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype else "float32",
        "attn": None,
    }
    if layers:
        _require(config, _needed_of_softmax(config))
        gla["attn"] = {
            "layers": layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "qkv_bias": config.attention_bias,
            "window_size": None,
            "rope_theta": config.rope_parameters["rope_theta"],
        }
    return gla


def _needed_of_linear() -> dict[str, tuple]:
    """Fields of HybridGLA that fla's GLA has only with these values."""
    return {
        "hidden_act": ("silu",),
        "mlp_bias": (False,),
        "attention_output_bias": (False,),
        "linear_decay": ("vector",),
        "linear_gate_low_rank_dim": (GATE_RANK,),
        "linear_gate_logit_normalizer": (GATE_NORMALIZER,),
        "linear_feature_map": ("none", "relu"),
        "linear_rope": (False,),
        "linear_qk_norm": (False,),
        "linear_output_norm": (True,),
        "linear_output_gate_act": ("silu",),
    }


def _needed_of_softmax(config: HybridGLAConfig) -> dict[str, tuple]:
    return {
        "qk_norm": (False,),
        "softmax_rope": (True,),
        "head_dim": (config.hidden_size / config.num_attention_heads,),
        "attention_dropout": (0,),
        "rope_parameters": (
            {"rope_type": "default", "rope_theta": config.rope_parameters.get("rope_theta")},
        ),
    }


def _require(config: HybridGLAConfig, needed: Mapping[str, tuple]) -> None:
    for name, values in needed.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"{name} = {getattr(config, name)!r} cannot be written as fla's GLA, which has "
                f"only {' or '.join(map(repr, values))}; keep the checkpoint as hybrid_gla"
            )


def _expand(config: HybridGLAConfig, head_dim: int) -> float:
    return config.linear_num_heads * head_dim / config.hidden_size


def _refuse_unsupported(gla: Mapping[str, Any]) -> None:
    supported = {
        "feature_map": (None, "relu"),
        "attnres_block_size": (None,),
        "hidden_act": ("swish", "silu"),
    }
    for name, values in supported.items():
        if gla[name] not in values:
            raise ValueError(
                f"{name} = {gla[name]!r} of this GLA checkpoint is not supported; HybridGLA has "
                f"{' and '.join(map(repr, values))}: train it with fla"
            )


def _check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> None:
    for name, (kind, holds) in kinds.items():
        if name in fields and not holds(fields[name]):
            raise ValueError(
                f"{where}{name} = {shown(fields[name])} of this GLA checkpoint is not {kind}; mend "
                "its config.json or download it again"
            )


def _attention(gla: Mapping[str, Any]) -> dict[str, Any]:
    """Fla's `attn`: None, one description of softmax layers or a list of them, as one."""
    given = gla["attn"] or {"layers": []}
    entries = given if isinstance(given, list) else [given]
    for entry in entries:
        if not isinstance(entry, Mapping) or "layers" not in entry:
            raise ValueError(
                f"attn = {shown(given)} of this GLA checkpoint does not say which layers are "
                'softmax; fla writes {"layers": [1], "num_heads": 4}, a list of such, or null'
            )
        _check_kinds(entry, ATTENTION_KINDS, "attn: ")
    layers = [i for entry in entries for i in entry["layers"]]
    shapes = [ATTENTION_DEFAULTS | {k: v for k, v in e.items() if k != "layers"} for e in entries]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"attn = {given} describes softmax layers of several shapes, and those of HybridGLA "
            "are alike: train it with fla"
        )
    if shapes[0]["window_size"] is not None:
        raise ValueError(
            f"attn: window_size = {shapes[0]['window_size']} is a sliding window, and hybrids see "
            "the whole sequence; set it to null if that is what you want"
        )
    outside = [i for i in layers if not 0 <= i < gla["num_hidden_layers"]]
    if outside:
        raise ValueError(
            f"attn: layers names layer {outside[0]}, but the model's {gla['num_hidden_layers']} "
            f"layers are numbered 0 to {gla['num_hidden_layers'] - 1}"
        )
    heads = shapes[0].get("num_heads", gla["num_heads"])
    if layers and gla["hidden_size"] % heads:
        raise ValueError(
            f"attn: num_heads = {heads} of this GLA checkpoint does not divide hidden_size = "
            f"{gla['hidden_size']}; mend its config.json or download it again"
        )
    return shapes[0] | {"layers": layers}


def _head_dim(gla: Mapping[str, Any], expand: str) -> int:
    width, heads = gla["hidden_size"] * gla[expand], gla["num_heads"]
    if not math.isclose(width, round(width)) or round(width) % heads:
        raise ValueError(
            f"{expand} = {gla[expand]} makes {width} of hidden_size = {gla['hidden_size']}, which "
            f"num_heads = {heads} does not divide"
        )
    return round(width) // heads


def _intermediate_size(gla: Mapping[str, Any]) -> int:
    """Of the MLP; without one, two thirds of hidden_ratio, rounded up to a multiple of 256."""
    if gla["intermediate_size"] is not None:
        return gla["intermediate_size"]
    size = int(gla["hidden_size"] * (gla["hidden_ratio"] or 4) * 2 / 3)
    return 256 * -(-size // 256)


__all__ = ["gla_config_of_hybrid", "hybrid_config_of_gla"]
