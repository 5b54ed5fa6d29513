"""At start, on the real model: is this really sequence parallelism, and are gradients exact?

Sequence parallelism that is silently off trains without complaint: each rank sees its own tokens,
the loss falls. So does a gradient that is too large by a factor, because Adam hides it. The
self-check puts a few dozen random tokens per rank through the engine and holds it to three claims:

    crossing   what one rank's tokens hold reaches the next rank in each kind of token mixer, and
               never a rank before
    exactness  every mixer's output, the loss and gradients, as the optimizer would get them, are
               those of the uncut sequence, computed on each rank alone without HybridSP's layers
    sharding   parameters and optimizer hold what the ZeRO stage says, activations L = T/P tokens

Of a deep model the probe goes through one layer of each kind and the last (`layers.py`). It costs
three forwards and one per kind of mixer, and two or three forwards and backwards, of a tiny batch
through so few layers, and leaves no trace.

In fp32 the two runs agree to 1e-4. In bf16 they round differently, and how far that may take them
apart is a matter of the model: the uncut probe runs once more with each mixer and each layer
rounding at random by as much as bf16 does, and three times what that moves is allowed. Where that
is so much that a wrong factor of two would pass, nothing is judged, and the report says so. Nor is
"never a rank before" a matter of bits: a chunk's kernel scales all its pairs by a gate in the
middle, so a later token moves the last digits of an earlier one's output.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from math import inf, isinf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridsp.adapters import decoder_layers
from hybridsp.mesh import SPMesh, gather_objects
from hybridsp.self_check.layers import Mixer, first_of_each_kind, passing_by
from hybridsp.self_check.no_trace import leaving_no_trace
from hybridsp.self_check.probe import Probe, Trace
from hybridsp.self_check.sharding import sharding_problems

FP32_TOLERANCE = 1e-4
NOISE_MARGIN = 3
# What a mixer's kernel rounds inside: q and k under their gates, scores, what it gives.
ROUNDINGS_OF_A_MIXER = 4
# A gradient that is wrong by a factor of two, either way, has an error of at least 0.5.
MAX_TOLERANCE = 0.4
# Half the distance to the next number, relative: bf16's, and that of products in TF32.
BF16_ROUNDOFF, TF32_ROUNDOFF = 2**-8, 2**-11

logger = logging.getLogger(__name__)


class SelfCheckError(RuntimeError):
    """The engine does not do what it should; the message says what, by how much and likely why."""


def self_check(engine: Any, mesh: SPMesh) -> str:
    """Prove that an engine trains on whole sequences with exact gradients. Collective.

    Args:
        engine: made by `hybridsp.initialize`, standing between two steps.
        mesh: its mesh.

    Returns:
        What was found, in a line.

    Raises:
        SelfCheckError: on every rank, with every rank's findings.
    """
    start = time.perf_counter()
    if mesh.rank == 0:
        logger.info("checking on a few tokens that the cut sequence trains as the whole one does")
    problems, sharding = sharding_problems(engine, mesh)
    if mesh.sp == 1:
        proven = "sp = 1, so no sequence is cut"
    else:
        probe = Probe(engine, mesh)
        with leaving_no_trace(engine), passing_by(probe.model, probe.mixers):
            whole = probe.whole()
            allowed = tolerances(probe, whole)
            problems = (
                crossing_problems(probe, allowed)
                + exactness_problems(probe, whole, allowed)
                + problems
            )
        proven = _proven(probe)
        if untold := sum(isinf(x) for x in allowed.values()):
            proven += f", but {untold} of {len(allowed)} move too much by rounding alone to tell"
    _raise_together(problems)
    line = f"self-check passed in {time.perf_counter() - start:.1f} s: {proven}; {sharding}"
    if mesh.rank == 0:
        logger.info(line)
    return line


def _proven(probe: Probe) -> str:
    """What a probe without problems has shown."""
    kinds = dict.fromkeys(mixer.kind for mixer in probe.mixers)
    through = len({id(mixer.layer) for mixer in probe.mixers})
    like_them = (
        f" through {through} of {n} layers (the others are like them)"
        if (n := len(decoder_layers(probe.model))) > through
        else ""
    )
    return (
        f"{' and '.join(kinds)} cross {probe.mesh.sp} ranks; outputs, loss and gradients of "
        f"{probe.length * probe.mesh.sp} tokens{like_them} are those of the uncut sequence"
    )


def tolerances(probe: Probe, whole: Trace) -> dict[str, float]:
    """How far right values may be from those of the uncut probe, as a part of their norm.

    Infinitely far where rounding alone takes them further than a wrong factor would, as in a raw
    conversion in bf16: there nothing can be told. Rounding noise is drawn alike on every rank, but
    each has its own tokens, so what one rank cannot tell another may.
    """
    roundoff = _roundoff(probe)
    noisy = probe.whole(noise=roundoff) if roundoff else whole
    floor = max(FP32_TOLERANCE, ROUNDINGS_OF_A_MIXER * roundoff)
    noise = {name: NOISE_MARGIN * _error(noisy[name], right) for name, right in whole.items()}
    return {name: max(floor, x) if x <= MAX_TOLERANCE else inf for name, x in noise.items()}


def crossing_problems(probe: Probe, allowed: Mapping[str, float]) -> list[str]:
    """Changes on one rank that do not reach the next one, or reach one before.

    Args:
        probe: the probe.
        allowed: how far the output of a mixer may move for reasons of rounding.
    """
    # Twice, because not every kernel gives the same bits twice.
    unchanged = probe.outputs(), probe.outputs()
    where = f"the tokens in the second half of SP rank {probe.changed_rank}"
    changes = [(probe.mixers[-1], probe.outputs(change_tokens=True), f"crossing: {where} changed")]
    for mixer in first_of_each_kind(probe.mixers):
        what = f"crossing, {mixer.kind}: what {mixer.name} sees of {where} changed"
        changes.append((mixer, probe.outputs(change_at=mixer), what))
    problems = []
    for mixer, after, what in changes:
        name = f"the output of {mixer.name}"
        before, again = (trace[name] for trace in unchanged)
        differs = _differs(before, again, after[name])
        # A mixer that ignores its input (say, a projection that starts at zero) proves nothing.
        reacts = differs.any().int()
        dist.all_reduce(reacts, dist.ReduceOp.MAX, group=probe.mesh.sp_group)
        if reacts:
            early = slice(_tokens_before_the_change(probe))
            leak = _error(after[name][:, early], before[:, early])
            problems += _judge_change(probe, mixer, what, differs, leak, allowed[name])
    return problems


def _differs(before: Tensor, again: Tensor, after: Tensor) -> Tensor:
    """Which of this rank's tokens [1, L, D] have another output, bool [L]."""
    chance = (again - before).abs().max()
    return (after - before).abs().amax(dim=-1)[0] > 8 * chance


def _tokens_before_the_change(probe: Probe) -> int:
    """How many of this rank's tokens come before the second half of `probe.changed_rank`."""
    start = probe.changed_rank * probe.length + probe.length // 2
    return min(max(start - probe.mesh.sp_rank * probe.length, 0), probe.length)


def _judge_change(
    probe: Probe, mixer: Mixer, what: str, differs: Tensor, leak: float, allowed: float
) -> list[str]:
    """This rank's view of a change in the second half of `probe.changed_rank`."""
    mine, changed = probe.mesh.sp_rank, probe.changed_rank
    if leak > allowed:
        return [
            f"{what}, and the output of {mixer.name} for the tokens before them changed by "
            f"{leak:.2g} of its norm (allowed {allowed:.2g}) on SP rank {mine}: it looks into the "
            "future, so the ranks' parts are not in the sequence's order, or attention is not "
            "causal"
        ]
    if mine == changed + 1 and not differs.any():
        return [
            f"{what}, and no output of {mixer.name} on SP rank {mine} changed: each rank computes "
            "on its own tokens as if the sequence began there. The state (linear attention) or "
            "the keys and values (softmax attention) do not cross the ranks"
        ]
    return []


def exactness_problems(probe: Probe, whole: Trace, allowed: Mapping[str, float]) -> list[str]:
    """What differs between the probe cut by the engine and the uncut one, more than allowed."""
    got = probe.split()
    problems: dict[str, str] = {}
    for name, right in whole.items():
        what = " ".join(name.split()[:2])  # the output, the loss, the gradient
        if got[name].shape != right.shape:
            problems.setdefault(what, _not_cut(name, got[name], right))
            continue
        tolerance = allowed[name]
        # Not "larger": NaN is no agreement.
        if not (error := _error(got[name], right)) <= tolerance:
            reason = _likely_reason(probe, what, got[name], right, tolerance)
            problems.setdefault(
                what,
                f"exactness: {name} is off by {error:.2g} of its norm (allowed {tolerance:.2g}) "
                f"from the same {probe.length * probe.mesh.sp} tokens uncut: {reason}",
            )
    return list(problems.values())


def _roundoff(probe: Probe) -> float:
    """How much the precision of this model rounds; 0 for fp32."""
    # Of all, not only those that are trained: LoRA's may be fp32 in a model in bf16.
    if any(parameter.dtype == torch.bfloat16 for parameter in probe.model.parameters()):
        return BF16_ROUNDOFF
    on_gpu = probe.mesh.device.type == "cuda"
    return TF32_ROUNDOFF if on_gpu and torch.get_float32_matmul_precision() != "highest" else 0.0


def _error(got: Tensor, right: Tensor) -> float:
    """|got - right| / |right|."""
    norm = right.float().norm()
    return float((got.float() - right.float()).norm() / (norm if norm > 0 else 1))


def _not_cut(name: str, got: Tensor, right: Tensor) -> str:
    return (
        f"sharding: {name} has shape {tuple(got.shape)} on this rank, its part of the sequence "
        f"has {tuple(right.shape)}: activations are not cut over the SP ranks"
    )


def _likely_reason(probe: Probe, what: str, got: Tensor, right: Tensor, tolerance: float) -> str:
    mesh, engine = probe.mesh, probe.engine
    if what == "the output":
        return "this layer, the first that differs, does not compute one sequence over the ranks"
    if what == "the loss":
        return "the loss is not the mean over the labels of all ranks (hybridsp.loss.TokenMean)"
    ratio = float((got * right).sum() / right.square().sum())
    if _error(got / ratio, right) <= tolerance:
        return (
            f"it is {ratio:.2g} times the right one, and points the same way, so DeepSpeed divides "
            f"by another number than it is counted on (dp = {mesh.dp}, sp = {mesh.sp}, "
            f"gradient_accumulation_steps = {engine.gradient_accumulation_steps()}, ZeRO stage "
            f"{engine.zero_optimization_stage()}, factor on the loss "
            f"{probe.model.token_mean.gradient_factor:g}). Adam would hide it; clipping and the "
            "reported norm would not"
        )
    return (
        "it points another way, so gradients of a layer are lost between ranks, or DeepSpeed does "
        "not sum over the ranks of a sequence (it sums over those that its mpu names)"
    )


def _raise_together(problems: list[str]) -> None:
    """Raise on every rank what any rank found."""
    ranks: dict[str, list[int]] = {}
    for rank, report in enumerate(gather_objects(problems)):
        for problem in report:
            ranks.setdefault(problem, []).append(rank)
    if not ranks:
        return
    lines = [f"{problem} [rank {', '.join(map(str, ranks[problem]))}]" for problem in sorted(ranks)]
    raise SelfCheckError(
        "the self-check failed (initialize(..., self_check=False) trains all the same, wrongly):\n"
        "  " + "\n  ".join(lines)
    )


__all__ = ["SelfCheckError", "self_check"]
