"""The planner's memory model: real parameters, ZeRO's shares, and what autograd really keeps."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planner_cases import HYBRIDS, SOURCES, K, setting_of, shape_of
from transformers import AutoModelForCausalLM

import hybridsp  # noqa: F401 - registers the family with the Auto classes
from hybridsp.convert import hybrid_config
from hybridsp.memory import tile_mlp
from hybridsp.planner import Cluster
from hybridsp.planner.activations import layer_bytes
from hybridsp.planner.memory import memory, sharded_states
from hybridsp.planner.model import LINEAR, SOFTMAX


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Llama-8B's shape, a quarter of its layers softmax."""
    return shape_of(tmp_path_factory.mktemp("large"), SOURCES["large"], "0.25")


def real_parameters(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def real_tensors(config):
    with torch.device("meta"):
        return len(list(AutoModelForCausalLM.from_config(config).parameters()))


@pytest.mark.parametrize("name", SOURCES)
def test_parameters_of_dense_models_and_of_their_hybrids(tmp_path, name):
    config = SOURCES[name]
    assert shape_of(tmp_path, config).parameters == real_parameters(config)
    hybrid = hybrid_config(config, 0.25)
    assert shape_of(tmp_path, config, 0.25).parameters == real_parameters(hybrid)
    assert shape_of(tmp_path, config, 0.25).tensors == real_tensors(hybrid)
    assert shape_of(tmp_path, hybrid).parameters == real_parameters(hybrid)


@pytest.mark.parametrize("name", HYBRIDS)
def test_parameters_of_hybrids(tmp_path, name):
    assert shape_of(tmp_path, HYBRIDS[name]).parameters == real_parameters(HYBRIDS[name])
    assert shape_of(tmp_path, HYBRIDS[name]).tensors == real_tensors(HYBRIDS[name])


@pytest.mark.parametrize(
    ("stage", "dtype_bytes", "parameters", "gradients", "optimizer"),
    [
        (0, 2, 2, 2, 12),
        (1, 2, 2, 2, 12 / 8),
        (2, 2, 2, 2 / 8, 12 / 8),
        (3, 2, 2 / 8, 2 / 8, 12 / 8),
        (0, 4, 4, 4, 8),
        (3, 4, 4 / 8, 4 / 8, 12 / 8),
    ],
)
def test_zero_partitions(stage, dtype_bytes, parameters, gradients, optimizer):
    states = sharded_states(1000, setting_of(stage=stage, dtype_bytes=dtype_bytes))
    found = (states.parameters, states.gradients, states.optimizer, states.host)
    assert found == (1000 * parameters, 1000 * gradients, 1000 * optimizer, 0)


def test_an_offloaded_optimizer_is_the_hosts():
    states = sharded_states(1000, setting_of(offload_optimizer=True))
    assert (states.parameters, states.gradients, states.optimizer) == (250, 0, 0)
    assert states.host == (12 + 4 + 2) * 1000 / 8


def test_activations_by_hand(large):
    """One rank's 64 tokens of Llama-8B's shape over a mesh of 2 x 4, in bf16."""
    setting, tokens = setting_of(ring=2, ulysses=4), 64
    hidden, width, q, kv = 4096 * tokens, 14336 * tokens, 32 * 128 * tokens, 8 * 128 * tokens
    # Root mean square and input in fp32; bf16 before and behind the weight.
    norm = 4 * tokens + (4 + 2 + 2) * hidden
    softmax = layer_bytes(large, setting, SOFTMAX, 8 * tokens)
    # q, out, and k, v (U divides the KV heads); lse in fp32.
    assert softmax.before == norm + 2 * (2 * q + 2 * kv) + 4 * 32 * tokens
    assert softmax.after == norm + 2 * q
    assert softmax.mlp == 4 * 2 * width
    assert softmax.mlp_work == 2 * 2 * width + 2 * 2 * hidden
    dq, dkv, travelling = (2 * 2 + 4) * q, 2 * kv * (4 + 2), 2 * kv * (2 + 4)
    assert softmax.mixer_work == dq + dkv + travelling + 2 * 2 * hidden

    linear = layer_bytes(large, setting, LINEAR, 8 * tokens)
    # q, k, v of all heads, g and its logits in fp32 and what the logits are made of.
    assert linear.before == norm + 3 * 2 * q + 2 * 4 * q + 2 * 16 * tokens
    # The output norm, whose output goes into o_proj.
    assert linear.after == norm + 4 * 32 * tokens + (4 + 2 + 2) * q
    # dout, dv, dq, dk; dg; pairs. Of the one chunk: its decay, the ends of its stretch, its state
    # and the gradient with eight bits more, S x D in two blocks of columns.
    core = 2 * 4 * q + 4 * q + 4 * 64 * 32 * tokens
    core += 4 * 32 * 128 + 2 * 4 * 32 * 128 * 128 + 32 * (5 * 128 * 128 + 2 * 4 * 128)
    assert linear.mixer_work == max(core, 2 * 3 * q + 12 * q) + 2 * 2 * hidden


def test_replicated_heads_take_room(large):
    tokens = 64 * K
    eight, sixteen = (
        layer_bytes(large, setting_of(gpus=u, ulysses=u), SOFTMAX, u * tokens) for u in (8, 16)
    )
    assert sixteen.before - eight.before == 2 * 2 * tokens * 8 * 128  # each KV head twice


def test_plain_attention_holds_scores(large):
    tokens = 64 * K
    hidden, q, kv = 4096 * tokens, 32 * 128 * tokens, 8 * 128 * tokens
    found = layer_bytes(large, setting_of(dtype_bytes=4), SOFTMAX, 8 * tokens).mixer_work
    scores = 4 * 4 * 512 * 8 * tokens * 4  # four matrices of 512 queries, all keys, four heads
    copies = 3 * 4 * q + 2 * 4 * kv
    assert found == (2 * 4 + 4) * q + 2 * kv * (4 + 4) + scores + copies + 2 * 4 * hidden


def peak(model, setting, length, gpu="h100-80"):
    cluster = Cluster(gpu=gpu, gpus=setting.gpus)
    return memory(model, setting, cluster, length).peak


# What `parallelize` can be told, one after another.
STEPS = [
    {"checkpointing": False},
    {"checkpointing": False, "tiled_mlp": 4096},
    {"checkpointing": True},
    {"checkpointing": True, "tiled_mlp": 4096},
    {"checkpointing": True, "tiled_mlp": 4096, "keep_attention": False},
    {"checkpointing": True, "tiled_mlp": 4096, "offload_activations": True},
    {
        "checkpointing": True,
        "tiled_mlp": 4096,
        "offload_activations": True,
        "keep_attention": False,
    },
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_peaks_are_monotone(large, stage, dtype_bytes):
    options = {"stage": stage, "dtype_bytes": dtype_bytes}
    for step in STEPS:
        setting = setting_of(**options, **step)
        lengths = [peak(large, setting, length) for length in (1, K, 50 * K, 300 * K, 4 * K * K)]
        assert all(shorter <= longer for shorter, longer in pairwise(lengths))
        peaks = [
            peak(large, replace(setting, gpus=n, ring=max(n // 8, 1), ulysses=min(n, 8)), 512 * K)
            for n in (2, 4, 8, 16, 64, 1024)
        ]
        assert all(fewer >= more for fewer, more in pairwise(peaks))
        offloaded = replace(setting, offload_optimizer=True)
        for length in (K, K * K):
            assert peak(large, offloaded, length) <= peak(large, setting, length)


def test_what_saves_memory_never_raises_the_peak(large):
    for length in (K, 128 * K, K * K):
        for less, more in ((2, 0), (3, 2), (3, 1), (4, 3), (5, 3), (6, 4), (6, 5)):
            saving, spending = (setting_of(**STEPS[step]) for step in (less, more))
            assert peak(large, saving, length) <= peak(large, spending, length)


def test_checkpoints_by_hand(large):
    """8 of 32 layers softmax, no two of them neighbours; 128K tokens of a rank, in bf16."""
    length, cluster = K * K, Cluster(gpu="h100-80", gpus=8)
    tokens = length // 8
    one, out, lse = 2 * 4096 * tokens, 2 * 32 * 128 * tokens, 4 * 32 * tokens

    def found(**changes):
        got = memory(large, setting_of(**changes), cluster, length)
        phase = got.phases["backward of a linear_attention layer (MLP)"]
        items = [items.get("layer inputs", 0) for items in (phase, got.phases["loss"], got.host)]
        return items, phase["kept attention"], got.host["kept attention"]

    assert found() == ([32 * one, 32 * one, 0], 8 * (out + lse), 0)
    # Before the head nothing is under way; lse is 16 MiB, a quarter of a page of host memory.
    assert lse == 16 * K * K
    on_host = ([2 * one, 0, 8 * 32 * one], out + lse, 8 * 8 * (out + 64 * K * K))
    assert found(offload_activations=True) == on_host
    assert found(offload_activations=True, keep_attention=False) == (on_host[0], 0, 0)


def test_tiles_by_hand(large):
    """A tile's six activations, and the gradients of the weights: fp32 sums, and bf16 twice."""
    tokens, weights = 16 * K, 3 * 4096 * 14336
    whole = layer_bytes(large, setting_of(), SOFTMAX, 8 * tokens)
    tiled = layer_bytes(large, setting_of(tiled_mlp=4 * K), SOFTMAX, 8 * tokens)
    assert (whole.mlp, tiled.mlp) == (4 * 2 * 14336 * tokens, 0)
    stream = 2 * 2 * 4096 * tokens
    assert tiled.mlp_work == 6 * 2 * 14336 * 4 * K + (4 + 2 + 2) * weights + stream
    assert layer_bytes(large, setting_of(tiled_mlp=tokens), SOFTMAX, 8 * tokens) == whole


def test_only_stages_below_three_load_whole_weights(large):
    cluster = Cluster(gpu="h100-80", gpus=8)
    embedding = 2 * 128256 * 4096
    for stage in (2, 3):
        found = memory(large, setting_of(stage=stage), cluster, 128 * K)
        whole = 2 * large.parameters
        expected = whole if stage == 2 else whole / 8 + embedding
        assert sum(found.phases["loading"].values()) == expected
        assert found.host["weights while loading"] == 8 * (whole if stage == 2 else embedding)


def test_what_the_allocator_sees(large):
    found = memory(large, setting_of(), Cluster(gpu="h100-80", gpus=8), K * K)
    assert found.phase != "loading"
    assert found.allocated == pytest.approx(found.peak - 1.75 * K**3)


@pytest.mark.parametrize("tile", [None, 128])
@pytest.mark.parametrize("name", ["all options", "scalar", "vector"])
def test_layers_keep_what_autograd_keeps(tmp_path, name, tile):
    """Two layers run for real, in bf16 on the CPU, and the tensors that autograd saves weighed."""
    config = HYBRIDS[name]
    shape, tokens = shape_of(tmp_path, config), 256
    setting = setting_of(gpus=1, ulysses=1, tiled_mlp=tile)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").bfloat16().model
    positions = torch.arange(tokens)[None]
    for layer, kind in zip(model.layers[:2], config.layer_types, strict=False):
        x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        tile_mlp(layer.mlp, tile)
        rotation = None
        if kind in model.rotary_embs:
            rotation = model.rotary_embs[kind](x, positions)
        shared = [x, *model.parameters(), *(rotation or ())]
        found = saved_bytes(lambda: layer(x, position_embeddings=rotation), shared)  # noqa: B023
        if kind == LINEAR and config.linear_decay != "fixed":
            found -= 4 * tokens * shape.gates  # a buffer of logsigmoid's that only the CPU has
        if kind == SOFTMAX:
            # Here the output stays in place; over ranks it comes back in another order.
            found += 2 * tokens * config.num_attention_heads * config.head_dim
        assert layer_bytes(shape, setting, kind, tokens).kept == pytest.approx(found, rel=0.005)


def saved_bytes(run, shared):
    """Bytes that autograd saves while `run` is called, each storage once, without `shared`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in shared}
    storages = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())
