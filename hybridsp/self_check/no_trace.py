"""Looking at an engine's gradients without its training ever noticing.

DeepSpeed keeps gradients in other places at every stage (the parameters, flat buffers of a
partition, host memory) and counts what it has seen in each. All of it is put back to what it was:
buffers to zero, counters, flags and tables to their content, random generators to their states.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

# What holds gradients between a backward and a step in the ZeRO optimizers of DeepSpeed 0.19.8 and
# is made once. BF16_Optimizer's own `zero_grad` reaches all that it has.
PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
BUFFERS = ("grad_partitions_flat_buffer", "temp_grad_buffer_for_gpu_offload")
# Dictionaries and sets.
TABLES = (
    "averaged_gradients",
    "all_grad_tensors",
    "norm_for_param_grads",
    "accumulated_grads_in_cpu",
    "_offload_accumulated_param_ids",
    "_offload_boundary_param_ids",
)
# Where BF16_Optimizer links a parameter, at its first gradient, to its part of a buffer.
HP_GRADIENT = "_hp_grad"
PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def leaving_no_trace(engine: Any) -> Iterator[None]:
    """The engine, which stands between two steps, is afterwards as if nothing had run on it.

    So are torch's random generators, of the CPU and of this rank's device.
    """
    optimizer = engine.optimizer
    objects = [engine, engine.tput_timer, optimizer, *engine.module.modules()]
    if hasattr(optimizer, "_backward_hook_state"):
        objects.append(optimizer._backward_hook_state)
    if engine.zero_optimization_stage() == 3:
        objects.append(_coordinator(engine))
    restore = [_remember(thing) for thing in objects]
    unlinked = [p for p in engine.module.parameters() if not hasattr(p, HP_GRADIENT)]
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            _forget_gradients(engine)
            for put_back in restore:
                put_back()
            for parameter in unlinked:
                vars(parameter).pop(HP_GRADIENT, None)


@contextlib.contextmanager
def without_reduction(engine: Any) -> Iterator[None]:
    """Gradients may be taken by `torch.autograd.grad` and DeepSpeed does not take part in it.

    ZeRO-3, behind a module that it gathers as a whole, reduces the gradients of all parameters
    listed for it, and makes zeros of those that are not there, as in `autograd.grad` none are. At
    the first it asks how many parameters take part, which `autograd.grad` does not tell.
    """
    if hasattr(engine.optimizer, "_backward_hook_state"):
        state = engine.optimizer._backward_hook_state
        state.reset_for_new_step()
        state.hooks_fired_this_backward = 1
    lists = list(getattr(engine.optimizer, "leaf_parameters", {}).values())
    contents = [list(parameters) for parameters in lists]
    try:
        for parameters in lists:
            parameters.clear()
        yield
    finally:
        for parameters, content in zip(lists, contents, strict=True):
            parameters.extend(content)


def plain_attributes(thing: Any) -> dict[str, Any]:
    """An object's numbers, flags and words by name."""
    return {name: value for name, value in vars(thing).items() if isinstance(value, PLAIN)}


def _remember(thing: Any) -> Callable[[], None]:
    """A function that gives the object's counters, flags and tables their present content."""
    plain = plain_attributes(thing)
    tables = {name: copy.copy(vars(thing)[name]) for name in TABLES if name in vars(thing)}

    def put_back() -> None:
        for name, value in list(vars(thing).items()):
            if isinstance(value, PLAIN) and name not in plain:
                del vars(thing)[name]
        vars(thing).update(plain)
        for name, content in tables.items():
            # In place: others refer to the same table.
            table = vars(thing)[name]
            table.clear()
            table.update(content)

    return put_back


def _forget_gradients(engine: Any) -> None:
    optimizer = engine.optimizer
    engine.zero_grad()
    optimizer.zero_grad()
    buffers = [getattr(optimizer, name, None) for name in BUFFERS]
    for name in PARTITIONS:
        buffers += [partition.grad for partition in getattr(optimizer, name, [])]
    for buffer in buffers:
        if buffer is not None:
            buffer.zero_()
    if engine.zero_optimization_stage() == 3:
        # The order in which training will fetch parameters is learnt from training.
        coordinator = _coordinator(engine)
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


def _coordinator(engine: Any) -> Any:
    return engine.optimizer.parameter_offload.get_param_coordinator()
