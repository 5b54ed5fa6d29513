"""`hybridsp eval`: tables, record and picture of several checkpoints; mistakes in one line."""

import argparse
import json
import math

import pytest
import torch
from distributed import run_ranks
from tiny_hybrid_gla import tiny_model
from tiny_tokenizer import character_tokenizer

from hybridsp.cli import main
from hybridsp.evaluate.command import _context, _trained_length
from hybridsp.evaluate.options import Options, add_arguments
from hybridsp.evaluate.positions import CurveOfLoss
from hybridsp.evaluate.report import render

TEXT = "".join(
    f"line {i} of a text that nobody has trained on, with {i * i} in it\n" for i in range(90)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny checkpoints, one whose tokenizer is another, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = character_tokenizer()
    for name, layers in (
        ("dense", ["full_attention"] * 4),
        ("hybrid", ["linear_attention"] * 3 + ["full_attention"]),
        ("other", ["full_attention"] * 4),
    ):
        if name == "other":
            tokenizer.add_tokens(["HybridSP"])
        model = tiny_model(vocab_size=100 + (name == "other"), layer_types=layers)
        model.config.max_position_embeddings = 64
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [TEXT, TEXT[::-1], "short"]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def command(folder, *options: str) -> list[str]:
    return [
        "eval", "--model", f"{folder}/dense,{folder}/hybrid", "--teacher", f"{folder}/dense",
        "--text", f"{folder}/text.jsonl", "--length", "256", "--tokens", "2K",
        "--needle-lengths", "128,256", "--keys", "1,2", "--depths", "2", "--samples", "1", *options,
    ]  # fmt: skip


def evaluate(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.parametrize("world", [1, 2])
def test_every_question_is_answered_and_recorded(folder, capfd, world):
    out = folder / f"out-{world}"
    assert (
        run_ranks(evaluate, world, command(folder, "--out", str(out)), backend=None) == [0] * world
    )
    record = json.loads((out / "eval.json").read_text())
    assert record["environment"]["world"] == world
    assert record["documents"] == 3
    assert (out / "eval.png").stat().st_size > 10_000
    dense, hybrid = record["models"]["dense"], record["models"]["hybrid"]
    assert dense["text"]["tokens"] == hybrid["text"]["tokens"] > 2000
    assert dense["text"]["agreement"] == 1
    assert dense["text"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert hybrid["text"]["divergence"] > 0.01
    assert [point["context"] for point in hybrid["positions"]["points"]] == [256]
    assert [point["context"] for point in hybrid["context"]["points"]] == [128, 256]
    assert [case["length"] for case in hybrid["needle"]] == [128, 256] * 2
    # Two sentences have no room in 128 tokens: said, and the rest is answered.
    assert "no room for 2 sentences" in hybrid["needle"][2]["reason"]
    assert hybrid["needle"][3]["asked"] == 2
    printed = capfd.readouterr().out
    for title in ("Held-out text", "Loss by position", "Loss of the same tokens", "Needles found"):
        assert printed.count(title) == 1
    assert "cannot run: length = 128 tokens have no room" in printed


def test_ranks_do_not_change_the_record(folder):
    one, two = (
        json.loads((folder / f"out-{world}" / "eval.json").read_text())["models"]
        for world in (1, 2)
    )

    def numbers(value):
        if isinstance(value, dict):
            return [number for item in value.values() for number in numbers(item)]
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, (int, float)) else []

    assert len(numbers(one)) > 50
    assert numbers(one) == pytest.approx(numbers(two), rel=1e-4, abs=1e-5)


def test_only_what_is_asked_is_done(folder, capsys):
    arguments = command(folder, "--tasks", "positions", "--out", str(folder / "some"))
    assert run_ranks(evaluate, 1, arguments, backend=None) == [0]
    record = json.loads((folder / "some" / "eval.json").read_text())
    assert {task for tasks in record["models"].values() for task in tasks} == {"positions"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{0}/dense,{0}/other"], "have different tokenizers"),
        (["--teacher", "{0}/other"], "have different tokenizers"),
        (["--model", "{0}/dense,{0}/absent"], "absent"),
        (["--model", "{0}/dense,{0}/dense"], "twice; name each checkpoint once"),
        (["--model", ","], "names no checkpoint"),
        (["--text", "{0}/absent.jsonl"], "names no file with content"),
        (["--length", "32"], "must be at least 64 tokens"),
        (["--length", "8K"], "the longest document has"),
        (["--length", "64K"], "--length"),
        (["--keys", "1000"], "keys = 1000, but there are names for"),
    ],
)
def test_mistakes_are_one_line(folder, capfd, options, message):
    arguments = command(folder, *(option.format(folder) for option in options))
    assert run_ranks(evaluate, 1, arguments, backend=None) == [2]
    told = [line for line in capfd.readouterr().out.splitlines() if "error:" in line]
    assert len(told) == 1
    assert message in told[0]


def options_of(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.of(parser.parse_args(["--text", "t.jsonl", *arguments]))


def test_models_are_named_by_the_ends_that_tell_them_apart():
    assert list(options_of("--model", "/a/x,/a/y").models) == ["x", "y"]
    assert list(options_of("--model", "/a/x,/b/x").models) == ["a/x", "b/x"]


def test_needles_are_asked_for_up_to_the_length():
    assert options_of("--model", "m", "--length", "32K").needle_lengths == (
        4096,
        8192,
        16384,
        32768,
    )
    assert options_of("--model", "m", "--length", "1K").needle_lengths == (1024,)


def test_past_the_trained_length_is_past_that_of_the_model_all_were_made_from(tmp_path):
    """Training at length raises a model's own, and hides what it was made from."""
    for name, length in (("dense", 8192), ("finetuned", 32768)):
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "max_position_embeddings": length}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    dense, finetuned = (str(tmp_path / name) for name in ("dense", "finetuned"))
    assert _trained_length(options_of("--model", f"{finetuned},{dense}")) == 8192
    assert _trained_length(options_of("--model", finetuned, "--teacher", dense)) == 8192
    assert _trained_length(options_of("--model", finetuned)) == 32768
    sums, counts = torch.tensor([[9.0, 8.0, 6.0], [9.0, 8.0, 7.0]]), torch.ones(2, 3)
    curve = CurveOfLoss([4096, 8192, 32768], sums, counts, torch.arange(2))
    changes = [(c["from"], c["to"], c["change"]) for c in _context(curve, 8192)["changes"]]
    assert changes == [(4096, 32768, -2.5), (8192, 32768, -1.5)]
    assert len(_context(curve, 32768)["changes"]) == 1


def test_a_model_that_cannot_run_has_its_reason_in_the_tables():
    point = {"context": 256, "tokens": 10, "loss": 2.0, "standard_error": None}
    text = {"tokens": 10, "loss": 2.0, "standard_error": 0.25, "accuracy": 0.5}
    shown = render(
        {
            "good": {"text": text, "positions": {"points": [point]}},
            "big": {"text": {"reason": "out of memory"}, "positions": {"reason": "out of memory"}},
        }
    )
    assert "2.0000 ± 0.2500" in shown
    assert f"{math.exp(2):.2f}"[:3] in shown
    assert "[1] cannot run: out of memory" in shown
    assert "big cannot run: out of memory" in shown
