"""The self-check passes what is right, catches what is sabotaged, and leaves no trace."""

import collections
import contextlib
import enum
import itertools
from unittest import mock

import pytest
import torch
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_engine import PACKED, deepspeed_config
from test_parallelize import dense_model
from tiny import tiny_model
from torch.nn import functional as F

import hybridsp
from hybridsp.adapters import hybrid_gla
from hybridsp.attention import linear, softmax_attention
from hybridsp.mesh import DeepSpeedView
from hybridsp.self_check import SelfCheckError, probe, self_check

PRELOAD += DEEPSPEED

OFFLOAD = {"zero_force_ds_cpu_optimizer": False}
BF16 = {"bf16": {"enabled": True}}
# One per kind of optimizer that DeepSpeed wraps around the user's, and per place of gradients.
ENGINES = {
    "ZeRO-0": (0, {}),
    "ZeRO-0, bf16": (0, BF16),
    "ZeRO-1": (1, {}),
    "ZeRO-1, bf16, fp32 gradients": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "ZeRO-1, offload": (1, OFFLOAD),
    "ZeRO-2, bf16": (2, BF16),
    "ZeRO-2, offload": (2, OFFLOAD),
    "ZeRO-3": (3, {}),
    "ZeRO-3, bf16, offload": (3, {**BF16, **OFFLOAD}),
}


def make_engine(mesh, stage=2, extra=(), *, model=None, **options):
    extra = dict(extra)
    config = deepspeed_config(stage, **extra)
    if "zero_force_ds_cpu_optimizer" in extra:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    model = model or tiny_model()
    if "bf16" in extra:
        model = model.bfloat16()
    hybridsp.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return hybridsp.initialize(model, mesh, config, optimizer=optimizer, **options)


def no_trace(names, accumulation):
    """Three steps with and without a self-check before them, and an engine's state around it."""
    mesh = hybridsp.SPMesh(ring=2)
    parts = [hybridsp.shard_batch(PACKED[i % 2], mesh) for i in range(accumulation)]
    for name in names:
        with case(name):
            stage, extra = ENGINES[name]
            extra = {**extra, "gradient_accumulation_steps": accumulation}
            records = []
            for checked in (False, True):
                torch.manual_seed(0)
                engine = make_engine(mesh, stage, extra, self_check=False)
                before = state_of(engine)
                if checked:
                    self_check(engine, mesh)
                    after = state_of(engine)
                    keys = sorted({*before, *after})
                    changed = [(k, before.get(k), after.get(k)) for k in keys]
                    changed = [change for change in changed if change[1] != change[2]]
                    assert not changed, changed[:10]
                random = torch.rand(3).tolist()
                steps = [hybridsp.train_step(engine, parts) for _ in range(3)]
                records.append((random, steps))
                engine.destroy()
            assert records[0] == records[1]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("names", [list(ENGINES)[:5], list(ENGINES)[5:]], ids=["low", "high"])
def test_it_leaves_no_trace(names, accumulation):
    run_ranks(no_trace, 2, names, accumulation, timeout=240)


def state_of(engine):
    """Every number that can be reached from an engine, by the path to it."""
    found, seen = {}, set()

    def walk(thing, path):
        if isinstance(thing, (bool, int, float, str, type(None), enum.Enum)):
            found[path] = repr(thing)
            return
        if id(thing) in seen or (callable(thing) and not isinstance(thing, torch.nn.Module)):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            content = 0.0 if thing.is_meta else thing.detach().double().sum().item()
            found[path] = f"{tuple(thing.shape)} {thing.dtype} {content}"
            walk(thing.grad if thing.is_leaf else None, f"{path}.grad")
        if isinstance(thing, (dict, collections.UserDict)):
            found[path] = len(thing)
            for number, (key, value) in enumerate(thing.items()):
                walk(value, f"{path}[{key if isinstance(key, (int, str)) else number}]")
        elif isinstance(thing, (list, tuple, set, collections.deque)):
            found[path] = len(thing)
            for number, value in enumerate(thing):
                walk(value, f"{path}[{number}]")
        elif type(thing).__module__.split(".")[0] in ("deepspeed", "hybridsp", "torch"):
            for name, value in getattr(thing, "__dict__", {}).items():
                # What was sent through the buckets of ZeRO stays there until the next is sent.
                if "bucket" not in name and name != "buffer":
                    walk(value, f"{path}.{name}")

    walk(engine, "engine")
    return found


def passes(degrees):
    """Right engines of other models and precisions; returns one line per case."""
    lines = []
    for ring, ulysses in degrees:
        mesh = hybridsp.SPMesh(ring=ring, ulysses=ulysses)
        models = {
            "hybrid": lambda: tiny_model(),
            "scalar decay": lambda: tiny_model(linear_decay="scalar", linear_conv_kernel_dim=0),
            "long convolution": lambda: tiny_model(linear_conv_kernel_dim=24),
            "llama": lambda: dense_model("llama"),
        }
        if ring == 1:
            models["window"] = lambda: dense_model("mistral", sliding_window=5)
        for name, make in models.items():
            for stage, extra in [(2, {}), (3, BF16)]:
                with case((ring, ulysses, name, stage)):
                    model = make()
                    model.gradient_checkpointing_enable()
                    model.train()
                    engine = make_engine(mesh, stage, extra, model=model, self_check=False)
                    lines.append(self_check(engine, mesh))
                    engine.destroy()
    return lines


@pytest.mark.parametrize(("world", "degrees"), [(2, [(2, 1), (1, 2)]), (4, [(2, 1), (2, 2)])])
def test_right_engines_pass(world, degrees):
    for lines in run_ranks(passes, world, degrees, timeout=280):
        assert all("self-check passed" in line for line in lines)


def without_sequence_parallelism():
    mesh = hybridsp.SPMesh()
    for stage in (0, 3):
        line = self_check(make_engine(mesh, stage), mesh)
        assert "sp = 1, so no sequence is cut" in line
    return line


def test_without_sequence_parallelism_only_sharding_is_checked():
    for line in run_ranks(without_sequence_parallelism, 2):
        assert "this rank holds" in line


class Sabotage:
    """What could be wrong, each as a context in which an engine is made and checked."""

    @staticmethod
    @contextlib.contextmanager
    def scan(directions):
        """All-Scan returns zeros."""
        scan = linear._scan_beside

        def broken(*args, reverse=False):
            crossed = scan(*args, reverse=reverse)
            return torch.zeros_like(crossed) if reverse in directions else crossed

        with mock.patch.object(linear, "_scan_beside", broken):
            yield

    @staticmethod
    @contextlib.contextmanager
    def softmax(attend):
        with mock.patch("hybridsp.adapters.base.softmax_attention", attend):
            yield

    @staticmethod
    @contextlib.contextmanager
    def mpu():
        """DeepSpeed believes that there is one rank per sequence, and reduces over dp alone."""

        class Hiding(DeepSpeedView):
            def get_sequence_parallel_group(self):
                return self._mesh.self_group

            def get_sequence_parallel_world_size(self):
                return 1

            def get_sequence_data_parallel_group(self):
                return self._mesh.dp_group

            def get_sequence_data_parallel_world_size(self):
                return self._mesh.dp

            def get_sequence_data_parallel_rank(self):
                return self._mesh.dp_rank

            # ZeRO-3 asks for these, and shards over all ranks where there are none.
            get_data_parallel_group = get_sequence_data_parallel_group
            get_data_parallel_world_size = get_sequence_data_parallel_world_size
            get_data_parallel_rank = get_sequence_data_parallel_rank

        with mock.patch.object(hybridsp.SPMesh, "mpu", property(Hiding)):
            yield

    @staticmethod
    @contextlib.contextmanager
    def divisor(factor):
        """The loss is scaled for another divisor than DeepSpeed's."""
        import hybridsp.engine as engine

        right = engine._divisor
        with mock.patch.object(engine, "_divisor", lambda *args: right(*args) * factor):
            yield

    @staticmethod
    @contextlib.contextmanager
    def one_layer():
        """A layer that the probe would pass by is left as it was."""
        right = hybridsp.parallelize

        def broken(model, mesh):
            right(model, mesh)
            model.model.layers[2].linear_attn.implementation = "local"

        with mock.patch.object(hybridsp, "parallelize", broken):
            yield

    @staticmethod
    @contextlib.contextmanager
    def uncut():
        """Every rank gets the whole sequence."""
        cut = probe.shard_batch

        def whole(batch, mesh):
            part = cut(batch, mesh)
            copies = {name: tensor.repeat(1, mesh.sp) for name, tensor in part.items()}
            positions = torch.arange(copies["input_ids"].shape[1])[None]
            return {**copies, "position_ids": positions}

        with mock.patch.object(probe, "shard_batch", whole):
            yield


def attend_alone(q, k, v, *, mesh, scale, **_options):
    """Softmax attention over this rank's tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def attend_to_all(*args, **options):
    return softmax_attention(*args, **{**options, "causal": False})


# How it is broken; parts of the message; parts that must not be there.
CASES = {
    "All-Scan returns zeros": (
        lambda: Sabotage.scan({False, True}),
        ["crossing, HybridGLALinearAttention", "do not cross the ranks"],
        ["crossing, HybridGLAAttention"],
    ),
    "the reverse All-Scan returns zeros": (
        lambda: Sabotage.scan({True}),
        ["exactness: the gradient of", "linear_attn", "points another way"],
        ["crossing", "the loss is", "times the right one"],
    ),
    "softmax attention does not communicate": (
        lambda: Sabotage.softmax(attend_alone),
        ["crossing, HybridGLAAttention", "do not cross the ranks"],
        ["crossing, HybridGLALinearAttention"],
    ),
    "softmax attention is not causal": (
        lambda: Sabotage.softmax(attend_to_all),
        ["crossing, HybridGLAAttention", "looks into the future"],
        ["crossing, HybridGLALinearAttention"],
    ),
    "the gradient is sp times too large": (
        lambda: Sabotage.divisor(2),
        ["exactness: the gradient of", "it is 2 times the right one", "sp = 2"],
        ["crossing", "sharding"],
    ),
    "the gradient is sp times too small": (
        lambda: Sabotage.divisor(0.5),
        ["it is 0.5 times the right one", "gradient_accumulation_steps = 3"],
        ["crossing", "sharding"],
    ),
    "the mpu hides SP": (
        Sabotage.mpu,
        ["sharding: this rank holds", "let hybridsp.initialize pass mesh.mpu"],
        ["crossing"],
    ),
    "one layer of two is not parallel": (
        Sabotage.one_layer,
        ["the output of model.layers.2.linear_attn", "do not cross the ranks"],
        ["the output of model.layers.0.linear_attn", "crossing, HybridGLAAttention"],
    ),
    "activations are not cut": (
        Sabotage.uncut,
        ["activations are not cut over the SP ranks"],
        [],
    ),
}


def sabotaged(stage, extra):
    """The message of each case on this rank."""
    messages = {}
    extra = {**extra, "gradient_accumulation_steps": 3}
    for name, (sabotage, _, _) in CASES.items():
        with case(name), sabotage():
            mesh = hybridsp.SPMesh(ring=2)
            with pytest.raises(SelfCheckError, match="the self-check failed") as caught:
                make_engine(mesh, stage, extra)
            messages[name] = str(caught.value)
    return messages


@pytest.mark.parametrize(
    ("world", "stage", "extra"),
    [(2, 2, {}), (2, 3, BF16), (4, 1, {})],
    ids=["fp32", "bf16", "two data-parallel ranks"],
)
def test_sabotage_is_caught_on_every_rank(world, stage, extra, subtests):
    results = run_ranks(sabotaged, world, stage, extra, timeout=200)
    for name, (_, present, absent) in CASES.items():
        with subtests.test(name):
            (message,) = {result[name] for result in results}
            for part in present:
                assert part in message
            for part in absent:
                assert part not in message


def silent_mixers():
    """Layers that give nothing yet (their output projection is zero) are no failure."""
    mesh = hybridsp.SPMesh(ulysses=2)
    for number in (0, 1):
        model = tiny_model()
        for layer in model.model.layers[number::2]:
            mixer = layer.self_attn if number else layer.linear_attn
            torch.nn.init.zeros_(mixer.o_proj.weight)
        make_engine(mesh, 3, model=model)


def test_layers_that_give_nothing_are_not_judged():
    run_ranks(silent_mixers, 2)


def unusual_engines():
    """Right ones, each of which would be easy to find fault with."""
    mesh = hybridsp.SPMesh(ring=2)
    attend = hybrid_gla.linear_attention

    def rounding(q, k, v, g, **options):
        last_digits = 1e-6 * torch.cos(1000 * g.detach().sum())
        return attend(q, k, v, g, **options) * (1 + last_digits)

    rounded = mock.patch.object(hybrid_gla, "linear_attention", rounding)
    with case("later tokens move the last digits of earlier ones, as in Triton's kernels"), rounded:
        make_engine(mesh)
    with case("a parameter in a mixer that nothing uses, and ZeRO-3 has sharded"):
        model = tiny_model()
        model.model.layers[1].self_attn.spare = torch.nn.Parameter(torch.ones(64, 80))
        make_engine(mesh, 3, model=model)
    with case("large parameters only"), mock.patch.object(probe, "MAX_COMPARED_NUMEL", 0):
        make_engine(mesh)


def test_unusual_engines_pass():
    run_ranks(unusual_engines, 2)


@pytest.mark.gpu
def test_right_engines_pass_on_gpus():
    lines = run_ranks(passes, 2, [(2, 1), (1, 2)], backend="nccl", timeout=280)
    assert all("self-check passed" in line for line in itertools.chain(*lines))
