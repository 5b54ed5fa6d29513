"""The peak of a GPU and of a host, item by item.

A GPU holds, all the time, its share of weights, gradients and optimizer states; ZeRO shards over
all N ranks, since each carries other tokens. On top comes whatever the step is doing, and the peak
is the widest of these phases:

    loading      the whole model; under ZeRO-3 a share of it, and one weight at a time
    a layer's    inputs of all layers, one layer computed again and its backward (`activations`)
    loss         inputs of all layers, a tile of logits, the head's gradient in fp32
    update       fp32 gradients of what this rank updates

Bytes per parameter, e = 2 (bf16) or 4 (fp32), before the division by N:

    stage    weights   gradients   optimizer states    divided by N
    0        e         e           12, or 8 in fp32     nothing
    1        e         e           12                   optimizer states
    2        e         e           12                   and gradients
    3        e         e           12                   and weights

With the optimizer offloaded, its states and the gradients of stages 2 and 3 are the host's. With
activations offloaded, so is what checkpointing keeps of all layers but two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from hybridsp.planner.activations import LayerBytes, layer_bytes, norm_kept
from hybridsp.planner.hardware import GIB, Cluster
from hybridsp.planner.model import SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting

# Assumptions, not measured: what CUDA, its libraries and loaded kernels take beside PyTorch's
# allocator; NCCL's buffers for the mesh's communicators; and the part of the memory that the
# allocator cannot use because it lies between blocks.
CUDA_CONTEXT = 0.75 * GIB
NCCL_BUFFERS = 1.0 * GIB
FRAGMENTATION = 0.05
# Of a rank's process in the host: Python, libraries, pinned staging buffers. An assumption.
HOST_PROCESS = 4 * GIB
HOST_PAGE = 64 * 2**20  # hybridsp/memory/offload.py; a tensor takes whole pages

TOKENS_PER_TILE = 1024  # hybridsp/ops/cross_entropy.py
BUCKET = 50_000_000  # numbers; reduce_bucket_size of ds_configs/*.json
# DeepSpeed's stage3_max_reuse_distance: weights that are used again within so many are not
# released, so at the turn from forward to backward so many stay.
REUSE_DISTANCE = 1_000_000_000
SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size: so many are updated at a time at stage 3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU at its peak, and of one host.

    Attributes:
        always: what is there all the time, by item.
        phases: by name, what each phase adds, by item.
        host: one host's, by item.
        usable: what of the GPU's memory can be counted on.
        host_capacity: of one host.
    """

    always: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: dict[str, float]
    usable: float
    host_capacity: float

    @property
    def phase(self) -> str:
        """The widest phase."""
        return max(self.phases, key=lambda name: self.total(name))

    def total(self, phase: str) -> float:
        """What a GPU holds in a phase. Loading happens before anything else is there."""
        constants = CUDA_CONTEXT + self.always["NCCL buffers"]
        always = constants if phase == "loading" else sum(self.always.values())
        return always + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Of a GPU, over all phases."""
        return self.total(self.phase)

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator hands out at the most during a step: the peak of a GPU without
        what it does not see, and without loading.
        """
        unseen = CUDA_CONTEXT + self.always["NCCL buffers"]
        return max(self.total(name) for name in self.phases if name != "loading") - unseen

    @property
    def host_total(self) -> float:
        """Of one host."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        """Whether GPU and host have the room."""
        return self.short_gpu <= 0 and self.short_host <= 0

    @property
    def short_gpu(self) -> float:
        """Bytes that a GPU lacks; negative is room."""
        return self.peak - self.usable

    @property
    def short_host(self) -> float:
        """Bytes that a host lacks; negative is room."""
        return self.host_total - self.host_capacity


def memory(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> Memory:
    """What a setting needs for sequences of `length` tokens."""
    states = sharded_states(model.parameters, setting)
    always = {
        "parameters": states.parameters,
        "optimizer states": states.optimizer,
        "CUDA context": CUDA_CONTEXT,
        "NCCL buffers": NCCL_BUFFERS if setting.gpus > 1 else 0.0,
    }
    return Memory(
        always=always,
        phases=_phases(model, setting, length),
        host=_host(model, setting, cluster, length),
        usable=cluster.chip.memory * (1 - FRAGMENTATION),
        host_capacity=cluster.host_memory,
    )


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank on its GPU; `host` those that are offloaded; `update` during the step."""

    parameters: float
    gradients: float
    optimizer: float
    update: float
    host: float


def sharded_states(parameters: int, setting: Setting) -> States:
    """ZeRO's arithmetic for so many parameters."""
    e, stage, ranks = setting.dtype_bytes, setting.stage, setting.gpus
    owned = parameters / ranks if stage else parameters  # what this rank updates
    optimizer = (8 if stage == 0 and e == 4 else 12) * owned
    gradients = e * (owned if stage >= 2 else parameters)
    # bf16 gradients become fp32 to be clipped and applied; so do ZeRO's own partitions in fp32.
    update = 4 * min(owned, SUB_GROUP) if stage == 3 else 4 * owned
    update = 0 if stage == 0 and e == 4 else update
    host = 0.0
    if setting.offload_optimizer:
        # fp32 weights, two moments and the gradients applied; and the gradients as they arrive.
        host = (12 + 4 + e) * owned
        optimizer, update = 0.0, 0.0
        gradients = 0.0 if stage >= 2 else gradients
    return States(
        parameters=e * (owned if stage == 3 else parameters),
        gradients=gradients,
        optimizer=optimizer,
        update=update,
        host=host,
    )


def _phases(model: ModelShape, setting: Setting, length: int) -> dict[str, dict[str, float]]:
    layers = {kind: layer_bytes(model, setting, kind, length) for kind in model.kinds}
    kept = _kept_by_checkpoints(model, setting, length)
    shared = _shared_by_layers(model, setting, layers, length)
    largest = max(model.embedding, *(model.layer_parameters(kind) for kind in model.kinds))
    gathered = _gathered(setting, min(model.parameters, REUSE_DISTANCE + largest))
    states = sharded_states(model.parameters, setting)
    stream = _kept_in_backward(model, setting, kept, states.gradients) | shared
    phases = {"loading": _loading(model, setting)}
    for kind, layer in layers.items():
        for part, num_bytes in layer.phases.items():
            # This layer's own part is in `stream` as well: all of it without checkpointing, with
            # it what is kept of attention.
            own = num_bytes - (0 if setting.checkpointing else layer.kept)
            if kind == SOFTMAX and setting.keeps_attention:
                own -= kept_attention(model, setting, length)
            phases[f"backward of a {kind} layer ({part})"] = {
                **stream,
                **gathered,
                "gradient buckets": _buckets(model, setting, kind),
                "one layer's activations": max(own, 0.0),
            }
    # Before the head, the last layer's copy to the host is waited for.
    before_head = shared if setting.offload_activations else kept | shared
    phases["loss"] = {
        **before_head,
        **_gathered(setting, model.embedding),
        "gradients": 0.0 if _gradients_grow(setting) else states.gradients,
        **_loss(model, setting, length),
    }
    phases["update"] = {"gradients": states.gradients, "fp32 gradients": states.update}
    return phases


def _kept_in_backward(
    model: ModelShape, setting: Setting, kept: dict[str, float], gradients: float
) -> dict[str, float]:
    """What is kept of layers and the gradients there are, where both together are most.

    A backward pass lets go of what is kept of a layer when its gradients are made, so most is there
    either before the last layer or behind the first.
    """
    if not _gradients_grow(setting):
        return {**kept, "gradients": gradients}
    of_head = gradients * model.embedding / model.parameters
    layers = 1 if setting.offload_activations else model.num_layers
    of_first = {name: num_bytes / layers for name, num_bytes in kept.items()}
    if sum(kept.values()) + of_head > sum(of_first.values()) + gradients:
        return {**kept, "gradients": of_head}
    return {**of_first, "gradients": gradients}


def _gradients_grow(setting: Setting) -> bool:
    """Whether gradients are made in the backward pass, not in a buffer that is always there."""
    return setting.stage <= 1 and setting.accumulation == 1


def layer_input(model: ModelShape, setting: Setting, length: int) -> float:
    """What checkpointing keeps of every layer: [B, L, D]."""
    return setting.dtype_bytes * model.config.hidden_size * setting.local_tokens(length)


def kept_attention(model: ModelShape, setting: Setting, length: int) -> float:
    """What `keep_attention` keeps of a softmax layer besides: out, and lse in fp32."""
    c, tokens = model.config, setting.local_tokens(length)
    return tokens * c.num_attention_heads * (setting.dtype_bytes * c.head_dim + 4)


def _kept_by_checkpoints(model: ModelShape, setting: Setting, length: int) -> dict[str, float]:
    """What is on the device of what checkpointing keeps."""
    if not setting.checkpointing:
        return {}
    layers, softmax = model.num_layers, model.count(SOFTMAX)
    if setting.offload_activations:
        # This layer's, and that of the layer whose copy is under way: the one before, forward, the
        # one that is next, backward.
        layers = min(2, layers)
        kinds = [kind == SOFTMAX for kind in model.config.layer_types]
        softmax = max([kinds[0], *(a + b for a, b in pairwise(kinds))])
    kept = softmax * kept_attention(model, setting, length) if setting.keep_attention else 0.0
    return {"layer inputs": layers * layer_input(model, setting, length), "kept attention": kept}


def _shared_by_layers(
    model: ModelShape, setting: Setting, layers: dict[str, LayerBytes], length: int
) -> dict[str, float]:
    """What lasts from the first layer to the last."""
    c, tokens, e = model.config, setting.local_tokens(length), setting.dtype_bytes
    rotated = {"softmax": c.softmax_rope * c.head_dim, "linear": c.linear_rope}
    rotated["linear"] *= c.linear_key_head_dim
    shared = 2 * e * tokens * sum(rotated.values()) + 3 * 8 * tokens
    # The final norm keeps its input, and the head its own.
    final = norm_kept(tokens, c.hidden_size, e) + e * c.hidden_size * tokens
    kept = sum(model.count(kind) * layer.kept for kind, layer in layers.items())
    return {
        "token data and final norm": shared + final,
        "activations of all layers": 0.0 if setting.checkpointing else kept,
    }


def _gathered(setting: Setting, numbers: int) -> dict[str, float]:
    """So many whole weights that ZeRO-3 holds for a while; on one rank they are whole anyway."""
    if setting.stage < 3 or setting.gpus == 1:
        return {}
    return {"gathered weights": setting.dtype_bytes * numbers}


def _buckets(model: ModelShape, setting: Setting, kind: str) -> float:
    """A layer's gradients on their way to their ranks, in fp32 where a sequence is shared."""
    e = setting.dtype_bytes
    if setting.gpus == 1 and setting.stage < 2:
        return 0.0
    bucket = min(max(BUCKET, model.largest_weight), model.parameters)
    wire = 4 if setting.sp > 1 and e == 2 else 0
    own = e * model.layer_parameters(kind) if setting.stage >= 2 else 0
    return own + (e + wire) * bucket


def _loss(model: ModelShape, setting: Setting, length: int) -> dict[str, float]:
    """`ops.cross_entropy`: fp32 logits, softmax, gradient and two temporaries of one tile."""
    c, tokens, e = model.config, setting.local_tokens(length), setting.dtype_bytes
    hidden = c.hidden_size * tokens
    tile = min(TOKENS_PER_TILE, tokens) * c.vocab_size * (e + 5 * 4)
    forward = {
        "hidden states' gradient": e * hidden,
        "logits of a tile": tile,
        "head's gradient": (4 + 4 + e) * model.embedding,
    }
    backward = {
        "hidden states' gradient": (e + 4 + 4 + e) * hidden,
        "logits of a tile": 0.0,
        "head's gradient": (4 + 4 + e) * model.embedding,
    }
    return max(forward, backward, key=lambda items: sum(items.values()))


def _loading(model: ModelShape, setting: Setting) -> dict[str, float]:
    e, whole = setting.dtype_bytes, model.parameters
    if setting.stage < 3:
        return {"whole weights": e * whole}
    return {"shares of weights": e * whole / setting.gpus, "one weight": e * _largest(model)}


def _largest(model: ModelShape) -> int:
    """Numbers in the largest weight of all."""
    return max(model.embedding, model.largest_weight)


def _host(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> dict[str, float]:
    ranks, e = min(cluster.local, setting.gpus), setting.dtype_bytes
    # Every rank reads the weights into its own memory before they go to its GPU, under ZeRO-3 one
    # at a time; what is offloaded comes after that.
    loaded = e * (_largest(model) if setting.stage == 3 else model.parameters)
    states = sharded_states(model.parameters, setting).host
    inputs, attention = offloaded_activations(model, setting, length)
    return {
        "processes": HOST_PROCESS * ranks,
        "offloaded optimizer": states * ranks,
        "layer inputs": inputs * ranks,
        "kept attention": attention * ranks,
        "weights while loading": max(loaded - states - inputs - attention, 0.0) * ranks,
    }


def offloaded_activations(model: ModelShape, setting: Setting, length: int) -> tuple[float, float]:
    """Bytes of one rank's host pages for layer inputs, and for what is kept of attention."""
    inputs = attention = 0.0
    if setting.offload_activations:
        inputs = model.num_layers * _in_pages(layer_input(model, setting, length))
        if setting.keep_attention:
            lse = 4.0 * setting.local_tokens(length) * model.config.num_attention_heads
            out = kept_attention(model, setting, length) - lse
            attention = model.count(SOFTMAX) * (_in_pages(out) + _in_pages(lse))
    return inputs, attention


def _in_pages(num_bytes: float) -> float:
    return HOST_PAGE * math.ceil(num_bytes / HOST_PAGE)


__all__ = [
    "Memory",
    "States",
    "kept_attention",
    "layer_input",
    "memory",
    "offloaded_activations",
    "sharded_states",
]
