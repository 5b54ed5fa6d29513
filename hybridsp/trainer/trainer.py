"""The Trainer: transformers' training loop around the engine of `hybridsp.initialize`.

transformers keeps its loop, its callbacks, its logs and its checkpoint folders. What is replaced is
what knows how ranks share the work: which samples a rank draws, how labels are counted, how model,
optimizer and DeepSpeed are put together, evaluation, and what is written to disk.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import DeepSpeedSchedulerWrapper
from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from hybridsp.checkpoint import gathered_weights, load_checkpoint, save_checkpoint
from hybridsp.engine import initialize
from hybridsp.mesh import SPMesh
from hybridsp.parallelize import parallelize
from hybridsp.trainer.batches import BOUNDARIES
from hybridsp.trainer.checkpoints import begin_save, check_resumable, complete_checkpoint
from hybridsp.trainer.engine_wrapper import EngineWrapper, OptimizerWrapper
from hybridsp.trainer.evaluation import eval_dataloader, evaluate_loss, model_to_evaluate
from hybridsp.trainer.guards import GuardedTrainer, Guards, check_disk
from hybridsp.trainer.settings import (
    check_arguments,
    deepspeed_settings,
    finished_config,
    introduce_ranks,
    mesh_of_all_ranks,
)

SCHEDULER = "scheduler.pt"


class Trainer(GuardedTrainer):
    """A `transformers.Trainer` whose sequences are cut over the ranks of a mesh.

    `per_device_train_batch_size` and its counterpart for evaluation count the sequences of one
    data-parallel group: the ranks that share a sequence share them too. The loss that is logged is
    the mean over all labels of an optimizer step, the gradient norm that of its gradient, and
    the evaluation loss the mean over all labels of the dataset; none depends on the mesh.

    Args:
        model: as for `transformers.Trainer`; parallelized already, or in a family that
            `hybridsp.parallelize` knows.
        args: with `deepspeed` set.
        positional: further arguments of `transformers.Trainer`.
        mesh: the grid of ranks; None for the one that the model was parallelized for, or else all
            ranks as one SP group with degrees that fit the model's heads.
        self_check: as for `hybridsp.initialize`.
        max_bad_steps: optimizer steps in a row whose loss or gradient is not finite, which are left
            out, after which training ends; the batch of each is kept in `output_dir/bad_steps`.
        hang_timeout: seconds without a layer begun, in training, after which the job ends with a
            report of where each rank stands; less than the timeout of the mesh.
        named: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: an argument that cannot be honoured (all are named, with remedies), a model that
            cannot be parallelized or was for another mesh, or a DeepSpeed configuration that fights
            the mesh.
    """

    # The model divides by the labels of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        mesh: SPMesh | None = None,
        self_check: bool = True,
        max_bad_steps: int = 10,
        hang_timeout: float = 900.0,
        **named: Any,
    ) -> None:
        given = inspect.signature(transformers.Trainer).bind(model, args, *positional, **named)
        check_arguments(args, given.arguments)
        assert args is not None, "it was checked"
        self.guards = Guards(max_bad_steps=max_bad_steps, hang_timeout=hang_timeout)
        introduce_ranks(args)
        self.sp_mesh, self._self_check = mesh, self_check
        self._given_optimizers = given.arguments.get("optimizers", (None, None))
        if model is not None:
            self._parallelize(model)
        super().__init__(model, args, *positional, **named)
        self.add_callback(self.guards)
        self._wire()

    @property
    def mesh(self) -> SPMesh:
        """The grid of ranks."""
        assert self.sp_mesh is not None, "set together with the first model"
        return self.sp_mesh

    def _parallelize(self, model: Any) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}: give a PreTrainedModel; adapters of peft are "
                "put into one with model.add_adapter(config)"
            )
        token_mean = getattr(model, "token_mean", None)
        if self.sp_mesh is None:
            self.sp_mesh = mesh_of_all_ranks(model) if token_mean is None else token_mean.mesh
        if token_mean is None:
            parallelize(model, self.sp_mesh)
        elif token_mean.mesh is not self.sp_mesh:
            raise ValueError(
                "the model was parallelized for another mesh: give the Trainer that mesh, or none"
            )

    def _wire(self) -> None:
        """Tell accelerate of the mesh: who draws the same samples, and how DeepSpeed is set up."""
        mesh = self.mesh
        if self.args.device.type != mesh.device.type:
            raise ValueError(
                f"the mesh is on {mesh.device}, TrainingArguments on {self.args.device}: let both "
                "use the GPUs, or hide them with CUDA_VISIBLE_DEVICES="
            )
        settings = deepspeed_settings(self.args, mesh)
        plugin = self.accelerator.state.deepspeed_plugin
        plugin.hf_ds_config, plugin.deepspeed_config = settings, settings.config
        self.args.hf_deepspeed_config = settings
        # accelerate gives the ranks of a "tp" group the same samples, which is all it does there.
        self.accelerator.state.ds_device_mesh = DeviceMesh.from_group(
            [mesh.dp_group, mesh.sp_group],
            mesh.device.type,
            torch.arange(mesh.world_size).view(mesh.dp, mesh.sp),
            mesh_dim_names=("dp", "tp"),
        )
        # Batches stay on the host until they are cut, and every rank reads its own.
        self.accelerator.device_placement = False
        self.accelerator.dataloader_config.dispatch_batches = False

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """A new model, parallelized."""
        model = super().call_model_init(trial)
        self._parallelize(model)
        return model

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, as `transformers.Trainer.train`; once per Trainer. Collective over all ranks.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the newest complete one
                in `output_dir`.
            args: further arguments of `transformers.Trainer.train`.
            kwargs: the same by name.

        Raises:
            ValueError: it was called before; or there is no such checkpoint, or it is damaged or
                from other degrees; or the disk has no room for those to come.
        """
        if self.deepspeed is not None:
            raise ValueError(
                "train() was called before: make a new Trainer, which may resume from a checkpoint"
            )
        if resume_from_checkpoint:
            resume_from_checkpoint = self.mesh.on_rank_zero(
                complete_checkpoint, self.args.output_dir, resume_from_checkpoint
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Sequences of one optimizer step."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.mesh.dp

    def _set_signature_columns_if_needed(self) -> None:
        # The model's own forward, before it was parallelized, says what a dataset may hold.
        if self._signature_columns is None:
            parameters = inspect.signature(type(self.model).forward).parameters
            self._signature_columns: list[str] = [
                *parameters,
                *BOUNDARIES,
                "seq_idx",
                "label",
                "label_ids",
            ]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """This rank's parts of the next step's batches, and the step's labels over all ranks."""
        batches = itertools.islice(epoch_iterator, num_batches)
        cut = self.guards.draw(batches, self.mesh, self.state.global_step + 1)
        seen = self.args.include_num_input_tokens_seen
        if seen != "no":
            tokens = cut.num_real_tokens if seen == "non_padding" else cut.num_tokens
            self.state.num_input_tokens_seen += tokens
        return cut.parts, cut.num_labels

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """They are counted when they are drawn, where padding can still be told."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # on the device they are needed on: boundaries of documents stay on the host

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, forward and backward."""
        if self.mesh.sp == 1:
            return super().training_step(*args, **kwargs)
        # The ranks of a sequence draw its samples from one stream of random numbers. What dropout
        # draws must not be the same for each rank's tokens.
        seed = int(torch.randint(2**62, ())) + self.mesh.sp_rank
        devices = [self.mesh.device] if self.mesh.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss, the same on every rank."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        config = finished_config(self.args.hf_deepspeed_config, self.args, self.model, max_steps)
        self.guards.compare(self.model, config, self.args, self.state)
        optimizer = self._client_optimizer(config)
        self.mesh.on_rank_zero(check_disk, self.args, self.state, self.model, optimizer, config)
        engine = initialize(
            self.model, self.mesh, config, optimizer=optimizer, self_check=self._self_check
        )
        self.deepspeed = self.model_wrapped = engine
        self.accelerator.deepspeed_engine_wrapped = wrapper = EngineWrapper(engine)
        self.optimizer = OptimizerWrapper(wrapper)
        self.accelerator._models.append(engine)
        self.accelerator._optimizers.append(self.optimizer)
        if "scheduler" in config:
            self.lr_scheduler = DeepSpeedSchedulerWrapper(engine.lr_scheduler, self.optimizer)
        else:
            self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            state = load_checkpoint(engine, self.mesh, resume_from_checkpoint)
            step_size = self.get_total_train_batch_size(self.args)
            skips = not self.args.ignore_data_skip
            check_resumable(resume_from_checkpoint, state, step_size if skips else None)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        self.guards.begin(wrapper, self.state)
        return engine, train_dataloader

    def _client_optimizer(self, config: dict[str, Any]) -> torch.optim.Optimizer | None:
        """The optimizer that DeepSpeed is to use; None for its configuration's own.

        Raises:
            ValueError: there are two of them, or two learning rate schedules.
        """
        given = {
            "optimizer": self._given_optimizers[0] or self.optimizer_cls_and_kwargs,
            "scheduler": self._given_optimizers[1],
        }
        for key, other in given.items():
            if key in config and other is not None:
                raise ValueError(
                    f"the DeepSpeed configuration has {key!r}, and the Trainer was given another: "
                    "remove one of them"
                )
        if "optimizer" in config:
            return None
        config["zero_allow_untested_optimizer"] = True
        optimizer = self.create_optimizer()
        offloaded = config.get("zero_optimization", {}).get("offload_optimizer", {})
        on_host = offloaded.get("device", "none") != "none"
        if on_host and config.get("zero_force_ds_cpu_optimizer", True):
            return map_pytorch_optim_to_deepspeed(optimizer)
        return optimizer

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The evaluation batches of this rank's data-parallel group.

        Raises:
            ValueError: there is no evaluation dataset, or it does not know its length.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            chosen = self.eval_dataset
            eval_dataset = chosen if eval_dataset is None else chosen[eval_dataset]
        if eval_dataset is None:
            raise ValueError("evaluation needs an eval_dataset: give one to the Trainer")
        collator = self.data_collator
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = self._remove_unused_columns(eval_dataset, "Evaluation")
        else:
            collator = self._get_collator_with_removed_columns(collator, "Evaluation")
        return eval_dataloader(
            eval_dataset,
            self.args.eval_batch_size,
            self.mesh,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all labels of a dataset. Collective over all ranks."""
        model = self.deepspeed or model_to_evaluate(self.model, self.mesh)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        losses = []
        with self.guards.position.during("evaluating", watched=True):
            for loss in evaluate_loss(model, dataloader, self.mesh):
                losses.append(loss)
                self.control: Any = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": losses[-1]},
            num_samples=len(dataloader.dataset),
        )

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not offered.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "predict() returns logits, which are never held for a whole sequence: call save_model "
            "and predict with the model it wrote"
        )

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Not offered.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "hyperparameter_search() trains many times, a Trainer here once: start a job per trial"
        )

    # What is written to disk

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as an ordinary Hugging Face checkpoint. Collective over all ranks.

        Raises:
            ValueError: the files cannot be written.
        """
        target = output_dir or self.args.output_dir
        weights = None if self.deepspeed is None else gathered_weights(self.deepspeed)
        self.mesh.on_rank_zero(self._save, target, weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.mesh.on_rank_zero(begin_save, Path(self._get_output_dir(trial=trial)) / name)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        step = self.state.global_step
        state = {"sequences_per_step": self.get_total_train_batch_size(self.args)}
        save_checkpoint(self.deepspeed, self.mesh, output_dir, step, state, keep=1)
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            schedule = self.lr_scheduler.state_dict()
            self.mesh.on_rank_zero(torch.save, schedule, Path(output_dir) / SCHEDULER)


__all__ = ["Trainer"]
