"""The copy of a run's state in the host's memory, from which a save in the background writes.

What is saved once is saved again, so the memory of the copy is kept: a save that follows copies
into pages that are there and, beside a GPU, locked, at the speed of the link. That is the work of
the stager in `torch.distributed.checkpoint`, which keys a copy by the storage that it is of, for
as long as that lives; tied tensors stay tied. It is taken without `staging.DefaultStager` around
it, which in torch 2.11 and 2.12 closes it behind every copy: nothing would be kept, and the next
copy would fail.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from hybridsp.checkpoint.capture import File, storages_of


class Staging:
    """Host memory for the copy of one engine's state, from save to save.

    Args:
        device: the engine's.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stager = StateDictStager(pin_memory=self._on_gpu)
        self._staged: set[tuple[int, int]] = set()

    def bytes_to_get(self, files: list[File]) -> int:
        """Host memory that a copy of these files takes beside what is held, as addresses tell."""
        return sum(num_bytes for _, num_bytes in storages_of(files) - self._staged)

    def copy(self, files: list[File]) -> list[File]:
        """The same files with tensors of their own, complete when this returns.

        They are overwritten by the next copy.
        """
        contents = {str(file.path): file.content for file in files}
        copies = self._stager.stage(contents, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        self._staged = storages_of(files)
        return [dataclasses.replace(file, content=copies[str(file.path)]) for file in files]
