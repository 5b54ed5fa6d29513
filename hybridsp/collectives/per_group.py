"""What is found out once for a process group and remembered as long as the group lives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

T = TypeVar("T")


def per_group(make: Callable[[dist.ProcessGroup], T]) -> Callable[[dist.ProcessGroup], T]:
    """Call `make` once per group.

    Groups are told apart by identity, not by name: a name is used again after
    `destroy_process_group`. What `make` returns must not refer to the group, or both live for ever.
    """
    kept: WeakKeyDictionary[dist.ProcessGroup, T] = WeakKeyDictionary()

    @functools.wraps(make)
    def get(group: dist.ProcessGroup) -> T:
        if group not in kept:
            kept[group] = make(group)
        return kept[group]

    return get
