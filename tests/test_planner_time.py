"""The time model against counts: bytes and launches of real layers, and what documents change."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from planner_cases import SOURCES, K, setting_of, shape_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import hybridsp
from hybridsp.attention.ring import RingAttention
from hybridsp.ops.gla.local import GatedLinearAttention
from hybridsp.planner import Cluster, Setting
from hybridsp.planner.elementwise import layer_traffic
from hybridsp.planner.kernels import (
    KERNEL_SECONDS,
    LAUNCHES,
    LAUNCHES_OF_TILE,
    launch_seconds,
    model_flops,
    pairs_of,
    softmax_seconds,
)
from hybridsp.planner.model import LINEAR, SOFTMAX
from hybridsp.planner.time import step_time

# What moves no data, or next to none, or only looks at it when a shape is first seen.
FREE = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
    ),
    *("split", "unbind", "detach", "permute", "alias", "empty", "empty_like", "new_zeros"),
    "aminmax",
}
PRODUCTS = {"mm", "addmm"}


class Traffic(TorchDispatchMode):
    """Operations outside attention kernels: how many, and the bytes of those that are no products.

    A tensor that is broadcast counts with the memory that it has. `numbers` are those of operations
    whose operands do not all lie alike.
    """

    inside = 0

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not Traffic.inside and name not in FREE:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if name not in PRODUCTS:
                self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
                laid = {(x.shape, x.stride()) for x in tensors if x.ndim}
                self.numbers += max(x.numel() for x in tensors) if len(laid) > 1 else 0
        return out


def leave_out(function):
    """Attention kernels, which are one launch on a GPU and many operations on a CPU."""
    for method in ("forward", "backward"):
        original = getattr(function, method)

        def run(*args, original=original):
            Traffic.inside += 1
            try:
                return original(*args)
            finally:
                Traffic.inside -= 1

        setattr(function, method, staticmethod(run))


def traffic_of(config, kinds, length):
    """(launches, bytes, numbers) of forward, and of backward with a second forward in it."""
    changes = {"num_hidden_layers": len(kinds), "layer_types": kinds}
    config = type(config).from_dict(config.to_dict() | changes)
    mesh = hybridsp.SPMesh()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.activation_checkpointing_enable()
    hybridsp.parallelize(model, mesh)
    tokens = torch.randint(config.vocab_size, (1, length))
    batch = hybridsp.shard_batch({"input_ids": tokens}, mesh)
    with Traffic() as forward:
        loss = model(**batch, num_items_in_batch=length).loss
    with Traffic() as backward:
        loss.backward()
    return torch.tensor(
        [[x.launches, x.bytes, x.numbers] for x in (forward, backward)], dtype=torch.float64
    )


def count(configs, length):
    """What a layer of each kind adds, by kind, of each model."""
    leave_out(RingAttention)
    leave_out(GatedLinearAttention)
    counted = []
    for config in configs:
        base = traffic_of(config, [LINEAR], length)
        of_kinds = {k: traffic_of(config, [LINEAR, k], length) - base for k in (LINEAR, SOFTMAX)}
        counted.append(of_kinds)
    return counted


def test_a_layers_small_operations_are_counted(tmp_path):
    """Bytes within a tenth, forward and over the whole step; launches, the kernels' own aside."""
    shapes = [shape_of(tmp_path, SOURCES["small"], "0.25") for _ in range(2)]
    length = 512
    for shape in shapes:
        shape.config.vocab_size = 64
    options = {"linear_conv_kernel_dim": 4, "linear_output_gate": True, "qk_norm": True}
    shapes[1].config.update(options)
    setting = setting_of(gpus=1, ulysses=1, stage=1)
    (counted,) = run_ranks(count, 1, [shape.config for shape in shapes], length, timeout=100)
    for i, shape in enumerate(shapes):
        for kind, ((first, forward, once), (again, backward, more)) in counted[i].items():
            planned = layer_traffic(shape, setting, kind) * length
            assert forward.item() == pytest.approx(planned.bytes, rel=0.1), (i, kind)
            assert (forward + backward).item() == pytest.approx(4 * planned.bytes, rel=0.15), kind
            assert once.item() == pytest.approx(planned.numbers, rel=0.1), (i, kind)
            assert (once + more).item() == pytest.approx(4 * planned.numbers, rel=0.15), (i, kind)
            if i == 0:
                launches = [first.item(), (again - first).item()]
                assert launches == pytest.approx(list(LAUNCHES[kind]), rel=0.25), kind


def test_packed_documents_take_their_pairs(tmp_path):
    shape, cluster = shape_of(tmp_path, SOURCES["small"], "0.25"), Cluster(gpu="h200-141", gpus=1)
    setting = setting_of(gpus=1, ulysses=1, stage=1)
    pairs = pairs_of([32 * K] * 4)
    assert pairs == pytest.approx(1 / 4)
    whole, packed = (model_flops(shape, 128 * K, part) for part in (1.0, pairs))
    short = 4 * model_flops(shape, 32 * K)
    assert packed == pytest.approx(short)
    assert packed < whole
    times = [step_time(shape, setting, cluster, 128 * K, part) for part in (None, pairs)]
    one, four = (each.parts["softmax attention"].seconds for each in times)
    # A quarter of the pairs, by a slower kernel.
    assert one / 4 < four < one / 2
    rest = [each.seconds - each.parts["softmax attention"].seconds for each in times]
    assert rest[0] == pytest.approx(rest[1])
    assert times[1].mfu * times[1].seconds == pytest.approx(packed / cluster.chip.peak)


def test_narrow_heads_are_slower(tmp_path):
    cluster = Cluster(gpu="h200-141", gpus=1)
    setting = setting_of(gpus=1, ulysses=1, stage=1)
    narrow = shape_of(tmp_path, SOURCES["small"])
    wide = shape_of(tmp_path, SOURCES["large"])

    def rates(shape):
        forward, backward, _ = softmax_seconds(shape, setting, cluster, 64 * K, None)
        c = shape.config
        work = 2 * (64 * K) ** 2 * c.num_attention_heads * c.head_dim
        return work / forward, 2.5 * work / backward

    assert rates(wide)[0] == pytest.approx(579e12)
    assert rates(narrow)[0] / rates(wide)[0] == pytest.approx(413 / 595, rel=0.01)
    assert rates(narrow)[1] / rates(wide)[1] == pytest.approx(433 / 516, rel=0.01)


def test_the_host_bounds_few_tokens(tmp_path):
    shape, cluster = shape_of(tmp_path, SOURCES["small"], "0.25"), Cluster(gpu="h200-141", gpus=1)
    setting = Setting(gpus=1, ring=1, ulysses=1, stage=1)
    short, long = (step_time(shape, setting, cluster, n) for n in (1 * K, 128 * K))
    assert short.bound == "launches"
    assert short.seconds > launch_seconds(shape, setting, 1 * K)
    assert "launches" not in long.parts
    # What the GPU takes to start each kernel is paid at any length, and tiles have kernels each.
    tiled = setting_of(gpus=1, ulysses=1, stage=1, tiled_mlp=8 * K)
    more = step_time(shape, tiled, cluster, 128 * K).parts["starts of kernels"].seconds
    added = LAUNCHES_OF_TILE * 30 * 16 * KERNEL_SECONDS
    assert more - long.parts["starts of kernels"].seconds == pytest.approx(added)
    # The update's kernels are as many as there are parameters, whatever the length.
    assert short.parts["launches of the update"] == long.parts["launches of the update"]


def test_kernels_that_index_are_no_faster_on_faster_memory(tmp_path):
    """Their share of a layer takes as long on both chips, all else as its bytes do."""
    shape, setting = shape_of(tmp_path, SOURCES["small"], "0.25"), setting_of(gpus=1, ulysses=1)
    traffic = layer_traffic(shape, setting, LINEAR)
    h100, h200 = (Cluster(gpu=gpu, gpus=1) for gpu in ("h100-80", "h200-141"))
    indexed = replace(traffic, plain=0.0)
    assert indexed.seconds(h100) == indexed.seconds(h200) > indexed.bytes / h100.chip.bandwidth
    plain = replace(traffic, indexed=0.0, numbers=0.0)
    assert plain.seconds(h100) / plain.seconds(h200) == pytest.approx(4.3 / 2.974)
