"""`hybridsp bench` from the command line to the files it leaves, on one rank and on two."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_ranks

from hybridsp.attention.linear import METHODS
from hybridsp.cli import BENCHES, main

ENVIRONMENT = {
    *("chip", "world", "hosts", "backend", "threads", "python", "torch", "triton", "nccl"),
    *("flash-linear-attention", "hybridsp", "date", "commit", "command"),
}
TINY_LAYER = ["--heads", "2", "--key-dim", "8", "--value-dim", "4", "--repeats", "2"]


def commands(*lines):
    """Exit code, stdout, stderr of each command line, on this rank."""
    return [command(line) for line in lines]


def command(line):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["bench", *line])
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def record_of(folder: Path, name: str) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((folder / f"{name}.json").read_text(), parse_constant=refuse)
    assert record["bench"] == name
    assert set(record["environment"]) == ENVIRONMENT
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return record


def told_by_rank_zero(results, folder):
    """The first rank's stdout; nobody else says a word."""
    assert [code for code, _, _ in results] == [0] * len(results), results
    assert [out for _, out, _ in results[1:]] == [""] * (len(results) - 1)
    out = results[0][1]
    assert out.endswith(f"\n\nwritten to {folder}\n")
    return out


def test_two_ranks(tmp_path):
    algorithms = "auto,chain,doubling,allgather,hierarchical,symmetric"
    scans = ["all-scan", "--algorithms", algorithms, "--repeats", "2"]
    first = [*scans, "--bytes", "512,64K", "--out", str(tmp_path / "a")]
    second = ["all-scan", "--algorithms", "hierarchical", "--heads", "3", "--key-dim", "4"]
    second += ["--repeats", "2", "--ranks-per-host", "1", "--out", str(tmp_path / "b"), "--trace"]
    second += ["--include", str(tmp_path / "a" / "all-scan.json")]
    layer = ["linear", *TINY_LAYER, "--tokens-per-rank", "8,16", "--backends", "plain,triton"]
    layer += ["--out", str(tmp_path / "c"), "--trace"]
    # Every rank joins before it can know that the file is none.
    no_record = ["all-scan", "--include", str(tmp_path / "a" / "all-scan.png")]
    ranks = run_ranks(commands, 2, first, second, layer, no_record, timeout=90)
    a, b, c, mistake = zip(*ranks, strict=True)

    out = told_by_rank_zero(a, tmp_path / "a")
    check_all_scan(record_of(tmp_path / "a", "all-scan"), out)
    assert len(out.splitlines()[0]) > 0

    told_by_rank_zero(b, tmp_path / "b")
    record = record_of(tmp_path / "b", "all-scan")
    assert record["complete"] is True
    assert record["options"]["states"] == [[3, 4, 128]]
    assert record["options"]["included"] == [str(tmp_path / "a" / "all-scan.json")]
    assert set(record["fits"]) > {"chain", "doubling"}, "those of the included run"
    hierarchical = [row for row in record["cases"] if row["name"] == "hierarchical"]
    assert [row["scan"]["ranks_per_host"] for row in hierarchical] == [1, 1]
    for name in ("trace-hierarchical-forward.json", "trace-hierarchical-reverse.json"):
        assert json.loads((tmp_path / "b" / name).read_text())["traceEvents"]
        assert any(line.startswith(f"{name}: ") for line in record["traces"])

    out = told_by_rank_zero(c, tmp_path / "c")
    check_parallel_layer(record_of(tmp_path / "c", "linear"), out)

    assert [code for code, _, _ in mistake] == [2, 2]
    assert "is no record of bench all-scan" in mistake[0][2]
    assert mistake[1][1:] == ("", "")


def check_all_scan(record, out):
    rows = {(row["name"], row["direction"], row["state_bytes"]): row for row in record["cases"]}
    assert len(rows) == len(record["cases"]) == 2 * (2 + 2 * 6)
    for (name, direction, _), row in rows.items():
        if name in ("hierarchical", "symmetric"):
            assert "seconds" not in row
            expected = {"hierarchical": "one host", "symmetric": "the state is on cpu"}
            assert expected[name] in row["reason"]
            continue
        assert row["reason"] is None
        assert 0 < row["seconds_p10"] <= row["seconds"] <= row["seconds_p90"]
        fraction = row["bytes_sent"] / row["seconds"] / record["wire_bytes_per_second"]
        assert row["fraction_of_wire"] == pytest.approx(fraction)
        assert row["seconds_per_hop"] <= row["seconds"]
        assert (row["scan"] is None) == (direction is None)
    assert rows["chain", "forward", 65536]["bytes_sent"] == 65536
    assert rows["allgather", "reverse", 65536]["bytes_sent"] == 65536 + 512
    assert set(record["fits"]) == {"chain", "doubling", "allgather"}
    assert record["options"]["states"] == [[1, 1, 128], [1, 128, 128]]
    assert re.search(r"^auto \((chain|doubling|allgather)\) +forward +512 ", out, re.MULTILINE)
    assert re.search(r"^symmetric +reverse +64K .* \[\d\]$", out, re.MULTILINE)
    assert re.search(r"^doubling: .* off by \d+%$", out, re.MULTILINE)


def check_parallel_layer(record, out):
    assert record["options"]["methods"] == ["local", *METHODS]
    assert record["options"]["tokens_per_rank"] == [8, 16]
    assert len(record["cases"]) == 2 * 2 * (1 + len(METHODS))
    alone = {
        row["tokens_per_rank"]: row["passes"]
        for row in record["cases"]
        if (row["method"], row["backend"]) == ("local", "plain")
    }
    for row in record["cases"]:
        if row["backend"] == "triton":
            assert "CUDA" in row["reason"]
            continue
        assert row["reason"] is None
        assert set(row["passes"]) == {"fwd", "fwd+bwd"}
        for name, figures in row["passes"].items():
            if row["method"] != "local":
                tax = figures["seconds"] / alone[row["tokens_per_rank"]][name]["seconds"]
                assert figures["sp_tax"] == pytest.approx(tax)
    assert len(record["traces"]) == 1 + len(METHODS), "of the longest sequence"
    assert all("no GPU work in the trace" in line for line in record["traces"])
    assert record["traces"][0] in out


def test_one_rank(tmp_path):
    layer = ["linear", *TINY_LAYER, "--tokens-per-rank", "8", "--decay", "scalar", "--check"]
    layer += ["--dtype", "fp32", "--pass", "fwd", "--out", str(tmp_path / "a")]
    ((layer_alone, scan_alone),) = run_ranks(commands, 1, layer, ["all-scan"], backend=None)
    out = told_by_rank_zero([layer_alone], tmp_path / "a")
    record = record_of(tmp_path / "a", "linear")
    assert record["environment"]["world"] == record["environment"]["hosts"] == 1
    rows = {row["backend"]: row for row in record["cases"]}
    assert list(rows) == ["triton", "plain", "fla"]
    assert "needs CUDA" in rows["fla"]["reason"]
    figures = rows["plain"]["passes"]["fwd"]
    assert set(rows["plain"]["passes"]) == {"fwd"}
    # 8 tokens x 2 heads: q, k of 8, v, o of 4 and one decay, in fp32.
    floor = 8 * 2 * (2 * (8 + 4) + 1) * 4 / record["copy_bytes_per_second"]
    assert figures["floor_seconds"] == pytest.approx(floor)
    assert figures["times_floor"] == pytest.approx(figures["seconds"] / floor)
    assert figures["tokens_per_second"] == pytest.approx(8 / figures["seconds"])
    assert rows["plain"]["first_call_seconds"] > 0
    checks = [row for row in record["checks"] if row["backend"] == "plain"]
    assert [row["gates"] for row in checks] == ["ordinary", "strong", "all at 1", "mixed with -100"]
    assert all(0 < row[name] < 1e-5 for row in checks for name in ("o", "dq", "dk", "dv", "dg"))
    assert "error against the naive fp64 recurrence" in out

    code, out, err = scan_alone
    assert (code, out) == (2, "")
    assert re.fullmatch(r"hybridsp bench: error: a scan over 1 rank sends nothing: .*\n", err)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_gpus(ranks, tmp_path):
    scan = ["all-scan", "--bytes", "64K,1M", "--repeats", "3", "--trace"]
    scan += ["--out", str(tmp_path / "a")]
    layer = ["linear", "--tokens-per-rank", "1K", "--heads", "2", "--repeats", "3", "--check"]
    layer += ["--backends", "triton,plain", "--trace", "--out", str(tmp_path / "b")]
    lines = [layer, scan] if ranks > 1 else [layer]
    results = run_ranks(commands, ranks, *lines, backend="nccl", timeout=240)
    layers, *scans = zip(*results, strict=True)
    out = told_by_rank_zero(layers, tmp_path / "b")
    record = record_of(tmp_path / "b", "linear")
    for row in record["cases"]:
        assert row["reason"] is None
        assert all(figures["peak_bytes"] > 0 for figures in row["passes"].values())
    assert all("no GPU work" not in line for line in record["traces"]), out
    assert ("of them while the main stream computed" in out) == (ranks > 1), out
    for row in record["checks"]:
        assert all(row[name] < 2e-2 for name in ("o", "dq", "dk", "dv", "dg")), row
    if scans:
        told_by_rank_zero(scans[0], tmp_path / "a")
        for row in record_of(tmp_path / "a", "all-scan")["cases"]:
            assert row["reason"] is None or row["name"] in ("hierarchical", "symmetric"), row


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["all-scan", "--bytes", "64Q"], "'64Q' is no size"),
        (["all-scan", "--bytes", "0"], "'0' is no size"),
        (["all-scan", "--bytes", "70000"], "--bytes 68.36K is no state"),
        (["all-scan", "--bytes", "64K", "--heads", "2"], "exclude each other"),
        (["all-scan", "--algorithms", "chain,ring"], "'ring' is unknown: choose from auto, chain"),
        (["all-scan", "--repeats", "0"], "'0' is no size"),
        (["linear", "--methods", "lasp3"], "'lasp3' is unknown: choose from zeco"),
        (["linear", "--backends", "cuda"], "'cuda' is unknown"),
        (["linear", "--algorithms", "chain", "--methods", "lasp2,ulysses"], "name it in --methods"),
        (["linear", "--pass", "bwd"], "'bwd' is unknown: choose from fwd, fwd+bwd"),
        (["linear", "--tokens", "8"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line_of_rank_zero(line, message, monkeypatch):
    code, out, err = command(line)
    assert (code, out) == (2, "")
    assert message in err
    if "unrecognized" not in message:
        assert re.fullmatch(r"hybridsp bench[^\n]*: error: [^\n]*\n", err)
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert command(line) == (2, "", "")


def test_algorithms_of_a_scan_that_one_rank_does_not_make():
    """Many ranks measure zeco unless told otherwise; one rank does if told."""
    code, _, err = command(["linear", "--algorithms", "chain"])
    assert code == 2
    assert "--algorithms chain: these are of the All-Scan under zeco" in err


def test_help_names_every_benchmark_and_imports_nothing_heavy():
    """The parser alone, as in test_cli."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['hybridsp', 'bench', '--help']\n"
        "try:\n    runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
        "except SystemExit as exit:\n    assert exit.code == 0, exit.code\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    path = importlib.util.find_spec("hybridsp.cli").origin
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    *shown, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert all(any(line.split()[:1] == [name] for line in shown) for name in BENCHES)


@pytest.mark.parametrize("name", ["all-scan", "linear"])
def test_help_of_a_benchmark_says_its_defaults(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", name, "--help"])
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--repeats N timed calls of each case, whose median counts; default 20" in shown


def test_the_launchers_own_option_is_taken(capsys):
    """`deepspeed` puts --local_rank in front of every script's arguments."""
    assert main(["--local_rank=0", "bench", "all-scan", "--bytes", "70000"]) == 2
    assert "is no state" in capsys.readouterr().err
