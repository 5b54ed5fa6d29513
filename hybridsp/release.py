"""Letting go of an engine, so that the next one finds its memory free.

A process that makes several engines, as a distillation or a benchmark does, ends each before it
makes the next. `engine.destroy` takes DeepSpeed's hooks away, and what is left refers to itself
only, for Python's garbage collector to find. Not so with ZeRO-3: DeepSpeed 0.19.8 keeps two things
outside of its engines that reach the model, through the model's hooks the engine, and so
everything that was sharded: this rank's weights, gradients and optimizer states. An engine that
fails while it is made leaves the same behind, and is in nobody's hands.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def release(engine: Any) -> None:
    """End an engine. Once the caller's own references are gone, `gc.collect` frees all it held.

    Other engines of the process go on as before, also where this one stopped inside a step.

    Args:
        engine: a `deepspeed.DeepSpeedEngine`; it cannot be used again.
    """
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        _leave_forward_stack(engine)
        _forget_schedules()


@contextmanager
def released_on_error(model: Any) -> Iterator[None]:
    """Release the engine of a model, whole or half made, if the block that makes it raises.

    Args:
        model: what is passed to `deepspeed.initialize` in the block.
    """
    from deepspeed import DeepSpeedEngine

    try:
        yield
    except BaseException:
        # DeepSpeed hands out none that failed, but its hooks keep it.
        engines = [thing for thing in gc.get_objects() if type(thing) is DeepSpeedEngine]
        for engine in engines:
            if getattr(engine, "module", None) is model:
                release(engine)
        raise


def _leave_forward_stack(engine: Any) -> None:
    """`DeepSpeedZeRoOffload.setup_zero_stage3_hooks` puts the model on it; nothing takes it off.

    A forward that failed, as where memory ran out, leaves the modules there that it was inside of.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    gone = {id(module) for module in engine.module.modules()}
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if id(module) not in gone]


def _forget_schedules() -> None:
    """`PartitionedParameterCoordinator.__params_to_release` is a method under `lru_cache`.

    The cache belongs to the class, and its keys are the coordinators and modules of all engines. It
    can be cleared only as a whole: the engines that go on work out the same answers once more.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for method in vars(PartitionedParameterCoordinator).values():
        # Behind a decorator that does not say what it wraps.
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


__all__ = ["release", "released_on_error"]
