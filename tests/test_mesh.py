"""The grid of ranks, how a rank joins it, and how ranks fail together."""

import itertools
import os

import pytest
import torch.distributed as dist
from cases import case
from distributed import expect_raises, run_ranks

from hybridsp.launch import LAUNCHER_VARIABLES, SLURM_VARIABLES, Rank, rank_from_environment
from hybridsp.mesh import SPMesh, choose_degrees, gather_objects

GROUPS = ("dp_group", "sp_group", "ring_group", "ulysses_group", "data_group", "self_group")


def describe(degrees):
    """Numbers and group memberships of this rank on each mesh, and what DeepSpeed sees."""
    results = []
    for ring, ulysses in degrees:
        with case((ring, ulysses)):
            mesh = SPMesh(ring=ring, ulysses=ulysses)
            sizes = mesh.dp, mesh.ring, mesh.ulysses, mesh.sp, mesh.world_size
            numbers = mesh.rank, mesh.dp_rank, mesh.sp_rank, mesh.ring_rank, mesh.ulysses_rank
            groups = {name: dist.get_process_group_ranks(getattr(mesh, name)) for name in GROUPS}
            results.append((sizes, numbers, groups, deepspeed_view(mesh), repr(mesh)))
    return results


def deepspeed_view(mesh):
    view = mesh.mpu
    assert hasattr(view, "initialize_sequence_parallel"), "DeepSpeed's switch for SP"
    assert not [name for name in dir(view) if name.startswith("get_data_parallel")], "ZeRO-3 trap"
    seen = {}
    for axis in ("sequence_parallel", "sequence_data_parallel", "model_parallel",
                 "tensor_model_parallel"):  # fmt: skip
        ask = {
            part: getattr(view, f"get_{axis}_{part}") for part in ("group", "world_size", "rank")
        }
        ranks = dist.get_process_group_ranks(ask["group"]())
        assert ask["world_size"]() == len(ranks)
        assert ranks[ask["rank"]()] == mesh.rank
        seen[axis] = ranks
    return seen


def unlike_degrees():
    ring = 1 + dist.get_rank()
    with pytest.raises(ValueError, match=r"differ between ranks: \(1, 1\), \(2, 1\)"):
        SPMesh(ring=ring)


def test_ranks_of_other_degrees_end_together():
    run_ranks(unlike_degrees, 2)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_numbers_and_groups(world, subtests):
    degrees = [(r, u) for r in divisors(world) for u in divisors(world) if world % (r * u) == 0]
    results = run_ranks(describe, world, degrees)
    for number, (ring, ulysses) in enumerate(degrees):
        dp, sp = world // (ring * ulysses), ring * ulysses
        for rank, (sizes, numbers, groups, view, text) in enumerate(r[number] for r in results):
            with subtests.test(f"ring {ring}, ulysses {ulysses}, rank {rank}"):
                d, r, u = rank // sp, rank % sp // ulysses, rank % ulysses
                assert sizes == (dp, ring, ulysses, sp, world)
                assert numbers == (rank, d, rank % sp, r, u)
                assert groups == {
                    "dp_group": [i * sp + rank % sp for i in range(dp)],
                    "sp_group": [d * sp + i for i in range(sp)],
                    "ring_group": [d * sp + i * ulysses + u for i in range(ring)],
                    "ulysses_group": [d * sp + r * ulysses + i for i in range(ulysses)],
                    "data_group": list(range(world)),
                    "self_group": [rank],
                }
                assert view["sequence_parallel"] == groups["sp_group"]
                assert view["sequence_data_parallel"] == groups["data_group"]
                assert view["model_parallel"] == view["tensor_model_parallel"] == [rank]
                assert f"dp={dp}, ring={ring}, ulysses={ulysses}, rank={rank} of {world}" in text


@pytest.mark.parametrize(("ring", "ulysses"), [(3, 1), (1, 3), (4, 1), (2, 2)])
def test_degrees_that_do_not_divide_the_world_are_refused_on_every_rank(ring, ulysses):
    match = rf"ring \* ulysses = {ring} \* {ulysses} = {ring * ulysses} does not divide .* 2 ranks"
    expect_raises(SPMesh, 2, ValueError, match, ring=ring, ulysses=ulysses)


@pytest.mark.parametrize("degree", [0, -1, True, 2.0, "2", None])
@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_degrees_that_are_no_positive_integers_are_refused_before_anything_is_joined(name, degree):
    with pytest.raises(ValueError, match=f"{name} = {degree!r} must be a positive integer"):
        SPMesh(**{name: degree})
    assert not dist.is_initialized()


DEGREES = {  # (sp, heads, KV heads, GPUs per node): (ring, ulysses)
    (1, 9, 3, 8): (1, 1),
    (8, 32, 8, 8): (1, 8),
    (16, 32, 8, 8): (2, 8),
    (16, 32, 8, 16): (1, 16),  # two ranks read each KV head
    (8, 32, 8, 4): (2, 4),
    (64, 32, 8, 8): (8, 8),
    (2, 9, 3, 8): (2, 1),
    (3, 9, 3, 8): (1, 3),
    (6, 9, 3, 8): (2, 3),
    (4, 8, 1, 8): (1, 4),
    (8, 24, 6, 8): (4, 2),  # 4 divides the query heads, but not the KV heads
    (7, 32, 8, 8): (7, 1),
}


@pytest.mark.parametrize("arguments", DEGREES, ids=str)
def test_choose_degrees(arguments):
    assert choose_degrees(*arguments) == DEGREES[arguments]


def test_chosen_ulysses_groups_stay_inside_a_host():
    """Of hosts that the first SP group fills one after the other."""
    for sp, node in itertools.product(range(1, 17), range(1, 9)):
        ring, ulysses = choose_degrees(sp, 24, 12, node)
        assert ring * ulysses == sp
        for first in range(0, sp, ulysses):
            assert first // node == (first + ulysses - 1) // node, (sp, node, ulysses)


def test_choose_degrees_names_what_is_no_positive_integer():
    for name, value in [("sp", 0), ("num_heads", -4), ("num_kv_heads", 1.0), ("sp", True)]:
        arguments = {"sp": 2, "num_heads": 4, "num_kv_heads": 4, "gpus_per_node": 8, name: value}
        with pytest.raises(ValueError, match=f"{name} = {value!r} must be a positive integer"):
            choose_degrees(**arguments)


def automatic():
    meshes = [
        SPMesh.auto(4, num_heads=8, num_kv_heads=4),
        SPMesh.auto(4, num_heads=8, num_kv_heads=4, gpus_per_node=2),
        SPMesh.auto(2, num_heads=9, num_kv_heads=3),
    ]
    return [(mesh.dp, mesh.ring, mesh.ulysses) for mesh in meshes]


def test_auto():
    expected = [(1, 1, 4), (1, 2, 2), (2, 2, 1)]
    assert run_ranks(automatic, 4) == [expected] * 4


def agreements():
    """What each rank hears, for errors on no, one, some and all ranks."""
    mesh = SPMesh(ring=2)
    heard = []
    for errors in (
        [None, None, None, None],
        [None, None, FileNotFoundError("no such file: b.bin"), None],
        ["short", None, None, ValueError("long")],
        [ValueError("the same"), "the same", "the same", "the same"],
        ["", None, None, None],
    ):
        error = errors[mesh.rank]
        try:
            mesh.agree(error)
        except ValueError as raised:
            cause = error if isinstance(error, Exception) else None
            heard.append((str(raised), raised.__cause__ is cause))
        else:
            heard.append(None)
    return heard


def test_agree():
    expected = [
        None,
        "rank 2: no such file: b.bin",
        "rank 0: short; rank 3: long",
        "the same",
        "rank 0: ",
    ]
    right = [message and (message, True) for message in expected]
    assert run_ranks(agreements, 4) == [right] * 4


# --- joining the job ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        ({"PATH": "/bin", "LOCAL_RANK": "0"}, Rank()),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1"},
            Rank(rank=5, world_size=8, local_rank=1),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            Rank(rank=3, world_size=4, local_rank=0),
        ),
        (  # torchrun or deepspeed under srun: theirs are the ranks
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0",
             "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
            Rank(rank=1, world_size=2, local_rank=1),
        ),
    ],
    ids=["none", "no launcher", "torchrun", "slurm", "torchrun under slurm"],
)  # fmt: skip
def test_rank_from_environment(environment, expected):
    assert rank_from_environment(environment) == expected


@pytest.mark.parametrize("names", [LAUNCHER_VARIABLES, SLURM_VARIABLES], ids=["torchrun", "slurm"])
def test_incomplete_variables_are_refused(names):
    whole = dict(zip(names, ("0", "2", "0"), strict=True))
    for missing in names:
        partial = {name: value for name, value in whole.items() if name != missing}
        with pytest.raises(ValueError, match=f"'{missing}': None.* must all be numbers"):
            rank_from_environment(partial)
    for garbage in ("", "two", "1.5"):
        with pytest.raises(ValueError, match=f"'{names[0]}': '{garbage}'"):
            rank_from_environment({**whole, names[0]: garbage})


def join_by_itself(ring):
    assert not dist.is_initialized()
    mesh = SPMesh(ring=ring)
    return mesh.sp, mesh.device.type, gather_objects(mesh.rank)


def test_a_mesh_joins_the_launchers_job():
    assert run_ranks(join_by_itself, 2, 2, backend=None) == [(2, "cpu", [0, 1])] * 2


def join_without_a_launcher(variables):
    for name in (*LAUNCHER_VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    return join_by_itself(1)


def test_one_process_needs_no_launcher():
    assert run_ranks(join_without_a_launcher, 1, {}, backend=None) == [(1, "cpu", [0])]


def test_a_job_without_a_meeting_point_is_refused():
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    match = "MASTER_ADDR is not set for a job of 2 ranks"
    expect_raises(join_without_a_launcher, 1, ValueError, match, slurm, backend=None)


def gathered():
    mesh = SPMesh(ring=2)
    groups = (None, mesh.sp_group, mesh.self_group)
    return [gather_objects({"rank": mesh.rank}, group) for group in groups]


def test_objects_are_gathered_in_rank_order_over_all_or_a_group():
    ranks = [{"rank": rank} for rank in range(4)]
    for rank, found in enumerate(run_ranks(gathered, 4)):
        assert found == [ranks, ranks[:2] if rank < 2 else ranks[2:], [ranks[rank]]]
