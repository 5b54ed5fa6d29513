"""A dense model under DeepSpeed's own long-sequence training (ALST, arXiv:2506.13996), to be timed.

The parts are DeepSpeed's: Ulysses around transformers' SDPA (`UlyssesSPAttentionHF`), tiles of the
MLP (`TiledMLP`) and of the loss (`TiledFusedLogitsLoss`), layer inputs on the host
(`CheckpointHiddenStatesOffload`), the sharding of a batch (`UlyssesSPDataLoaderAdapter`), ZeRO. The
numbers of tiles are those that ALST's authors recommend. Three things are not left as they come,
all in the rival's favour or for its correctness:

* Ulysses is registered under a name of its own instead of in place of `sdpa`. Transformers would
  otherwise build a causal mask of this rank's tokens in every step, which Ulysses then discards.
* The loss is this rank's sum over the labels of all ranks, scaled for the ZeRO stage. With ALST's
  own recipe gradients are P times too large at every stage but ZeRO-3's default.
* A head that shares its weight with the embedding waits for the embedding's gradient. ZeRO would
  otherwise reduce the weight's gradient when the loss is done, and again later, which it refuses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridsp.bench.step.case import Case, deepspeed_section
from hybridsp.deepspeed_config import skip_inference_op
from hybridsp.mesh import SPMesh
from hybridsp.ops.cross_entropy import IGNORED_LABEL
from hybridsp.planner.files import DTYPES
from hybridsp.planner.model import load_config

NAME = "alst_ulysses"
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
LOGITS_BYTES = 2**30  # of a tile of the loss, in fp32: ArcticTraining's


@dataclass(frozen=True, kw_only=True)
class Alst:
    """An engine, and what surrounds its steps.

    Attributes:
        engine: DeepSpeed's.
        batch: this rank's part: input_ids, position_ids, shift_labels.
        factor: by which a rank's loss is multiplied so that the averaged gradient is exact.
        offload: where layer inputs go.
        kernel: of softmax attention, of `KERNELS`; None for PyTorch's choice.
        mesh: the job.
    """

    engine: Any
    batch: dict[str, Tensor]
    factor: float
    offload: AbstractContextManager[Any]
    kernel: str | None
    mesh: SPMesh

    def warm_up(self, steps: int, tokens: int | None = None) -> None:
        """Steps that allocate and compile, and change no weight. Collective.

        Args:
            steps: how many.
            tokens: per rank; None for all. The positions of a rank's first tokens are kept.
        """
        batch = {name: x[:, :tokens] for name, x in self.batch.items()}
        groups = self.engine.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for _ in range(steps):
            self.step(batch)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def step(self, batch: dict[str, Tensor] | None = None) -> float:
        """One optimizer step on `batch`, or else all tokens; their mean loss. Collective."""
        kernel = nullcontext() if self.kernel is None else sdpa_kernel(KERNELS[self.kernel])
        with self.offload, kernel:
            loss = self.engine(**(batch or self.batch))
            self.engine.backward(loss)
            self.engine.step()
        mean = loss.detach() / self.factor
        dist.all_reduce(mean, group=self.mesh.sp_group)
        return float(mean)


def make_alst(case: Case, mesh: SPMesh, *, kernel: str | None) -> Alst:
    """A model of random weights and the case's tokens, ready for `step`. Collective.

    Args:
        case: a dense model and how it is run; its `tiled_mlp` is None for ALST's own choice.
        mesh: the whole job as one Ulysses group.
        kernel: see `Alst`.

    Raises:
        ValueError: heads that DeepSpeed's Ulysses cannot deal out to so many ranks.
    """
    import deepspeed
    from deepspeed.runtime.activation_checkpointing.offload_activations import (
        CheckpointHiddenStatesOffload,
    )

    if mesh.device.type == "cpu":
        skip_inference_op()
    deepspeed.init_distributed(dist_init_required=False)
    setting = case.setting
    config = load_config(case.model)
    _register_ulysses(config, mesh)
    torch.manual_seed(case.seed)
    with mesh.device:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, DTYPES[setting.dtype_bytes]),
            attn_implementation=NAME,
        )
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = _batch_of_rank(case, mesh)
    # DeepSpeed sums gradients over all ranks and divides by all of them only here.
    factor = float(mesh.world_size if setting.stage == 3 else mesh.dp)
    _install_tiles(model, case, factor / (case.length - 1))
    engine, *_ = deepspeed.initialize(
        model=model, config=_deepspeed_config(case, mesh), mpu=mesh.mpu, dist_init_required=False
    )
    return Alst(
        engine=engine,
        batch=batch,
        factor=factor,
        offload=CheckpointHiddenStatesOffload() if setting.offload_activations else nullcontext(),
        kernel=kernel,
        mesh=mesh,
    )


def _register_ulysses(config: Any, mesh: SPMesh) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    ulysses = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward,
        batch_size=1,
        attn_head_count=config.num_attention_heads,
        attn_head_size=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=mesh.sp_group,
        seq_length_is_variable=True,
    )

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Any, **kwargs: Any
    ) -> Any:
        return ulysses(module, q, k, v, None, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def _batch_of_rank(case: Case, mesh: SPMesh) -> dict[str, Tensor]:
    """The case's sequence, as one document, cut by DeepSpeed's own adapter."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    tokens = case.sequence.batch["input_ids"]
    positions = torch.arange(case.length)[None]
    whole = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    adapter = UlyssesSPDataLoaderAdapter([whole], mesh.sp_rank, mesh.sp_group, mesh.sp, mesh.device)
    return {name: x.to(mesh.device) for name, x in next(adapter).items()}


def _install_tiles(model: Any, case: Case, scale: float) -> None:
    """Let MLPs and the loss be computed in tiles; `scale` is of the sum of losses."""
    length, tile = case.tokens_per_rank, case.setting.tiled_mlp
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    mlp_tiles = divisor_from(length, ceil(length / (tile or hidden)))
    loss_tiles = divisor_from(length, ceil(length * vocabulary * 4 / LOGITS_BYTES))
    for layer in model.model.layers:
        layer.mlp.tiles, layer.mlp.whole = mlp_tiles, layer.mlp.forward
        layer.mlp.forward = MethodType(_tiled_mlp, layer.mlp)
    model.loss_tiles, model.loss_scale = loss_tiles, scale
    model.forward = MethodType(_tiled_loss, model)


def divisor_from(length: int, wanted: int) -> int:
    """The least number of equal tiles that is at least `wanted`.

    `TiledFusedLogitsLoss` counts tiles that `torch.chunk` may not make, and then drops gradients.
    """
    return next(count for count in range(wanted, length + 1) if length % count == 0)


def _tiled_mlp(mlp: Any, x: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    return TiledMLP.apply(_mlp_of_tile, mlp, x, mlp.tiles, list(mlp.parameters()))


def _mlp_of_tile(mlp: Any, x: Tensor) -> Tensor:
    return mlp.whole(x)


def _tiled_loss(
    model: Any, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor
) -> Tensor:
    """In place of the model's forward: the scaled sum of this rank's losses."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    hidden = model.model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    head = model.lm_head.weight
    tied = head is model.get_input_embeddings().weight
    weights = [Unfinished(head) if tied else head]
    arguments = model, hidden, shift_labels, None, model.loss_tiles, weights, "sum"
    loss = TiledFusedLogitsLoss.apply(_loss_of_tile, *arguments)
    head.ds_grad_is_ready = True
    return loss


class Unfinished:
    """Stands for a weight whose gradient is not whole after the last tile either."""

    weight: Any
    requires_grad = True

    def __init__(self, weight: Tensor) -> None:
        object.__setattr__(self, "weight", weight)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "ds_grad_is_ready", name
        self.weight.ds_grad_is_ready = False


def _loss_of_tile(model: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = model.lm_head(x).float()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
    return loss * model.loss_scale  # here: what is multiplied later misses the head's gradient


def _deepspeed_config(case: Case, mesh: SPMesh) -> dict[str, Any]:
    """The shipped configuration of the stage, AdamW as our own steps have it."""
    setting = case.setting
    params: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
    on_gpu = mesh.device.type == "cuda"
    if not (setting.offload_optimizer and on_gpu):
        params |= {"torch_adam": True} | ({"fused": True} if on_gpu else {})
    return {
        **deepspeed_section(setting),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": setting.dtype_bytes == 2},
        "optimizer": {"type": "AdamW", "params": params},
        "zero_force_ds_cpu_optimizer": on_gpu,
    }
