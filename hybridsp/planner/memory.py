"""The peak of a GPU and of a host, item by item.

A GPU holds, all the time, its share of weights, gradients and optimizer states; ZeRO shards over
all N ranks, since each carries other tokens. On top comes whatever the step is doing, and the peak
is the widest of these phases:

    loading      DeepSpeed 0.19.8 moves a whole model to the device before it splits it
    a layer's    inputs of all layers, one layer computed again and its backward (`activations`)
    loss         inputs of all layers, a tile of logits, the head's gradient in fp32
    update       fp32 gradients of what this rank updates

Bytes per parameter, e = 2 (bf16) or 4 (fp32), before the division by N:

    stage    weights   gradients   optimizer states    divided by N
    0        e         e           12, or 8 in fp32     nothing
    1        e         e           12                   optimizer states
    2        e         e           12                   and gradients
    3        e         e           12                   and weights

With the optimizer offloaded, its states and the gradients of stages 2 and 3 are the host's.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        "gradients": states.gradients,
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
    stream = _between_layers(model, setting, layers, length)
    gathered = _gathered(model, setting)
    phases = {"loading": _loading(model, setting)}
    for kind, layer in layers.items():
        for part, num_bytes in layer.phases.items():
            # Without checkpointing this layer's own part is in `stream` as well.
            own = num_bytes if setting.checkpointing else num_bytes - layer.kept
            phases[f"backward of a {kind} layer ({part})"] = {
                **stream,
                **gathered,
                "gradient buckets": _buckets(model, setting, kind),
                "one layer's activations": max(own, 0.0),
            }
    phases["loss"] = {**stream, **gathered, **_loss(model, setting, length)}
    phases["update"] = {"fp32 gradients": sharded_states(model.parameters, setting).update}
    return phases


def _between_layers(
    model: ModelShape, setting: Setting, layers: dict[str, LayerBytes], length: int
) -> dict[str, float]:
    """What lasts from one layer to the next."""
    c, tokens, e = model.config, setting.local_tokens(length), setting.dtype_bytes
    one = e * c.hidden_size * tokens
    rotated = {"softmax": c.softmax_rope * c.head_dim, "linear": c.linear_rope}
    rotated["linear"] *= c.linear_key_head_dim
    shared = 2 * e * tokens * sum(rotated.values()) + 3 * 8 * tokens
    # The final norm keeps its input, and the head its own.
    final = norm_kept(tokens, c.hidden_size, e) + one
    if setting.checkpointing:
        held = min(2, model.num_layers) if _offloads(setting) else model.num_layers
        items = {"layer inputs": held * one, "token data and final norm": shared + final}
        if model.count(SOFTMAX) and "keep_attention" in setting.features:
            # What each softmax layer keeps for its recomputation: out, and lse in fp32.
            of_a_token = c.num_attention_heads * (e * c.head_dim + 4)
            items["kept attention"] = model.count(SOFTMAX) * tokens * of_a_token
        return items
    kept = sum(model.count(kind) * layer.kept for kind, layer in layers.items())
    return {"activations of all layers": kept, "token data and final norm": shared + final}


def _offloads(setting: Setting) -> bool:
    return setting.checkpointing and "offload_activations" in setting.features


def _gathered(model: ModelShape, setting: Setting) -> dict[str, float]:
    """Whole weights that ZeRO-3 holds for a while; on one rank they are whole anyway."""
    if setting.stage < 3 or setting.gpus == 1:
        return {}
    largest = max(model.embedding, *(model.layer_parameters(kind) for kind in model.kinds))
    numbers = min(model.parameters, REUSE_DISTANCE + largest)
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
    part = whole / setting.gpus
    if "sharded_loading" in setting.features or setting.gpus == 1:
        return {"whole weights": e * (part + model.embedding)}
    return {"whole weights": e * (whole + part)}


def _host(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> dict[str, float]:
    ranks, e = min(cluster.local, setting.gpus), setting.dtype_bytes
    part = "sharded_loading" in setting.features and setting.stage == 3
    loaded = e * model.parameters / (setting.gpus if part else 1)
    states = sharded_states(model.parameters, setting).host
    inputs = 0.0
    if _offloads(setting):
        one = e * model.config.hidden_size * setting.local_tokens(length)
        inputs = one * model.num_layers
    # Every rank reads the weights into its own memory before they go to its GPU; what is
    # offloaded comes after that.
    return {
        "processes": HOST_PROCESS * ranks,
        "offloaded optimizer": states * ranks,
        "layer inputs": inputs * ranks,
        "weights while loading": max(loaded - states - inputs, 0.0) * ranks,
    }


__all__ = ["Memory", "States", "memory", "sharded_states"]
