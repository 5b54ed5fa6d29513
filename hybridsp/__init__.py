"""HybridSP: fine-tune models that mix linear and softmax attention at a million tokens.

    import hybridsp
    mesh = hybridsp.SPMesh(ring=2, ulysses=4)                  # dp is what remains of the world
    model = AutoModelForCausalLM.from_pretrained(path)
    hybridsp.parallelize(model, mesh)
    engine = hybridsp.initialize(model, mesh, config=ds_config)
    result = hybridsp.train_step(engine, [hybridsp.shard_batch(batch, mesh)])

or, in a script written for transformers' Trainer, `from hybridsp import Trainer`.

Importing it registers the model family `hybrid_gla` with the Auto classes, and nothing else: no
process group is made and no device is touched before `SPMesh`.
"""

from typing import TYPE_CHECKING, Any

from hybridsp import attention, collectives
from hybridsp.engine import StepResult, eval_step, initialize, train_step
from hybridsp.mesh import SPMesh
from hybridsp.models.hybrid_gla import register as _register_hybrid_gla
from hybridsp.parallelize import parallelize
from hybridsp.sharding import shard_batch

if TYPE_CHECKING:
    from hybridsp.trainer import Trainer

_register_hybrid_gla()


def __getattr__(name: str) -> Any:
    # transformers' Trainer brings accelerate with it, for which only its users wait.
    if name == "Trainer":
        from hybridsp.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SPMesh",
    "StepResult",
    "Trainer",
    "attention",
    "collectives",
    "eval_step",
    "initialize",
    "parallelize",
    "shard_batch",
    "train_step",
]
