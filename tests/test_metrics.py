"""The record of a run: what is written, by whom, and what a resumed run keeps of it."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridsp.metrics import RunLogger, peak_memory_gib

STEP = {
    "tokens": 4096,
    "labels": 4000,
    "seconds": 2.0,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
}


def log_run(directory, steps, first_step=0, offset=0.0):
    logger = RunLogger(directory, total_steps=10, is_main=True, first_step=first_step)
    if first_step == 0:
        logger.log_evaluation(0, 5.0)
    for step in steps:
        logger.log_step(step, loss=4.0 - step / 10 + offset, **STEP)
        logger.advance()
    logger.log_evaluation(steps[-1], 3.0)
    logger.close()


def read_rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory, tag):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_every_step_and_evaluation_is_one_row(tmp_path):
    log_run(tmp_path / "run", [1, 2])
    before, first, second, after = read_rows(tmp_path / "run")
    assert before == {"step": 0, "eval_loss": 5.0}
    assert after == {"step": 2, "eval_loss": 3.0}
    assert first.pop("memory_gib") > 0
    assert first == {"step": 1, "loss": 3.9, "tokens_per_second": 2048.0, **STEP}
    assert second["step"] == 2


def test_tensorboard_shows_the_same_numbers(tmp_path):
    log_run(tmp_path, [1, 2])
    assert read_events(tmp_path, "train/loss") == [(1, 3.9), (2, 3.8)]
    assert read_events(tmp_path, "eval/loss") == [(0, 5.0), (2, 3.0)]
    assert read_events(tmp_path, "train/grad_norm") == [(1, 0.5), (2, 0.5)]


def test_a_resumed_run_appends_and_takes_back_what_it_repeats(tmp_path):
    log_run(tmp_path, [1, 2, 3, 4])
    log_run(tmp_path, [3, 4, 5], first_step=2, offset=1.0)
    rows = read_rows(tmp_path)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    assert losses == pytest.approx({1: 3.9, 2: 3.8, 3: 4.7, 4: 4.6, 5: 4.5})
    assert [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r] == [(0, 5.0), (5, 3.0)]
    assert [step for step, _ in read_events(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]
    assert read_events(tmp_path, "train/loss")[2] == (3, 4.7)


def test_a_new_run_starts_a_new_record(tmp_path):
    log_run(tmp_path, [1, 2, 3])
    log_run(tmp_path, [1], offset=1.0)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 1]
    assert read_events(tmp_path, "train/loss") == [(1, 4.9)]


def test_a_row_cut_off_by_a_kill_is_dropped_but_damage_before_it_is_reported(tmp_path):
    log_run(tmp_path, [1, 2])
    record = tmp_path / "metrics.jsonl"
    record.write_text(record.read_text() + '{"step": 3, "lo')
    log_run(tmp_path, [3], first_step=2)
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == [1, 2, 3]
    record.write_text("{\n" + record.read_text())
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is no JSON"):
        RunLogger(tmp_path, total_steps=10, is_main=True, first_step=2)


def test_other_ranks_write_nothing(tmp_path):
    logger = RunLogger(tmp_path / "run", total_steps=10, is_main=False)
    logger.log_evaluation(0, 5.0)
    logger.log_step(1, loss=1.0, **STEP)
    logger.advance()
    logger.draw()
    assert logger.summary() == "no loss was recorded"
    logger.close()
    assert not (tmp_path / "run").exists()


def test_the_picture_shows_both_losses_and_changes_with_them(tmp_path):
    log_run(tmp_path, [1, 2, 3])
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1050, 630)
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    # Matplotlib's first and second colour: the training and the evaluation line.
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colors
    before = (tmp_path / "loss.png").read_bytes()
    log_run(tmp_path, [4], first_step=3)
    assert (tmp_path / "loss.png").read_bytes() != before


def test_a_run_without_any_row_can_be_drawn(tmp_path):
    logger = RunLogger(tmp_path, total_steps=1, is_main=True)
    logger.close()
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_the_bar_shows_loss_speed_memory_rate_and_gradient(tmp_path, capsys):
    log_run(tmp_path, [1])
    shown = capsys.readouterr().err
    for part in ("loss 3.9000", "2,048 tokens/s", "GiB", "lr 1.00e-03", "|grad| 0.500", "1/10"):
        assert part in shown
    assert "step 0: eval loss 5.0000" in shown


def test_the_summary_says_where_the_loss_began_and_ended(tmp_path):
    logger = RunLogger(tmp_path, total_steps=3, is_main=True)
    assert logger.summary() == "no loss was recorded"
    for step in (1, 2, 3):
        logger.log_step(step, loss=4.0 - step, **STEP)
    assert logger.summary() == "training loss: 3.0000 at step 1, 1.0000 at step 3"
    logger.log_evaluation(0, 5.0)
    logger.log_evaluation(3, 2.0)
    assert logger.summary() == "evaluation loss: 5.0000 at step 0, 2.0000 at step 3"
    logger.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_kernels_high_water_mark():
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_memory_gib() == pytest.approx(kib / 2**20, rel=0.05)
