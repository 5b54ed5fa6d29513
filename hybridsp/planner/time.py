"""Seconds of an optimizer step, part by part, and what bounds each.

A product takes its operations at the rate that products reach, or its bytes at the memory's,
whichever is longer; everything else on a GPU takes its bytes. What overlaps with something else
counts only as far as it sticks out. Under checkpointing a layer runs forward twice. An MLP in tiles
costs no third time, because the recomputation ends where the MLP begins; what it costs is to sum
the gradients of its weights, which are read and written once per tile.

Left out: launches (they dominate below some ten thousand tokens per rank), ranks that wait for one
another, reading data, and evaluation.
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
from hybridsp.planner.memory import TOKENS_PER_TILE, kept_attention, layer_input
from hybridsp.planner.model import LINEAR, SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting

# Times over reading each input and writing each output once; H16 K128 V128, 256K tokens, bf16,
# measured on an H100 (docs/performance.md).
GLA_FORWARD, GLA_STEP = 3.6, 4.7
# The part of a linear layer's kernels that runs while the scan is in flight: about half forward
# (measured with FLA's), by assumption a fifth backward.
INTRA_FORWARD, INTRA_BACKWARD = 0.5, 0.2
# Reads and writes of the fp32 score matrix by plain attention, counted in ops/softmax/plain.py.
PLAIN_FORWARD, PLAIN_BACKWARD = 12, 20

COMPUTE, MEMORY, PCIE, HOST = "FLOPs", "memory bandwidth", "PCIe", "host memory"
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


def step_time(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> StepTime:
    """What a step on sequences of `length` tokens takes."""
    micro = _computation(model, setting, cluster, length)
    computing = sum(part.seconds for part in micro.values())
    micro |= _communication(model, setting, cluster, length, micro)
    micro |= _beside(model, setting, cluster, length, computing)
    parts = {
        name: Part(seconds=part.seconds * setting.accumulation, bound=part.bound)
        for name, part in micro.items()
    }
    parts |= _update(model, setting, cluster)
    parts = {name: part for name, part in parts.items() if part.seconds > 0}
    seconds = sum(part.seconds for part in parts.values())
    flops = setting.batch * model_flops(model, length)
    return StepTime(
        parts=parts,
        tokens=setting.batch * length,
        mfu=flops / (seconds * setting.gpus * cluster.chip.peak),
    )


def model_flops(model: ModelShape, length: int) -> float:
    """Operations of forward and backward on one sequence, each computed once."""
    c = model.config
    products = sum(
        model.count(kind) * sum(rows * columns for rows, columns in model.layer_products(kind))
        for kind in model.kinds
    )
    key_dim, value_dim = c.linear_key_head_dim, c.linear_value_head_dim
    # Per token: write to the state, read from it, and the pairs inside a chunk of 64.
    linear = c.linear_num_heads * (4 * key_dim * value_dim + 64 * (key_dim + value_dim))
    per_token = 2 * (products + model.embedding) + model.count(LINEAR) * linear
    return 3 * (per_token * length + model.count(SOFTMAX) * _causal_flops(model, length))


def _causal_flops(model: ModelShape, length: int) -> float:
    """Forward, of one softmax layer on one sequence."""
    return 2 * length**2 * model.config.num_attention_heads * model.config.head_dim


def _computation(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int
) -> dict[str, Part]:
    tokens = setting.local_tokens(length)
    forwards = 1 + setting.checkpointing
    parts = {
        "projections and MLP": _all_products(model, setting, cluster, length),
        "norms, RoPE, activations": Part(
            # A backward is as much as two forwards.
            seconds=(forwards + 2)
            * sum(
                count * _elementwise_seconds(model, setting, cluster, kind, tokens)
                for kind, count in model.kinds.items()
            ),
            bound=MEMORY,
        ),
        "loss": _loss(model, setting, cluster, tokens),
    }
    if tile := setting.tile(length):
        of_a_tile = (4 + 4 + setting.dtype_bytes) * model.num_layers * model.mlp_parameters
        parts["sums over tiles of the MLP"] = Part(
            seconds=-(-tokens // tile) * of_a_tile / cluster.chip.bandwidth, bound=MEMORY
        )
    if model.count(LINEAR):
        forward, backward = _linear_seconds(model, setting, cluster, tokens)
        parts["linear attention"] = Part(
            seconds=model.count(LINEAR) * (forwards * forward + backward), bound=MEMORY
        )
    if model.count(SOFTMAX):
        parts["softmax attention"] = _softmax(model, setting, cluster, length)
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
            part = _products(products, setting, cluster, tokens)
            compute, moved = compute + count * times * part[0], moved + count * times * part[1]
            seconds += count * times * part[2]
    return Part(seconds=seconds, bound=COMPUTE if compute > moved else MEMORY)


def _products(
    products: list[tuple[int, int]], setting: Setting, cluster: Cluster, tokens: int
) -> tuple[float, float, float]:
    """Seconds of some products: of their operations, of their bytes, and of both together."""
    rate, e = _matmul_rate(setting, cluster), setting.dtype_bytes
    work = [2 * tokens * rows * columns / rate for rows, columns in products]
    moved = [
        e * (tokens * (rows + columns) + rows * columns) / cluster.chip.bandwidth
        for rows, columns in products
    ]
    return sum(work), sum(moved), sum(map(max, work, moved))


def _matmul_rate(setting: Setting, cluster: Cluster) -> float:
    return cluster.chip.matmul if setting.dtype_bytes == 2 else cluster.chip.float32


def _elementwise_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, kind: str, tokens: int
) -> float:
    """Of one layer, forward."""
    return tokens * _elementwise_bytes(model, kind, setting.dtype_bytes) / cluster.chip.bandwidth


def _elementwise_bytes(model: ModelShape, kind: str, e: int) -> float:
    """Bytes that a layer's unfused small operations read and write per token, forward."""
    c = model.config
    norm, rope, gate = 28 + 4 * e, 9 * e, 5 * e  # per number; gate is silu(a) * b
    total = 2 * norm * c.hidden_size + 6 * e * c.hidden_size + gate * c.intermediate_size
    if kind == SOFTMAX:
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        total += (rope * bool(c.softmax_rope) + norm * bool(c.qk_norm)) * (query + kv)
        return total + 4 * e * (2 * query + 2 * kv)  # into the all-to-all and out of it
    query, key, value = model.linear_widths
    out = c.linear_num_heads * c.linear_value_head_dim
    total += (rope * bool(c.linear_rope) + norm * bool(c.linear_qk_norm)) * (query + key)
    total += 10 * e * bool(c.linear_conv_kernel_dim) * (query + key + value)
    if c.linear_num_key_value_heads < c.linear_num_heads:
        total += 2 * e * (query + out)  # k and v cloned for their query heads
    total += (20 + e) * model.gates * (c.linear_decay != "fixed")
    return total + (norm * bool(c.linear_output_norm) + gate * bool(c.linear_output_gate)) * out


def _linear_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, tokens: int
) -> tuple[float, float]:
    """Forward and backward of one layer's kernels."""
    c, e = model.config, setting.dtype_bytes
    keys = tokens * c.linear_num_heads * c.linear_key_head_dim
    values = tokens * c.linear_num_heads * c.linear_value_head_dim
    gates = 4 * tokens * model.gates
    forward = e * (2 * keys + 2 * values) + gates  # q, k, v, g read, o written
    backward = e * (4 * keys + 3 * values) + 2 * gates  # with do read; dq, dk, dv, dg written
    seconds = GLA_FORWARD * forward / cluster.chip.bandwidth
    return seconds, GLA_STEP * (forward + backward) / cluster.chip.bandwidth - seconds


def _softmax(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> Part:
    forward, backward, bound = _softmax_seconds(model, setting, cluster, length)
    each = setting.attention_forwards * forward + backward
    return Part(seconds=model.count(SOFTMAX) * each, bound=bound)


def _softmax_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int
) -> tuple[float, float, str]:
    """Forward and backward of one layer's kernels, and what bounds them."""
    chip = cluster.chip
    if setting.fused_attention:
        flops = _causal_flops(model, length) / setting.sp
        forward = flops / chip.attention_forward
        return forward, 3.5 * flops / chip.attention - forward, COMPUTE  # a backward is 2.5
    # Plain attention computes the masked half of causal blocks too.
    c, ring = model.config, setting.ring
    share = 1.0 if ring == 1 else (2 * ring + 1) / (4 * ring**2)
    pairs = share * length**2 * c.num_attention_heads / setting.ulysses
    compute = [pairs * c.head_dim * operations / chip.float32 for operations in (4, 10)]
    moved = [4 * pairs * n / chip.bandwidth for n in (PLAIN_FORWARD, PLAIN_BACKWARD)]
    bound = COMPUTE if sum(compute) > sum(moved) else MEMORY
    return compute[0] + moved[0], compute[1] + moved[1], bound


def _loss(model: ModelShape, setting: Setting, cluster: Cluster, tokens: int) -> Part:
    """Head and cross-entropy: three products, the logits' small operations, sums of the weight."""
    compute = 6 * tokens * model.embedding / _matmul_rate(setting, cluster)
    logits = (34 + setting.dtype_bytes) * tokens * model.config.vocab_size
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
        forward, backward = _linear_seconds(model, setting, cluster, tokens)
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
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, computing: float
) -> dict[str, Part]:
    """What runs beside a micro-batch's computation, as far as that does not hide it."""
    parts: dict[str, Part] = {}
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
            seconds=_offload_seconds(model, setting, cluster, length), bound=PCIE
        )
    return parts


def _offload_seconds(model: ModelShape, setting: Setting, cluster: Cluster, length: int) -> float:
    """What a layer's copies take longer than its computation, there and back, of all layers."""
    seconds = 0.0
    for kind, count in model.kinds.items():
        moved = layer_input(model, setting, length)
        if kind == SOFTMAX and setting.keep_attention:
            moved += kept_attention(model, setting, length)
        for computing in _layer_seconds(model, setting, cluster, length, kind):
            seconds += count * max(moved / cluster.chip.pcie - computing, 0.0)
    return seconds


def _layer_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, kind: str
) -> tuple[float, float]:
    """One layer's computation forward and, recomputed first, backward."""
    tokens = setting.local_tokens(length)
    once = _products(model.layer_products(kind), setting, cluster, tokens)[2]
    once += _elementwise_seconds(model, setting, cluster, kind, tokens)
    if kind == SOFTMAX:
        forward, backward, _ = _softmax_seconds(model, setting, cluster, length)
        backward += (setting.attention_forwards - 1) * forward
    else:
        forward, backward = _linear_seconds(model, setting, cluster, tokens)
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
    if setting.stage in (1, 2) and setting.gpus > 1:
        parts["updated weights"] = Part(
            seconds=e * whole / cluster.collective_bandwidth(setting.gpus),
            bound=NVLINK if cluster.nodes == 1 else NETWORK,
        )
    return parts


__all__ = ["Part", "StepTime", "model_flops", "step_time"]
