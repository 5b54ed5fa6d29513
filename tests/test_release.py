"""An engine that was let go of leaves nothing behind, and leaves the others alone."""

import contextlib
import gc
import weakref

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_bench_scaling import dense
from test_distill import tiny_teacher
from test_engine import PACKED, deepspeed_config
from tiny import tiny_model

import hybridsp
from hybridsp.bench.alst import command as alst
from hybridsp.bench.step import case as step_case
from hybridsp.distill import Teacher
from hybridsp.planner import Setting
from hybridsp.release import release

PRELOAD += [*DEEPSPEED, "hybridsp.distill"]

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
# ZeRO-3 records its schedule in the first step and asks its cache from the second on.
STEPS = 3
STAGES = [0, 1, 2, 3]


def make_engine(mesh, stage=3, *, self_check=False, offload=False, **changes):
    model = tiny_model()
    hybridsp.parallelize(model, mesh)
    config = deepspeed_config(stage, **ADAM, **changes)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return hybridsp.initialize(model, mesh, config, self_check=self_check)


def take_steps(engine, mesh, steps=STEPS):
    batch = hybridsp.shard_batch(PACKED[mesh.dp_rank], mesh)
    return [hybridsp.train_step(engine, [batch]).loss for _ in range(steps)]


def parts_of(model):
    things = {"model": model}
    for name, parameter in model.named_parameters():
        things[name] = parameter
        if hasattr(parameter, "ds_tensor"):
            things[f"{name}, this rank's part"] = parameter.ds_tensor
    return things


def watch(engine):
    """Weak references to what has a size, and to what reaches it, by name."""
    optimizer = engine.optimizer
    things = {"engine": engine, "optimizer": optimizer, **parts_of(engine.module)}
    for index, states in enumerate(getattr(optimizer, "state", {}).values()):
        tensors = {key: value for key, value in states.items() if torch.is_tensor(value)}
        things |= {f"{key} {index}": value for key, value in tensors.items()}
    for index, part in enumerate(getattr(optimizer, "fp32_partitioned_groups_flat", ())):
        things[f"fp32 weights {index}"] = part
    return {name: weakref.ref(thing) for name, thing in things.items()}


def alive(watched):
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]


def run_and_release(mesh, **options):
    engine = make_engine(mesh, **options)
    take_steps(engine, mesh)
    hybridsp.eval_step(engine, [hybridsp.shard_batch(PACKED[mesh.dp_rank], mesh)])
    watched = watch(engine)
    release(engine)
    return watched


def what_is_left(cases):
    """Per case, and with nothing but the case's own release to thank for it."""
    mesh = hybridsp.SPMesh()
    return [alive(run_and_release(mesh, **case)) for case in cases]


CASES = [
    *({"stage": stage} for stage in STAGES),
    {"self_check": True},
    {"offload": True},
    {"bf16": {"enabled": True}},
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_of_an_engine_is_left(ranks):
    for left in run_ranks(what_is_left, ranks, CASES, timeout=180):
        assert left == [[]] * len(CASES)


def engines_left():
    from deepspeed.runtime.engine import DeepSpeedEngine

    gc.collect()
    return sum(type(thing) is DeepSpeedEngine for thing in gc.get_objects())


def stop(*_):
    raise MemoryError


def fail_and_release(mesh):
    """Stopped where memory runs out: inside a layer."""
    engine = make_engine(mesh)
    take_steps(engine, mesh)
    engine.module.get_decoder().layers[2].register_forward_pre_hook(stop)
    with contextlib.suppress(MemoryError):
        take_steps(engine, mesh)
    watched = watch(engine)
    release(engine)
    return watched


def read_and_release(mesh):
    teacher = tiny_teacher()
    hybridsp.parallelize(teacher, mesh)
    teacher = Teacher(teacher, mesh, deepspeed_config())
    batch = hybridsp.shard_batch(PACKED[mesh.dp_rank], mesh)
    for _ in range(STEPS):
        teacher.evaluate([batch])
    watched = watch(teacher._engine)
    teacher.close()
    return watched


def what_other_ends_leave():
    mesh = hybridsp.SPMesh()
    return [alive(end(mesh)) for end in (fail_and_release, read_and_release)]


def test_nothing_is_left_of_a_failed_engine_nor_of_a_teacher():
    for left in run_ranks(what_other_ends_leave, 2, timeout=120):
        assert left == [[], []]


def fail_to_make(mesh, stage, *, self_check):
    """Stopped in its self-check, or by DeepSpeed once it has the optimizer."""
    model, config = tiny_model(), deepspeed_config(stage, **ADAM)
    hybridsp.parallelize(model, mesh)
    if self_check:
        model.get_decoder().layers[-1].register_forward_pre_hook(stop)
    else:
        config["scheduler"] = {"type": "WarmupLR", "params": {"an option": "it does not have"}}
    with pytest.raises(MemoryError if self_check else TypeError):
        hybridsp.initialize(model, mesh, config, self_check=self_check)
    return {name: weakref.ref(part) for name, part in parts_of(model).items()}


def what_is_left_of_none():
    mesh = hybridsp.SPMesh(ulysses=2)
    cases = [(stage, self_check) for stage in STAGES for self_check in (False, True)]
    return [alive(fail_to_make(mesh, s, self_check=c)) for s, c in cases], engines_left()


def test_nothing_is_left_of_an_engine_that_could_not_be_made():
    for left, engines in run_ranks(what_is_left_of_none, 2, timeout=180):
        assert left == [[]] * 2 * len(STAGES)
        assert engines == 0


def steps_beside_another():
    """Losses of an engine alone, and of one beside which two others end, one inside a forward."""
    mesh = hybridsp.SPMesh()
    alone = make_engine(mesh)
    expected = take_steps(alone, mesh, 2 * STEPS)
    release(alone)
    engine = make_engine(mesh)
    losses = take_steps(engine, mesh)
    left = alive(run_and_release(mesh)), alive(fail_and_release(mesh))
    losses += take_steps(engine, mesh)
    return expected, losses, left


def test_others_go_on_as_before():
    for expected, losses, left in run_ranks(steps_beside_another, 2, timeout=120):
        assert losses == expected
        assert left == ([], [])


def engines_after_each_row(model):
    """How many there are behind each row of the benchmarks that run several in one process."""
    mesh = hybridsp.SPMesh(ulysses=torch.distributed.get_world_size())
    setting = Setting(
        gpus=mesh.world_size, ring=1, ulysses=mesh.world_size, stage=3, dtype_bytes=4, tiled_mlp=7
    )
    case = step_case.Case(model=model, softmax_layers=None, setting=setting, tokens_per_rank=16)
    found = []
    for row in (
        lambda: step_case.take_steps(case, mesh, steps=STEPS),
        lambda: alst.take_steps(case, mesh, kernel=None, steps=STEPS, warmup_tokens=None),
    ):
        row()
        found.append(engines_left())
    return found


def test_benchmarks_leave_no_engine(tmp_path):
    assert run_ranks(engines_after_each_row, 2, dense(tmp_path), timeout=120) == [[0, 0]] * 2


def bytes_left(stages):
    mesh = hybridsp.SPMesh()
    run_and_release(mesh)  # kernels and libraries keep their workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    left = []
    for stage in stages:
        run_and_release(mesh, stage=stage)
        gc.collect()
        left.append(torch.cuda.memory_allocated() - before)
    return left


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_memory_is_left_on_gpus(ranks):
    for left in run_ranks(bytes_left, ranks, STAGES, backend="nccl", timeout=180):
        assert max(left) <= 0
