"""Stopping and going on: checkpoints of a run, and the trained model for everyone else.

    output_dir/checkpoints/
      latest                    name of the newest complete checkpoint
      step-000010/
        *.pt                    what DeepSpeed saves: each rank its share of weights and optimizer
        rng-00000.pt ...        each rank's random generators
        client_state.json       what the training script wants back (step, place in the data)
        manifest.json           mesh and ZeRO stage of the run, size and sha256 of every file above
      step-000020.partial/      a save that has not finished, or never will

    manifest.py     what a checkpoint consists of, and whether it still does
    capture.py      what DeepSpeed would write, caught before it is written
    save.py         atomic saves, at once or in the background
    load.py         verification, and the way back
    shards.py       any range of any parameter from files of any cut
    reshape.py      resuming at another world size, mesh or ZeRO stage
    generators.py   random generators
    export.py       the model as a Hugging Face checkpoint

All ranks must see the same file system.
"""

from hybridsp.checkpoint.capture import NotEnoughSpaceError
from hybridsp.checkpoint.export import export_pretrained, gathered_weights
from hybridsp.checkpoint.load import load_checkpoint
from hybridsp.checkpoint.save import CheckpointSaver, save_checkpoint

__all__ = [
    "CheckpointSaver",
    "NotEnoughSpaceError",
    "export_pretrained",
    "gathered_weights",
    "load_checkpoint",
    "save_checkpoint",
]
