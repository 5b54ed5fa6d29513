"""Folders of checkpoints, `checkpoint-<step>` in the run's directory, as transformers has them.

The model is in each as an ordinary Hugging Face checkpoint; beside it, in `checkpoints/`, is what
`hybridsp.checkpoint` saves of all ranks, and last of all comes transformers' own state of the
run. So a folder without that state is what an interrupted save has left.
"""

from __future__ import annotations

from pathlib import Path

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


def begin_save(folder: str | Path) -> None:
    """Let a checkpoint that is about to be replaced no longer pass for complete."""
    (Path(folder) / STATE).unlink(missing_ok=True)


__all__ = ["begin_save", "complete_checkpoint"]
