"""What holds for every test: fixed seeds, no warnings of our own, no uninitialised memory.

`strict` (distributed.py) does the work, because the ranks of a test need it as much as the test.
"""

import pytest
import torch
import torch.distributed as dist
from distributed import strict
from fuzzing import register_profiles

register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    # An exception in a destructor or in a thread is printed and forgotten unless a test fails.
    for warning in ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"error::pytest.{warning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _strict():
    with strict():
        yield


@pytest.fixture(autouse=True)
def _no_group_is_left():
    """Ranks are processes of their own; a group joined here would be in the next tests' way."""
    yield
    joined = dist.is_initialized()
    if joined:
        dist.destroy_process_group()
    assert not joined, "the test joined a process group in pytest's own process and left it"
