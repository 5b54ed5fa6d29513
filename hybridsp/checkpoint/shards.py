"""The weights and optimizer state of a checkpoint, by parameter, however ZeRO had cut them.

ZeRO lays the parameters of a group end to end and gives each rank a part, which is what it saves:

    ZeRO 1, 2   one flat tensor of the group, cut in equal parts: a part holds whole parameters, and
                pieces of those at its ends. Each file says which (`param_slice_mappings`).
    ZeRO 3      each parameter is cut in equal parts, and a rank's parts are laid end to end. The
                model's file gives the order and the shapes (`param_shapes`).

Both are what DeepSpeed records for its own converter (`deepspeed.checkpoint.ds_to_universal`).
`Shards` turns them around: any range of any parameter's fp32 weight or optimizer state, read
from whichever files have it. Files are mapped, not read, so a rank reads what it asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridsp.checkpoint.manifest import allowed_classes

WEIGHT = "fp32"


@dataclass
class _Piece:
    """Elements `start` to `start + numel` of a flattened parameter, in flat tensors from `at`."""

    flat: dict[str, Tensor]
    at: int
    start: int
    numel: int


@dataclass
class _Parameter:
    """Where a parameter is, and what its optimizer knows of it that is not a tensor of its size."""

    options: dict[str, Any]
    scalars: dict[str, Any]
    pieces: list[_Piece] = field(default_factory=list)

    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)


class Shards:
    """A checkpoint's parameters, addressed by name.

    Args:
        directory: of a checkpoint that was verified.
        names: of the files in it that were.

    Raises:
        ValueError: it has no optimizer state that ZeRO 1, 2 or 3 has cut.
    """

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        self._models, self._optimizers = (
            [load_plain(directory / name, mapped=True) for name in _of_all_ranks(names, kind)]
            for kind in ("model_states.pt", "optim_states.pt")
        )
        if not self._models or not self._optimizers:
            raise ValueError(f"{directory} holds no state that ZeRO 1, 2 or 3 has cut")
        self.common: dict[str, Any] = self._models[0]
        """What ranks have in common: scheduler, counters of steps, buffers."""
        self._parameters: dict[str, _Parameter] = {}
        saved = [file["optimizer_state_dict"] for file in self._optimizers]
        if "fp32_flat_groups" in saved[0]:
            self._find_cut_one_by_one(saved)
        elif isinstance(saved[0]["base_optimizer_state"], dict):
            self._find_cut_end_to_end(saved)
        else:
            raise ValueError(f"{directory} was saved with zero_optimization.elastic_checkpoint")

    def options(self, name: str) -> dict[str, Any]:
        """Options of the optimizer's group (learning rate, betas, ...) that a parameter is in."""
        return self._parameters[name].options

    def scalars(self, name: str) -> dict[str, Any]:
        """A parameter's optimizer state that is no tensor of its size: the step."""
        return {key: _copy(value) for key, value in self._parameters[name].scalars.items()}

    def keys(self, name: str) -> list[str]:
        """What `read` can give of a parameter: `fp32`, and the optimizer's tensors of its size."""
        return list(self._parameters[name].pieces[0].flat)

    def read(self, name: str, key: str, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """The elements `start` to `start + numel` of a flattened parameter's weight or state.

        Yields:
            Offsets from `start`, and fp32 [n] that belong there; together they are all elements.
        """
        for piece in self._parameters[name].pieces:
            first = max(start, piece.start)
            end = min(start + numel, piece.start + piece.numel)
            if first < end:
                at = piece.at + first - piece.start
                yield first - start, piece.flat[key][at : at + end - first]

    def frozen(self, name: str, shape: torch.Size) -> Tensor:
        """A parameter that is not trained, in its own dtype."""
        fragments = self.common.get("frozen_param_fragments") or {}
        if "fp32_flat_groups" not in self._optimizers[0]["optimizer_state_dict"]:
            return self.common["module"][name]
        assert name in fragments, "check_frozen was called"
        flat = torch.cat([model["frozen_param_fragments"][name] for model in self._models])
        return flat[: shape.numel()].view(shape)

    def check_complete(self, shapes: dict[str, int]) -> None:
        """Check that the trained parameters of a model, name to elements, are all here and whole.

        Raises:
            ValueError: one is not.
        """
        for name, numel in shapes.items():
            found = self._parameters[name].numel() if name in self._parameters else 0
            if found != numel:
                raise ValueError(
                    f"the checkpoint has {found} of the {numel} elements of {name}: resume with "
                    "the same parameters trained"
                )

    def check_frozen(self, names: Iterable[str]) -> None:
        """Check that `frozen` can give parameters, which a model does not train.

        Raises:
            ValueError: one was trained, and ZeRO-3 has cut it.
        """
        whole = "fp32_flat_groups" not in self._optimizers[0]["optimizer_state_dict"]
        for name in () if whole else names:
            if name not in (self.common.get("frozen_param_fragments") or {}):
                raise ValueError(
                    f"the checkpoint has trained {name}, which this run does not: resume with the "
                    "same parameters trained"
                )

    def _find_cut_end_to_end(self, saved: list[dict[str, Any]]) -> None:
        for part in saved:
            state, options = _by_group(part["base_optimizer_state"])
            for group, mapping in enumerate(part["param_slice_mappings"]):
                weight = part["single_partition_of_fp32_groups"][group]
                flat, scalars = _split(state.get(group, {}), weight)
                for name, address in mapping.items():
                    parameter = self._parameters.setdefault(
                        name, _Parameter(options[group], scalars)
                    )
                    parameter.pieces.append(
                        _Piece(flat, address.start, parameter.numel(), address.numel)
                    )

    def _find_cut_one_by_one(self, saved: list[dict[str, Any]]) -> None:
        for rank, part in enumerate(saved):
            state, options = _by_group(part["optimizer_state_dict"])
            for group, shapes in enumerate(self.common["param_shapes"]):
                flat, scalars = _split(state.get(group, {}), part["fp32_flat_groups"][group])
                at = 0
                for name, shape in shapes.items():
                    numel = math.prod(shape)
                    share = -(-numel // len(saved))
                    parameter = self._parameters.setdefault(
                        name, _Parameter(options[group], scalars)
                    )
                    mine = max(min(share, numel - rank * share), 0)
                    parameter.pieces.append(_Piece(flat, at, rank * share, mine))
                    at += share


def load_plain(path: Path | str, *, mapped: bool = False) -> Any:
    """What `torch.save` wrote, if it holds tensors and plain values only.

    Args:
        path: the file.
        mapped: leave tensors in the file until they are read. While they live, so does the file:
            copy what is to stay.
    """
    with torch.serialization.safe_globals(allowed_classes()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _of_all_ranks(names: Iterable[str], kind: str) -> list[str]:
    """Files of a kind in the ranks' order; at ZeRO 1 and 2 one holds the model."""

    def rank(name: str) -> int:
        number = re.search(r"zero_pp_rank_(\d+)_", name)
        return 0 if number is None else int(number[1])

    return sorted((name for name in names if name.endswith(f"mp_rank_00_{kind}")), key=rank)


def _by_group(optimizer: dict[str, Any]) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
    """A torch optimizer's state and options by number of the flat tensor."""
    options = {
        number: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer["param_groups"]
        for number in group["params"]
    }
    return optimizer["state"], options


def _split(state: dict[str, Any], weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flat tensors, weight included, and the rest. States may be padded where weights are not."""
    flat = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= weight.numel()
    }
    return {WEIGHT: weight, **flat}, {k: v for k, v in state.items() if k not in flat}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


__all__ = ["WEIGHT", "Shards", "load_plain"]
