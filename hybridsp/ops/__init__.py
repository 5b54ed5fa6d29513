"""One device's mathematics, each op beside its naive fp32 oracle in `reference.py`.

Nothing here communicates. Sequence parallelism composes these pieces with `hybridsp.collectives`
in `hybridsp.attention`; the model family calls them through the registries in `interfaces.py`.
"""

from hybridsp.ops.interfaces import LINEAR_ATTENTION_FUNCTIONS, SHORT_CONVOLUTION_FUNCTIONS

__all__ = ["LINEAR_ATTENTION_FUNCTIONS", "SHORT_CONVOLUTION_FUNCTIONS"]
