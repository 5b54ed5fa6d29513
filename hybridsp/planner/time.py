"""Seconds of an optimizer step, part by part, and what bounds each.

What overlaps with something else counts only as far as it sticks out. Under checkpointing a layer
runs forward twice. An MLP in tiles costs no third time, because the recomputation ends where the
MLP begins; what it costs is to sum the gradients of its weights, which are read and written once
per tile. Each kernel takes its time to start; where the host launches kernels more slowly than the
GPU runs them, it is what counts.

Left out: ranks that wait for one another, reading data, and evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hybridsp.collectives.cost import (
    Topology,
    all_gather_seconds,
    chain_plan,
    doubling_seconds,
    hierarchical_plan,
)
from hybridsp.planner.hardware import HOST_MEMORY_BANDWIDTH, Cluster
from hybridsp.planner.kernels import (
    COMPUTE,
    KERNEL_SECONDS,
    LAUNCH_SECONDS,
    LAUNCHES_OF_UPDATE,
    MEMORY,
    elementwise_seconds,
    kernels_of,
    launch_seconds,
    linear_seconds,
    matmul_rate,
    model_flops,
    products_seconds,
    softmax_seconds,
)
from hybridsp.planner.memory import TOKENS_PER_TILE, kept_attention, layer_input
from hybridsp.planner.model import LINEAR, SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting

# The part of a linear layer's kernels that runs while the scan is in flight: about half forward
# (measured with FLA's), by assumption a fifth backward.
INTRA_FORWARD, INTRA_BACKWARD = 0.5, 0.2

PCIE, HOST, LAUNCHES = "PCIe", "host memory", "launches"
NVLINK, NETWORK = "NVLink", "network"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds of a part of a step, and what bounds them."""

    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step.

    Attributes:
        parts: by name.
        tokens: of the whole step.
        mfu: the model's operations, without recomputation, over what all GPUs could do.
    """

    parts: dict[str, Part]
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """What bounds the longest part."""
        return max(self.parts.values(), key=lambda part: part.seconds).bound


def step_time(
    model: ModelShape,
    setting: Setting,
    cluster: Cluster,
    length: int,
    pairs: float | None = None,
) -> StepTime:
    """What a step on sequences of `length` tokens takes.

    Args:
        model: its shape.
        setting: how it is run.
        cluster: on what.
        length: T.
        pairs: where a sequence is packed, the part of one document's pairs of tokens that its
            documents have (`kernels.pairs_of`); None for one document.
    """
    micro = _computation(model, setting, cluster, length, pairs)
    computing = sum(part.seconds for part in micro.values())
    micro |= _communication(model, setting, cluster, length, micro)
    micro |= _beside(model, setting, cluster, length, pairs, computing)
    parts = {
        name: Part(seconds=part.seconds * setting.accumulation, bound=part.bound)
        for name, part in micro.items()
    }
    parts |= _update(model, setting, cluster)
    parts = {name: part for name, part in parts.items() if part.seconds > 0}
    seconds = sum(part.seconds for part in parts.values())
    flops = setting.batch * model_flops(model, length, 1.0 if pairs is None else pairs)
    return StepTime(
        parts=parts,
        tokens=setting.batch * length,
        mfu=flops / (seconds * setting.gpus * cluster.chip.peak),
    )


def _computation(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, pairs: float | None
) -> dict[str, Part]:
    tokens = setting.local_tokens(length)
    forwards = 1 + setting.checkpointing
    parts = {
        "projections and MLP": _all_products(model, setting, cluster, length),
        "norms, RoPE, activations": Part(
            # A backward is as much as two forwards.
            seconds=(forwards + 2)
            * sum(
                count * elementwise_seconds(model, setting, cluster, kind, tokens)
                for kind, count in model.kinds.items()
            ),
            bound=MEMORY,
        ),
        "loss": _loss(model, setting, cluster, tokens),
        "starts of kernels": Part(
            seconds=KERNEL_SECONDS * kernels_of(model, setting, length), bound=LAUNCHES
        ),
    }
    if tile := setting.tile(length):
        e = setting.dtype_bytes
        of_a_tile = (4 + 4 + e) * model.mlp_parameters
        # Each tile's output, and its input's gradient, is copied to its place.
        moved = -(-tokens // tile) * of_a_tile + 4 * e * model.config.hidden_size * tokens
        parts["sums over tiles of the MLP"] = Part(
            seconds=model.num_layers * moved / cluster.chip.bandwidth, bound=MEMORY
        )
    if model.count(LINEAR):
        forward, backward = linear_seconds(model, setting, cluster, tokens)
        parts["linear attention"] = Part(
            seconds=model.count(LINEAR) * (forwards * forward + backward), bound=MEMORY
        )
    if model.count(SOFTMAX):
        parts["softmax attention"] = _softmax(model, setting, cluster, length, pairs)
    return parts


def _all_products(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> Part:
    """Projections and MLPs of all layers, forward and backward."""
    tokens, forwards = setting.local_tokens(length), 1 + setting.checkpointing
    # A backward is two products of the same size; in tiles it computes the MLP itself once more.
    mlp_forwards = 2 if setting.tile(length) else forwards
    compute = moved = seconds = 0.0
    for kind, count in model.kinds.items():
        for products, times in (
            (model.mixer_products(kind), forwards + 2),
            (model.mlp_products, mlp_forwards + 2),
        ):
            part = products_seconds(products, setting, cluster, tokens)
            compute, moved = compute + count * times * part[0], moved + count * times * part[1]
            seconds += count * times * part[2]
    return Part(seconds=seconds, bound=COMPUTE if compute > moved else MEMORY)


def _softmax(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, pairs: float | None
) -> Part:
    forward, backward, bound = softmax_seconds(model, setting, cluster, length, pairs)
    each = setting.attention_forwards * forward + backward
    return Part(seconds=model.count(SOFTMAX) * each, bound=bound)


def _loss(model: ModelShape, setting: Setting, cluster: Cluster, tokens: int) -> Part:
    """Head and cross-entropy: three products, the logits' small operations, sums of the weight."""
    compute = 6 * tokens * model.embedding / matmul_rate(setting, cluster)
    # Written and read by three products, read three times by the softmax (its largest number, their
    # sum, the result), made of fp32 at the end; in fp32: written, exponentiated, masked, read.
    logits = (7 * setting.dtype_bytes + 24) * tokens * model.config.vocab_size
    sums = (16 + setting.dtype_bytes) * model.embedding * -(-tokens // TOKENS_PER_TILE)
    moved = (logits + sums) / cluster.chip.bandwidth
    return Part(seconds=compute + moved, bound=COMPUTE if compute > moved else MEMORY)


def _communication(
    model: ModelShape,
    setting: Setting,
    cluster: Cluster,
    length: int,
    computation: dict[str, Part],
) -> dict[str, Part]:
    """What sequence parallelism sends, as far as it is not hidden."""
    if setting.sp == 1:
        return {}
    c, e, forwards = model.config, setting.dtype_bytes, 1 + setting.checkpointing
    tokens, bound = setting.local_tokens(length), NVLINK if setting.sp <= cluster.local else NETWORK
    parts = {}
    if layers := model.count(SOFTMAX):
        query = tokens * c.num_attention_heads * c.head_dim
        held = setting.ulysses * -(-c.num_key_value_heads // setting.ulysses)
        kv = tokens * held * c.head_dim
        exchange = _all_to_all_seconds(setting.sp, e * 2 * (query + kv), cluster)
        parts["all-to-all of softmax layers"] = Part(
            seconds=layers * (forwards + 1) * exchange, bound=bound
        )
        wire = cluster.chip.nvlink if setting.sp <= cluster.local else cluster.wire
        hops = (setting.ring - 1) * 2 * kv * (setting.attention_forwards * e + e + 4) / wire
        exposed = layers * hops - computation["softmax attention"].seconds
        parts["ring of softmax layers"] = Part(seconds=max(exposed, 0.0), bound=bound)
    if layers := model.count(LINEAR):
        forward, backward = linear_seconds(model, setting, cluster, tokens)
        state = 4 * c.linear_num_heads * c.linear_key_head_dim * c.linear_value_head_dim
        scan = _scan_seconds(
            cluster.topology(setting.sp), setting.sp, state, 4 * model.gates, c.linear_key_head_dim
        )
        exposed = forwards * max(scan - INTRA_FORWARD * forward, 0.0)
        exposed += max(scan - INTRA_BACKWARD * backward, 0.0)
        parts["All-Scan of linear layers"] = Part(seconds=layers * exposed, bound=bound)
    return parts


def _all_to_all_seconds(ranks: int, num_bytes: float, cluster: Cluster) -> float:
    """An all-to-all in which each rank holds so many bytes; both kinds of link at once."""
    local = min(ranks, cluster.local)
    inside = num_bytes * (local - 1) / ranks / cluster.chip.nvlink
    return max(inside, num_bytes * (ranks - local) / ranks / cluster.wire)


@lru_cache(maxsize=256)
def _scan_seconds(topology: Topology, ranks: int, state: int, decay: int, rows: int) -> float:
    """The fastest scan, as `collectives.cost.choose` would have it."""
    seconds = [
        chain_plan(topology, ranks, state, rows)[0],
        doubling_seconds(topology, ranks, state, decay),
        all_gather_seconds(topology, ranks, state, decay),
    ]
    local = topology.ranks_per_host
    if local is not None and 1 < local < ranks:
        seconds.append(hierarchical_plan(topology, ranks, state, decay, rows, local)[0])
    return min(seconds)


def _beside(
    model: ModelShape,
    setting: Setting,
    cluster: Cluster,
    length: int,
    pairs: float | None,
    computing: float,
) -> dict[str, Part]:
    """What runs beside a micro-batch's computation, as far as that does not hide it."""
    exposed = launch_seconds(model, setting, length) - computing
    parts = {"launches": Part(seconds=max(exposed, 0.0), bound=LAUNCHES)}
    ranks = setting.gpus
    if ranks > 1:
        e, moved = setting.dtype_bytes, model.parameters * (ranks - 1) / ranks
        gradient = 4.0 if setting.sp > 1 else e
        # Stage 3 gathers weights forward and backward; gradients are summed once per micro-batch
        # from stage 2 on, and once per step before.
        sums = gradient * (2.0 if setting.stage == 0 else 1.0)
        sums /= setting.accumulation if setting.stage < 2 else 1
        num_bytes = moved * (sums + (2 * e if setting.stage == 3 else 0))
        exposed = num_bytes / cluster.collective_bandwidth(ranks) - computing
        bound = NVLINK if cluster.nodes == 1 else NETWORK
        parts["ZeRO's weights and gradients"] = Part(seconds=max(exposed, 0.0), bound=bound)
    if setting.offload_activations:
        parts["activations over PCIe"] = Part(
            seconds=_offload_seconds(model, setting, cluster, length, pairs), bound=PCIE
        )
    return parts


def _offload_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, pairs: float | None
) -> float:
    """What a layer's copies take longer than its computation, there and back, of all layers."""
    seconds = 0.0
    for kind, count in model.kinds.items():
        moved = layer_input(model, setting, length)
        if kind == SOFTMAX and setting.keep_attention:
            moved += kept_attention(model, setting, length)
        for computing in _layer_seconds(model, setting, cluster, length, pairs, kind):
            seconds += count * max(moved / cluster.chip.pcie - computing, 0.0)
    return seconds


def _layer_seconds(
    model: ModelShape,
    setting: Setting,
    cluster: Cluster,
    length: int,
    pairs: float | None,
    kind: str,
) -> tuple[float, float]:
    """One layer's computation forward and, recomputed first, backward."""
    tokens = setting.local_tokens(length)
    once = products_seconds(model.layer_products(kind), setting, cluster, tokens)[2]
    once += elementwise_seconds(model, setting, cluster, kind, tokens)
    if kind == SOFTMAX:
        forward, backward, _ = softmax_seconds(model, setting, cluster, length, pairs)
        backward += (setting.attention_forwards - 1) * forward
    else:
        forward, backward = linear_seconds(model, setting, cluster, tokens)
        backward += forward
    return once + forward, 3 * once + backward


def _update(model: ModelShape, setting: Setting, cluster: Cluster) -> dict[str, Part]:
    """AdamW, once per step, and the updated weights to all ranks before stage 3."""
    e, chip, whole = setting.dtype_bytes, cluster.chip, model.parameters
    owned = whole / setting.gpus if setting.stage else whole
    # fp32 weights and two moments read and written, the gradient made fp32 and read, weights out.
    moved = (24 + e + 4 + 4 + e) * owned
    parts = {}
    if setting.offload_optimizer:
        parts["gradients and weights over PCIe"] = Part(
            seconds=2 * e * owned / chip.pcie, bound=PCIE
        )
        ranks = min(cluster.local, setting.gpus)
        parts["AdamW on the host"] = Part(seconds=moved * ranks / HOST_MEMORY_BANDWIDTH, bound=HOST)
    else:
        parts["AdamW"] = Part(seconds=moved / chip.bandwidth, bound=MEMORY)
    launched = LAUNCH_SECONDS * LAUNCHES_OF_UPDATE * model.tensors
    launched -= sum(part.seconds for part in parts.values())
    parts["launches of the update"] = Part(seconds=max(launched, 0.0), bound=LAUNCHES)
    if setting.stage in (1, 2) and setting.gpus > 1:
        parts["updated weights"] = Part(
            seconds=e * whole / cluster.collective_bandwidth(setting.gpus),
            bound=NVLINK if cluster.nodes == 1 else NETWORK,
        )
    return parts


__all__ = ["Part", "StepTime", "step_time"]
