"""Several tensors as one message, and back: what one call costs does not grow with the tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype end to end, in a new 1-D tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def pack_padded(messages: Sequence[Sequence[Tensor]], length: int) -> Tensor:
    """Lists of tensors of one dtype, each padded with zeros to `length`, as one [n * length]."""
    parts = []
    for tensors in messages:
        flat = [tensor.flatten() for tensor in tensors]
        missing = length - sum(part.numel() for part in flat)
        parts += [*flat, flat[0].new_zeros(missing)]
    return torch.cat(parts)


def unpack(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of these shapes that begin a message: views of it."""
    sizes = [shape.numel() for shape in shapes]
    parts = message[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
