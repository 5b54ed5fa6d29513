"""The choices of a conversion under sequence parallelism: gradients as in one process."""

import pytest
from test_engine import PACKED, check

GATED = {"linear_output_gate_act": "sigmoid"}


@pytest.mark.parametrize(
    "options",
    [
        GATED | {"linear_feature_map": "relu", "linear_rope": True},
        GATED | {"linear_feature_map": "softmax", "linear_gate_clamp_min": -0.5},
        {"linear_decay": "key", "linear_feature_map": "elu"},
    ],
    ids=["relu", "softmax", "key"],
)
def test_gradients_equal_one_process(options):
    check(2, 2, 1, PACKED, [(3, True)], **options)
