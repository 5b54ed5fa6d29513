"""The Triton kernels of gated linear attention on the CPU, under Triton's interpreter.

`interpret` runs in a process of its own, see `fresh_interpreter`. It imports the kernels, which
nothing else in this file may do, and tries every case in that one process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, product
from typing import Any
from unittest import mock

import numpy as np
import torch
from cases import case
from distributed import strict
from gla_cases import GATES, SCALE, Inputs, errors, exact_results, make_inputs, named
from interpreter_bf16 import right_bf16
from torch import Tensor

DECAYS = {"channel": True, "head": False}
SMALL = {"heads": 1, "key_dim": 24, "value_dim": 40}
TUNED = {"key_dim": 40, "value_dim": 70}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs and how they are run.

    Attributes:
        inputs: arguments of `make_inputs`.
        change: done to the inputs.
        constants: of `plan.py`, replaced.
        cut: (stretches, parts), to be sure that the case is what its name says.
        launch: which of the tuner's candidates each kernel gets; None for the rule of thumb.
    """

    inputs: dict[str, Any]
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs
    constants: Mapping[str, int] = field(default_factory=dict)
    cut: tuple[int, int] | None = None
    launch: int | None = None


def strided(inputs: Inputs) -> Inputs:
    """The same numbers at strides that no kernel expects."""

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, -1).contiguous().transpose(1, -1)

    names = ("q", "k", "v", "g", "dout", "state", "dfinal")
    return replace(inputs, **{name: turned(getattr(inputs, name)) for name in names})


def one_gradient(inputs: Inputs) -> Inputs:
    """The dout of o.sum(): a single number, expanded."""
    return replace(inputs, dout=torch.ones(()).expand(inputs.dout.shape))


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    return {
        f"{decay}: {name}": replace(one, inputs={**SMALL, **one.inputs, "channels": channels})
        for decay, channels in DECAYS.items()
        for group in (gate_cases, shape_cases, document_cases, plan_cases, other_cases)
        for name, one in group().items()
    }


def gate_cases() -> dict[str, Case]:
    kinds = ("mild", "strong", "mixed", "shut", "open", "limit")
    return {f"{kind} gates": Case(inputs={"length": 100, "gates": [kind]}) for kind in kinds}


def shape_cases() -> dict[str, Case]:
    found = {f"L = {length}": Case(inputs={"length": length}) for length in (1, 63, 64, 200)}
    inputs = {"length": 65, "gates": ["mild", "open"], "heads": 2}
    found["B = 2, H = 2"] = Case(inputs=inputs)
    for key_dim, value_dim in ((96, 70), (1, 3), (3, 1), (130, 20)):
        inputs = {"length": 20, "key_dim": key_dim, "value_dim": value_dim}
        found[f"{key_dim} x {value_dim}"] = Case(inputs=inputs)
    return found


def document_cases() -> dict[str, Case]:
    starts = {
        "at token 0": (0,),
        "at token 1": (1,),
        "at the edge of a chunk": (64,),
        "at the last token of a chunk": (63,),
        "twice in a chunk": (20, 50),
        "at the last token": (99,),
        "around every edge": (0, 1, 63, 64, 65, 99),
        "at every token": tuple(range(100)),
    }
    found = {
        f"documents start {where}": Case(inputs={"length": 100, "starts": tokens})
        for where, tokens in starts.items()
    }
    inputs = {"length": 100, "starts": (20, 50, 65), "gates": ["mixed"]}
    return {**found, "documents, mixed gates": Case(inputs=inputs)}


def plan_cases() -> dict[str, Case]:
    three_heads = {"length": 20, "heads": 3}
    # A chunk's state, its gradient, and their product summed over V, all in fp32.
    one_chunk = (2 * SMALL["value_dim"] + 1) * SMALL["key_dim"] * 4
    return {
        "a stretch per chunk": Case(
            inputs={"length": 150}, constants={"PROGRAMS_PER_PROCESSOR": 1000}, cut=(3, 1)
        ),
        "stretches of two chunks, and documents": Case(
            inputs={"length": 270, "starts": (64, 140)},
            constants={"PROGRAMS_PER_PROCESSOR": 2},
            cut=(3, 1),
        ),
        "pairs of all but one chunk at once": Case(
            inputs={"length": 200, "gates": ["mixed"]}, constants={"CHUNKS_IN_FLIGHT": 1}
        ),
        "pairs of two chunks in flight, two heads, documents": Case(
            inputs={"length": 300, "heads": 2, "starts": (70, 140, 200)},
            constants={"CHUNKS_IN_FLIGHT": 4},
        ),
        "the longest stretch": Case(
            inputs={"length": 150},
            constants={"PROGRAMS_PER_PROCESSOR": 1, "LONGEST_STRETCH": 2},
            cut=(2, 1),
        ),
        "one head at a time": Case(
            inputs=three_heads, constants={"WORKSPACE_BYTES": 1}, cut=(1, 3)
        ),
        "two heads at a time, then one": Case(
            inputs=three_heads, constants={"WORKSPACE_BYTES": 2 * one_chunk}, cut=(1, 2)
        ),
        "two stretches of one head at a time, and documents": Case(
            inputs={"length": 300, "heads": 2, "starts": (70, 140, 200)},
            constants={"PROGRAMS_PER_PROCESSOR": 1000, "WORKSPACE_BYTES": 2 * one_chunk},
            cut=(5, 6),
        ),
    }


def other_cases() -> dict[str, Case]:
    inputs: dict[str, Any] = {"length": 20}
    found = {
        "nothing enters or comes back": Case(
            inputs=inputs, change=lambda x: replace(x, state=None, dfinal=None)
        ),
        "other strides": Case(inputs={"length": 65, "heads": 2}, change=strided),
        "one gradient for all": Case(inputs=inputs, change=one_gradient),
    }
    inputs = {"length": 20, "gates": ["mixed"], **TUNED}
    for number in range(max(len(launches) for launches in candidates().values())):
        found[f"candidates {number}"] = Case(inputs=inputs, launch=number)
    return found


def interpret() -> dict[str, dict[str, list[float]]]:
    """Errors of every case, per result and row."""
    torch.set_num_threads(1)
    found = {}
    for name, one in all_cases().items():
        # Kernels for mild chunks overflow in strong ones, where others write over the result.
        with case(name), strict(), np.errstate(over="ignore", invalid="ignore"):
            found[name] = errors_of(one)
    return found


def interpret_in_bf16() -> dict[str, dict[str, list[float]]]:
    """The same of a few cases in bf16."""
    torch.set_num_threads(1)
    parts = {"PROGRAMS_PER_PROCESSOR": 1000, "WORKSPACE_BYTES": 2**14, "CHUNKS_IN_FLIGHT": 2}
    chosen = {
        "all gates": Case(inputs={"length": 130, "gates": list(GATES)}),
        "gates at 1": Case(
            inputs={"length": 1024, "gates": ["open"], "key_dim": 16, "value_dim": 16}
        ),
        "documents, in parts": Case(
            inputs={"length": 200, "heads": 2, "starts": (20, 64, 150)}, constants=parts, cut=(4, 4)
        ),
    }
    found = {}
    for (decay, channels), (name, one) in product(DECAYS.items(), chosen.items()):
        sizes = {**SMALL, **one.inputs, "channels": channels}
        rounded = replace(one, inputs=sizes, change=lambda inputs: inputs.to(torch.bfloat16))
        with right_bf16(), strict(), np.errstate(over="ignore", invalid="ignore"):
            found[f"{decay}: {name}"] = errors_of(rounded)
    return found


def errors_of(one: Case) -> dict[str, list[float]]:
    from hybridsp.ops.gla.triton import plan

    inputs = one.change(make_inputs(**one.inputs))
    with mock.patch.dict(vars(plan), one.constants):
        results = run_passes(inputs, one)
    return errors(results, exact_results(inputs))


def run_passes(inputs: Inputs, one: Case) -> dict[str, Tensor]:
    """What one device makes of the passes, see `local.GatedLinearAttention`."""
    from hybridsp.ops.gla.contract import Tokens
    from hybridsp.ops.gla.triton.passes import TritonBackward, TritonForward

    tokens = Tokens(
        q=inputs.q, k=inputs.k, v=inputs.v, g=inputs.g, scale=SCALE, segments=inputs.segments
    )
    forward = TritonForward(tokens)
    backward = TritonBackward(tokens, inputs.dout, inputs.state)
    if one.launch is not None:
        launches = {k: next(islice(cycle(x), one.launch, None)) for k, x in candidates().items()}
        forward.plan.launches = backward.plan.launches = launches
    if one.cut is not None:
        assert (forward.plan.stretches, len(list(forward.plan.parts()))) == one.cut

    end, decay = forward.end_state()
    forward.intra_chunk()
    out = forward.output(inputs.state)
    start, same_decay = backward.start_gradient()
    backward.intra_chunk()
    grads = backward.gradients(inputs.dfinal)
    torch.testing.assert_close(decay, same_decay, rtol=1e-6, atol=1e-30)
    final = end if inputs.state is None else decay[..., None] * inputs.state + end
    dstate = start if inputs.dfinal is None else decay[..., None] * inputs.dfinal + start
    return named(out, final, *grads, dstate)


def candidates() -> dict[str, list[Any]]:
    """What the tuner tries for each kernel, one launch for each shape of blocks."""
    from hybridsp.bench.tune import candidates as candidates_of
    from hybridsp.ops.gla.triton.tuning import KERNELS

    found = {}
    for kernel in KERNELS:
        every = candidates_of(kernel, TUNED["key_dim"], TUNED["value_dim"])
        found[kernel] = list({(launch.BK, launch.BV): launch for launch in every}.values())
    return found
