"""HybridGLA: causal language models that mix gated linear attention and softmax attention.

Importing this package changes nothing outside it; `register` is what makes `AutoConfig`,
`AutoModel` and `AutoModelForCausalLM` know the family, and `import hybridsp` calls it. After that
the installed classes load every HybridGLA checkpoint, with or without `trust_remote_code`; where
hybridsp was not imported, `trust_remote_code=True` loads the copy saved beside the weights.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hybridsp.models.hybrid_gla.configuration_hybrid_gla import HybridGLAConfig
from hybridsp.models.hybrid_gla.modeling_hybrid_gla import (
    HybridGLAForCausalLM,
    HybridGLAModel,
    HybridGLAPreTrainedModel,
)


def register() -> None:
    """Make the Auto classes load this family, and its checkpoints carry their own code.

    `register_for_auto_class` makes `save_pretrained` copy the files of the family beside the
    weights and write `auto_map` into config.json. Calling this again changes nothing.
    """
    AutoConfig.register(HybridGLAConfig.model_type, HybridGLAConfig, exist_ok=True)
    HybridGLAConfig.register_for_auto_class()
    model_classes = {AutoModel: HybridGLAModel, AutoModelForCausalLM: HybridGLAForCausalLM}
    for auto_class, model_class in model_classes.items():
        auto_class.register(HybridGLAConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)


__all__ = [
    "HybridGLAConfig",
    "HybridGLAForCausalLM",
    "HybridGLAModel",
    "HybridGLAPreTrainedModel",
    "register",
]
