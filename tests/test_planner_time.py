"""The time model against counts: bytes and launches of real layers, and what documents change."""

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
from hybridsp.planner.kernels import (
    LAUNCHES,
    elementwise_bytes,
    launch_seconds,
    model_flops,
    pairs_of,
    softmax_seconds,
)
from hybridsp.planner.model import LINEAR, SOFTMAX
from hybridsp.planner.time import step_time

# What moves no data, or only looks at it when a shape is first seen.
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
    *("split", "unbind", "detach", "permute", "alias", "empty", "empty_like", "aminmax"),
}
PRODUCTS = {"mm", "addmm"}


class Traffic(TorchDispatchMode):
    """Operations outside attention kernels: how many, and the bytes of those that are no products.

    A tensor that is broadcast counts with the memory that it has.
    """

    inside = 0

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not Traffic.inside and name not in FREE:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if name not in PRODUCTS:
                self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
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
    """(launches, bytes) of forward, and of backward with a second forward in it."""
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
        [[forward.launches, forward.bytes], [backward.launches, backward.bytes]]
    ).double()


def count(config, length):
    """What a layer of each kind adds, by kind."""
    leave_out(RingAttention)
    leave_out(GatedLinearAttention)
    base = traffic_of(config, [LINEAR], length)
    return {kind: traffic_of(config, [LINEAR, kind], length) - base for kind in (LINEAR, SOFTMAX)}


def test_a_layers_small_operations_are_counted(tmp_path):
    """Bytes within a tenth, forward and over the whole step; launches, the kernels' own aside."""
    shape = shape_of(tmp_path, SOURCES["small"], "0.25")
    length = 512
    shape.config.vocab_size = 64
    setting = setting_of(gpus=1, ulysses=1, stage=1)
    (counted,) = run_ranks(count, 1, shape.config, length, timeout=100)
    for kind, ((first, forward), (again, backward)) in counted.items():
        planned = length * elementwise_bytes(shape, setting, kind)
        assert forward.item() == pytest.approx(planned, rel=0.1), kind
        assert (forward + backward).item() == pytest.approx(4 * planned, rel=0.15), kind
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
