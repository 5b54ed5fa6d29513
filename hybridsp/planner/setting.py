"""One way to run a job, and which features of the code it may count on.

A plan for today uses only what is `available`. What is not built yet is modelled too, so that
`--assume` can show what it would bring; once it is built, its line here is all that changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that changes memory or time.

    Attributes:
        what: it does, in a few words.
        available: whether hybridsp does it today.
    """

    what: str
    available: bool


FEATURES = {
    "fused_attention": Feature(
        what="softmax attention by fused kernels in bf16, without a score matrix", available=True
    ),
    "keep_attention": Feature(
        what="checkpointing keeps softmax attention's output, so that it runs forward once",
        available=True,
    ),
    "tiled_mlp": Feature(what="the MLP computed for some tokens at a time", available=False),
    "offload_activations": Feature(
        what="checkpointed layer inputs in host memory", available=False
    ),
    "sharded_loading": Feature(
        what="weights are split while they are loaded, under ZeRO-3", available=False
    ),
}


def features_of(assumed: Iterable[str] = ()) -> frozenset[str]:
    """What is available today, and what is assumed besides.

    Raises:
        ValueError: an assumed feature is unknown.
    """
    assumed = set(assumed)
    for name in sorted(assumed):
        if name not in FEATURES:
            raise ValueError(
                f"assume = {name!r} is no feature; known are {', '.join(sorted(FEATURES))}"
            )
    return frozenset(assumed | {name for name, each in FEATURES.items() if each.available})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a job is run.

    Attributes:
        gpus: ranks in all, N.
        ring, ulysses: their product is P, the ranks that share a sequence.
        stage: ZeRO stage, 0 to 3.
        offload_optimizer: the optimizer's states and its work are the host's.
        checkpointing: layers keep their inputs only and are computed again in the backward.
        batch: sequences per optimizer step, a multiple of dp.
        dtype_bytes: of weights and activations, 2 (bf16) or 4 (fp32).
        features: names in FEATURES to count on.
    """

    gpus: int
    ring: int
    ulysses: int
    stage: int
    offload_optimizer: bool
    checkpointing: bool
    batch: int
    dtype_bytes: int
    features: frozenset[str]

    @property
    def sp(self) -> int:
        """Ranks that share a sequence, P."""
        return self.ring * self.ulysses

    @property
    def dp(self) -> int:
        """Sequences trained at once."""
        return self.gpus // self.sp

    @property
    def accumulation(self) -> int:
        """Micro-batches of one sequence per optimizer step."""
        return self.batch // self.dp

    @property
    def fused_attention(self) -> bool:
        """Fused kernels take bf16 only; fp32 is plain PyTorch's."""
        return "fused_attention" in self.features and self.dtype_bytes == 2

    def local_tokens(self, length: int) -> int:
        """L, the tokens of a rank; padding makes all equal."""
        return -(-length // self.sp)


__all__ = ["FEATURES", "Feature", "Setting", "features_of"]
