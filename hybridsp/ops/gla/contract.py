"""What a backend of gated linear attention does, in the order in which it is asked.

Sequence parallelism needs a layer's work in stages, because a state crosses the ranks in the middle
of it. Forward, a span of tokens first says what it does to a state (`end_state`: that travels),
then does what needs no other rank (`intra_chunk`: meanwhile), then reads the state that entered
(`output`). Backward is the same from the other end: the gradient of the state that entered
(`start_gradient`: that travels), what needs no other rank, and the rest (`gradients`), once the
gradient of the state that leaves is known. The stages share workspace, so a pass is an object.

    forward                                         backward
    end, decay = passing.end_state()                start, decay = passing.start_gradient()
    pending = scan(end, decay)                      pending = scan(start, decay, from the right)
    passing.intra_chunk()                           passing.intra_chunk()
    out = passing.output(pending.wait())            grads = passing.gradients(pending.wait())

What enters a span from the right in the scan of (start, decay) *is* the gradient of the state that
leaves it. On one device nothing is scanned: an initial state enters, its final state leaves.

Backends: `plain` (PyTorch, any device) and `triton` (kernels, CUDA).
Shapes: B batch, L tokens of the span, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("plain", "triton")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One rank's span of tokens, as `check_tokens` demands; strides may be any.

    Attributes:
        q, k: [B, L, H, K], floating point.
        v: [B, L, H, V].
        g: log decay, finite and <= 0, [B, L, H, K], or [B, L, H, 1] for one decay per head.
        scale: factor on q.
        segments: int [L] from `segment_ids`, non-decreasing; 0 is the document that continues from
            before the span. None where the whole span is that document.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    scale: float
    segments: Tensor | None


class ForwardPass(Protocol):
    """One forward of one layer: `end_state`, `intra_chunk`, `output`, each called once, in order.

    Runs without autograd: what the backward needs is recomputed from the tokens.
    """

    def __init__(self, tokens: Tokens) -> None: ...

    def end_state(self) -> tuple[Tensor, Tensor]:
        """What the span does to a state that enters it.

        Returns:
            The end state as if zero entered, [B, H, K, V] fp32, and the total decay, [B, H, K] or
            [B, H, 1] fp32 as g has it, 0 where a document starts inside the span.
        """

    def intra_chunk(self) -> None:
        """Do whatever needs no other rank; runs while the scan is in flight."""

    def output(self, incoming: Tensor | None) -> Tensor:
        """[B, L, H, V] in v's dtype; `incoming` [B, H, K, V] fp32 enters the span, None is zero."""


class BackwardPass(Protocol):
    """One backward: `start_gradient`, `intra_chunk`, `gradients`, each called once, in order."""

    def __init__(self, tokens: Tokens, dout: Tensor, incoming: Tensor | None) -> None: ...

    def start_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient of the state that enters the span, through the span's own outputs.

        Returns:
            The gradient [B, H, K, V] fp32 as if the state that leaves had none, and the total
            decay as in `ForwardPass.end_state`.
        """

    def intra_chunk(self) -> None:
        """Do whatever needs no other rank; runs while the reverse scan is in flight."""

    def gradients(self, outgoing: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv, dg, of their tensors' shapes and dtypes.

        Args:
            outgoing: [B, H, K, V] fp32, the gradient of the state that leaves; None is zero.
        """


@dataclass(frozen=True)
class Backend:
    """A pair of passes; `why_not(tokens)` says why it cannot do these tokens, None if it can."""

    name: str
    forward: type[ForwardPass]
    backward: type[BackwardPass]
    why_not: Callable[[Tokens], str | None]


def choose_backend(tokens: Tokens, name: str | None = None) -> Backend:
    """The backend for these tokens.

    Args:
        tokens: what is to be computed; only shapes, dtypes and devices matter.
        name: one of BACKENDS, or None for "triton" where the tokens are on CUDA and it can do them
            (if it cannot, the reason is logged once), else "plain".

    Returns:
        The backend.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot do these tokens.
    """
    # Here because both backends import this file; and Triton may not be there at all.
    from hybridsp.ops.gla.plain import BACKEND as PLAIN

    if name not in (None, *BACKENDS):
        raise ValueError(f"backend = {name!r} is unknown; use one of {BACKENDS}, or None")
    if name == "plain" or (name is None and not tokens.q.is_cuda):
        return PLAIN
    reason: str | None
    try:
        from hybridsp.ops.gla.triton import BACKEND as TRITON
    except ImportError as error:
        reason = f"Triton's kernels cannot be imported ({error})"
    else:
        reason = TRITON.why_not(tokens)
        if reason is None:
            return TRITON
    if name == "triton":
        raise ValueError(f"backend = 'triton' cannot do this: {reason}; use backend = None")
    _log_why_not(reason)
    return PLAIN


@lru_cache
def _log_why_not(reason: str) -> None:
    """Once per reason, not once per layer and step."""
    logger.warning(
        "gated linear attention runs in plain PyTorch, which is slow on a GPU: %s", reason
    )


def without_autocast(tokens: Tokens) -> torch.autocast:
    """In this context a pass computes in the dtypes it chose: autocast would make states bf16."""
    return torch.autocast(tokens.q.device.type, enabled=False)


def segment_ids(
    bounds: Sequence[int], start: int, stop: int, device: torch.device | None = None
) -> Tensor:
    """Number the documents of a span of the packed sequence.

    Id 0 is the document that continues from before the span, the only one that a state entering
    the span belongs to; where a document starts at the span's first token, ids begin with 1.

    Args:
        bounds: document boundaries of the whole packed sequence, rising from 0.
        start, stop: the span of tokens asked for.
        device: where the result lives.

    Returns:
        int64 [stop - start], non-decreasing.
    """
    # The sequence's own start is no cut: an initial state continues the first document.
    starts = torch.tensor([b for b in bounds[1:-1] if start <= b < stop], dtype=torch.int64)
    return torch.bucketize(torch.arange(start, stop), starts, right=True).to(device)


def check_tokens(tokens: Tokens) -> None:
    """Refuse what no backend can do.

    The values of g are read too, which on CUDA makes the host wait; there they are read only the
    first time that a shape, dtype and device are seen, which finds a gate of the wrong sign in the
    first step and not one that turns NaN later.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no tokens, or a g that is positive,
            infinite or NaN.
    """
    _check_shapes(tokens)
    tensors = {"q": tokens.q, "k": tokens.k, "v": tokens.v, "g": tokens.g}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: give q, k, v and g in floating point")
        if tensor.device != tokens.q.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but q on {tokens.q.device}: move them to one device"
            )
    g = tokens.g
    if not g.is_cuda:
        _check_decays(g)
    elif (seen := (g.shape, g.dtype, g.device)) not in _checked_decays:
        _check_decays(g)
        _checked_decays.add(seen)


_checked_decays: set[tuple[torch.Size, torch.dtype, torch.device]] = set()


def _check_decays(g: Tensor) -> None:
    low, high = (x.item() for x in torch.aminmax(g.detach()))
    if not (float("-inf") < low and high <= 0):  # written so that NaN does not pass
        raise ValueError(
            f"g lies in [{low:g}, {high:g}]: a log decay is finite, not NaN and <= 0, so that "
            "exp(g) lies in (0, 1]; pass logsigmoid of the gate's logits, not the gate itself"
        )


def _check_shapes(tokens: Tokens) -> None:
    q, k, v, g = tokens.q, tokens.k, tokens.v, tokens.g
    fits = q.dim() == 4 and q.shape == k.shape
    if not fits or any(x.dim() != 4 or x.shape[:3] != q.shape[:3] for x in (v, g)):
        raise ValueError(
            f"shapes q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g "
            f"{tuple(g.shape)} do not fit: q and k are [B, L, H, K], v [B, L, H, V], and g "
            "[B, L, H, K] or [B, L, H, 1]; clone KV heads to H before the call"
        )
    if g.shape[-1] not in (1, q.shape[-1]):
        raise ValueError(
            f"g has {g.shape[-1]} decays per head; give one per key channel ({q.shape[-1]}) or one"
        )
    if q.shape[1] == 0:
        raise ValueError("the sequence is empty: L = 0; give every rank at least one token")
    if tokens.segments is not None and tokens.segments.shape != (q.shape[1],):
        raise ValueError(
            f"segments have shape {tuple(tokens.segments.shape)} for L = {q.shape[1]} tokens; "
            "give one id per token (segment_ids makes them)"
        )
