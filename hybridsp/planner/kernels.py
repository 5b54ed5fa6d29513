"""Seconds of what a layer runs on a GPU: products, attention kernels, and everything small.

A product takes its operations at the rate that products reach, or its bytes at the memory's,
whichever is longer. Softmax attention takes its operations; a score costs its exponential besides,
which a narrow head spreads over fewer products. Linear attention takes a multiple of its bytes, and
the small operations between the kernels (norms, RoPE, silu) are in `elementwise`. In eager PyTorch
each of all these is a kernel, which takes its time to start, and is launched by the host, which is
what bounds a step of few tokens.
"""

from __future__ import annotations

from hybridsp.planner.activations import CHUNK
from hybridsp.planner.elementwise import layer_traffic
from hybridsp.planner.hardware import Cluster
from hybridsp.planner.memory import TOKENS_PER_TILE
from hybridsp.planner.model import LINEAR, SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting

COMPUTE, MEMORY = "FLOPs", "memory bandwidth"

# The linear layer's kernels: forward, and forward and backward. What they take is as many times as
# long as to read each input and write each output once, and so many bytes more for each number of
# the states that chunks pass on. Solved from two shapes on an H200 (256K tokens, commit 4ea7455):
# 3.2 and 5.1 times over its floor with heads of 128 x 128, 6.3 and 9.6 with 256 x 512. The times
# of docs/performance.md, with factors rounded since, are within 4% of those.
GLA_FORWARD, GLA_STEP = (1.18, 6.66), (2.08, 26.3)
# They keep an H100's multiprocessors as busy as its memory, so an H200's faster memory helps
# little: kernels before these took 29.3 ms there and 31.4 on an H100. Both count as this rate.
GLA_BYTES_PER_FLOP = 2.974e12 / 989e12
# Reads and writes of the fp32 score matrix by plain attention, counted in ops/softmax/plain.py.
PLAIN_FORWARD, PLAIN_BACKWARD = 12, 20
# What a head of 64 adds to the time that the same operations take in heads of 128. cuDNN on an
# H100, 16K tokens (FlashAttention-3, arXiv:2407.08608, figures 5 and 6): 413 of 595 TFLOP/s
# forward, 433 of 516 backward.
NARROW_FORWARD, NARROW_BACKWARD = 0.44, 0.19
# Packed documents are PyTorch's FlashAttention-2's, which has varlen kernels: 336 of cuDNN's 579
# TFLOP/s forward, 321 of its 542 in all (measured, H200).
PACKED_FORWARD, PACKED_STEP = 0.58, 0.59
# Kernels that a layer launches: forward, again where it is checkpointed, and backward; and a tile
# of an MLP. Counted on the CPU, the attention kernels' own added. A tile of the loss and, of the
# update, a parameter tensor: counted in a profile (H200, ZeRO-1, 360 tensors).
LAUNCHES = {LINEAR: (70, 100), SOFTMAX: (40, 75)}
LAUNCHES_OF_TILE, LAUNCHES_OF_LOSS_TILE, LAUNCHES_OF_UPDATE = 25, 24, 16
# Of the host, by assumption: PyTorch's dispatcher, autograd and CUDA's launch.
LAUNCH_SECONDS = 8e-6
# What a kernel takes on a GPU beside its bytes or operations: to start, to run out while some
# multiprocessors are done, and the gap behind it. From the same steps with the MLP in tiles and
# whole (H200, 64K and 128K tokens), which differ in the number of kernels: 5 to 9 us for each.
KERNEL_SECONDS = 6e-6


def model_flops(model: ModelShape, length: int, pairs: float = 1.0) -> float:
    """Operations of forward and backward on one sequence, each computed once.

    Args:
        model: its shape.
        length: T.
        pairs: the part of the pairs of one document of T tokens that its documents have.
    """
    c = model.config
    products = sum(
        model.count(kind) * sum(rows * columns for rows, columns in model.layer_products(kind))
        for kind in model.kinds
    )
    key_dim, value_dim = c.linear_key_head_dim, c.linear_value_head_dim
    # Per token: write to the state, read from it, and the pairs inside a chunk of 64.
    linear = c.linear_num_heads * (4 * key_dim * value_dim + 64 * (key_dim + value_dim))
    per_token = 2 * (products + model.embedding) + model.count(LINEAR) * linear
    softmax = model.count(SOFTMAX) * pairs * causal_flops(model, length)
    return 3 * (per_token * length + softmax)


def causal_flops(model: ModelShape, length: int) -> float:
    """Forward, of one softmax layer on one document."""
    return 2 * length**2 * model.config.num_attention_heads * model.config.head_dim


def pairs_of(lengths: list[int]) -> float:
    """The part of the pairs of one document that documents of these lengths have, end to end."""
    return sum(n**2 for n in lengths) / sum(lengths) ** 2


def products_seconds(
    products: list[tuple[int, int]], setting: Setting, cluster: Cluster, tokens: int
) -> tuple[float, float, float]:
    """Seconds of some products: of their operations, of their bytes, and of both together."""
    rate, e = matmul_rate(setting, cluster), setting.dtype_bytes
    work = [2 * tokens * rows * columns / rate for rows, columns in products]
    moved = [
        e * (tokens * (rows + columns) + rows * columns) / cluster.chip.bandwidth
        for rows, columns in products
    ]
    return sum(work), sum(moved), sum(map(max, work, moved))


def matmul_rate(setting: Setting, cluster: Cluster) -> float:
    """FLOP/s of products in the setting's dtype."""
    return cluster.chip.matmul if setting.dtype_bytes == 2 else cluster.chip.float32


def elementwise_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, kind: str, tokens: int
) -> float:
    """Of one layer's small operations, forward."""
    return tokens * layer_traffic(model, setting, kind).seconds(cluster)


def linear_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, tokens: int
) -> tuple[float, float]:
    """Forward and backward of one layer's kernels."""
    c, e, chip = model.config, setting.dtype_bytes, cluster.chip
    keys = tokens * c.linear_num_heads * c.linear_key_head_dim
    values = tokens * c.linear_num_heads * c.linear_value_head_dim
    gates = 4 * tokens * model.gates
    forward = e * (2 * keys + 2 * values) + gates  # q, k, v, g read, o written
    backward = e * (4 * keys + 3 * values) + 2 * gates  # with do read; dq, dk, dv, dg written
    states = keys * c.linear_value_head_dim / CHUNK * e / 2
    rate = min(chip.bandwidth, GLA_BYTES_PER_FLOP * chip.peak)
    once, step = (
        (times * moved + of_states * states) / rate
        for moved, (times, of_states) in (
            (forward, GLA_FORWARD),
            (forward + backward, GLA_STEP),
        )
    )
    return once, step - once


def softmax_seconds(
    model: ModelShape, setting: Setting, cluster: Cluster, length: int, pairs: float | None
) -> tuple[float, float, str]:
    """Forward and backward of one layer's kernels, and what bounds them; `pairs` as `step_time`."""
    chip, c = cluster.chip, model.config
    part = 1.0 if pairs is None else pairs
    if setting.fused_attention:
        flops = part * causal_flops(model, length) / setting.sp
        slower = (1.0, 1.0) if pairs is None else (1 / PACKED_FORWARD, 1 / PACKED_STEP)
        forward = slower[0] * flops / chip.attention_forward
        backward = slower[1] * 3.5 * flops / chip.attention - forward  # 2.5 forwards
        narrow = max(128 / c.head_dim - 1, 0.0)
        forward *= 1 + NARROW_FORWARD * narrow
        return forward, backward * (1 + NARROW_BACKWARD * narrow), COMPUTE
    share = part / (2 * setting.ring)  # tile by tile: the masked half is left out there too
    scores = share * length**2 * c.num_attention_heads / setting.ulysses
    compute = [scores * c.head_dim * operations / chip.float32 for operations in (4, 10)]
    moved = [4 * scores * n / chip.bandwidth for n in (PLAIN_FORWARD, PLAIN_BACKWARD)]
    bound = COMPUTE if sum(compute) > sum(moved) else MEMORY
    return compute[0] + moved[0], compute[1] + moved[1], bound


def kernels_of(model: ModelShape, setting: Setting, length: int) -> int:
    """Launched for a micro-batch."""
    tokens, forwards = setting.local_tokens(length), 1 + setting.checkpointing
    launches = sum(
        count * (forwards * LAUNCHES[kind][0] + LAUNCHES[kind][1])
        for kind, count in model.kinds.items()
    )
    if tile := setting.tile(length):
        launches += LAUNCHES_OF_TILE * model.num_layers * -(-tokens // tile)
    return launches + LAUNCHES_OF_LOSS_TILE * -(-tokens // TOKENS_PER_TILE)


def launch_seconds(model: ModelShape, setting: Setting, length: int) -> float:
    """Of the host, for all kernels of a micro-batch."""
    return LAUNCH_SECONDS * kernels_of(model, setting, length)
