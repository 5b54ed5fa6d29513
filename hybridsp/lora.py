"""LoRA (arXiv:2106.09685): train a low-rank update of some weights and leave the rest as they are.

A frozen weight needs no gradient, no optimizer state and no fp32 copy, so what is left of a large
model's memory is its weights and its activations. `peft` makes the adapters, in place: q_proj
becomes x W + (alpha / r) x A B inside the mixer, and the mixer stays the module that `parallelize`
knows, of either layer kind. Every adapted module works on each token alone, so sequence
parallelism has nothing to add to it, and gradients are exact as those of full weights are.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hybridsp.adapters import decoder_layers
from hybridsp.files import appear_at_once
from hybridsp.pretrained import load_causal_lm
from hybridsp.recipe import LoraKeys


def add_lora(model: PreTrainedModel, keys: LoraKeys) -> None:
    """Give a causal language model adapters to train, and freeze everything else, in place.

    Call it before or after `hybridsp.parallelize`, but before `hybridsp.initialize`.
    `export_pretrained` then saves the adapters alone.

    Args:
        model: a causal language model; its weights may be cut over ranks by ZeRO-3 already.
        keys: rank, scale, dropout, and what to adapt.

    Raises:
        ValueError: `peft` is not installed, or a decoder layer has no such linear module.
    """
    if find_spec("peft") is None:
        raise ValueError("lora needs the package peft: pip install 'hybridsp[lora]'")
    from peft import LoraConfig

    linear = {
        name.rsplit(".", 1)[-1]
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if unknown := sorted(set(keys.target_modules) - linear):
        raise ValueError(
            f"lora.target_modules: no decoder layer of {type(model).__name__} has a linear module "
            f"{unknown[0]!r}; choose among {', '.join(sorted(linear))}"
        )
    model.add_adapter(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=keys.r,
            lora_alpha=keys.alpha,
            lora_dropout=keys.dropout,
            target_modules=keys.target_modules,
        )
    )


def export_merged(
    base: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    config: Any,
    tokenizer: Any = None,
    **options: Any,
) -> Path:
    """Write base weights plus adapter as an ordinary checkpoint. On one rank, on the CPU.

    Args:
        base: directory of the checkpoint that was trained.
        adapter: directory of the adapter, as `export_pretrained` writes it.
        output_dir: directory the model is to be in; an earlier model there is replaced.
        config: the trained model's configuration: what a curriculum changed in it is kept.
        tokenizer: saved with it, if given.
        options: of `load_causal_lm` (`dtype`).

    Returns:
        `output_dir`.

    Raises:
        ValueError: the base is not whole.
    """
    from peft import PeftModel

    model = load_causal_lm(base, **options)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    for name in ("rope_parameters", "max_position_embeddings"):
        if hasattr(merged.config, name):
            setattr(merged.config, name, getattr(config, name))
    final = Path(output_dir)
    with appear_at_once(final) as folder:
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return final


__all__ = ["add_lora", "export_merged"]
