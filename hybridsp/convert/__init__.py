"""From a softmax checkpoint to a hybrid one, without training.

    source.py        read a safetensors or GGUF checkpoint, refuse what would be read wrongly
    layer_choice.py  which layers stay softmax
    mapping.py       config fields and weights of the hybrid
    this file        the three in a row, and writing the result

The result is a start for training, not a model to use: a linear layer that computes with softmax's
weights has to be taught, by fine-tuning or distillation. With all layers kept softmax it computes
what the source computes, bit for bit.

The output folder appears at once and whole: it is written beside its final place under another
name and moved there last, so a run that dies leaves the place as it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from hybridsp.convert.layer_choice import SoftmaxLayers, choose_softmax_layers
from hybridsp.convert.mapping import (
    SUPPORTED_MODEL_TYPES,
    convert_model,
    hybrid_config,
    reused_weights,
)
from hybridsp.convert.source import Source, find_source
from hybridsp.files import appear_at_once
from hybridsp.models.hybrid_gla import HybridGLAForCausalLM

DTYPES = ("auto", "float32", "bfloat16", "float16")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    softmax_layers: SoftmaxLayers = 0.25,
    linear_decay: str = "vector",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint on disk and print what was done.

    Args:
        src: a folder with config.json and safetensors, a .gguf file, or a folder with one.
        dst: the folder to write: weights, config, generation config, tokenizer, chat template.
        softmax_layers, linear_decay, seed: see `convert_model`.
        dtype: of the weights written; None or "auto" is the source's own, fp32 for GGUF.
        overwrite: replace `dst` if it is a checkpoint.

    Returns:
        The absolute path of `dst`.

    Raises:
        ValueError: an argument or a source that is not supported; `dst` is then untouched.
        FileNotFoundError: `src` or a file that belongs to it is missing.
    """
    source = find_source(src)
    dst = Path(os.path.abspath(dst))
    _check_destination(dst, source, overwrite)
    torch_dtype = _parse_dtype(dtype)
    config = source.load_config()
    # The same checks again, now, because reading the weights of a large model takes minutes.
    hybrid_config(config, softmax_layers, linear_decay=linear_decay)
    tokenizer = source.load_tokenizer()

    model = source.load_model(config, torch_dtype)
    hybrid = convert_model(
        model,
        softmax_layers,
        linear_decay=linear_decay,
        seed=seed,
        share_weights=True,
    )
    with appear_at_once(dst, overwrite=overwrite) as folder:
        hybrid.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    rows = {
        "source": f"{source.path} ({config.model_type})",
        **_describe(hybrid, num_reused=model.num_parameters()),
        "tokenizer": "saved" if tokenizer else "none in the source",
        "written": f"{dst} ({str(hybrid.dtype).removeprefix('torch.')})",
    }
    print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))
    return dst


def _check_destination(dst: Path, source: Source, overwrite: bool) -> None:
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise ValueError(f"DST = {dst} exists; choose another name, or overwrite it (--overwrite)")
    if dst.is_symlink() or not (dst / "config.json").is_file():
        raise ValueError(
            f"DST = {dst} is no folder with a config.json, so overwrite does not replace it; "
            "remove it yourself"
        )
    if source.folder.resolve().is_relative_to(dst.resolve()):
        raise ValueError(f"DST = {dst} holds the source {source.path}; choose another name")


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    name = str(dtype or "auto").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def _describe(hybrid: HybridGLAForCausalLM, num_reused: int) -> dict[str, str]:
    kinds = hybrid.config.layer_types
    softmax = [str(i) for i, kind in enumerate(kinds) if kind == "full_attention"]
    num_linear = len(kinds) - len(softmax)
    return {
        "softmax layers": f"{len(softmax)} of {len(kinds)}: {', '.join(softmax) or 'none'}",
        "linear layers": f"{num_linear} of {len(kinds)}, {hybrid.config.linear_decay} decay",
        "reused": f"{num_reused:,} parameters",
        "new": f"{hybrid.num_parameters() - num_reused:,} parameters",
    }


__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "choose_softmax_layers",
    "convert",
    "convert_model",
    "find_source",
    "hybrid_config",
    "reused_weights",
]
