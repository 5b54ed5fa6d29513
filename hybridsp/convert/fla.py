"""Checkpoints of flash-linear-attention's GLA, read into HybridGLA without loss and written back.

Both compute the same: a weight keeps its numbers and changes its name, with three exceptions. A
convolution [channels, 1, taps] loses its middle axis. Where KV heads are shared, fla shares the
gates with them, and HybridGLA has gates for every query head: rows are repeated per head, and one
of each group is written back if they are still equal. A norm without a weight gets one of ones.

fla need not be installed: its files are read and written as files. Configs: fla_config.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from hybridsp.convert.fla_config import gla_config_of_hybrid, hybrid_config_of_gla
from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM
from hybridsp.pretrained import check_safetensors, weight_files
from hybridsp.untrusted import read_json

MODEL_TYPE = "gla"
BLOCK = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
SOFTMAX = {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
LINEAR = {
    **{f"attn.{x}_proj": f"linear_attn.{x}_proj" for x in "qkvo"},
    **{f"attn.{x}_conv1d": f"linear_attn.{x}_conv" for x in "qkv"},
    "attn.g_proj": "linear_attn.output_gate",
    "attn.gk_proj.0": "linear_attn.decay_down",
    "attn.gk_proj.1": "linear_attn.decay_up",
    "attn.g_norm_swish_gate": "linear_attn.output_norm",
    "attn.g_norm": "linear_attn.output_norm",
}
# What belongs to a checkpoint beside weights and config, and is the same in both families.
COMPANIONS = (
    "*token*",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def is_gla(folder: Path) -> bool:
    """Whether a folder holds a GLA checkpoint of fla."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == MODEL_TYPE


def read_gla(folder: Path, dtype: torch.dtype | str = "auto") -> HybridGLAForCausalLM:
    """Load a GLA checkpoint as HybridGLA.

    Args:
        folder: config.json and safetensors of a `GLAForCausalLM`.
        dtype: of the weights in memory; "auto" is the checkpoint's own.

    Raises:
        ValueError: a config that HybridGLA cannot follow, quantised weights, or weights that are
            missing, left over or of another shape than the config says.
        FileNotFoundError: files that are missing.
    """
    fields = read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise ValueError(f"{folder / 'config.json'} says the weights are quantised; dequantise it")
    config = hybrid_config_of_gla(fields)
    check_safetensors(folder)
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights |= load_file(file)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights = dict(_renamed(weights, config, to_hybrid=True))
    _fill_defaults(weights, config)
    if dtype == "auto":
        dtype = weights["model.embed_tokens.weight"].dtype
    model = HybridGLAForCausalLM(config).to(dtype)
    _load(model, weights, folder)
    return model.eval()


def write_gla(model: HybridGLAForCausalLM, folder: Path) -> None:
    """Write HybridGLA as a GLA checkpoint of fla, in shards where it is large.

    Raises:
        ValueError: what fla's GLA does not have.
    """
    config = model.config
    fields = gla_config_of_hybrid(config)
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    weights = dict(_renamed(weights, config, to_hybrid=False))
    save_torch_state_dict(weights, folder)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, destination: Path) -> bool:
    """Copy tokenizer, chat template and generation config; whether there was a tokenizer."""
    names = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in names:
        shutil.copyfile(file, destination / file.name)
    return any(file.name.startswith("tokenizer") for file in names)


def _load(model: HybridGLAForCausalLM, weights: Mapping[str, Tensor], folder: Path) -> None:
    expected = dict(model.named_parameters())
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has no place for", weights.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{folder} {what} {', '.join(sorted(names)[:4])} ({len(names)} weights) as its "
                "config.json says; download it again"
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(weights[name].shape)}, but config.json "
                    f"says {tuple(parameter.shape)}; download it again"
                )
            parameter.copy_(weights[name])


def _renamed(
    weights: Mapping[str, Tensor], config: HybridGLAConfig, *, to_hybrid: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights under the other family's names, in its shapes; `config` is the hybrid's."""
    outside = {"model.embeddings.weight": "model.embed_tokens.weight"}
    if not to_hybrid:
        outside = {hybrid: gla for gla, hybrid in outside.items()}
    for name, weight in weights.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None or int(match[1]) >= config.num_hidden_layers:
            yield outside.get(name, name), weight
            continue
        names = BLOCK | LINEAR
        if config.layer_types[int(match[1])] == "full_attention":
            names = BLOCK | SOFTMAX
        if not to_hybrid:
            names = {hybrid: gla for gla, hybrid in names.items()} | _output_norm(config)
        reshape = _to_hybrid if to_hybrid else _to_gla
        # A name that neither family knows is left for the check of what is left over.
        part = names.get(match[2], match[2])
        if not to_hybrid and _is_linear_bias(match[2], match[3]):
            _require_zero(name, weight)
            continue
        yield f"model.layers.{match[1]}.{part}.{match[3]}", reshape(weight, name, config)


def _output_norm(config: HybridGLAConfig) -> dict[str, str]:
    """Fla's name of the output norm says whether it is fused with a gate, as is its default."""
    fused = "attn.g_norm_swish_gate" if config.linear_output_gate else "attn.g_norm"
    return {"linear_attn.output_norm": fused}


def _to_hybrid(weight: Tensor, name: str, config: HybridGLAConfig) -> Tensor:
    if "_conv1d." in name:
        return weight.squeeze(1)
    if ".gk_proj.1." in name:
        kv_heads = config.linear_num_key_value_heads
        heads = weight.unflatten(0, (kv_heads, -1))
        return heads.repeat_interleave(config.linear_num_heads // kv_heads, dim=0).flatten(0, 1)
    return weight


def _to_gla(weight: Tensor, name: str, config: HybridGLAConfig) -> Tensor:
    if "_conv." in name:
        return weight.unsqueeze(1).contiguous()
    if ".decay_up." in name:
        kv_heads = config.linear_num_key_value_heads
        groups = weight.unflatten(0, (kv_heads, config.linear_num_heads // kv_heads, -1))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(
                f"{name} differs between query heads that share a KV head, and fla's GLA has one "
                "gate for all of them; keep the checkpoint as hybrid_gla"
            )
        return groups[:, 0].flatten(0, 1).contiguous()
    return weight


def _is_linear_bias(part: str, kind: str) -> bool:
    return kind == "bias" and part.startswith("linear_attn.") and part.endswith("_proj")


def _require_zero(name: str, weight: Tensor) -> None:
    if weight.any():
        raise ValueError(
            f"{name} is not zero, and linear layers of fla's GLA have no bias; keep the "
            "checkpoint as hybrid_gla"
        )


def _fill_defaults(weights: dict[str, Tensor], config: HybridGLAConfig) -> None:
    """Add what HybridGLA has and GLA leaves out: weights of ones in norms, zeros in biases."""
    for i, kind in enumerate(config.layer_types):
        if kind == "full_attention":
            continue
        mixer = f"model.layers.{i}.linear_attn"
        fill: dict[str, tuple[int, Callable[..., Any]]] = {
            f"{mixer}.output_norm.weight": (config.linear_value_head_dim, torch.ones)
        }
        if config.attention_bias:
            for part in "qkv":
                projection = weights.get(f"{mixer}.{part}_proj.weight")
                if projection is not None:
                    fill[f"{mixer}.{part}_proj.bias"] = (len(projection), torch.zeros)
        for name, (size, make) in fill.items():
            weights.setdefault(name, make(size))


__all__ = ["copy_companions", "is_gla", "read_gla", "write_gla"]
