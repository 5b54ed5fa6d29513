"""One way to run a job: how its ranks share the work, and what is kept where.

Every field is something that the mesh, DeepSpeed's configuration or `hybridsp.parallelize` can be
told; `search` tries their combinations, and `files` writes the chosen one down.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a job is run.

    Attributes:
        gpus: ranks in all, N.
        ring, ulysses: their product is P, the ranks that share a sequence.
        stage: ZeRO stage, 0 to 3.
        offload_optimizer: the optimizer's states and its work are the host's.
        checkpointing: layers keep their inputs only and are computed again in the backward.
        keep_attention: where layers are checkpointed, softmax attention's output is kept too, and
            its kernels run forward once.
        offload_activations: what checkpointing keeps is in host memory until its backward.
        tiled_mlp: tokens that an MLP computes at a time; None for all at once.
        batch: sequences per optimizer step, a multiple of dp.
        dtype_bytes: of weights and activations, 2 (bf16) or 4 (fp32).
    """

    gpus: int
    ring: int
    ulysses: int
    stage: int
    offload_optimizer: bool = False
    checkpointing: bool = True
    keep_attention: bool = True
    offload_activations: bool = False
    tiled_mlp: int | None = None
    batch: int = 1
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        assert self.checkpointing or not self.offload_activations, "nothing else is offloaded"

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
        return self.dtype_bytes == 2

    @property
    def keeps_attention(self) -> bool:
        """Whether a layer's second run takes softmax attention's output from the first."""
        return self.checkpointing and self.keep_attention

    @property
    def attention_forwards(self) -> int:
        """How often softmax attention runs forward, kernels and ring."""
        return 1 + (self.checkpointing and not self.keep_attention)

    def local_tokens(self, length: int) -> int:
        """L, the tokens of a rank; padding makes all equal."""
        return -(-length // self.sp)

    def tile(self, length: int) -> int | None:
        """Tokens of an MLP's tile; None where its tokens are computed at once."""
        if self.tiled_mlp is None or self.local_tokens(length) <= self.tiled_mlp:
            return None
        return self.tiled_mlp


__all__ = ["Setting"]
