"""What the Trainer refuses to be asked for."""

import subprocess
import sys

import pytest
from trainer_cases import arguments

from hybridsp.trainer.settings import REFUSED, REFUSED_OF_ACCELERATOR, check_arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1: .*plain cross-entropy"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0: leave it out"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length': pack documents"),
        ({"optim": "lomo"}, "optim = 'lomo': choose one"),
        ({"eval_accumulation_steps": 4}, "logits are never held"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches = True: set per_device"),
        ({"average_tokens_across_devices": False}, "mean over all labels of a step"),
    ],
)
def test_arguments_are_refused_with_what_to_do(changes, message, tmp_path):
    args = arguments(tmp_path, use_cpu=True, **changes)
    with pytest.raises(ValueError, match=message) as error:
        check_arguments(args, {})
    # The other one is that deepspeed is missing, and is named too.
    assert len(str(error.value).splitlines()) == 3


def test_metrics_of_logits_and_other_losses_are_refused(tmp_path):
    given = {"compute_metrics": max, "compute_loss_func": min}
    with pytest.raises(ValueError, match="without deepspeed: pass deepspeed=") as error:
        check_arguments(arguments(tmp_path, use_cpu=True), given)
    assert "compute_metrics = <built-in function max>: logits are never held" in str(error.value)
    assert "compute_loss_func" in str(error.value)
    with pytest.raises(ValueError, match="without deepspeed"):
        check_arguments(None, {})


def test_what_is_refused_is_an_argument_that_asks_for_nothing_by_default(tmp_path):
    args = arguments(tmp_path, use_cpu=True)
    for owner, table in ((args, REFUSED), (args.accelerator_config, REFUSED_OF_ACCELERATOR)):
        for name, (harmless, _) in table.items():
            assert getattr(owner, name) in harmless, name


def test_only_who_asks_for_the_trainer_imports_it():
    code = """if True:
        import sys, hybridsp
        assert "transformers.trainer" not in sys.modules
        hybridsp.Trainer
        assert "transformers.trainer" in sys.modules
        assert not hasattr(hybridsp, "trainers")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
