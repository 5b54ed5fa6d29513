"""The command line: options reach the converter, mistakes are one line and exit code 2."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from hybridsp.cli import SUBCOMMANDS, build_parser, main


@pytest.fixture
def source(tmp_path) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def written_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_convert(source, tmp_path, capsys):
    dst = tmp_path / "hybrid"
    options = [
        "--softmax-layers",
        "1,3",
        "--linear-decay",
        "scalar",
        "--dtype",
        "bfloat16",
        "--seed",
        "5",
    ]
    assert main(["convert", str(source), str(dst), *options]) == 0
    config = written_config(dst)
    assert config["layer_types"] == ["linear_attention", "full_attention"] * 2
    assert config["linear_decay"] == "scalar"
    assert config["dtype"] == "bfloat16"
    assert "softmax layers  2 of 4: 1, 3\n" in capsys.readouterr().out

    again = ["convert", str(source), str(dst), "--softmax-layers", "every:4"]
    assert main(again) == 2
    assert main([*again, "--overwrite"]) == 0
    assert written_config(dst)["layer_types"].count("full_attention") == 1


def test_seed_reaches_the_weights(source, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["convert", str(source), str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_default_is_a_quarter_softmax_vector_decay_in_the_dtype_of_the_source():
    args = build_parser().parse_args(["convert", "SRC", "DST"])
    assert (args.softmax_layers, args.linear_decay, args.dtype) == ("0.25", "vector", "auto")
    assert (args.seed, args.overwrite, args.traceback) == (0, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "dst"], "SRC = absent does not exist"),
        (["source", "source"], "exists; choose another name"),
        (["source", "dst", "--softmax-layers", "9"], "numbered 0 to 3"),
        (["source", "dst", "--softmax-layers", "2.0"], "no fraction in [0, 1]"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"hybridsp convert: error: [^\n]*\n", err)
    assert message in err
    assert not (tmp_path / "dst").exists()


def test_traceback_on_request(tmp_path, capsys):
    assert main(["convert", "absent", str(tmp_path / "dst"), "--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("hybridsp convert: error: SRC = absent does not exist")


def test_our_own_bugs_are_not_hidden(source, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr("hybridsp.convert.convert", bug)
    with pytest.raises(AssertionError):
        main(["convert", str(source), str(tmp_path / "dst")])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["conver", "SRC", "DST"],
        ["convert", "SRC"],
        ["convert", "SRC", "DST", "--soft", "0.5"],
        ["convert", "SRC", "DST", "--linear-decay", "matrix"],
        ["convert", "SRC", "DST", "--dtype", "int8"],
        ["convert", "SRC", "DST", "--seed", "x"],
    ],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_names_every_subcommand_and_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for add in SUBCOMMANDS:
        assert add.__name__.removeprefix("add_") in shown
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    for option in ("--softmax-layers", "--linear-decay", "--dtype", "--seed", "--overwrite"):
        assert option in shown


def test_help_imports_nothing_heavy():
    """The parser alone; what `import hybridsp` itself imports is not the command line's."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['hybridsp', '--help']\n"
        "try:\n    runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
        "except SystemExit as exit:\n    assert exit.code == 0, exit.code\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    path = importlib.util.find_spec("hybridsp.cli").origin
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
