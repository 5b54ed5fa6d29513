"""Which layers keep softmax attention.

A user says it in one of three ways; all become one sorted list of layer indices:

    0.25 or "0.25"          a share of the layers, evenly spread
    [3, 7, 11] or "3,7,11"  these layers
    "every:4"               every 4th layer: 3, 7, 11, ...

A share `f` of `N` layers is `n = f * N` rounded to the nearest (halves up). The layers are then cut
into `n` consecutive groups as equal as can be, and the last layer of each group stays softmax:
layer `(j + 1) * N // n - 1` for `j = 0 .. n - 1`. So the last layer is always among them, and
where `N` is a multiple of 4, `0.25` and `"every:4"` say the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SoftmaxLayers = float | str | Sequence[int]

FORMS = "give a fraction in [0, 1] with a dot (0.25), layer indices (3,7,11) or a spacing (every:4)"


def choose_softmax_layers(spec: SoftmaxLayers, num_layers: int) -> list[int]:
    """Turn what the user asked for into sorted layer indices.

    Args:
        spec: a fraction, indices or a spacing; see the module's text.
        num_layers: layers of the model.

    Returns:
        Indices in [0, num_layers), rising. Empty for a fraction that rounds to no layer.

    Raises:
        ValueError: `spec` has none of the three forms, or names a layer that does not exist.
    """
    if isinstance(spec, float):
        return _spread(spec, num_layers)
    if isinstance(spec, str):
        return _parse(spec.strip(), num_layers)
    if isinstance(spec, int):  # bool too
        raise ValueError(
            f"softmax_layers = {spec!r} could be a fraction or a layer index; "
            f"write {float(spec)} or [{int(spec)}]"
        )
    return _check_indices(list(spec), num_layers)


def _parse(spec: str, num_layers: int) -> list[int]:
    if spec.startswith("every:"):
        return _every(spec, num_layers)
    if spec in ("0", "1"):
        raise ValueError(
            f"softmax_layers = {spec!r} could be a fraction or a layer index; write {spec}.0 for "
            f"{'all layers' if spec == '1' else 'none'}, or {spec}, with a comma for layer {spec}"
        )
    try:
        if "." in spec:
            return _spread(float(spec), num_layers)
        indices = [int(index) for index in spec.removesuffix(",").split(",")]
    except ValueError as error:
        # _spread's own message already says what is wrong with a number it could read.
        if str(error).startswith("softmax_layers"):
            raise
        raise ValueError(f"softmax_layers = {spec!r} cannot be read; {FORMS}") from error
    return _check_indices(indices, num_layers)


def _spread(fraction: float, num_layers: int) -> list[int]:
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"softmax_layers = {fraction} is no fraction in [0, 1]; {FORMS}")
    count = math.floor(fraction * num_layers + 0.5)
    return [(j + 1) * num_layers // count - 1 for j in range(count)]


def _every(spec: str, num_layers: int) -> list[int]:
    digits = spec.removeprefix("every:")
    spacing = int(digits) if digits.isdecimal() else 0
    if not 1 <= spacing <= num_layers:
        raise ValueError(
            f"softmax_layers = {spec!r}: the spacing must be a whole number from 1 to the model's "
            f"{num_layers} layers; 0.0 keeps no softmax layer"
        )
    return list(range(spacing - 1, num_layers, spacing))


def _check_indices(indices: list[int], num_layers: int) -> list[int]:
    for index in indices:
        if type(index) is not int:
            raise ValueError(f"softmax_layers holds {index!r}, which is no layer index; {FORMS}")
        if not 0 <= index < num_layers:
            raise ValueError(
                f"softmax_layers names layer {index}, but the model's {num_layers} layers are "
                f"numbered 0 to {num_layers - 1}"
            )
    if len(set(indices)) < len(indices):
        raise ValueError(f"softmax_layers = {indices} names a layer twice")
    return sorted(indices)


__all__ = ["SoftmaxLayers", "choose_softmax_layers"]
