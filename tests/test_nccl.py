"""Every collective, layer and ZeRO stage in one job, each rank against its own computation alone.

The other tests over NCCL take one subject each and pay for the start of a job each time. Here one
job holds everything that has to be seen on a new machine, with the kernels that a training run
there would take. No rank's answer travels to be judged: inputs are the same on all, so that each
computes the whole sequence by itself (layers on its own device, optimizer steps on the CPU) and
compares its part of it. The same functions run over gloo.
"""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from cases import case
from distributed import DEEPSPEED, PRELOAD, run_ranks
from scan_oracle import naive_scan
from tiny import batch_of, reference_loss_sum, tiny_model
from torch.nn import functional as F

import hybridsp
from hybridsp.attention import linear_attention, short_convolution, softmax_attention
from hybridsp.attention.linear import METHODS
from hybridsp.collectives import ALGORITHMS, all_scan, left_halo
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_attention, naive_causal_conv, naive_gla

PRELOAD += DEEPSPEED

TOTAL = 256
# Cut by every rank edge; a document that starts with a rank, one of a single token, an empty one.
PACKINGS = {"one document": None, "packed": [0, 50, 128, 128, 150, 255, TOTAL]}
# Of bf16: the error against fp64 is that of one device, up to how partial results are rounded.
SLACK = 1.3

RANKS = [("gloo", 2), *(pytest.param("nccl", n, marks=pytest.mark.gpu) for n in (2, 4))]


def splits(ranks):
    """Every (ring, ulysses) for P = ranks."""
    return [(ranks // u, u) for u in range(1, ranks + 1) if ranks % u == 0]


def scans(device):
    """All-Scan, every algorithm that can run: states, gradients, from both ends."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state = torch.randn(ranks, 1, 4, 64, 32, device=device)
    decays = {
        "vector": torch.rand(ranks, 1, 4, 64, device=device),
        "scalar": torch.rand(ranks, 1, 4, 1, device=device),
        "documents": torch.rand(ranks, 1, 4, 64, device=device),
    }
    decays["documents"][-1] = 0
    dout = torch.randn_like(state)
    choices = [{"algorithm": name} for name in ALGORITHMS]
    choices += [{"algorithm": "chain", "num_blocks": 8}]
    choices += [{"algorithm": "hierarchical", "ranks_per_host": 1}]
    for options, (name, decay), reverse in itertools.product(
        choices, decays.items(), (False, True)
    ):
        if options["algorithm"] == "symmetric" and device.type == "cpu":
            continue  # it writes into the memory of other GPUs
        exact = [x.double().requires_grad_() for x in (state, decay)]
        expected = naive_scan(*exact, reverse=reverse)
        right = [expected, *torch.autograd.grad(expected, exact, dout.double())]
        mine = [x[rank].clone().requires_grad_() for x in (state, decay)]
        out = all_scan(*mine, dist.group.WORLD, reverse=reverse, **options)
        got = [out, *torch.autograd.grad(out, mine, dout[rank])]
        with case(f"{options}, {name}, reverse {reverse}"):
            for part, whole in zip(got, right, strict=True):
                torch.testing.assert_close(part.double(), whole[rank], rtol=1e-5, atol=1e-5)


def halos(device):
    """The tokens before a rank's first, and the gradient that goes back to their owners."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length = 5
    for width, dtype in itertools.product((1, 3, 5, 7, 40), (torch.float32, torch.bfloat16)):
        x = torch.randn(2, ranks * length, 6, device=device).to(dtype)
        directions = torch.randn(ranks, 2, width, 6, device=device).to(dtype)
        exact = x.double().requires_grad_()
        padded = F.pad(exact, (0, 0, width, 0))
        right = torch.stack([padded[:, r * length : r * length + width] for r in range(ranks)])
        (right_grad,) = torch.autograd.grad(right, exact, directions.double())
        mine = x.chunk(ranks, dim=1)[rank].clone().requires_grad_()
        halo = left_halo(mine, width, dist.group.WORLD)
        (grad,) = torch.autograd.grad(halo, mine, directions[rank])
        with case(f"{width} tokens, {dtype}"):
            torch.testing.assert_close(halo.double(), right[rank], rtol=0, atol=0)
            rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5  # summed in fp32, rounded once
            expected = right_grad.chunk(ranks, dim=1)[rank]
            torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=1e-6)


def linear_layers(device):
    """Every method and every algorithm of the scan, bf16."""
    heads, key_dim, value_dim = 4, 64, 64
    q, k = (random(heads, key_dim, device=device) for _ in range(2))
    v = random(heads, value_dim, device=device)
    choices = [{"method": method} for method in METHODS]
    choices += [{"algorithm": name} for name in ALGORITHMS if name != "auto"]
    for width, (name, bounds) in itertools.product((key_dim, 1), PACKINGS.items()):
        g = F.logsigmoid(random(heads, width, device=device).float()) / 4

        def oracle(q, k, v, g, bounds=bounds):
            return naive_gla(q, k, v, g, scale=key_dim**-0.5, cu_seqlens=bounds)[0]

        calls = {
            f"{options}, gates {width}, {name}": functools.partial(linear_attention, **options)
            for options in choices
            if not (options.get("algorithm") == "symmetric" and device.type == "cpu")
        }
        compare(calls, oracle, [q, k, v, g], bounds, [(dist.get_world_size(), 1)])


def softmax_layers(device):
    """Every split of the ranks in ring x Ulysses, both variants of a ring, bf16."""
    inputs = [random(heads, 64, device=device) for heads in (6, 2, 2)]
    ranks = dist.get_world_size()
    for name, bounds in PACKINGS.items():

        def oracle(q, k, v, bounds=bounds):
            return naive_attention(q, k, v, scale=64**-0.5, cu_seqlens=bounds)

        for variant in ("ring", "allgather"):
            rings = [(ring, ulysses) for ring, ulysses in splits(ranks) if ring > 1]
            call = functools.partial(softmax_attention, variant=variant)
            compare({f"{variant}, {name}": call}, oracle, inputs, bounds, rings)
        compare({f"ulysses, {name}": softmax_attention}, oracle, inputs, bounds, [(1, ranks)])


def convolutions(device):
    """Four taps, so that every rank needs its left neighbour's last three tokens."""
    x = random(24, device=device)
    weight = torch.randn(24, 4, device=device, dtype=torch.bfloat16)
    for name, bounds in PACKINGS.items():

        def oracle(x, bounds=bounds):
            return naive_causal_conv(x, weight.double(), None, cu_seqlens=bounds)

        def call(x, **options):
            return short_convolution(x, weight, None, **options)

        compare({name: call}, oracle, [x], bounds, [(dist.get_world_size(), 1)])


def random(*sizes, device):
    """[1, T, ...] in bf16, the same on every rank."""
    return torch.randn(1, TOTAL, *sizes, device=device, dtype=torch.bfloat16)


def compare(calls, oracle, inputs, bounds, degrees):
    """Outputs and gradients over the mesh err, against fp64, no more than one device does."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    exact = [x.double().requires_grad_() for x in inputs]
    out = oracle(*exact)
    dout = torch.randn_like(out).to(inputs[0].dtype)
    right = [out, *torch.autograd.grad(out, exact, dout.double())]
    for (name, call), (ring, ulysses) in itertools.product(calls.items(), degrees):
        errors = []
        for mesh in (mesh_of(1, 1), mesh_of(ring, ulysses)):
            parts = [share(x, mesh).clone().requires_grad_() for x in inputs]
            got = call(*parts, mesh=mesh, cu_seqlens=cu_seqlens)
            got = [got, *torch.autograd.grad(got, parts, share(dout, mesh))]
            pairs = zip(got, right, strict=True)
            errors.append(torch.stack([squared(a, share(b, mesh)) for a, b in pairs]))
            dist.all_reduce(errors[-1], group=mesh.sp_group)
        with case(f"{name}, ring {ring}, ulysses {ulysses}"):
            alone, together = errors
            assert (together <= SLACK**2 * alone).all(), (together / alone).sqrt().tolist()


@functools.cache
def mesh_of(ring, ulysses):
    return SPMesh(ring=ring, ulysses=ulysses)


def share(x, mesh):
    """This rank's tokens of [B, T, ...]."""
    return x.chunk(mesh.sp, dim=1)[mesh.sp_rank]


def squared(got, right):
    return (got.double() - right.double()).square().sum()


LENGTH, STEPS, LEARNING_RATE, CLIPPING = 48, 2, 2e-3, 0.5
MICRO_BATCHES = [
    batch_of(1, LENGTH, seed=1, cu_seqlens=[0, 1, 5, 24, 48], ignored=[slice(0, 9)]),
    batch_of(2, LENGTH, seed=2, ignored=[slice(20, 48)]),
]
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
SAVING = {"offload_activations": True, "tiled_mlp": 8}
ENGINES = {  # of DeepSpeed's "zero_optimization", and of parallelize
    "ZeRO 0": ({"stage": 0}, {}),
    "ZeRO 1": ({"stage": 1}, {}),
    "ZeRO 2": ({"stage": 2}, {}),
    "ZeRO 3": ({"stage": 3}, {}),
    "ZeRO 3 without reduce_scatter": ({"stage": 3, "reduce_scatter": False}, {}),
    "ZeRO 2, optimizer on the host": ({"stage": 2, **OFFLOADED}, {}),
    "ZeRO 3, optimizer on the host": ({"stage": 3, **OFFLOADED}, {}),
    "ZeRO 3, all that saves memory": ({"stage": 3, **OFFLOADED}, SAVING),
}


def engines(_device):
    """Losses and gradient norms of optimizer steps at every stage, fp32, against one process."""
    expected = steps_alone()
    ranks = dist.get_world_size()
    for (ring, ulysses), (name, (zero, saving)) in itertools.product(
        [(ranks, 1), (1, ranks)], ENGINES.items()
    ):
        mesh = mesh_of(ring, ulysses)
        engine = make_engine(zero, saving, mesh)
        batches = [hybridsp.shard_batch(batch, mesh) for batch in MICRO_BATCHES]
        with case(f"{name}, ring {ring}, ulysses {ulysses}"):
            for want in expected:
                step = hybridsp.train_step(engine, batches)
                assert (step.loss, step.grad_norm) == pytest.approx(want, rel=1e-4)
        engine.destroy()


def make_engine(zero, saving, mesh):
    """A tiny hybrid under DeepSpeed; AdamW as a training run there would have it."""
    model = tiny_model().to(mesh.device)
    model.activation_checkpointing_enable()
    hybridsp.parallelize(model, mesh, **saving)
    params = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    if "offload_optimizer" not in zero or mesh.device.type == "cpu":
        params["torch_adam"] = True
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(MICRO_BATCHES),
        "gradient_clipping": CLIPPING,
        "optimizer": {"type": "AdamW", "params": params},
        "zero_force_ds_cpu_optimizer": mesh.device.type != "cpu",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "reduce_bucket_size": 10000,
            "stage3_param_persistence_threshold": 0,
            **zero,
        },
    }
    return hybridsp.initialize(model, mesh, config, self_check=False)


def steps_alone():
    """(loss, norm) of each step of one process on whole sequences, on the CPU."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        sums = [reference_loss_sum(model, batch) for batch in MICRO_BATCHES]
        loss = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


SUBJECTS = {body.__name__: body for body in (scans, halos, linear_layers, softmax_layers)}
SUBJECTS |= {body.__name__: body for body in (convolutions, engines)}


def everything():
    """What is wrong with each subject on this rank; what fails in one does not hide the next."""
    device = mesh_of(1, 1).device
    wrong = {}
    for name, body in SUBJECTS.items():
        torch.manual_seed(0)
        try:
            body(device)
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong[name] = "\n".join([str(error), *getattr(error, "__notes__", [])])
        dist.barrier()
    return wrong


@pytest.mark.parametrize(("backend", "ranks"), RANKS)
def test_everything_in_one_job(backend, ranks, subtests):
    results = run_ranks(everything, ranks, backend=backend, timeout=280)
    for name in SUBJECTS:
        with subtests.test(name):
            wrong = {rank: result[name] for rank, result in enumerate(results) if name in result}
            assert not wrong
