"""A recipe's model, ready for `hybridsp.initialize`: with its weights, parallelized, cut.

What a recipe says of a model is said in three places: its checkpoint, sequence parallelism with
what saves memory, and DeepSpeed's configuration, which under ZeRO-3 has to be known before a weight
is read. Whoever trains by a recipe goes this way, so that all train the same model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hybridsp.mesh import SPMesh
from hybridsp.parallelize import parallelize
from hybridsp.pretrained import (
    NO_CODE,
    check_config,
    check_safetensors,
    empty_causal_lm,
    fill_sharded,
    load_causal_lm,
)
from hybridsp.recipe import Recipe
from hybridsp.untrusted import shown

logger = logging.getLogger(__name__)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        ValueError: it cannot be read, or needs code of its own.
    """
    check_config(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
    except Exception as error:  # tokenizers raises plain Exceptions, which name no file
        if not any(Path(folder).glob("token*")):
            raise ValueError(
                f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json): copy its "
                "files there from the checkpoint that the model comes from"
            ) from error
        raise ValueError(f"the tokenizer of {folder} cannot be read: {error}") from error


def check_same_tokenizer(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    other_name: str,
    other: PreTrainedTokenizerBase,
    remedy: str,
) -> None:
    """Refuse two models by whose tokenizers a token means two things.

    Args:
        name, other_name: what the user calls the models.
        remedy: what the user can do.

    Raises:
        ValueError: the vocabularies differ; names one token that does.
    """
    one, two = tokenizer.get_vocab(), other.get_vocab()
    different = sorted({token for token, _ in one.items() ^ two.items()})
    if different:
        token = different[0]
        raise ValueError(
            f"{name} and {other_name} have different tokenizers ({len(different)} tokens, such as "
            f"{shown(token)}: {one.get(token)} and {two.get(token)}), so their tokens are not the "
            f"same words; {remedy}"
        )


def num_embeddings(folder: str) -> int | None:
    """Tokens that a checkpoint's model has embeddings for, by its config; None if that is silent.

    Raises:
        ValueError: the config cannot be read, or says no number.
    """
    size = check_config(folder).get("vocab_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{folder}: vocab_size = {shown(size)} in config.json is no number")
    return size


def prepare_model(model: PreTrainedModel, mesh: SPMesh, recipe: Recipe) -> None:
    """Install sequence parallelism and what the recipe says of memory, in place.

    Raises:
        ValueError: as `hybridsp.parallelize`.
    """
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable()
    parallelize(
        model,
        mesh,
        keep_attention=recipe.keep_attention,
        tiled_mlp=recipe.tiled_mlp,
        offload_activations=recipe.offload_activations,
    )


def load_prepared(recipe: Recipe, mesh: SPMesh, config: Mapping[str, Any]) -> PreTrainedModel:
    """The recipe's checkpoint as a prepared model. Collective over the world.

    Args:
        recipe: names the checkpoint.
        mesh: the grid of ranks.
        config: the DeepSpeed configuration that `hybridsp.initialize` will be given. At stage 3
            no rank holds more than its share of the weights and one whole one.

    Raises:
        ValueError: the checkpoint is not whole, or cannot be parallelized; on every rank.
    """
    shards = config.get("zero_optimization", {}).get("stage") == 3

    logger.info("loading %s", recipe.model)

    def load() -> PreTrainedModel:
        check_safetensors(recipe.model)
        read = empty_causal_lm if shards else load_causal_lm
        model = read(recipe.model, dtype=recipe.torch_dtype)
        prepare_model(model, mesh, recipe)
        return model

    model = mesh.on_every_rank(load)
    if shards:
        fill_sharded(model, recipe.model, mesh, config)
    return model


__all__ = [
    "check_same_tokenizer",
    "load_prepared",
    "load_tokenizer",
    "num_embeddings",
    "prepare_model",
]
