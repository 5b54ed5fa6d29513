"""Loading a Hugging Face checkpoint, and refusing one that is not whole.

transformers is lenient: a weight that a checkpoint lacks is made up at random and one that has no
place is dropped, each with a warning at most, and training goes on. Here both are errors, and so is
a file that is cut short. Only safetensors are read, which hold no code; and no code is run that a
checkpoint brings or names, be it a model's (`auto_map`) or a kernel of the Hub.

`load_causal_lm` gives a process the whole model. Under ZeRO-3 no rank is to hold more than its
share: `empty_causal_lm` builds the model without weights, and `fill_sharded` reads one weight at a
time on rank 0, which the ranks divide among them before the next one is read. transformers' own way
to do so has every rank read the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from hybridsp.deepspeed_config import skip_inference_op
from hybridsp.mesh import SPMesh
from hybridsp.untrusted import inside, read_json, reading, shown

# transformers, left alone, asks on the terminal whether to run a checkpoint's code.
NO_CODE = {"trust_remote_code": False}
# Under these names a config may ask for an implementation, one of the Hub ("owner/name") included.
IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
# The deepest models have some hundred. A model is built layer by layer before its weights are read.
MOST_LAYERS = 2_000


def load_causal_lm(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model with every one of its weights.

    Args:
        folder: where the checkpoint is; nothing is downloaded.
        options: of `AutoModelForCausalLM.from_pretrained` (`dtype`, `config`, `gguf_file`, ...).

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: weights are missing, left over or of another shape than the config says, the
            config or the weights cannot be read, or the checkpoint needs code of its own.
    """
    if "gguf_file" not in options:
        check_config(folder)
        check_safetensors(folder)
    with reading(folder, "model"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **NO_CODE,
            **options,
        )
    for problem in ("missing", "unexpected", "mismatched"):
        _refuse(folder, problem, sorted(map(str, loaded[f"{problem}_keys"])))
    return model


def empty_causal_lm(folder: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with its parameters on the meta device, for `fill_sharded`.

    Of the weights it looks at names and shapes.

    Args:
        folder: where the checkpoint is; nothing is downloaded.
        dtype: of the parameters.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: weights are missing, left over or of another shape than the config says, or
            stored under names that only `load_causal_lm` understands; or as `load_causal_lm`.
    """
    check_config(folder)
    files = _files_of_weights(folder)
    with reading(folder, "model"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, **NO_CODE)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE)
        model.tie_weights()
        model.name_or_path = str(folder)
        if (Path(folder) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))

    groups = _names_of_parameters(model)
    _refuse(folder, "missing", [names[0] for names in groups if not files.keys() & set(names)])
    known = {name for names in groups for name in names}
    # Frequencies, which old checkpoints of Llama hold for every layer, follow from the config.
    left_over = [name for name in files if name not in known and not name.endswith("inv_freq")]
    _refuse(folder, "unexpected", left_over)
    stored = sorted(known & files.keys())
    wrong = [n for n in stored if _stored_shape(files[n], n) != model.get_parameter(n).shape]
    _refuse(folder, "mismatched", wrong)
    return model


def fill_sharded(
    model: PreTrainedModel, folder: str | Path, mesh: SPMesh, config: Mapping[str, Any]
) -> None:
    """Give an empty model its weights, cut over all ranks as ZeRO-3 keeps them, in place.

    Collective over the world. The weights are those of rank 0's files.

    Args:
        model: made by `empty_causal_lm`; it may have been parallelized.
        folder: the checkpoint.
        mesh: the grid of ranks.
        config: the DeepSpeed configuration that `hybridsp.initialize` will be given.

    Raises:
        ValueError: the ranks have different checkpoints, or a weight cannot be read; on all ranks.
    """
    import deepspeed

    if mesh.device.type == "cpu":
        skip_inference_op()
    groups = _names_of_parameters(model)
    shapes = [(names, tuple(model.get_parameter(names[0]).shape)) for names in groups]
    mesh.on_every_rank(_require_equal, folder, shapes, mesh.on_rank_zero(lambda: shapes))
    files = _files_of_weights(folder) if mesh.rank == 0 else None
    partitioned: Any = None
    for names in groups:
        empty = model.get_parameter(names[0])
        weight = mesh.on_every_rank(_read_or_allocate, files, names, empty)
        # DeepSpeed broadcasts rank 0's content and keeps a share of it on each rank.
        parameter = nn.Parameter(weight.to(mesh.device), requires_grad=empty.requires_grad)
        if partitioned is None:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(
                module=holder, config_dict_or_path=dict(config), dtype=empty.dtype, mpu=mesh.mpu
            )
            partitioned = parameter
        else:
            partitioned.convert_to_zero_parameters(param_list=[parameter])
        for name in names:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, parameter)


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Number of parameters of a model, whether ZeRO-3 has cut them or not."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad or not only_trainable
    )


def _names_of_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several for one that is tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _files_of_weights(folder: str | Path) -> dict[str, Path]:
    """The file that each weight of a checkpoint is in."""
    files = {}
    for file in weight_files(folder):
        with _open(file) as weights:
            files.update(dict.fromkeys(weights.keys(), file))
    return files


def _stored_shape(file: Path, name: str) -> tuple[int, ...]:
    with _open(file) as weights:
        return tuple(weights.get_slice(name).get_shape())


def _require_equal(folder: str | Path, mine: Any, of_rank_zero: Any) -> None:
    if mine != of_rank_zero:
        raise ValueError(
            f"{folder} holds another model than on rank 0: copy the same checkpoint to every host"
        )


def _read_or_allocate(
    files: Mapping[str, Path] | None, names: Sequence[str], empty: Tensor
) -> Tensor:
    """A weight, from the file it is in; without files, room for it."""
    if files is None:
        return torch.empty(empty.shape, dtype=empty.dtype)
    name = next(name for name in names if name in files)
    with _open(files[name]) as weights:
        return weights.get_tensor(name).to(empty.dtype)


def _refuse(folder: str | Path, problem: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{folder} does not fit its own config: {len(names)} {problem} weights, "
            f"for example {min(names)}; download it again or repair config.json"
        )


def check_safetensors(folder: str | Path) -> None:
    """Open every shard, which compares its header with its size.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard is missing.
        ValueError: the index or a shard is corrupt.
    """
    for file in weight_files(folder):
        with _open(file):
            pass


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}); download it again") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or as many as its index names.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: the index is corrupt.
    """
    folder = Path(folder)
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise FileNotFoundError(
                f"{folder} holds neither model.safetensors nor {index.name}; weights in "
                "another format are rewritten by transformers' save_pretrained"
            )
        try:
            shards = read_json(index)["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no index of shards: {error}") from error
        if not isinstance(shards, dict) or not shards:
            raise ValueError(
                f"{index} is no index of shards: weight_map = {shown(shards)} must name the file "
                "of each weight"
            )
        files = sorted({inside(folder, name, f"{index}: weight_map") for name in shards.values()})
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{index.name} names {file}, which is missing")
    return files


def check_config(path: str | Path) -> dict[str, Any]:
    """The fields of a config, if a model may be made of them.

    Args:
        path: a checkpoint's folder, or the config's file.

    Raises:
        ValueError: it cannot be read, is of an architecture that transformers does not have, asks
            for a kernel from the Hub, or has more layers than there are weights.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    fields = read_json(file)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = "its own code (auto_map) is not run; " if "auto_map" in fields else ""
        raise ValueError(
            f"{file}: model_type = {shown(model_type)} is unknown to this transformers; {code}"
            "convert the checkpoint to an architecture that it has, or update transformers"
        )
    # Of a model of several parts, each has a config of its own.
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        _refuse_kernels(file, part)
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"{file}: num_hidden_layers = {layers} is above {MOST_LAYERS}: repair it")
    return fields


def _refuse_kernels(file: Path, fields: Mapping[str, Any]) -> None:
    for name in IMPLEMENTATIONS:
        asked = fields.get(name)
        if asked is not None and asked not in ("eager", "sdpa"):
            raise ValueError(
                f"{file}: {name} = {shown(asked)} may name a kernel to be downloaded and run: "
                "remove it, hybridsp chooses the kernels"
            )


__all__ = [
    "check_config",
    "check_safetensors",
    "empty_causal_lm",
    "fill_sharded",
    "load_causal_lm",
    "num_parameters",
    "weight_files",
]
