"""Who is there and who is not: ranks answer by name in the job's store.

The store is a key-value server beside the network that collectives use (TCP to one host, or a
file), so it works where they hang. A rank answers each question once; whoever waits for all
answers gets, when the time is over, the names of those that did not come.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

from hybridsp.launch import Rank


class RollCall:
    """The answers of a job's ranks.

    Args:
        store: of all ranks; not used by another thread meanwhile, since a wait holds it.
        me: this rank.
    """

    def __init__(self, store: Store, me: Rank) -> None:
        self._store, self.me = store, me

    def answer(self, question: str, text: str = "") -> None:
        """Say that this rank is there, and perhaps something besides."""
        self._store.set(self._key(question, self.me.rank), text or "-")
        if self._store.add(f"{question}/count", 1) == self.me.world_size:
            self._store.set(f"{question}/all", "-")

    def missing(self, question: str, seconds: float) -> list[int]:
        """The ranks that have not answered when all have, or when the time is over."""
        if self.hear(f"{question}/all", seconds) is not None:
            return []
        ranks = range(self.me.world_size)
        return [rank for rank in ranks if not self._store.check([self._key(question, rank)])]

    def answers(self, question: str, seconds: float = 0) -> dict[int, str]:
        """What the ranks that are there have said, after a wait for all of them."""
        absent = set(self.missing(question, seconds))
        return {
            rank: self._store.get(self._key(question, rank)).decode()
            for rank in range(self.me.world_size)
            if rank not in absent
        }

    def tell(self, key: str, text: str) -> None:
        """Say something that any rank may hear."""
        self._store.set(key, text)

    def hear(self, key: str, seconds: float) -> str | None:
        """What was told, or None if nobody has within the time."""
        try:
            # A wait of no time is none at all in some stores, and for ever in others.
            self._store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except (dist.DistStoreError, RuntimeError) as error:
            # FileStore raises a bare RuntimeError. Anything but time running out goes on up.
            if "timeout" not in str(error).lower():
                raise
            return None
        return self._store.get(key).decode()

    @staticmethod
    def _key(question: str, rank: int) -> str:
        return f"{question}/{rank}"


__all__ = ["RollCall"]
