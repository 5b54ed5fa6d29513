"""Hosts on which a script of train/ runs: a tiny model, documents and a recipe on each.

Each rank of the harness has a directory of its own, as two hosts without a shared disk have it;
only the run's output lies where both see it.
"""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import yaml
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridsp.train import console, finetune

SCRIPT = Path(__file__).parents[1] / "train" / "finetune.py"
HOSTS = ("host0", "host1")
STEPS, SAVED = 6, 3
EOS = "<eos>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

RECIPE = {
    "model": "model",
    "data": "data/train.jsonl",
    "eval_data": "data/heldout.jsonl",
    "seq_length": 48,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "eval_every": SAVED,
    "save_every": SAVED,
    "deepspeed": "ds.json",
    "generate_prompt": "one two ",
    "max_new_tokens": 8,
}


def byte_tokenizer():
    """A token per byte."""
    vocabulary = {token: i for i, token in enumerate([EOS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def make_host(directory, output_dir, **changes):
    """All that a run needs, tiny: model and tokenizer, documents, DeepSpeed JSON, recipe."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory / "model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(directory / "model")
    (directory / "data").mkdir()
    sentence = "one two three four, one two three four. "
    for name, count in (("train", 40), ("heldout", 4)):
        rows = [json.dumps({"text": sentence * (1 + i % 3)}) for i in range(count)]
        (directory / "data" / f"{name}.jsonl").write_text("\n".join(rows))
    shipped = SCRIPT.parents[1] / "ds_configs" / "zero3.json"
    zero = json.loads(shipped.read_text())
    # The shipped buckets reserve memory for a real model, on every rank.
    for bucket in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        zero["zero_optimization"][bucket] = 10_000
    (directory / "ds.json").write_text(json.dumps(zero))
    recipe = {**RECIPE, "output_dir": str(output_dir), **changes}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def rows_of(run, key):
    """One column of the record, by step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def run_script(hosts, arguments, main=finetune.main):
    """`main` on this rank, in its host's directory: exit code, standard output, error message."""
    os.chdir(hosts / HOSTS[int(os.environ["RANK"])])
    out, err = io.StringIO(), io.StringIO()
    code = 0
    # A rank's own packing cache; and a clock that does not make rank 1 pause before it ends.
    clock = SimpleNamespace(sleep=lambda seconds: None)
    with (
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute()),
        mock.patch.object(console, "time", clock),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(["recipe.yaml", *arguments])
        except SystemExit as stop:
            code = stop.code
    error = re.search(r"^error( on rank \d+)?: .*", err.getvalue(), re.DOTALL | re.MULTILINE)
    return code, out.getvalue(), error[0] if error else ""
