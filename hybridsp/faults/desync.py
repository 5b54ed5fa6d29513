"""Are all ranks about to do the same? Asked before the first step and after each reshape.

Ranks of another library version, another recipe or another length do not fail: their collectives
do not match, and they hang or train nonsense. So where training begins, and where a new stage
changes its shapes, every rank states what it is about to do as facts (name and value), all compare,
and all raise the same error naming the fact, the ranks and their values. It costs one small gather
a stage and nothing per step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from hybridsp.mesh import SPMesh, gather_objects

LIBRARIES = ("torch", "deepspeed", "transformers")
MAX_SHOWN = 200


def check_in_step(mesh: SPMesh, common: Mapping[str, str], of_sequence: Mapping[str, str]) -> None:
    """Return if every rank states the same facts. Collective over all ranks.

    Args:
        mesh: the grid of ranks.
        common: facts that are to be the same on all ranks.
        of_sequence: facts that are to be the same on the ranks that share sequences (SP groups).

    Raises:
        ValueError: facts differ, or some rank does not state them all; the same on every rank.
    """
    stated = gather_objects((dict(common), dict(of_sequence)))
    everybody = range(mesh.world_size)
    groups = [(everybody[i : i + mesh.sp], 1) for i in range(0, mesh.world_size, mesh.sp)]
    for ranks, kind in [(everybody, 0), *groups]:
        facts = {rank: stated[rank][kind] for rank in ranks}
        for name in sorted({name for one in facts.values() for name in one}):
            holders: dict[str, list[int]] = defaultdict(list)
            for rank, one in facts.items():
                holders[one.get(name, "not stated")].append(rank)
            if len(holders) > 1:
                raise ValueError(_differ(name, holders))


def settings_facts(settings: Any) -> dict[str, str]:
    """Versions and settings, known before anything is made of them.

    Args:
        settings: the recipe, a dataclass; or settings by the names that an error is to give them.
    """
    facts = {f"version of {name}": version(name) for name in LIBRARIES}
    if not isinstance(settings, Mapping):
        settings = {f"recipe's {k}": v for k, v in dataclasses.asdict(settings).items()}
    return facts | {name: _shown(value) for name, value in settings.items()}


def engine_facts(engine: Any, settings: Any, *, step: int) -> dict[str, str]:
    """What an engine and its run are, where a difference between ranks would be fatal.

    Args:
        engine: made by `hybridsp.initialize`.
        settings: as `settings_facts` takes them.
        step: optimizer steps already taken.
    """
    model = engine.module
    parameters = [
        (name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters()
    ]
    return settings_facts(settings) | {
        "step": str(step),
        "learning rate": repr(engine.get_lr()),
        "micro-batches per step": str(engine.gradient_accumulation_steps()),
        "ZeRO stage": str(int(engine.zero_optimization_stage())),
        "DeepSpeed configuration": _digest(json.dumps(engine._config._param_dict, default=str)),
        "model configuration": _digest(model.config.to_json_string()),
        "parameters (names, shapes, dtypes)": _digest(repr(parameters)),
    }


def batch_facts(batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Facts of the micro-batches of a step before they are cut: of all ranks, of a sequence's.

    Args:
        batches: as the loader yields them; tensors and plain values by name.
    """
    shapes = [
        {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items() if k != "cu_seqlens"}
        for batch in map(_tensors, batches)
    ]
    content = hashlib.sha256()
    for batch in map(_tensors, batches):
        for name in sorted(batch):
            content.update(name.encode())
            content.update(batch[name].contiguous().view(torch.uint8).numpy().tobytes())
    return {"shapes of a batch": _shown(shapes)}, {"content of a batch": content.hexdigest()[:12]}


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).cpu() for name, value in batch.items()}


def _differ(name: str, holders: dict[str, list[int]]) -> str:
    listed = "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}"
        f"{' ...' * (len(ranks) > 8)}: {value}"
        for value, ranks in sorted(holders.items(), key=lambda item: len(item[1]))
    )
    return (
        f"the ranks are not in step, {name} differs: {listed}. Start all of them from the same "
        "files, versions and arguments"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


__all__ = ["batch_facts", "check_in_step", "engine_facts", "settings_facts"]
