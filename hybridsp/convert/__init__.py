"""From a softmax checkpoint to a hybrid one, without training.

    source.py        read a safetensors or GGUF checkpoint, refuse what would be read wrongly
    layer_choice.py  which layers stay softmax
    mapping.py       config fields and weights of the hybrid
    this file        the three in a row, and writing the result
    align.py         fit one linear layer to the softmax layer in its place
    measure.py       which layers linear attention replaces at the least cost, measured
    fla.py           checkpoints of fla's GLA, read and written without loss

The result is a start for training, not a model to use: a linear layer that computes with softmax's
weights has to be taught, by fine-tuning or distillation. With all layers kept softmax it computes
what the source computes, bit for bit.

The output folder appears at once and whole: it is written beside its final place under another
name and moved there last, so a run that dies leaves the place as it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridsp.convert.fla import copy_companions, is_gla, read_gla, write_gla
from hybridsp.convert.fla_config import gla_config_of_hybrid
from hybridsp.convert.layer_choice import SoftmaxLayers, choose_softmax_layers
from hybridsp.convert.mapping import (
    SUPPORTED_MODEL_TYPES,
    HybridOptions,
    convert_model,
    hybrid_config,
    reused_weights,
)
from hybridsp.convert.measure import (
    LayerCost,
    keep_costliest,
    measure_layers,
    measured_share,
    read_windows,
    write_ranking,
)
from hybridsp.convert.source import Source, check_tokenizer, find_source
from hybridsp.files import appear_at_once
from hybridsp.models.hybrid_gla import HybridGLAConfig, HybridGLAForCausalLM
from hybridsp.pretrained import check_config, load_causal_lm
from hybridsp.untrusted import reading

# The command line always names a decay.
DEFAULT_DECAY = ("linear_decay", "vector")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    softmax_layers: SoftmaxLayers = 0.25,
    text: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: Unpack[HybridOptions],
) -> Path:
    """Convert a checkpoint on disk and print what was done.

    Args:
        src: a folder with config.json and safetensors, a .gguf file, or a folder with one. A
            checkpoint of fla's GLA is read as it is; it says itself which layers are softmax.
        dst: the folder to write: weights, config, generation config, tokenizer, chat template.
        softmax_layers: see `convert_model`; or "measured:0.25", this share of the layers, chosen by
            `measure_layers`, which also writes `layer_ranking.json`.
        text: what to measure on, with "measured:".
        dtype: of the weights written; None or "auto" is the source's own, fp32 for GGUF.
        seed, options: see `convert_model`.
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
    if source.gguf_file is None and is_gla(source.folder):
        _refuse_choices(source, softmax_layers, options)
        return _convert_gla(source, dst, torch_dtype, overwrite)
    share = _check_measured(softmax_layers, text)
    config = source.load_config()
    # The same checks again, now, because reading the weights of a large model takes minutes.
    hybrid_config(config, softmax_layers if share is None else share, **options)
    tokenizer = source.load_tokenizer()
    check_tokenizer(tokenizer, config, source.path)

    costs: list[LayerCost] = []
    model = source.load_model(config, torch_dtype)
    if share is not None:
        assert text is not None
        costs = _measure(model, tokenizer, text, seed, options)
        softmax_layers = keep_costliest(costs, share)
    hybrid = convert_model(model, softmax_layers, seed=seed, share_weights=True, **options)
    num_reused = sum(weight.numel() for weight in reused_weights(model, hybrid.config).values())
    with appear_at_once(dst, overwrite=overwrite) as folder:
        hybrid.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if costs:
            write_ranking(costs, [*keep_costliest(costs, share or 0.0)], folder)
    _report(source, config.model_type, dst, hybrid, num_reused, saved_tokenizer=bool(tokenizer))
    return dst


def export_fla(
    src: str | Path, dst: str | Path, *, dtype: torch.dtype | str | None = None, overwrite=False
) -> Path:
    """Write a HybridGLA checkpoint as one of fla's GLA (`GLAForCausalLM`).

    Args:
        src: folder of a HybridGLA checkpoint.
        dst, dtype, overwrite: as of `convert`.

    Raises:
        ValueError: what fla's GLA does not have, such as RoPE in linear layers; the field is named.
        FileNotFoundError: `src` or a file that belongs to it is missing.
    """
    source = find_source(src)
    dst = Path(os.path.abspath(dst))
    _check_destination(dst, source, overwrite)
    fields = check_config(source.folder) if source.gguf_file is None else {}
    if fields.get("model_type") != HybridGLAConfig.model_type:
        raise ValueError(f"SRC = {src} is no HybridGLA checkpoint, which alone is written as fla's")
    with reading(source.path, "config"):
        config = HybridGLAConfig.from_pretrained(source.folder)
    gla_config_of_hybrid(config)
    hybrid = load_causal_lm(source.folder, dtype=_parse_dtype(dtype))
    with appear_at_once(dst, overwrite=overwrite) as folder:
        write_gla(hybrid, folder)
        saved = copy_companions(source.folder, folder)
    num_reused = hybrid.num_parameters()
    _report(source, hybrid.config.model_type, dst, hybrid, num_reused, saved_tokenizer=saved)
    return dst


def _convert_gla(source: Source, dst: Path, dtype: torch.dtype | str, overwrite: bool) -> Path:
    hybrid = read_gla(source.folder, dtype)
    with appear_at_once(dst, overwrite=overwrite) as folder:
        hybrid.save_pretrained(folder)
        saved = copy_companions(source.folder, folder)
    _report(source, "gla", dst, hybrid, hybrid.num_parameters(), saved_tokenizer=saved)
    return dst


def _refuse_choices(source: Source, softmax_layers: object, options: HybridOptions) -> None:
    chosen = [name for name, value in options.items() if (name, value) != DEFAULT_DECAY]
    if str(softmax_layers) != "0.25":
        chosen.insert(0, "softmax_layers")
    if chosen:
        raise ValueError(
            f"{', '.join(chosen)}: {source.path} is a GLA checkpoint, whose config.json says which "
            "layers are softmax and how layers compute; leave these options out"
        )


def _check_measured(softmax_layers: object, text: object) -> float | None:
    share = measured_share(softmax_layers)
    if share is not None and text is None:
        raise ValueError(
            f"softmax_layers = {softmax_layers!r} needs a text to measure on; name a file (--text)"
        )
    if share is None and text is not None:
        raise ValueError(
            f"text = {text} is used to measure layers only; ask for it with softmax_layers = "
            "measured:0.25, or leave it out"
        )
    return share


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Path,
    seed: int,
    options: HybridOptions,
) -> list[LayerCost]:
    if tokenizer is None:
        raise ValueError(f"text = {text} needs a tokenizer to be read, and the source has none")
    tokens = read_windows(text, tokenizer)
    device = model.device
    model.to("cuda" if torch.cuda.is_available() else device)
    costs = measure_layers(model, tokens, seed=seed, **options)
    model.to(device)
    return costs


def _report(
    source: Source,
    model_type: str,
    dst: Path,
    hybrid: HybridGLAForCausalLM,
    num_reused: int,
    *,
    saved_tokenizer: bool,
) -> None:
    rows = {
        "source": f"{source.path} ({model_type})",
        **_describe(hybrid, num_reused),
        "tokenizer": "saved" if saved_tokenizer else "none in the source",
        "written": f"{dst} ({str(hybrid.dtype).removeprefix('torch.')})",
    }
    print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))


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
    "HybridOptions",
    "LayerCost",
    "choose_softmax_layers",
    "convert",
    "convert_model",
    "export_fla",
    "find_source",
    "hybrid_config",
    "measure_layers",
    "reused_weights",
]
