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


def check_resumable(folder: str, state: dict[str, Any] | None, sequences: int | None) -> None:
    """Check that a checkpoint's steps mean the same place in the data for this run.

    transformers finds its place by the number of steps taken, whatever the mesh.

    Args:
        folder: the checkpoint.
        state: what `hybridsp.checkpoint` returned of it.
        sequences: of an optimizer step of this run, over all data-parallel groups; None if the run
            begins the data anew.

    Raises:
        ValueError: it is a model alone, or its steps had another number of sequences.
    """
    if state is None:
        raise ValueError(
            f"{folder} holds the model alone, as with save_only_model: to train on from it, load "
            "it with from_pretrained"
        )
    saved = state["sequences_per_step"]
    if sequences is not None and saved != sequences:
        raise ValueError(
            f"the checkpoint's steps have {saved} sequences, this run's {sequences}, so it would "
            "repeat or skip some: with another number of data-parallel groups, change "
            "gradient_accumulation_steps or per_device_train_batch_size to match, or set "
            "ignore_data_skip=True to begin the data anew"
        )


def begin_save(folder: str | Path) -> None:
    """Let a checkpoint that is about to be replaced no longer pass for complete."""
    (Path(folder) / STATE).unlink(missing_ok=True)


__all__ = ["begin_save", "check_resumable", "complete_checkpoint"]
