"""What HybridSP knows of each Hugging Face model family: one small file per kind of family.

An adapter recognises the token mixers of a family's decoder layers and installs the
sequence-parallel implementation in them, from outside. Supporting a new family means writing one
file here and adding it to `ADAPTERS`; `hybridsp.parallelize` refuses every family and every layer
that no adapter vouches for.
"""

from hybridsp.adapters.base import IMPLEMENTATION, Adapter, decoder_layers, set_checkpointing
from hybridsp.adapters.dense import DenseAdapter
from hybridsp.adapters.hybrid_gla import HybridGLAAdapter

ADAPTERS: dict[str, Adapter] = {
    model_type: adapter
    for adapter in (HybridGLAAdapter(), DenseAdapter())
    for model_type in adapter.model_types
}

__all__ = ["ADAPTERS", "IMPLEMENTATION", "Adapter", "decoder_layers", "set_checkpointing"]
