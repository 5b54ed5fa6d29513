"""The trained model as a Hugging Face checkpoint, without a rank that holds all of it.

Where ZeRO-3 has cut the weights, they are gathered one after another. The rank whose shard file a
weight belongs to keeps a copy in its host's memory; when every rank has a shard, all write theirs
at the same time. So a rank needs memory for one weight on its device and for one shard on its host,
whatever the size of the model.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hybridsp.files import appear_at_once, sync
from hybridsp.mesh import SPMesh

SHARD_SIZE = "5GB"


def export_pretrained(
    engine: Any,
    mesh: SPMesh,
    output_dir: str | Path,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = SHARD_SIZE,
) -> Path:
    """Write the model as a Hugging Face checkpoint. Collective over the world.

    The result is complete or absent, after a loss of power as well: it is written beside its place,
    synced to disk and renamed. It is an ordinary checkpoint of the architecture; of sequence
    parallelism nothing remains in it. Of a model with adapters (`hybridsp.lora`) it is the adapters
    alone, in the format of `peft`.

    Args:
        engine: the DeepSpeed engine, at any ZeRO stage.
        mesh: its mesh.
        output_dir: directory the model is to be in; an earlier model there is replaced.
        tokenizer: saved with it, if given.
        max_shard_size: of a file of weights, in bytes or as `"5GB"`; a larger weight has a file of
            its own.

    Returns:
        `output_dir`.

    Raises:
        ValueError: the files cannot be written.
    """
    final = Path(output_dir)
    one_by_one = _can_be_written_one_by_one(engine)
    # Of no weights transformers writes no file.
    weights = {} if one_by_one else gathered_weights(engine)
    with ExitStack() as stack:
        folder = mesh.on_rank_zero(lambda: stack.enter_context(appear_at_once(final)))

        def write_the_rest() -> None:
            engine.module.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

        mesh.on_rank_zero(write_the_rest)
        if one_by_one:
            _write_one_by_one(engine.module, mesh, folder, max_shard_size)
        mesh.on_rank_zero(stack.close)
    return final


def gathered_weights(engine: Any) -> dict[str, Any] | None:
    """The weights to save, on rank 0, where ZeRO-3 has cut them. Collective over the world.

    None where they are not cut: the module has them. Of a model with adapters (`peft`) they are
    those that were trained.
    """
    if engine.zero_optimization_stage() != 3:
        return None
    # Frozen weights are those of the base model: nobody has to gather them.
    adapters = getattr(engine.module, "_hf_peft_config_loaded", False)
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters)


def _can_be_written_one_by_one(engine: Any) -> bool:
    """Whether weights are cut, and a weight of the file is a weight of the model.

    Some families' files hold weights that transformers merges or splits when it loads them.
    """
    model = engine.module
    if engine.zero_optimization_stage() != 3 or getattr(model, "_hf_peft_config_loaded", False):
        return False
    weights = _weights_of(model)
    reverted = revert_weight_conversion(model, dict(weights))
    return all(reverted.get(name) is weight for name, weight in weights.items())


def _weights_of(model: Any) -> dict[str, Tensor]:
    """Name, shape and dtype of every weight in the files; a tied one has its first name only."""
    persistent = model.state_dict().keys()
    ignored = set(model._keys_to_ignore_on_save or ())
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        name: torch.empty(getattr(w, "ds_shape", w.shape), dtype=w.dtype, device="meta")
        for name, w in named.items()
        if name in persistent and name not in ignored
    }


def _write_one_by_one(model: Any, mesh: SPMesh, folder: Path, max_shard_size: int | str) -> None:
    import deepspeed

    weights = _weights_of(model)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    files = list(split.filename_to_tensors.items())
    for first in range(0, len(files), mesh.world_size):
        mine: dict[str, Tensor] = {}
        for owner, (_, names) in enumerate(files[first : first + mesh.world_size]):
            for name in names:
                with deepspeed.zero.GatheredParameters([tensors[name]]):
                    if owner == mesh.rank:
                        mine[name] = tensors[name].detach().to("cpu", copy=True).contiguous()
        path = folder / files[first + mesh.rank][0] if mine else None
        mesh.on_every_rank(_write_shard, path, mine)
    if split.is_sharded:
        mesh.on_rank_zero(_write_index, folder, split, weights)


def _write_shard(path: Path | None, weights: dict[str, Tensor]) -> None:
    """Write a rank's file, if there is one for it in this round."""
    if path is not None:
        save_file(weights, path, {"format": "pt"})
        sync(path)  # rank 0, which syncs the folder, may be on another host


def _write_index(folder: Path, split: StateDictSplit, weights: dict[str, Tensor]) -> None:
    """Which file each weight is in, as transformers writes it."""
    parameters = sum(weight.numel() for weight in weights.values())
    index = {
        "metadata": {"total_parameters": parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


__all__ = ["export_pretrained", "gathered_weights"]
