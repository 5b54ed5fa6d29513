"""`hybridsp bench softmax`: its counts and its model by hand, its runs through the command line."""

import json
import re
from itertools import pairwise
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from test_bench import ENVIRONMENT, command, commands, told_by_rank_zero

from hybridsp.bench import report
from hybridsp.bench.softmax import report as softmax_report
from hybridsp.bench.softmax.cases import Case, Way, chosen_variant, splits
from hybridsp.bench.softmax.command import add_comparisons
from hybridsp.bench.softmax.ops import EmulatedRing, Raw, make_inputs
from hybridsp.bench.softmax.work import Work, balance, count_pairs, document_bounds
from hybridsp.cli import main
from hybridsp.mesh import SPMesh
from hybridsp.ops.reference import naive_attention

TINY = ["softmax", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--repeats", "1"]
OPTIONS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}


def work(*bounds, window=None):
    return Work(bounds=bounds, window=window, **OPTIONS)


def naive_pairs(bounds, window, queries):
    documents = list(pairwise(bounds))
    return sum(
        1
        for start, stop in documents
        for query in range(start, stop)
        for key in range(start, query + 1)
        if query in queries and (window is None or query - key < window)
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_counted_one_by_one(window):
    for bounds in ((0, 12), (0, 1, 5, 5, 12)):
        for start, stop in ((0, 12), (3, 9), (5, 6), (4, 4)):
            counted = count_pairs(bounds, window, (start, stop))
            assert counted == naive_pairs(bounds, window, range(start, stop))
        assert count_pairs(bounds, window) == naive_pairs(bounds, window, range(12))


def test_flops():
    """4 D per pair and head forward: 2 products of 2 D; 2.5 times that in the backward."""
    one = work(0, 10)
    assert one.flops("fwd") == 55 * 4 * 8 * 4
    assert one.flops("fwd+bwd") == 3.5 * one.flops("fwd")
    assert work(0, 10, window=1).flops("fwd") == 10 * 4 * 8 * 4


def test_documents_are_skewed_and_repeatable():
    bounds = document_bounds(10_000, 50, seed=3)
    lengths = sorted(b - a for a, b in pairwise(bounds))
    assert (len(bounds), bounds[0], bounds[-1]) == (51, 0, 10_000)
    assert lengths[0] >= 1
    assert lengths[-1] > 5 * 200, "the longest is far above the mean"
    assert bounds == document_bounds(10_000, 50, seed=3) != document_bounds(10_000, 50, seed=4)
    assert document_bounds(7, 7, seed=0) == tuple(range(8))
    assert document_bounds(7, 1, seed=0) == (0, 7)
    with pytest.raises(ValueError, match="8 documents in 7 tokens"):
        document_bounds(7, 8, seed=0)


def test_balance():
    row = balance((0, 4096), 4)
    assert row["pairs_per_rank"] == 4096 * 4097 / 2 / 4
    assert row["max_over_mean"] == pytest.approx(1, abs=0.01)
    assert row["contiguous_max_over_mean"] == pytest.approx(1.75, abs=0.01), "the last quarter"
    packed = balance(document_bounds(4096, 50, seed=0), 4)
    assert packed["documents"] == 50
    assert packed["max_over_mean"] < 1.1 < packed["contiguous_max_over_mean"]


def oracle(inputs, bounds):
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = naive_attention(*leaves, scale=8**-0.5, cu_seqlens=bounds)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)


@pytest.mark.parametrize("ring", [2, 3, 4])
@pytest.mark.parametrize("bounds", [(0, 24), (0, 3, 4, 20, 24), (0, 1, 2)])
def test_one_device_computes_attention(ring, bounds):
    asked = work(*bounds)
    inputs = make_inputs(asked, bounds[-1], torch.device("cpu"), seed=0)
    right = oracle(inputs, bounds)
    for op in (Raw(inputs, asked, "plain"), EmulatedRing(inputs, asked, "plain", ring=ring)):
        torch.testing.assert_close(op.results(), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a ring has no window"):
        EmulatedRing(inputs, work(*bounds, window=2), "plain", ring=ring)
    with pytest.raises(ValueError, match="not on a CUDA device"):
        Raw(inputs, asked, "cudnn")


def test_splits():
    assert list(splits(1)) == [(1, 1)]
    assert list(splits(8)) == [(1, 8), (2, 4), (4, 2), (8, 1)]


def row(method, documents, seconds, rate):
    figures = {"seconds": seconds, "flops_per_second": rate}
    known = {"backend": "plain", "tokens_per_rank": 8, "passes": {"fwd": figures}}
    return {"method": method, "documents": documents, **known}


@pytest.mark.parametrize("ranks", [1, 2])
def test_comparisons(ranks):
    rows = [row("local", 1, 2.0, 100.0), row("local", 5, 1.0, 80.0)]
    rows += [row("sp", 5, 3.0, 40.0), row("emulated", 1, 3.0, 60.0)]
    rows.append(row("sp", 1, 1.0, 1.0) | {"backend": "flash"})
    add_comparisons(rows, ranks)
    figures = [r["passes"]["fwd"] for r in rows]
    shares = [f.get("fraction_of_kernel") for f in figures]
    assert shares == [1.0, 0.8, 0.4, 0.6, None], "of one document on one device, same backend"
    times = [f.get("times_local") for f in figures]
    assert times == [None, None, 3.0 if ranks == 1 else None, 1.5, None]


def record_of(folder):
    record = json.loads((folder / "softmax.json").read_text())
    assert record["bench"] == "softmax"
    assert set(record["environment"]) == ENVIRONMENT
    assert (folder / "softmax.png").read_bytes().startswith(b"\x89PNG")
    return record


def ways_of(record, key="cases"):
    """method, ring, ulysses, variant -> the rows that ran."""
    ways = {}
    for line in record[key]:
        if line["reason"] is None:
            name = line["method"], line["ring"], line["ulysses"], line["variant"]
            ways.setdefault(name, []).append(line)
    return ways


def check_errors(record, limit):
    for rows in ways_of(record, "checks").values():
        assert all(line[name] < limit for line in rows for name in ("o", "dq", "dk", "dv")), rows


def test_one_rank(tmp_path, monkeypatch):
    line = [*TINY, "--tokens-per-rank", "64,32", "--documents", "5", "--emulate-ring", "4"]
    line += ["--check", "--link", "50", "--out", str(tmp_path)]
    ((alone,),) = run_ranks(commands, 1, line, backend=None)
    out = told_by_rank_zero([alone], tmp_path)
    record = record_of(tmp_path)
    ways = ways_of(record)
    assert set(ways) == {
        ("local", None, None, None),
        ("sp", 1, 1, None),
        ("emulated", 4, None, "ring"),
    }
    assert [r["documents"] for r in ways["local", None, None, None]] == [1, 5, 1, 5]
    for method in (("sp", 1, 1, None), ("emulated", 4, None, "ring")):
        assert [r["tokens_per_rank"] for r in ways[method]] == [64, 32]
        for r in ways[method]:
            assert r["passes"]["fwd+bwd"]["times_local"] > 0
            pairs = count_pairs(document_bounds(r["tokens_per_rank"], 5, 0))
            assert r["passes"]["fwd"]["flops_per_rank"] == 4 * 8 * 4 * pairs
    refused = {r["backend"] for r in record["cases"] if r["reason"]}
    assert refused == {"cudnn", "flash", "flash_attn_2", "flash_attn_3", "flash_attn_4"}
    assert len(re.findall(r"^local +cudnn ", out, re.MULTILINE)) == 2, "once in each table"
    assert [r["ring"] for r in record["balance"]] == [2, 4, 8]
    check_errors(record, 1e-2)
    assert record["model"]["bytes_per_second"] == 50e9
    assert "model, not measured" in out
    check_picture(record, tmp_path, monkeypatch)


def check_picture(record, folder, monkeypatch):
    panels = []

    def watched(count):
        figure, axes = report.new_figure(count)
        panels.extend(axes)
        return figure, axes

    monkeypatch.setattr(softmax_report, "new_figure", watched)
    softmax_report.draw(record, folder / "again.png")
    ways = ["local plain", "local plain 5 documents"]
    ways += ["sp plain R1 U1 5 documents", "emulated plain R4 ring 5 documents"]
    for axes in panels[:2]:
        lines = axes.get_lines()
        assert [line.get_label() for line in lines] == ways
        assert all(list(line.get_xdata()) == [32, 64] for line in lines)
    assert list(panels[1].get_lines()[0].get_ydata()) == pytest.approx([100, 100])
    models = panels[2].get_lines()
    assert len(models) == 3, "one document was not asked for, so nothing was measured of it"
    assert all(line.get_label().endswith(": model") for line in models)
    assert all(line.get_linestyle() == "--" for line in models)
    nothing = {**record, "cases": [], "model": None}
    softmax_report.draw(nothing, folder / "empty.png")
    assert (folder / "empty.png").stat().st_size > 0


def test_two_and_four_ranks(tmp_path):
    # 3 query heads over 4 Ulysses ranks do not go.
    packed = ["softmax", "--heads", "3", "--kv-heads", "3", "--head-dim", "8", "--repeats", "1"]
    packed += ["--tokens-per-rank", "16", "--documents", "1,3", "--backends", "plain"]
    packed += ["--ranks-per-host", "2"]
    packed += ["--check", "--dtype", "fp32", "--out", str(tmp_path / "4")]
    ((*fours,),) = zip(*run_ranks(commands, 4, packed, timeout=90), strict=True)
    told_by_rank_zero(fours, tmp_path / "4")
    record = record_of(tmp_path / "4")
    rings = [(2, 2), (4, 1)]
    expected = {("sp", *ring, v) for ring in rings for v in ("auto", "ring", "allgather")}
    expected |= {("sp", 4, 1, "double_ring"), ("local", None, None, None)}
    assert set(ways_of(record)) == expected
    refused = [r for r in record["cases"] if r["reason"]]
    kinds = [(r["ring"], r["ulysses"], r["variant"]) for r in refused]
    assert kinds == 2 * [(1, 4, None), (2, 2, "double_ring")], "with each number of documents"
    assert "3 query heads" in refused[0]["reason"]
    assert "ranks_per_host = 2 with ring = 2" in refused[1]["reason"]
    for r in record["cases"]:
        assert "times_local" not in r["passes"].get("fwd", {}), "over more ranks it is other work"
        assert (r["chosen_variant"] is None) == (r["variant"] != "auto")
        total = 4 * 8 * 3 * count_pairs(document_bounds(16 * r["ranks"], r["documents"], 0))
        if r["reason"] is None:
            assert r["passes"]["fwd"]["flops_per_rank"] == total / r["ranks"]
    check_errors(record, 1e-5)
    assert [(r["documents"], r["ring"]) for r in record["balance"]] == [
        *((1, 2), (1, 4), (3, 2), (3, 4)),
    ]
    assert record["model"]["bytes_per_second"] > 0, "as measured between the ranks"

    windowed = [*TINY, "--tokens-per-rank", "16", "--documents", "1", "--window", "5"]
    windowed += ["--pass", "fwd", "--variants", "ring", "--backends", "plain", "--trace"]
    windowed += ["--out", str(tmp_path / "2")]
    many = [*TINY, "--tokens-per-rank", "16", "--documents", "50"]
    windows, mistakes = zip(*run_ranks(commands, 2, windowed, many, timeout=90), strict=True)
    out = told_by_rank_zero(windows, tmp_path / "2")
    record = record_of(tmp_path / "2")
    assert set(ways_of(record)) == {("local", None, None, None), ("sp", 1, 2, None)}
    (refused,) = (r for r in record["cases"] if r["reason"])
    assert "window = 5" in refused["reason"]
    assert (record["balance"], record["model"], record["checks"]) == ([], None, [])
    assert "trace-sp-plain-1-2-1-documents.json: no GPU work" in out
    assert [code for code, _, _ in mistakes] == [2, 2]
    assert "50 documents in 16 tokens" in mistakes[0][2]
    assert mistakes[1][1:] == ("", "")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_gpus(ranks, tmp_path):
    line = ["softmax", "--tokens-per-rank", "2K", "--documents", "1,20", "--repeats", "3"]
    line += ["--emulate-ring", "4", "--check", "--trace", "--out", str(tmp_path)]
    ((*results,),) = zip(
        *run_ranks(commands, ranks, line, backend="nccl", timeout=240), strict=True
    )
    out = told_by_rank_zero(results, tmp_path)
    record = record_of(tmp_path)
    ran = [r for r in record["cases"] if r["reason"] is None]
    assert all(r["method"] == "local" for r in record["cases"] if r["reason"]), out
    assert {"cudnn", "flash"} & {r["backend"] for r in ran if r["method"] == "local"}, out
    assert all(figures["peak_bytes"] > 0 for r in ran for figures in r["passes"].values())
    check_errors(record, 2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "9", "--kv-heads", "2"], "--kv-heads 2 does not divide --heads 9"),
        (["--emulate-ring", "1"], "--emulate-ring 1 is no ring"),
        (["--link", "-3"], "--link -3.0 GB/s"),
        (["--link", "nan"], "--link nan GB/s"),
        (["--host-link", "0"], "--host-link 0.0 GB/s"),
        (["--host-link", "50"], "--host-link 50.0 GB/s in a job of one rank"),
        (["--link", "300", "--window", "64"], "--link 300.0 GB/s with --window 64"),
        (["--ranks-per-host", "1"], "--ranks-per-host 1 is no ring"),
        (
            ["--variants", "tree"],
            "'tree' is unknown: choose from auto, ring, double_ring, allgather",
        ),
        (["--backends", "triton"], "'triton' is unknown: choose from plain, cudnn"),
    ],
)
def test_mistakes(options, message):
    code, out, err = command(["softmax", *options])
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"hybridsp bench[^\n]*: error: [^\n]*\n", err)


def what_auto_is_asked():
    """Whether the layer and the bench ask the same question; on a ring of 2, packed."""
    mesh, packed = SPMesh(ring=2), work(0, 5, 16, 32)
    way = Way(method="sp", backend="plain", ring=2, mesh=mesh, variant="auto")
    op = way.op(make_inputs(packed, 16, mesh.device, seed=0), packed)
    with (
        mock.patch("hybridsp.attention.softmax.choose_variant", return_value="ring") as layers,
        mock.patch("hybridsp.bench.softmax.cases.choose_variant", return_value="x") as benches,
    ):
        op.forward()
        assert chosen_variant(Case(way=way, tokens_per_rank=16, work=packed)) == "x"
    assert layers.call_args == benches.call_args


def test_auto_is_told_as_the_layer_chooses():
    run_ranks(what_auto_is_asked, 2)


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "softmax", "--help"])
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "default 8K,32K,128K on GPUs" in shown
