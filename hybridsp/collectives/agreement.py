"""Do all ranks of a group make the same call? Asked once per kind of call, before anything is sent.

Ranks that disagree on a shape or an option do not fail: they exchange messages that do not match,
and hang or compute nonsense. So the first time a rank makes a call of a new kind it writes what it
is about to do into the group's store. Rank 0 reads what all have written and writes the verdict,
and every rank raises the same error or none. The store is not the network that collectives use: a
rank that does *not* come is missed after the store's timeout, by name, on those that wait for it.

Only first calls are compared (`admit`), so that later ones cost a look into a table, and only of
first ones it holds that every rank hears of every refusal. Who refuses a call of a kind that was
agreed on before raises alone; the others wait in a collective for as long as their group's timeout
lets them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store

from hybridsp.collectives.per_group import per_group

AGREED = "agreed"
T = TypeVar("T")


def admit(
    group: dist.ProcessGroup,
    kind: Hashable,
    look: Callable[[], T],
    words: Callable[[T], str],
    *,
    name: str,
) -> T:
    """What `look` finds in a call against which nothing speaks; on any rank, if its kind is new.

    A call of a known kind costs its look and no more: no words are made and nobody is asked.

    Args:
        group: all its ranks make the call.
        kind: of the call, such that it is new on every rank or on none.
        look: raises what speaks against the call on this rank.
        words: what of the call and of what was found has to be the same on every rank.
        name: of what is called.

    Raises:
        ValueError: if the kind is new, as in `compare`.
        Exception: otherwise, what `look` raises here.
    """
    known = _admitted(group)
    if kind in known:
        return look()
    found = compare(group, look, words, name=name)
    known.add(kind)
    return found


@per_group
def _admitted(_group: dist.ProcessGroup) -> set[Hashable]:
    """The kinds of call that every rank of the group has made."""
    return set()


def compare(
    group: dist.ProcessGroup, look: Callable[[], T], words: Callable[[T], str], *, name: str
) -> T:
    """What `look` finds in a call that every rank makes now, after all have heard of each other.

    Args: as in `admit`.

    Raises:
        ValueError: whatever `look` raised, here or on another rank, or words that differ: on every
            rank (see `agree`).
    """
    try:
        found = look()
    except Exception as error:  # memory that runs out, too: the others wait for this rank
        agree(group, name, refusal=_refusal(error))  # tells all, and raises
        raise
    agree(group, words(found))
    return found


@per_group
def _rounds(_group: dist.ProcessGroup) -> itertools.count[int]:
    """Numbers the questions of a group: every rank asks them in the same order."""
    return itertools.count()


def agree(group: dist.ProcessGroup, call: str, refusal: str | None = None) -> None:
    """Return if every rank of the group makes this call.

    Args:
        group: all its ranks call `agree`, and wait here for the last of them.
        call: what this rank is about to do.
        refusal: why this rank will not; it does not wait then, and the others are told.

    Raises:
        ValueError: the refusal of a rank, calls that differ, each rank's named, or ranks that did
            not come within the timeout of the group's store (they make a call of a kind that was
            agreed on before, and this rank a new one). Every rank that came names the same ones,
            where rank 0 did.
    """
    if group.size() > 1:
        store = group.get_group_store()
        prefix = f"hybridsp/agreement/{next(_rounds(group))}"
        keys = [f"{prefix}/{rank}" for rank in range(group.size())]
        verdict = f"{prefix}/verdict"
        store.set(keys[group.rank()], call if refusal is None else f"refuses: {refusal}")
        if group.rank() == 0:
            judged = _judge(store, keys, call) if refusal is None else None
            store.set(verdict, judged or f"rank 0 refuses: {refusal}")
    if refusal is not None:
        raise ValueError(refusal)
    if group.size() > 1:
        judged = _hear(store, keys, verdict, call)
        if judged != AGREED:
            raise ValueError(judged)


def _refusal(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _judge(store: Store, keys: list[str], call: str) -> str:
    """Rank 0's verdict on what all have written."""
    if _runs_out(store, keys) and (absent := _missing(store, keys)):
        return _absence(call, absent)
    calls = [_read(store, key) for key in keys]
    if len(set(calls)) == 1:
        return AGREED
    listed = "; ".join(f"rank {rank}: {call}" for rank, call in enumerate(calls))
    return f"the ranks do not make the same call; give all of them the same arguments. {listed}"


def _hear(store: Store, keys: list[str], verdict: str, call: str) -> str:
    """Rank 0's verdict, or who did not come if it is rank 0 that did not."""
    if _runs_out(store, keys[:1]) and 0 in (absent := _missing(store, keys)):
        return _absence(call, absent)
    # Rank 0 is there and waits for the others, as long as a wait lasts from when *it* came. With
    # the same patience this rank would give up at the same moment and know no name.
    if _runs_out(store, [verdict], patience=2):
        return (
            f"rank 0 came to the call {call} and gave no verdict in twice the time in which the "
            "group's store times out: it ended, or hangs"
        )
    return _read(store, verdict)


def _missing(store: Store, keys: list[str]) -> list[int]:
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _runs_out(store: Store, keys: list[str], patience: int = 1) -> bool:
    """Wait for the keys, `patience` times the store's timeout; whether the time ran out."""
    timeout = store.timeout  # type: ignore[attr-defined] # torch's stub of Store leaves it out
    try:
        store.wait(keys, patience * timeout)
    except (dist.DistStoreError, RuntimeError) as error:
        # FileStore raises a bare RuntimeError. Anything but time running out goes on up.
        if "timeout" not in str(error).lower():
            raise
        return True
    return False


def _absence(call: str, absent: list[int]) -> str:
    return (
        f"ranks {absent} did not come to the call {call} before the group's store timed out: they "
        "were in another call, or ended. Every rank must make the same calls in the same order"
    )


def _read(store: Store, key: str) -> str:
    return store.get(key).decode()
