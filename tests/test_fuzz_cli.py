"""Command lines and model configurations at random: done, or one line that says what is wrong."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from fuzzing import cases, outcome, scalars, wild
from hypothesis import given
from hypothesis import strategies as st
from tiny_hybrid_gla import tiny_config
from tiny_softmax import tiny_softmax_model

from hybridsp.cli import main
from hybridsp.planner.model import load_config

OPTIONS = {
    "convert": ["--softmax-layers", "--linear-decay", "--dtype", "--seed", "--overwrite", "--x"],
    "plan": [
        "--gpus",
        "--gpu",
        "--seq",
        "--gpus-per-node",
        "--batch",
        "--dtype",
        "--softmax-layers",
        "--host-memory",
        "--network",
    ],
    "bench": ["--repeats", "--tokens-per-rank", "--dtype", "--heads", "--seq", "--x"],
    "doctor": ["--plan", "--time-limit", "--json", "--x"],
}
VALUES = st.one_of(
    st.sampled_from(
        [
            "0.25",
            "every:4",
            "1,2",
            "0",
            "-1",
            "1.0",
            "0.0",
            "nan",
            "inf",
            "1e400",
            "every:0",
            "every:-1",
            "999",
            "1,1",
            ",",
            "64K",
            "1M",
            "1T",
            "999999G",
            "vector",
            "fixed",
            "bf16",
            "fp32",
            "float32",
            "h100-80",
            "h200-141",
            "8",
            "1",
            "3",
            "1024",
            "400",
        ]
    ),
    st.text(max_size=8),
    st.integers(-(2**70), 2**70).map(str),
)


def command(arguments):
    """Exit code and what was said."""
    told, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(wrong):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, told.getvalue(), wrong.getvalue()


def check(arguments):
    code, told, wrong = command(arguments)
    assert code in (0, 2), arguments
    if code == 2:
        assert "error:" in wrong
        assert "Traceback" not in wrong
    else:
        assert told
    return code


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_softmax_model("llama").save_pretrained(folder)
    return str(folder)


def drawn_options(name):
    one = st.tuples(st.sampled_from(OPTIONS[name]), st.lists(VALUES, max_size=2))
    return st.lists(one, max_size=4).map(
        lambda chosen: [word for option, values in chosen for word in (option, *values)]
    )


@cases(60)
@given(
    drawn_options("plan"),
    st.sampled_from(["smollm2-135m", "llama-1b", "nowhere", "", "."]),
    st.booleans(),
)
def test_plan(options, model, complete):
    needed = ["--gpus", "8", "--gpu", "h100-80", "--seq", "64K"] if complete else []
    check(["plan", model, *needed, *options])


@cases(25)
@given(drawn_options("convert"))
def test_convert(source, options):
    check(["convert", source, "out", "--overwrite", *options])


@cases(60)
@given(
    st.sampled_from(["all-scan", "linear", "softmax", "step", "x", ""]),
    drawn_options("bench"),
    st.lists(st.text(max_size=5), max_size=2),
)
def test_mistyped_commands(name, options, words):
    code, _, wrong = command(["bench", name, *options, "--no-such-option", *words])
    assert code == 2
    assert "error:" in wrong
    code, _, wrong = command([*words, name])
    assert code == 2


FIELDS = sorted(tiny_config().to_dict())


@cases(100)
@given(
    st.dictionaries(
        st.sampled_from(FIELDS) | st.text(max_size=8), wild | scalars, min_size=1, max_size=3
    )
)
def test_a_model_configuration_is_taken_or_refused(changes):
    Path("config.json").write_text(json.dumps({**tiny_config().to_dict(), **changes}))
    config, error = outcome(load_config, "config.json")
    if error is not None or config.model_type != "hybrid_gla":
        return
    assert len(config.layer_types) == config.num_hidden_layers
    assert config.num_attention_heads % config.num_key_value_heads == 0
    config.save_pretrained("saved")
    again, error = outcome(load_config, "saved")
    # Infinity is a number to Python, and none in JSON.
    assert error is not None or again.layer_types == config.layer_types
