"""Cases of gated linear attention for any backend: inputs, exact results, errors.

Every row of a batch has its own kind of gates, because kernels that split 2^(a - b) into
2^a * 2^-b fail only where gates are strong, or weak beside strong ones; they are harder than those
of `hybridsp bench linear --check`, whose oracle and norm these are. Errors are per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridsp.bench.linear import check as linear_check
from hybridsp.bench.linear.check import RESULTS, relative_error
from hybridsp.ops.gla.contract import segment_ids

SCALE = 0.3
GATES = {
    "mild": F.logsigmoid,
    "strong": lambda logits: 20 * F.logsigmoid(logits),
    "mixed": lambda logits: torch.where(logits > 1.28, -100.0, -0.01 * logits.sigmoid()),
    "shut": lambda logits: torch.where(logits > 2, -1e4, F.logsigmoid(logits) / 16),
    "open": linear_check.all_at_one,
    # Half a chunk, 32 tokens, keeps 2^-80 or so: on either side of `intra.LIMIT`.
    "limit": lambda logits: -1.729 + 0.01 * logits.clamp(-4, 4),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What goes in, and the gradients that come back: `dout` of o, `dfinal` of the last state.

    `state` and `dfinal` [B, H, K, V] may be None for zero; bounds as in `segment_ids`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    dout: Tensor
    state: Tensor | None
    dfinal: Tensor | None
    bounds: Sequence[int] | None

    @property
    def segments(self) -> Tensor | None:
        if self.bounds is None:
            return None
        return segment_ids(self.bounds, 0, self.q.shape[1], self.q.device)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Gates and states stay fp32."""
        rounded = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")}
        return replace(self, **rounded)


def make_inputs(
    length: int,
    key_dim: int,
    value_dim: int,
    *,
    gates: Sequence[str] = ("mild",),
    channels: bool = True,
    heads: int = 2,
    starts: Sequence[int] = (),
    device: str = "cpu",
) -> Inputs:
    """Random inputs, a row per kind of gates; documents start at token 0 and at `starts`."""
    batch = len(gates)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    logits = random(batch, length, heads, key_dim if channels else 1)
    return Inputs(
        q=random(batch, length, heads, key_dim),
        k=random(batch, length, heads, key_dim),
        v=random(batch, length, heads, value_dim),
        g=torch.stack([GATES[kind](row) for kind, row in zip(gates, logits, strict=True)]),
        dout=random(batch, length, heads, value_dim),
        state=random(batch, heads, key_dim, value_dim),
        dfinal=random(batch, heads, key_dim, value_dim),
        bounds=[0, *starts, length] if starts else None,
    )


def exact_results(inputs: Inputs) -> dict[str, Tensor]:
    """RESULTS of the recurrence, token by token in fp64."""
    return linear_check.exact_results(
        (inputs.q, inputs.k, inputs.v, inputs.g),
        inputs.dout,
        scale=SCALE,
        state=inputs.state,
        dfinal=inputs.dfinal,
        bounds=inputs.bounds,
    )


def named(*results: Tensor) -> dict[str, Tensor]:
    """Results by their names."""
    return dict(zip(RESULTS, results, strict=True))


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, list[float]]:
    """Per result and row |got - exact| / |exact|, or |got| where what is exact is zero."""
    found = {}
    for name, right in exact.items():
        assert got[name].shape == right.shape, name
        found[name] = [relative_error(*row) for row in zip(got[name], right, strict=True)]
    return found
