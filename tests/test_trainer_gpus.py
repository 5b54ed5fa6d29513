"""The Trainer over NCCL against transformers' own on one process of the CPU.

A file of its own: where there are GPUs, accelerate leaves gloo, so that the rest of the Trainer's
tests run only where there are none.
"""

import pytest
from test_trainer import TWO, check_runs

CASES = {
    # ring, ulysses, dp: (model, collator, ZeRO stage, changes)
    (2, 1, 1): [("hybrid", "flattened", 3, TWO), ("dense", "padded", 2, {})],
    (1, 2, 1): [
        ("hybrid", "padded", 2, TWO),
        ("dense", "flattened positions", 3, {"activation_checkpointing": True}),
    ],
    (1, 1, 2): [("hybrid", "flattened", 0, {})],
}

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("ring", "ulysses", "dp"), CASES, ids=["ring 2", "ulysses 2", "dp 2"])
def test_runs_equal_one_process_on_gpus(ring, ulysses, dp, tmp_path):
    check_runs(ring, ulysses, dp, CASES[ring, ulysses, dp], tmp_path, backend="nccl")
