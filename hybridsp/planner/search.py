"""Every way to run a job, ranked; and the longest sequence that still fits.

The degrees of sequence and data parallelism that fit the batch, ZeRO stages 1 to 3, the optimizer
on the GPU or on the host (at stage 3, as `ds_configs/zero3_offload.json` has it), layers
checkpointed or not, what checkpointing keeps, on the GPU or on the host, the MLP whole or in tiles:
of those that fit, the fastest is recommended. Of equally fast ones those that leave some room come
first, for the memory model is not exact; then what offloads less and the lower stage, which are
simpler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from hybridsp.mesh import choose_degrees
from hybridsp.planner.hardware import GIB, GPUS, MOST_GPUS, Cluster
from hybridsp.planner.memory import Memory, memory
from hybridsp.planner.model import SOFTMAX, ModelShape
from hybridsp.planner.setting import Setting
from hybridsp.planner.time import StepTime, step_time

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
# Lengths are looked for in steps of so many tokens, up to more than anyone asks for.
LENGTH_STEP, LONGEST = 1024, 2**30
# Equally fast, for a model: the simpler one is then better.
SAME_SPEED = 1.01
# Fuller than this is tight.
TIGHT = 0.9
# Tokens of a tile of the MLP. To sum its weights' gradients takes, on a Hopper, 300 tokens' worth
# of its products per tile, whatever the model; and a tile of an 8B model needs 1.3 GiB.
TILE = 8192
STAGES = ((1, False), (2, False), (3, False), (3, True))  # and whether the optimizer is offloaded


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained on what.

    Attributes:
        model: its shape.
        cluster: the machines.
        length: T, tokens of a sequence.
        batch: sequences per optimizer step.
        dtype: "bf16" or "fp32".

    Raises:
        ValueError: a value out of range.
    """

    model: ModelShape
    cluster: Cluster
    length: int
    batch: int = 1
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST:
            raise ValueError(f"seq = {self.length} is out of range; give 1 to {LONGEST} tokens")
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch} must be at least 1 sequence per step")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype = {self.dtype!r} is unknown; use bf16 or fp32")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting with what it needs and takes."""

    setting: Setting
    memory: Memory
    time: StepTime


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The recommendation.

    Attributes:
        job: what was asked.
        best: the fastest candidate that fits.
        candidates: all that differ at this length, best first, those that do not fit last.
        longest: tokens of the longest sequence that fits in `best`'s setting.
        longest_any: the same in any setting, and that setting.
    """

    job: Job
    best: Candidate
    candidates: tuple[Candidate, ...]
    longest: int
    longest_any: tuple[int, Setting]


def make_plan(job: Job) -> Plan:
    """The fastest way to run a job that fits.

    Raises:
        ValueError: nothing fits; says what is short by how much, and what would fit.
    """
    candidates = rank(job)
    best = candidates[0]
    if not best.memory.fits:
        raise ValueError(_nothing_fits(job, candidates))
    return Plan(
        job=job,
        best=best,
        candidates=tuple(candidates),
        longest=longest(job, best.setting),
        longest_any=_longest_any(job),
    )


def settings(job: Job) -> Iterator[Setting]:
    """Every setting of a job."""
    config, gpus, batch = job.model.config, job.cluster.gpus, job.batch
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dtype_bytes = DTYPE_BYTES[job.dtype]
    for sp in (n for n in range(1, gpus + 1) if gpus % n == 0 and batch % (gpus // n) == 0):
        ring, ulysses = choose_degrees(sp, heads, kv_heads, job.cluster.local)
        whole = Setting(
            gpus=gpus, ring=ring, ulysses=ulysses, stage=1, batch=batch, dtype_bytes=dtype_bytes
        )
        for (stage, offload), tile, layers in product(STAGES, (None, TILE), _layers(job.model)):
            way = replace(whole, stage=stage, offload_optimizer=offload, tiled_mlp=tile)
            yield replace(way, **layers)


def _layers(model: ModelShape) -> list[dict[str, bool]]:
    """What becomes of what a layer computes: kept, or computed again from what is kept where."""
    keep = (True, False) if model.count(SOFTMAX) else (True,)
    checkpointed = [
        {"checkpointing": True, "keep_attention": kept, "offload_activations": offload}
        for kept, offload in product(keep, (False, True))
    ]
    return [{"checkpointing": False}, *checkpointed]


def rank(job: Job) -> list[Candidate]:
    """All candidates: those that fit by time, then the others by what they lack."""
    candidates = [
        Candidate(
            setting=setting,
            memory=memory(job.model, setting, job.cluster, job.length),
            time=step_time(job.model, setting, job.cluster, job.length),
        )
        for setting in settings(job)
        # Too few tokens for two tiles: the same as without.
        if setting.tiled_mlp is None or setting.tile(job.length) is not None
    ]
    fitting = sorted((c for c in candidates if c.memory.fits), key=lambda c: c.time.seconds)
    others = sorted((c for c in candidates if not c.memory.fits), key=_shortfall)
    if fitting:
        limit = SAME_SPEED * fitting[0].time.seconds
        equal = [c for c in fitting if c.time.seconds <= limit]
        equal.sort(key=_complexity)
        fitting = equal + fitting[len(equal) :]
    return fitting + others


def _longest_any(job: Job) -> tuple[int, Setting]:
    """The longest sequence that fits in any setting, and that setting; 0 for none."""
    # Those that save most come last; begun with, they leave little to look for in the others.
    furthest, *others = reversed(list(settings(job)))
    reach = longest(job, furthest)
    for setting in others:
        if memory(job.model, setting, job.cluster, reach + LENGTH_STEP).fits:
            reach, furthest = longest(job, setting), setting
    return reach, furthest


def longest(job: Job, setting: Setting) -> int:
    """Tokens of the longest sequence that fits in a setting, in steps of 1,024; 0 for none."""

    def fits(steps: int) -> bool:
        return memory(job.model, setting, job.cluster, steps * LENGTH_STEP).fits

    below, above = 0, 1
    while above * LENGTH_STEP <= LONGEST and fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below * LENGTH_STEP


def _complexity(candidate: Candidate) -> tuple[bool, int, bool, bool, int, float]:
    setting, memory = candidate.setting, candidate.memory
    tight = memory.peak > TIGHT * memory.usable
    offloads = setting.offload_optimizer + setting.offload_activations
    tiled, again = setting.tiled_mlp is not None, not setting.keep_attention
    return tight, offloads, tiled, again, setting.stage, candidate.time.seconds


def _shortfall(candidate: Candidate) -> float:
    return max(candidate.memory.short_gpu, 0.0) + max(candidate.memory.short_host, 0.0)


def _nothing_fits(job: Job, candidates: list[Candidate]) -> str:
    nearest, cluster = candidates[0].memory, job.cluster
    lacks = []
    if nearest.short_gpu > 0:
        lacks.append(
            f"{nearest.short_gpu / GIB:.1f} GiB of GPU memory ({nearest.phase}: "
            f"{nearest.peak / GIB:.1f} of {nearest.usable / GIB:.1f} GiB)"
        )
    if nearest.short_host > 0:
        lacks.append(
            f"{nearest.short_host / GIB:.1f} GiB of host memory ({nearest.host_total / GIB:.1f} of "
            f"{nearest.host_capacity / GIB:.1f} GiB)"
        )
    reach, _ = _longest_any(job)
    shorter = f"sequences of up to {reach} tokens fit" if reach else "no length fits"
    return (
        f"seq = {job.length} does not fit on {cluster.gpus} x {cluster.gpu}: the nearest setting "
        f"lacks {' and '.join(lacks)}; {shorter} there, and {_enough_gpus(job)}{_other_chips(job)}"
    )


def _enough_gpus(job: Job) -> str:
    """The first number of GPUs, doubled each time, on which the length fits."""
    gpus, node = 2 * job.cluster.gpus, job.cluster.gpus_per_node
    while True:
        whole = gpus if gpus <= node else -(-gpus // node) * node
        if whole > MOST_GPUS:
            return f"more GPUs, up to {MOST_GPUS}, are not enough for this length"
        if _fits_on(job, replace(job.cluster, gpus=whole)):
            return f"this length fits on {whole} GPUs"
        gpus = 2 * whole


def _other_chips(job: Job) -> str:
    """Other GPUs, as many, on which the length fits."""
    names = [name for name in GPUS if _fits_on(job, replace(job.cluster, gpu=name))]
    return f"; it fits on as many {' or '.join(names)}" if names else ""


def _fits_on(job: Job, cluster: Cluster) -> bool:
    there = replace(job, cluster=cluster)
    return any(memory(job.model, s, cluster, job.length).fits for s in settings(there))


__all__ = ["DTYPE_BYTES", "Candidate", "Job", "Plan", "longest", "make_plan", "rank", "settings"]
