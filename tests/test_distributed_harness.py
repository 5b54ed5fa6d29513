"""The harness itself: what it promises when ranks succeed, fail, die and hang."""

import os
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailedError, RankTimeoutError, expect_raises, run_ranks


def rank_and_environment(scale, *, offset):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR", "HARNESS_PROBE")
    x = torch.full((2,), float(dist.get_rank())) * scale + offset
    dist.all_reduce(x)
    return {
        "rank": dist.get_rank(),
        "environment": {name: os.environ.get(name) for name in names},
        "sum": x,
        "draw": torch.rand(3),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size, monkeypatch):
    monkeypatch.setenv("HARNESS_PROBE", "set by the test")
    results = run_ranks(rank_and_environment, world_size, torch.tensor([1.0, 2.0]), offset=1.0)
    assert [result["rank"] for result in results] == list(range(world_size))
    total = sum(range(world_size))
    for rank, result in enumerate(results):
        assert result["sum"].tolist() == [total + world_size, 2 * total + world_size]
        assert result["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
            "HARNESS_PROBE": "set by the test",
        }
        torch.testing.assert_close(result["draw"], results[0]["draw"], rtol=0, atol=0)
        assert result["threads"] == 1
    assert len({result["pid"] for result in results} | {os.getpid()}) == world_size + 1


def not_initialized():
    return dist.is_initialized(), os.environ["MASTER_PORT"]


def test_initialising_can_be_left_to_the_function():
    (first, first_port), (second, second_port) = run_ranks(not_initialized, 2, backend=None)
    assert not first
    assert not second
    assert first_port == second_port


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise ZeroDivisionError("the original failure")
    dist.barrier()


def test_the_original_failure_is_reported_with_its_traceback():
    with pytest.raises(RankFailedError) as caught:
        run_ranks(fail_on_rank_one, 3)
    message = str(caught.value)
    assert message.startswith("rank 1 raised ZeroDivisionError: the original failure")
    assert "in fail_on_rank_one" in message
    assert "dist.barrier()" not in message.splitlines()[0]
    assert "rank 0 stands at" in message
    assert "rank 2 stands at" in message


def fail_in_a_thread():
    thread = threading.Thread(target=fail_on_rank_one)
    thread.start()
    thread.join()


def die():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def print_then_fail():
    print(f"hello from {os.getpid()}")
    raise ZeroDivisionError


def test_a_failure_in_a_thread_is_a_failure():
    # Rank 1 alone runs the failing branch; the others wait in a barrier of their thread.
    with pytest.raises(RankFailedError, match="rank 1 raised ZeroDivisionError"):
        run_ranks(fail_in_a_thread, 2)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankFailedError, match="rank 0 died with exit code 7"):
        run_ranks(die, 2)


def test_output_of_ranks_is_printed_with_their_number(capsys):
    with pytest.raises(RankFailedError):
        run_ranks(print_then_fail, 1)
    assert "[rank 0] hello from" in capsys.readouterr().out


def wait_for_each_other(directory):
    (directory / str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    elif dist.get_rank() == 1:
        time.sleep(600)


def test_a_hang_says_where_each_rank_stands_and_leaves_nothing_behind(tmp_path):
    start = time.monotonic()
    with pytest.raises(RankTimeoutError) as caught:
        run_ranks(wait_for_each_other, 3, tmp_path, timeout=3)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.startswith("2 of 3 ranks did not finish within 3 s\nrank 2 has finished")
    first_line = wait_for_each_other.__code__.co_firstlineno
    assert f"rank 0 stands at {__file__}:{first_line + 3} in wait_for_each_other" in message
    assert f"rank 1 stands at {__file__}:{first_line + 5} in wait_for_each_other" in message
    for rank in range(3):
        pid = int((tmp_path / str(rank)).read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def refuse(value):
    raise ValueError(f"value={value} on rank {dist.get_rank()}: use 2")


def refuse_on_rank_zero():
    if dist.get_rank() == 0:
        raise RuntimeError("only here")
    dist.barrier()


def test_expect_raises_returns_every_message():
    messages = expect_raises(refuse, 2, ValueError, "value=3", 3)
    assert messages == [f"value=3 on rank {rank}: use 2" for rank in range(2)]


def test_expect_raises_notices_another_type_another_message_and_no_error():
    with pytest.raises(RankFailedError, match="raised ValueError"):
        expect_raises(refuse, 2, TypeError, "value=3", 3)
    with pytest.raises(RankFailedError, match="is not found in the message"):
        expect_raises(refuse, 2, ValueError, "value=4", 3)
    with pytest.raises(RankFailedError, match="rank 0 raised nothing, expected ValueError"):
        expect_raises(not_initialized, 1, ValueError, "anything")


def test_expect_raises_does_not_take_a_hang_for_an_error():
    # A rank that left would reset its neighbour's connection: a RuntimeError, the expected type.
    with pytest.raises(RankTimeoutError, match=r"rank 1 stands at .* in refuse_on_rank_zero"):
        expect_raises(refuse_on_rank_zero, 2, RuntimeError, "", timeout=3)


def uninitialised_memory():
    x = torch.zeros(2)
    return [
        torch.empty(2),
        torch.empty(2, dtype=torch.bfloat16, requires_grad=True).detach(),
        torch.empty_like(x),
        torch.empty_strided((2,), (1,)),
        x.new_empty(2),
        x.new_empty_strided((2,), (1,)),
    ]


def test_uninitialised_memory_is_nan_here_and_in_ranks():
    (in_rank,) = run_ranks(uninitialised_memory, 1)
    for tensor in [*uninitialised_memory(), *in_rank]:
        assert tensor.isnan().all()


def test_poison_leaves_meta_tensors_devices_and_integers_alone():
    assert torch.empty(2, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.nn.Linear(3, 3).weight.isfinite().all()


def warn_as(module):
    code = "import warnings; warnings.warn('careless', UserWarning)"
    exec(code, {"__name__": module})


@pytest.mark.parametrize("module", ["hybridsp", "hybridsp.ops.gla", "hybridsp.train.finetune"])
def test_our_own_warnings_are_errors_here_and_in_ranks(module):
    with pytest.raises(UserWarning, match="careless"):
        warn_as(module)
    expect_raises(warn_as, 1, UserWarning, "careless", module)


def test_warnings_of_libraries_are_not_errors():
    with warnings.catch_warnings(record=True) as caught:
        warn_as("hybridspark")
    assert [str(warning.message) for warning in caught] == ["careless"]
