"""Hugging Face checkpoints at random: loaded whole, or refused with the name of the file."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import cases, damaged, damaged_bytes, outcome, refusal, scalars, wild
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from tiny_softmax import tiny_softmax_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hybridsp.prepare import load_tokenizer
from hybridsp.pretrained import empty_causal_lm, load_causal_lm, weight_files
from hybridsp.untrusted import inside, redact, shown

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A hybrid and a Llama, in several shards, with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = Tokenizer(WordLevel({"<eos>": 0, "w1": 1}))
    words.pre_tokenizer = WhitespaceSplit()
    for name, model in (("hybrid", tiny_model()), ("llama", tiny_softmax_model("llama"))):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(
            folder / name
        )
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    return folder


def copy_of(checkpoint):
    shutil.rmtree("copy", ignore_errors=True)
    return shutil.copytree(checkpoint, "copy")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(folder):
    """Both ways to load; what one takes, the other takes, if it can be taken at all."""
    model, error = outcome(load_causal_lm, folder, dtype=torch.float32)
    if error is None:
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    outcome(empty_causal_lm, folder, dtype=torch.float32)
    return error


architectures = st.sampled_from(["hybrid", "llama"])


@cases(60)
@given(architectures, st.data())
def test_a_config_is_taken_or_refused(checkpoints, name, data):
    copy = Path(copy_of(checkpoints / name))
    fields = json.loads((copy / "config.json").read_text())
    key = st.sampled_from(sorted(fields)) | st.sampled_from(
        [
            "auto_map",
            "attn_implementation",
            "quantization_config",
            "layer_types",
            "torch_dtype",
            "x",
        ]
    )
    fields |= data.draw(st.dictionaries(key, wild | scalars, min_size=1, max_size=2))
    (copy / "config.json").write_text(json.dumps(fields))
    load(copy)
    outcome(load_tokenizer, str(copy))


@cases(40)
@given(architectures, st.data())
def test_damaged_files_are_refused(checkpoints, name, data):
    copy = Path(copy_of(checkpoints / name))
    victim = data.draw(st.sampled_from(sorted(copy.iterdir())))
    victim.write_bytes(data.draw(damaged_bytes(victim.read_bytes()) | st.binary(max_size=40)))
    load(copy)
    outcome(load_tokenizer, str(copy))


@cases(100)
@given(st.data())
def test_an_index_is_read_or_refused(checkpoints, data):
    copy = Path(copy_of(checkpoints / "llama"))
    index = json.loads((copy / INDEX).read_text())
    if data.draw(st.booleans()):
        victim = data.draw(st.sampled_from(sorted(index["weight_map"])))
        names = st.sampled_from(
            ["../llama/config.json", "/etc/passwd", "a/../../b", "config.json", "."]
        )
        index["weight_map"][victim] = data.draw(wild | names)
        text = json.dumps(index)
    else:
        text = data.draw(damaged(json.dumps(index)) | wild.map(json.dumps))
    (copy / INDEX).write_text(text, encoding="utf-8", errors="surrogatepass")
    files, error = outcome(weight_files, copy)
    if error is None:
        assert all(file.resolve().is_relative_to(copy.resolve()) for file in files)
    outcome(load_causal_lm, copy, dtype=torch.float32)


@cases(200)
@given(
    st.text(max_size=20)
    | st.lists(st.sampled_from(["..", ".", "a", "b", ""]), max_size=5).map("/".join)
)
def test_names_stay_in_their_folder(name):
    path, error = outcome(inside, "/folder", name, "the index")
    if error is None:
        assert path.resolve().is_relative_to("/folder")


def test_no_code_of_a_checkpoint_is_run(checkpoints):
    copy = Path(copy_of(checkpoints / "llama"))
    fields = json.loads((copy / "config.json").read_text())
    (copy / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")

    def refused(changes):
        (copy / "config.json").write_text(json.dumps({**fields, **changes}))
        messages = {
            refusal(load_causal_lm, copy),
            refusal(empty_causal_lm, copy, dtype=torch.float32),
        }
        return messages | {refusal(load_tokenizer, str(copy))}

    (message,) = refused({"model_type": "evil", "auto_map": auto_map})
    assert "its own code (auto_map) is not run" in message
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        (message,) = refused({key: "owner/kernel"})
        assert f"{key} = 'owner/kernel' may name a kernel" in message
        (message,) = refused({"text_config": {key: "owner/kernel"}})
        assert f"{key} = 'owner/kernel' may name a kernel" in message
    (message,) = refused({"num_hidden_layers": 10**9})
    assert "num_hidden_layers = 1000000000 is above" in message

    (copy / "config.json").write_text(json.dumps({**fields, "auto_map": auto_map}))
    assert load_causal_lm(copy).config.model_type == "llama", "installed code is preferred"
    tokenizer = copy / "tokenizer_config.json"
    told = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), **told}))
    outcome(load_tokenizer, str(copy))

    for file in copy.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.norm.weight": torch.zeros(1)}, copy / "pytorch_model.bin")
    assert "holds neither model.safetensors" in refusal(load_causal_lm, copy)


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnop0123",
        "https://user:pass@host/x",
        "https://host/x?token=abc123&y=1",
        "api_key=abc123",
    ],
)
def test_secrets_are_blanked(text):
    for secret in ("abcdefghijklmnop0123", "pass@", "abc123"):
        assert secret not in redact(text)
        assert secret not in shown({"model": text})
    assert "***" in redact(text)
    assert redact("model = 'models/llama'") == "model = 'models/llama'"
