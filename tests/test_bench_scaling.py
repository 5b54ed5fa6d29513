"""What `hybridsp bench` says of more GPUs: the cost model's table, the scan's algorithms, ALST."""

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from test_bench import TINY_LAYER, command, commands, record_of, told_by_rank_zero
from transformers import AutoModelForCausalLM, LlamaConfig

from hybridsp.bench.all_scan import cost_model
from hybridsp.bench.all_scan.cost_model import Measured, Scan, predictions
from hybridsp.bench.alst.model import divisor_from, make_alst
from hybridsp.bench.step.case import Case
from hybridsp.collectives.cost import Link
from hybridsp.mesh import SPMesh
from hybridsp.planner import Setting

PRELOAD += DEEPSPEED

LENGTH = 48


def test_predictions_are_the_fitted_formula():
    link = Link(latency=30e-6, bandwidth=200e9)
    points = [
        Measured(scan=scan, seconds=scan.seconds(link))
        for size in (2**16, cost_model.PAPER_STATE_BYTES, 2**26)
        for ranks in (2, 4)
        for scan in [
            Scan(algorithm="doubling", ranks=ranks, state_bytes=size, decay_bytes=512, rows=128)
        ]
    ]
    fits = cost_model.fit_all(points)
    row, gather, scan = predictions(points, fits)
    right = Scan(
        algorithm="doubling",
        ranks=4,
        state_bytes=cost_model.PAPER_STATE_BYTES,
        decay_bytes=512,
        rows=128,
    )
    assert row["name"] == "doubling"
    assert row["measured_us"] == pytest.approx(1e6 * right.seconds(link))
    assert row["model_us"] == pytest.approx(row["measured_us"])
    for ranks in cost_model.RANKS_TOLD:
        expected = 1e6 * right.at(ranks, link).seconds(link)
        assert row[f"model_us_{ranks}"] == pytest.approx(expected)
    # Table 2 of the paper.
    assert [gather[f"model_us_{n}"] for n in (8, 64, 256)] == pytest.approx([375, 2543, 8514])
    assert [scan[f"model_us_{n}"] for n in (8, 64, 256)] == pytest.approx([226, 739, 2165])
    assert predictions([], {}) == []


def test_two_ranks(tmp_path):
    scans = ["all-scan", "--algorithms", "chain,doubling", "--bytes", "64K,1M", "--repeats", "2"]
    layer = ["linear", *TINY_LAYER, "--tokens-per-rank", "8", "--backends", "plain", "--trace"]
    layer += ["--algorithms", "chain,doubling,symmetric", "--methods", "zeco,lasp2"]
    lines = [
        [*scans, "--out", str(tmp_path / "a")],
        [*layer, "--out", str(tmp_path / "b")],
    ]
    a, b = zip(*run_ranks(commands, 2, *lines, timeout=90), strict=True)

    out = told_by_rank_zero(a, tmp_path / "a")
    record = record_of(tmp_path / "a", "all-scan")
    names = [row["name"] for row in record["predictions"]]
    assert names == [*record["fits"], "AllGather, ZeCO paper", "All-Scan, ZeCO paper"]
    for row in record["cases"]:
        fitted = row["scan"] is not None and row["scan"]["algorithm"] in record["fits"]
        assert ("model_seconds" in row) == fitted
    assert "All-Scan, ZeCO paper" in out

    out = told_by_rank_zero(b, tmp_path / "b")
    record = record_of(tmp_path / "b", "linear")
    kinds = [(row["method"], row["algorithm"]) for row in record["cases"]]
    zeco = [("zeco", name) for name in ("chain", "doubling", "symmetric")]
    assert kinds == [("local", None), *zeco, ("lasp2", None)]
    assert "cannot run here" in record["cases"][3]["reason"]
    assert (tmp_path / "b" / "trace-zeco-chain-plain-8.json").exists()


def dense(folder, **changes):
    """A small Llama's config, on disk."""
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        **changes,
    }
    LlamaConfig(**config).save_pretrained(folder)
    return str(folder)


def rivals_gradients(models, stages):
    """The loss and gradients of ALST's step, by model and ZeRO stage."""
    from deepspeed.utils import safe_get_full_grad

    mesh = SPMesh(ulysses=torch.distributed.get_world_size())
    found = {}
    for model in models:
        for stage in stages:
            setting = Setting(
                gpus=mesh.world_size,
                ring=1,
                ulysses=mesh.world_size,
                stage=stage,
                offload_activations=True,
                tiled_mlp=7,
                dtype_bytes=4,
            )
            tokens = LENGTH // mesh.world_size
            case = Case(model=model, softmax_layers=None, setting=setting, tokens_per_rank=tokens)
            alst = make_alst(case, mesh, kernel=None)
            with alst.offload:
                loss = alst.engine(**alst.batch)
                alst.engine.backward(loss)
                parameters = alst.engine.module.named_parameters()
                grads = {name: safe_get_full_grad(p) for name, p in parameters}
                alst.engine.step()
            alst.engine.destroy()
            found[model, stage] = grads
    return found, case.sequence.batch


@pytest.mark.parametrize(
    ("backend", "ranks"), [("gloo", 2), pytest.param("nccl", 2, marks=pytest.mark.gpu)]
)
def test_the_rivals_gradients_are_exact(backend, ranks, tmp_path):
    """Whoever is slower must not be so for doing something else; tied weights and not."""
    models = [dense(tmp_path / str(tied), tie_word_embeddings=tied) for tied in (False, True)]
    results = run_ranks(rivals_gradients, ranks, models, (1, 2, 3), backend=backend, timeout=200)
    for model in models:
        torch.manual_seed(0)
        with torch.device("cuda" if backend == "nccl" else "cpu"):  # its generator, as the ranks'
            alone = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(model))
        batch = {name: x.to(alone.device) for name, x in results[0][1].items()}
        alone(**batch, use_cache=False).loss.backward()
        right = {name: p.grad.cpu() for name, p in alone.named_parameters()}
        for found, _ in results:
            for stage in (1, 2, 3):
                for name, grad in found[model, stage].items():
                    error = (grad.cpu() - right[name]).norm() / right[name].norm()
                    assert error < 1e-5, (model, stage, name, error)


def test_alst_writes_its_record(tmp_path):
    odd = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    models = dense(tmp_path / "a"), dense(tmp_path / "b", **odd)
    line = ["alst", "--model", ",".join(models)]
    line += ["--tokens-per-rank", "16", "--dtype", "fp32", "--steps", "1"]
    line += ["--offload-activations", "off,on", "--out", str(tmp_path / "out")]
    line += ["--warmup-tokens", "8"]
    (results,) = zip(*run_ranks(commands, 2, line, timeout=120), strict=True)
    out = told_by_rank_zero(results, tmp_path / "out")
    rows = record_of(tmp_path / "out", "alst")["cases"]
    assert [row["model"].rpartition("/")[2] for row in rows] == ["a", "a", "b", "b"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"])
    assert all(row["seconds"] > 0 and row["flops"] > 0 for row in rows[:2])
    assert all("3 is not divisible by SP size 2" in row["reason"] for row in rows[2:])
    assert "DeepSpeed's ALST" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--kernel", "flash"], "--kernel flash needs CUDA"),
        (["--stage", "0"], "invalid choice"),
        (["--kernel", "math"], "invalid choice"),
    ],
)
def test_what_alst_refuses(line, message):
    ((_, _, err),) = run_ranks(command, 1, ["alst", *line])
    assert message in err


def test_tiles_divide_the_length():
    assert [divisor_from(48, n) for n in (1, 5, 7, 48)] == [1, 6, 8, 48]
