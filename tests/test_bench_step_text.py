"""`hybridsp bench step` on checkpoints and text: documents, warm-up, profile, longest length."""

import json

import pytest
import torch
from distributed import DEEPSPEED, PRELOAD, run_ranks
from finetune_hosts import byte_tokenizer
from test_bench import command, commands, record_of, told_by_rank_zero
from tiny import tiny_model
from tiny_softmax import tiny_softmax_model
from torch.nn import functional as F

from hybridsp.bench.step import longest as step_longest
from hybridsp.bench.step.case import Case
from hybridsp.bench.step.data import OWN, Sequence, random_sequence, text_sequence
from hybridsp.bench.step.longest import find_longest
from hybridsp.bench.step.profile import IDLE, LOSS, OPTIMIZER, STEP, tabulate
from hybridsp.planner import Cluster, Setting

PRELOAD += DEEPSPEED

TEXTS = ["one two three four. " * n for n in (1, 3, 2, 40)]


@pytest.fixture
def checkpoints(tmp_path):
    """A hybrid and a dense checkpoint, and a text."""
    tokenizer = byte_tokenizer()
    vocabulary = len(tokenizer)
    models = {"hybrid": tiny_model, "dense": lambda **size: tiny_softmax_model("llama", **size)}
    for name, make in models.items():
        make(vocab_size=vocabulary).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    return str(tmp_path / "hybrid"), str(tmp_path / "dense"), str(text)


def test_checkpoints_train_on_a_text(tmp_path, checkpoints):
    hybrid, dense, text = checkpoints
    common = ["step", "--dtype", "fp32", "--steps", "2", "--text", text, "--gpu", "h200-141"]
    both = [*common, "--checkpoint", f"{hybrid},{dense}", "--tokens-per-rank", "96", "--profile"]
    both += ["--warmup-tokens", "16", "--offload-activations", "on", "--out", str(tmp_path / "a")]
    one = [*common, "--checkpoint", hybrid, "--tokens-per-rank", "64", "--documents", "one"]
    one += ["--stage", "3", "--longest", "4", "--out", str(tmp_path / "b")]
    a, b = zip(*run_ranks(commands, 2, both, one, timeout=200), strict=True)

    out = told_by_rank_zero(a, tmp_path / "a")
    rows = record_of(tmp_path / "a", "step")["cases"]
    assert [row["model"] for row in rows] == [hybrid, dense]
    for row, folder in zip(rows, (hybrid, dense), strict=True):
        assert row["reason"] is None
        # 192 bytes of documents of 21, 61 and 41 bytes with their ends; of the fourth what is left.
        assert (row["num_documents"], row["labels"]) == (4, 192 - 4)
        assert row["loss"] == pytest.approx(loss_of(folder, text), rel=1e-5)
        assert row["last_loss"] != row["loss"]
        assert row["grad_norm"] > 0
        assert {each["kind"] for each in row["profile"]} >= {"loss", "optimizer", "idle", "step"}
    assert "a step of dense takes" in out
    assert "what a step of hybrid at 192 tokens goes into" in out

    out = told_by_rank_zero(b, tmp_path / "b")
    record = record_of(tmp_path / "b", "step")
    tokens = [row["tokens"] for row in record["cases"]]
    assert tokens == [128, 192, 256, 384, 512]
    assert {row["num_documents"] for row in record["cases"]} == {1}
    (found,) = record["longest"]
    assert (found["fits"], found["fails"]) == (512, None)
    assert found["planned"] > 2**20
    assert "512 tokens ran; planned" in out


def loss_of(folder, text):
    """Mean loss of the packed documents, one after another, by the model as anyone loads it."""
    from transformers import AutoModelForCausalLM

    sequence = text_sequence(text, folder, 192, documents=OWN)
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0
    with torch.no_grad():
        for document in sequence.tokens[0].split(list(sequence.lengths)):
            logits = model(document[None, :-1]).logits[0]
            total += F.cross_entropy(logits, document[1:], reduction="sum").item()
            count += len(document) - 1
    return total / count


def test_sequences(checkpoints):
    hybrid, _, text = checkpoints
    own = text_sequence(text, hybrid, 100, documents=OWN)
    assert own.lengths == (21, 61, 18)
    assert own.pairs == pytest.approx((21**2 + 61**2 + 18**2) / 100**2)
    assert own.batch["cu_seqlens"].tolist() == [0, 21, 82, 100]
    assert own.first(30).lengths == (21, 9)
    assert own.first(30).tokens.tolist() == own.tokens[:, :30].tolist()
    cut = text_sequence(text, hybrid, 100, documents=32)
    assert cut.lengths == (32, 32, 32, 4)
    assert cut.tokens.tolist() == own.tokens.tolist()
    one = random_sequence(50, 64, documents="one", seed=3)
    assert (one.lengths, one.pairs, one.first(8).lengths) == (None, None, None)
    assert "cu_seqlens" not in one.batch
    with pytest.raises(
        ValueError, match=r"text.jsonl: the corpus has \d+ tokens .* seq_length=9999"
    ):
        text_sequence(text, hybrid, 9999, documents=OWN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "x.jsonl"], "--text needs the tokenizer of a --checkpoint"),
        (["--checkpoint", "x", "--softmax-layers", "0.5"], "a --checkpoint is taken as it is"),
        (["--documents", "own"], "--documents own are those of a text"),
        (["--documents", "some"], "'some' is no size"),
        (["--checkpoint", "x", "--model", "smollm2-135m"], "not allowed with argument"),
    ],
)
def test_mistakes(options, message):
    ((code, out, err),) = run_ranks(command, 1, ["step", *options], timeout=60)
    assert (code, out) == (2, "")
    assert message in err


def test_a_text_that_is_too_short_is_told_first(checkpoints):
    hybrid, _, text = checkpoints
    line = ["step", "--checkpoint", hybrid, "--text", text, "--tokens-per-rank", "64,8K"]
    ((code, out, err),) = run_ranks(command, 1, line, timeout=60)
    assert (code, out) == (2, "")
    assert "one sample needs seq_length=8192; add documents or shorten the sequence" in err


CLUSTER = Cluster(gpu="h100-80", gpus=1, gpus_per_node=1, host_memory=2.0**36)


def search(*, runs_until, left=0, tries=9, cluster=CLUSTER, **setting):
    """What is found where lengths up to `runs_until` run, and the lengths that were tried."""
    setting = Setting(gpus=1, ring=1, ulysses=1, stage=1, **setting)
    case = Case(model="smollm2-135m", softmax_layers="0.25", setting=setting, tokens_per_rank=1024)
    tried = []

    def attempt(longer):
        tried.append(longer.length)
        runs = longer.length <= runs_until
        return {"reason": None if runs else "OutOfMemoryError", "left_bytes": left}

    rows = [attempt(case)]
    (found,) = find_longest([case], rows, attempt, tries, cluster)
    return found, tried


def test_lengths_grow_until_memory_runs_out():
    found, tried = search(runs_until=3500)
    assert tried == [1024, 1536, 2048, 3072, 4096]
    assert (found.fits, found.fails, found.reason) == (3072, 4096, "OutOfMemoryError")
    assert found.planned > 2**17
    found, tried = search(runs_until=10**9, tries=2, cluster=None)
    assert (found.fits, found.fails, found.planned, len(tried)) == (2048, None, None, 3)
    found, tried = search(runs_until=0)
    assert (found.fits, found.fails, tried) == (None, 1024, [1024])


def test_a_try_that_proves_nothing_is_not_made():
    found, tried = search(runs_until=10**9, left=2**30)
    assert (found.fits, found.fails, tried) == (1024, 1536, [1024])
    assert "left 1.0 GiB on the GPU" in found.reason
    small = Cluster(gpu="h100-80", gpus=1, gpus_per_node=1, host_memory=9.0 * 2**30)
    found, tried = search(runs_until=10**9, tries=30, cluster=small, offload_activations=True)
    assert "by the plan the host lacks" in found.reason
    assert tried[-1] == found.fits < found.fails


def event(category, name, start, duration, thread=1, **args):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 0,
        "tid": thread,
        "args": args,
    }


def test_a_trace_becomes_a_table():
    """Kernels by what launched them, then by name; what runs beside is not idle."""
    host = [
        event("user_annotation", STEP, 0, 1000),
        event("cpu_op", "RingAttention", 10, 50),
        event("cuda_driver", "cuLaunchKernelEx", 20, 5, correlation=1),
        event("cpu_op", "aten::mm", 70, 10),
        event("cuda_runtime", "cudaLaunchKernel", 72, 5, correlation=2),
        event("user_annotation", LOSS, 100, 50),
        event("cuda_runtime", "cudaLaunchKernel", 110, 5, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 160, 5, correlation=4),
        event("cuda_driver", "cuLaunchKernelEx", 20, 5, thread=2, correlation=5),
        event("cpu_op", "GatedLinearAttentionBackward", 10, 50, thread=2),
        event("user_annotation", OPTIMIZER, 200, 50),
        event("cuda_runtime", "cudaLaunchKernel", 210, 5, correlation=6),
        {"ph": "M", "name": "process_name"},
    ]
    gpu = [
        event("kernel", "odd_name", 100, 100, thread=7, correlation=1, stream=7),
        event("kernel", "nvjet_tst_128x256", 200, 50, thread=7, correlation=2, stream=7),
        event("kernel", "sm90_gemm", 250, 50, thread=7, correlation=3, stream=7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 200, 80, correlation=4, stream=9),
        event("kernel", "walk_kernel", 300, 20, correlation=5, stream=7),
        event("kernel", "multi_tensor", 400, 10, correlation=6, stream=7),
        event("kernel", "elementwise_kernel", 410, 30, correlation=99, stream=7),
        event("kernel", "nccl_all_reduce", 900, 40, correlation=3, stream=8),
    ]
    found = {row.kind: (row.seconds * 1e6, row.calls) for row in tabulate([*host, *gpu])}
    assert found == {
        "softmax attention": (pytest.approx(100), 1),
        "products": (pytest.approx(50), 1),
        "loss": (pytest.approx(50), 1),
        "copies host <-> device": (pytest.approx(80), 1),
        "linear attention": (pytest.approx(20), 1),
        "optimizer": (pytest.approx(10), 1),
        "norms, RoPE, activations, sums": (pytest.approx(30), 1),
        "collectives": (pytest.approx(40), 1),
        IDLE: (pytest.approx(1000 - 220 - 40 - 40), 0),
        "step": (pytest.approx(1000), 1),
    }
    # Without a GPU each call counts with what is its own.
    found = {row.kind: row.seconds * 1e6 for row in tabulate(host)}
    assert found["softmax attention"] == pytest.approx(45)
    assert found["products"] == pytest.approx(5)
    assert found[IDLE] == pytest.approx(1000 - 60)


def test_a_sequence_is_its_first_tokens():
    sequence = Sequence(tokens=torch.arange(10)[None], lengths=(4, 4, 2))
    assert sequence.first(4).lengths == (4,)
    assert sequence.first(5).lengths == (4, 1)
    assert sequence.first(99).lengths == (4, 4, 2)


@pytest.mark.gpu
def test_a_gpus_time_is_told_and_its_memory_given_back(tmp_path):
    line = ["step", "--tokens-per-rank", "16K", "--steps", "1", "--profile", "--longest", "2"]
    line += ["--tiled-mlp", "8K", "--offload-activations", "on", "--out", str(tmp_path / "a")]
    results = run_ranks(commands, 1, line, backend="nccl", timeout=200)
    told_by_rank_zero([each[0] for each in results], tmp_path / "a")
    record = record_of(tmp_path / "a", "step")
    assert [row["tokens"] // 1024 for row in record["cases"]] == [16, 24, 32]
    for row in record["cases"]:
        assert row["reason"] is None, row
        assert row["left_bytes"] < step_longest.LEFT_BYTES
    seconds = {each["kind"]: each["seconds"] for each in record["cases"][0]["profile"]}
    kinds = ("softmax attention", "linear attention", "products", "loss", "optimizer")
    for kind in (*kinds, "copies host <-> device"):
        assert 0 < seconds[kind] < seconds["step"], kind
