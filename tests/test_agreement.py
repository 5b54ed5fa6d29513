"""A call is looked at every time, told of if its first look fails, and compared once."""

import pytest
import torch.distributed as dist
from distributed import run_ranks

from hybridsp.collectives.agreement import admit

ODD_RANK = 1


class Call:
    """What a rank does when it is asked about a call, counted."""

    def __init__(self, words="it", error=None):
        self.answer, self.error = words, error
        self.looks = self.worded = 0

    def look(self):
        self.looks += 1
        if self.error is not None:
            raise self.error
        return self.answer

    def words(self, found):
        self.worded += 1
        return f"call of {found}"

    def admit(self, kind, group=None):
        return admit(group or dist.group.WORLD, kind, self.look, self.words, name="the call")


def refusal(call, kind):
    with pytest.raises(ValueError, match=r"\S") as error:
        call.admit(kind)
    return str(error.value)


def kinds():
    is_odd = dist.get_rank() == ODD_RANK
    call, other = Call(), Call("another" if is_odd else "it")
    for kind in ("a", "a", "b", "a", "b"):
        assert call.admit(kind) == "it"
    assert (call.looks, call.worded) == (5, 2)

    call.admit("a", dist.new_group())
    assert call.worded == 3, "what a group agreed on says nothing of the next"

    told = {"other words": refusal(other, "c")}
    for name, error in (("refuses", ValueError("no")), ("fails", MemoryError("too little"))):
        told[name] = refusal(Call(error=error if is_odd else None), "c")
    call.admit("c")
    assert call.worded == 4, "what was refused is not agreed on"

    if is_odd:  # alone, because the kind is known
        with pytest.raises(MemoryError):
            Call(error=MemoryError()).admit("c")
    return told


def test_first_calls_are_compared_and_later_ones_are_not():
    for rank, told in enumerate(run_ranks(kinds, 3, timeout=60)):
        assert "rank 0: call of it; rank 1: call of another" in told["other words"]
        for name, reason in (("refuses", "no"), ("fails", "MemoryError: too little")):
            right = reason if rank == ODD_RANK else f"rank 1: refuses: {reason}"
            assert right in told[name]
