"""A plan as text: what to run, what it needs, how long it takes, and why not otherwise.

Every figure of memory and time is a model's; the constants behind it that this project measured
are named at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridsp.planner.hardware import GIB
from hybridsp.planner.model import LINEAR, SOFTMAX, ModelShape
from hybridsp.planner.search import Candidate, Plan, longest
from hybridsp.planner.setting import Setting

ALTERNATIVES = 8


def render(plan: Plan, rival: Plan | str | None = None) -> str:
    """The whole report.

    Args:
        plan: the plan.
        rival: the plan of the dense model it came from, or the reason why there is none.
    """
    sections = [
        _summary(plan),
        _memory(plan),
        _host(plan),
        _time(plan),
        _alternatives(plan),
    ]
    if rival is not None:
        sections.append(_comparison(plan, rival))
    sections.append(_notes(plan))
    return "\n\n".join(sections)


def describe_setting(setting: Setting) -> str:
    """A setting in one line."""
    where = "on the host" if setting.offload_optimizer else "on the GPU"
    checkpointing = "off"
    if setting.checkpointing:
        checkpointing = "on the host" if setting.offload_activations else "on the GPU"
        checkpointing += "" if setting.keep_attention else " without attention"
    tiles = f", MLP in tiles of {setting.tiled_mlp:,} tokens" if setting.tiled_mlp else ""
    return (
        f"dp {setting.dp} x ring {setting.ring} x ulysses {setting.ulysses}, ZeRO-{setting.stage}, "
        f"optimizer {where}, activation checkpoints {checkpointing}{tiles}"
    )


def _summary(plan: Plan) -> str:
    job, setting, time = plan.job, plan.best.setting, plan.best.time
    cluster, memory = job.cluster, plan.best.memory
    reach, furthest = plan.longest_any
    further = ""
    if furthest != setting and reach > plan.longest:
        further = f"; {reach:,} with {describe_setting(furthest)}"
    rows = {
        "model": f"{job.model.path} ({_family(job.model)}, {job.dtype})",
        "parameters": f"{job.model.parameters:,}",
        "layers": _layers(job.model),
        "sequence": f"{job.length:,} tokens, {job.batch} per optimizer step",
        "hardware": f"{cluster.gpus} x {cluster.gpu} on {cluster.nodes} "
        f"host{'s' * (cluster.nodes > 1)}",
        "": "",
        "run as": describe_setting(setting),
        "micro-batches": f"{setting.accumulation} per step",
        "GPU": f"{_gib(memory.peak)} of {_gib(memory.usable)} GiB",
        "host": f"{_gib(memory.host_total)} of {_gib(memory.host_capacity)} GiB",
        "step": f"{_seconds(time.seconds)}, {time.tokens_per_second:,.0f} tokens/s "
        f"({time.tokens_per_second / setting.gpus:,.0f} per GPU), MFU {time.mfu:.1%}, bound by "
        f"{time.bound}",
        "longest": f"{plan.longest:,} tokens fit{further}",
    }
    return "\n".join(f"{name:<15}{value}".rstrip() for name, value in rows.items())


def _family(model: ModelShape) -> str:
    if model.softmax_layers is None:
        return model.model_type
    return f"{model.model_type} as a hybrid, softmax layers {model.softmax_layers}"


def _layers(model: ModelShape) -> str:
    counts = f"{model.count(LINEAR)} linear, {model.count(SOFTMAX)} softmax"
    return f"{model.num_layers} ({counts})"


def _memory(plan: Plan) -> str:
    memory = plan.best.memory
    items = {} if memory.phase == "loading" else memory.always
    rows = [
        [name, _gib(num_bytes)]
        for name, num_bytes in (items | memory.phases[memory.phase]).items()
        if num_bytes
    ]
    others = ", ".join(
        f"{name} {_gib(memory.total(name))}" for name in memory.phases if name != memory.phase
    )
    title = f"GPU memory at its peak ({memory.phase})"
    table = _table([title, "GiB"], [*rows, ["together", _gib(memory.peak)]])
    return f"{table}\nother phases: {others}"


def _host(plan: Plan) -> str:
    host = plan.best.memory.host
    rows = [[name, _gib(num_bytes)] for name, num_bytes in host.items() if num_bytes]
    return _table(["Memory of a host", "GiB"], rows)


def _time(plan: Plan) -> str:
    time = plan.best.time
    rows = [
        [name, _seconds(part.seconds), f"{part.seconds / time.seconds:.0%}", part.bound]
        for name, part in sorted(time.parts.items(), key=lambda item: -item[1].seconds)
    ]
    return _table(["Time of a step", "", "share", "bound by"], rows)


def _alternatives(plan: Plan) -> str:
    rows = []
    shown = _shown(plan)
    for candidate in shown:
        setting, memory = candidate.setting, candidate.memory
        rows.append(
            [
                f"ZeRO-{setting.stage}",
                "host" if setting.offload_optimizer else "GPU",
                _checkpoints(setting),
                "tiles" if setting.tile(plan.job.length) else "whole",
                f"{setting.dp} x {setting.ring} x {setting.ulysses}",
                _gib(memory.peak),
                _seconds(candidate.time.seconds),
                f"{longest(plan.job, setting):,}",
                _why(plan, candidate),
            ]
        )
    header = ["Candidate", "optimizer", "checkpoints", "MLP", "dp x ring x ulysses", "GiB", "step"]
    table = _table([*header, "longest", ""], rows)
    hidden = len(plan.candidates) - len(shown)
    return table + (f"\nand {hidden} more" if hidden else "")


def _checkpoints(setting: Setting) -> str:
    """Where they are, and whether attention is among them."""
    if not setting.checkpointing:
        return "off"
    where = "host" if setting.offload_activations else "GPU"
    return where if setting.keep_attention else f"{where}, attention again"


def _shown(plan: Plan) -> Sequence[Candidate]:
    """The first ones, and among those that do not fit the ones that lack least."""
    fitting = [c for c in plan.candidates if c.memory.fits]
    others = [c for c in plan.candidates if not c.memory.fits]
    kept = max(ALTERNATIVES - len(others), ALTERNATIVES // 2)
    return [*fitting[:kept], *others][:ALTERNATIVES]


def _why(plan: Plan, candidate: Candidate) -> str:
    memory, best = candidate.memory, plan.best
    if candidate is best:
        return "recommended"
    if memory.short_gpu > 0:
        return f"GPU short by {_gib(memory.short_gpu)} GiB ({memory.phase})"
    if memory.short_host > 0:
        return f"host short by {_gib(memory.short_host)} GiB"
    slower = candidate.time.seconds / best.time.seconds - 1
    return f"{slower:.0%} slower" if slower >= 0.01 else "as fast, but tighter or less simple"


def _comparison(plan: Plan, rival: Plan | str) -> str:
    if isinstance(rival, str):
        return f"The dense model beside it: {rival}"
    rows = []
    for name, each in (("hybrid", plan), ("dense", rival)):
        time = each.best.time
        rows.append(
            [
                name,
                describe_setting(each.best.setting),
                _gib(each.best.memory.peak),
                _seconds(time.seconds),
                f"{time.tokens_per_second:,.0f}",
                f"{each.longest_any[0]:,}",
            ]
        )
    table = _table(["", "run as", "GiB", "step", "tokens/s", "longest"], rows)
    ratio = rival.best.time.seconds / plan.best.time.seconds
    return f"{table}\na step of the dense model takes {ratio:.2f} times as long"


def _notes(plan: Plan) -> str:
    chip = plan.job.cluster.chip
    measured = ", ".join(sorted(chip.measured)) or "nothing"
    return (
        f"A model, not a measurement. Of {plan.job.cluster.gpu}'s constants measured: {measured}; "
        "the rest from data sheets and other chips' shares of them (docs/planner.md)."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f}" if abs(num_bytes) >= 0.05 * GIB else "<0.1"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1e3:,.1f} ms"


__all__ = ["describe_setting", "render"]
