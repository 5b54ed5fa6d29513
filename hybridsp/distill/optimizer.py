"""Who learns, and how fast.

Mixers that a conversion made new are far from where they should be, all else is not: in alignment
they learn alone, and afterwards, where asked for, faster than the rest (arXiv:2505.03005; fla's
hybrid-distillation trains attention at fourteen times the rate of the rest).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hybridsp.distill.align import layers_to_align, mixer_of


def learning_only(student: PreTrainedModel) -> None:
    """Leave the mixers of the converted layers to learn, and nothing else, in place.

    Args:
        student: before it gets its engine.
    """
    student.requires_grad_(False)
    for parameter in new_parameters(student):
        parameter.requires_grad_(True)


def new_parameters(student: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of the mixers of the converted layers."""
    layers = layers_to_align(student.config)
    return [parameter for i in layers for parameter in mixer_of(student, i).parameters()]


def two_rates(
    student: PreTrainedModel, config: Mapping[str, Any], new_rate: float
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """An optimizer whose converted mixers learn at a rate of their own.

    Args:
        student: before it gets its engine.
        config: by `hybridsp.deepspeed_config`; says which AdamW, and the rate of the rest.
        new_rate: peak learning rate of the converted mixers.

    Returns:
        The optimizer, its converted mixers the second group, and the configuration to initialize
        the engine with: the schedule moves both rates alike.
    """
    options = dict(config["optimizer"]["params"])
    # As DeepSpeed's own reading of the configuration: PyTorch's where it is asked for.
    adam: Any = torch.optim.AdamW
    if not options.pop("torch_adam", False):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adam = DeepSpeedCPUAdam
    rate = options.pop("lr")
    new = {id(parameter) for parameter in new_parameters(student)}
    groups: list[dict[str, Any]] = [{"params": [], "lr": rate}, {"params": [], "lr": new_rate}]
    for parameter in student.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in new]["params"].append(parameter)

    changed = copy.deepcopy({k: v for k, v in config.items() if k != "optimizer"})
    if "warmup_max_lr" in changed["scheduler"]["params"]:
        changed["scheduler"]["params"]["warmup_max_lr"] = [rate, new_rate]
    return adam(groups, lr=rate, **options), changed


__all__ = ["learning_only", "new_parameters", "two_rates"]
