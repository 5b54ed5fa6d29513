"""What can go wrong in a long run, seen to while a Trainer trains.

The same guards as of `train/finetune.py` (`hybridsp.faults`), where transformers' loop has room for
them: a callback, last in the row, looks at each step when it ends, and a base class of the Trainer
puts the watchdog around `train` and says where the rank stands. Watched for hangs are drawing
batches, steps and evaluation, not the callbacks and saves between them, which may take their time.

Whatever is raised in training reaches the script, as it does with `transformers.Trainer`; ranks
that would wait for the one that raised are ended with exit code 70. A signal stops training as
transformers' own ways to stop do: `train` saves and returns, and `stopped_by` says why.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput

from hybridsp.adapters import decoder_layers
from hybridsp.engine import StepResult
from hybridsp.faults import (
    BadSteps,
    Position,
    StopSignals,
    Watchdog,
    check_in_step,
    check_room,
    engine_facts,
    follow,
    settings_facts,
)
from hybridsp.mesh import SPMesh
from hybridsp.pretrained import num_parameters
from hybridsp.trainer.batches import Parts, shard_batches
from hybridsp.trainer.engine_wrapper import EngineWrapper

# Arguments by which ranks decide what they do together, and when. Others, such as `report_to`, may
# well differ between them.
ARGUMENTS = (
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "seed",
    "data_seed",
    "ignore_data_skip",
    "logging_strategy",
    "logging_first_step",
    "eval_strategy",
    "eval_delay",
    "eval_on_start",
    "save_strategy",
    "save_only_model",
)
# The same after fractions and lengths of epochs were worked out.
WORKED_OUT = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
# Optimizers whose states `check_room` knows the size of.
ADAMS = ("adam", "adamw", "fusedadam", "deepspeedcpuadam")

logger = logging.getLogger(__name__)


def check_disk(
    args: TrainingArguments,
    state: TrainerState,
    model: Any,
    optimizer: Any,
    config: Mapping[str, Any],
) -> None:
    """Refuse to train if `output_dir` has no room for as many checkpoints as it will hold at once.

    Args:
        args: the Trainer's.
        state: the same, steps worked out.
        model: the same.
        optimizer: the Trainer's; None for the configuration's. Of others than Adam the states are
            not counted.
        config: DeepSpeed's.

    Raises:
        ValueError: there is less room.
    """
    at_once = checkpoints_at_once(args, state)
    if not at_once:
        return
    name = config["optimizer"]["type"] if optimizer is None else type(optimizer).__name__
    trained = num_parameters(model, only_trainable=True)
    check_room(
        args.output_dir,
        trained=trained if name.lower() in ADAMS and not args.save_only_model else 0,
        parameters=trained if args.save_only_model else num_parameters(model),
        bytes_per_weight=2 if config["bf16"]["enabled"] else model.dtype.itemsize,
        checkpoints=at_once,
        limit="save_total_limit",
    )


def checkpoints_at_once(args: TrainingArguments, state: TrainerState) -> int:
    """How many checkpoints there will be before the oldest is removed, as far as is certain.

    Args:
        args: the Trainer's.
        state: the same, steps worked out.
    """
    every = state.save_steps if state.save_steps > 0 else state.max_steps
    endless = state.num_train_epochs == sys.maxsize  # data that does not know its length
    written = {
        SaveStrategy.NO: 0,
        SaveStrategy.STEPS: math.ceil(state.max_steps / every),
        SaveStrategy.EPOCH: 1 if endless else state.num_train_epochs,
        SaveStrategy.BEST: 1,
    }[SaveStrategy(args.save_strategy)]
    limit = args.save_total_limit or 0
    return min(written, limit + 1) if limit > 0 else written


class Guards(TrainerCallback):
    """Looks after one Trainer's training.

    Args:
        max_bad_steps: as for the Trainer.
        hang_timeout: as for the Trainer.

    Attributes:
        position: where this rank stands.
        stopped_by: name of the signal that stopped training, if one did.

    Raises:
        ValueError: a limit is not a positive number.
    """

    def __init__(self, *, max_bad_steps: int, hang_timeout: float) -> None:
        if type(max_bad_steps) is not int or max_bad_steps < 1:
            raise ValueError(f"max_bad_steps = {max_bad_steps!r}: give a positive integer")
        if type(hang_timeout) not in (int, float) or not hang_timeout > 0:
            raise ValueError(f"hang_timeout = {hang_timeout!r}: give a positive number of seconds")
        self._max_bad_steps, self._hang_timeout = max_bad_steps, hang_timeout
        self.position = Position()
        self.stopped_by: str | None = None
        self._signals = StopSignals()
        self._bad_steps: BadSteps | None = None
        self._wrapper: EngineWrapper | None = None
        self._parts: Parts | None = None
        self._endings = contextlib.ExitStack()

    @contextlib.contextmanager
    def watch(self, mesh: SPMesh, output_dir: str) -> Iterator[None]:
        """See to the ranks while the block runs. Entering and leaving it is collective.

        Args:
            mesh: the grid of ranks.
            output_dir: of the run.
        """
        self._bad_steps = BadSteps(mesh, output_dir, self._max_bad_steps)
        watchdog = Watchdog(
            mesh, output_dir, hang_timeout=self._hang_timeout, user_errors=(Exception,)
        )
        self.position = watchdog.position
        with watchdog, contextlib.ExitStack() as self._endings:
            if threading.current_thread() is threading.main_thread():  # no other gets signals
                self._endings.enter_context(self._signals)
            yield

    def compare(
        self,
        model: Any,
        config: Mapping[str, Any],
        args: TrainingArguments,
        state: TrainerState,
    ) -> None:
        """See that all ranks were asked for the same. Collective over all ranks.

        Args:
            model: the Trainer's, of which no engine is made yet.
            config: DeepSpeed's, for that engine.
            args: the Trainer's.
            state: the same.

        Raises:
            ValueError: versions or settings differ; on every rank.
        """
        settings: dict[str, Any] = {f"argument {key}": getattr(args, key) for key in ARGUMENTS}
        settings |= {f"argument {key}": getattr(state, key) for key in WORKED_OUT}
        settings |= {
            "argument max_bad_steps": self._max_bad_steps,
            "activation checkpointing": model.is_activation_checkpointing,
        }
        settings |= {f"DeepSpeed configuration's {key}": config[key] for key in config}
        check_in_step(model.token_mean.mesh, settings_facts(settings), {})

    def begin(self, wrapper: EngineWrapper, state: TrainerState) -> None:
        """See that all ranks stand at the same step, and note where they are from now on.

        Collective over all ranks.

        Args:
            wrapper: of the engine, which stands before its first step or after a resume.
            state: the Trainer's.

        Raises:
            ValueError: parameters or steps differ; on every rank.
        """
        self._wrapper = wrapper
        model = wrapper.engine.module
        facts = engine_facts(wrapper.engine, {}, step=state.global_step)
        check_in_step(model.token_mean.mesh, facts, {})
        self._endings.enter_context(follow(decoder_layers(model), self.position))

    def draw(self, batches: Iterable[Mapping[str, Any]], mesh: SPMesh, step: int) -> Parts:
        """As `shard_batches`; the parts are kept as long as their step lasts.

        Args:
            batches: as `shard_batches` takes them.
            mesh: the grid of ranks.
            step: in which they are used, from 1.
        """
        self.position.enter(self.position.phase, step=step)
        # Drawing the first ones may mean to pass over all that a resumed run has seen.
        with self.position.during("drawing a batch", watched=self._parts is not None):
            self._parts = shard_batches(batches, mesh)
        return self._parts

    def count(self, logs: dict[str, float]) -> None:
        """Add to what is logged of training how many steps were left out, if any."""
        if self._bad_steps and self._bad_steps.total and {"loss", "train_loss"} & logs.keys():
            logs["bad_steps"] = self._bad_steps.total

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step if it was bad; stop if a signal has come to any rank.

        Raises:
            ValueError: there have been too many bad steps in a row.
        """
        wrapper, parts = self._wrapper, self._parts
        assert wrapper is not None, "begun"
        assert parts is not None, "drawn"
        assert self._bad_steps is not None, "watched"
        result = StepResult(
            loss=float(wrapper.loss),
            num_tokens=parts.num_tokens,
            num_labels=parts.num_labels,
            grad_norm=wrapper.get_global_grad_norm(),
            skipped=wrapper.skipped,
        )
        self._bad_steps.note(
            state.global_step,
            result,
            parts.parts,
            learning_rate=float(wrapper.engine.get_lr()[0]),
        )
        self.stopped_by = self._signals.agreed(wrapper.engine.module.token_mean.mesh)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An epoch that a signal ended is not over, so nothing is due behind it."""
        if self.stopped_by:
            control.should_save = control.should_evaluate = control.should_log = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say on the first rank that all is saved, if training stops for it."""
        if self.stopped_by and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            logger.warning(
                "stopped by %s, saved in %s: train(resume_from_checkpoint=True) goes on",
                *(self.stopped_by, folder),
            )


class GuardedTrainer(transformers.Trainer):
    """A `transformers.Trainer` that tells `guards` what it is doing."""

    guards: Guards
    mesh: Any

    @property
    def stopped_by(self) -> str | None:
        """Name of the signal that stopped `train`, such as "SIGTERM"; None if none did.

        All is saved then; a script that ends with `sys.exit(hybridsp.faults.EXIT_STOPPED)` tells
        the batch system that it is to be started again.
        """
        return self.guards.stopped_by

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `transformers.Trainer.train`."""
        with self.guards.watch(self.mesh, self.args.output_dir):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `transformers.Trainer.training_step`."""
        with self.guards.position.during("training", watched=True):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the number of steps that were left out, if any."""
        self.guards.count(logs)
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.guards.position.during("saving a checkpoint", watched=False):
            super()._save_checkpoint(*args, **kwargs)


__all__ = ["GuardedTrainer", "Guards", "check_disk"]
