"""Folders of checkpoints, `checkpoint-<step>` in the run's directory, as transformers has them.

The model is in each as an ordinary Hugging Face checkpoint; beside it, in `checkpoints/`, is what
`hybridsp.checkpoint` saves of all ranks, and last of all comes transformers' own state of the
run. So a folder without that state is what an interrupted save has left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

STATE = "trainer_state.json"


def complete_checkpoint(output_dir: str, asked: str | bool) -> str:
    """The folder to resume from; a save that was cut short is passed over.

    Args:
        output_dir: the run's directory.
        asked: a folder; or True for the newest complete one.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    if not isinstance(asked, bool):
        if not (Path(asked) / STATE).is_file():
            raise ValueError(f"{asked} is no complete checkpoint: it has no {STATE}")
        return str(asked)
    steps = {
        int(number): path.parent
        for path in Path(output_dir).glob(f"checkpoint-*/{STATE}")
        if (number := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    if not steps:
        raise ValueError(
            f"resume_from_checkpoint = True, but {output_dir} holds no complete checkpoint: leave "
            "it out to start from the beginning"
        )
    return str(steps[max(steps)])


def weights_to_save(engine: Any) -> dict[str, Any] | None:
    """Whole weights where ZeRO-3 has cut them, on rank 0; else None. Collective over all ranks.

    Of a model with adapters (`peft`) they are those that were trained.
    """
    if engine is None or engine.zero_optimization_stage() != 3:
        return None
    adapters = getattr(engine.module, "_hf_peft_config_loaded", False)
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters)


__all__ = ["complete_checkpoint", "weights_to_save"]
